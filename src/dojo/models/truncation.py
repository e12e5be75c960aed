"""Captions and prompts that are longer than a text encoder reads: counted, and said.

The rest of such a text is not seen, and two long texts that begin alike become one. CLIP reads 77
tokens and T5 as many as it is told to, so the same text may be cut for the one and not the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_AT_ONCE = 1000  # texts
_SHOWN = 60  # characters of an example on the screen
_LISTED = 100  # texts in a report


@dataclass(frozen=True)
class Reader:
    """A tokenizer and how much its encoder reads."""

    name: str
    """Of the encoder; several of one name count as one."""
    tokenizer: Any
    limit: int
    """Tokens, the marks of the beginning and the end included."""
    flag: str = ""
    """What sets the limit, where something does."""
    marks_end: bool = True
    """The last token is a mark, which stays when a text is cut."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What of some texts is not read."""

    count: int
    """Distinct texts that were looked at."""
    limits: Mapping[str, int]
    """Tokens that each encoder reads, by its name."""
    flags: Mapping[str, str]
    """What sets them."""
    texts: Mapping[str, Mapping[str, int]]
    """The texts that are cut, and their tokens by the name of each encoder that cuts them."""
    alike: Sequence[Sequence[str]]
    """Texts of which every encoder reads the same, because one at least is cut."""

    @property
    def told(self) -> list[str]:
        """What the screen says, a line each; nothing where all is read."""
        if not self.texts:
            return []
        lines: list[str] = []
        for name, limit in self.limits.items():
            over = sum(name in tokens for tokens in self.texts.values())
            flag = f", {self.flags[name]}" if self.flags[name] else ""
            lines.append(
                f"{over:,} of {self.count:,} captions and prompts are cut for {name}, which reads "
                f"{limit} tokens{flag}"
            )
        longest = max(self.texts, key=lambda text: max(self.texts[text].values()))
        tokens = max(self.texts[longest].values())
        lines.append(f"  the longest has {tokens} tokens: {_short(longest)}")
        if self.alike:
            number = sum(map(len, self.alike))
            both = " and ".join(map(_short, self.alike[0][:2]))
            lines.append(f"  {number:,} are the same as another one once they are cut: {both}")
        return lines

    @property
    def report(self) -> dict[str, Any]:
        """What data_report.json says: the counts, and the first hundred texts of each kind."""
        counts = {
            f"cut_for_{name}": sum(name in tokens for tokens in self.texts.values())
            for name in self.limits
        }
        limits = {f"tokens_of_{name}": limit for name, limit in self.limits.items()}
        rows = [{"text": text, **tokens} for text, tokens in self.texts.items()]
        return {
            "texts": {"texts": self.count, **limits, **counts},
            "cut_texts": rows[:_LISTED],
            "texts_alike_when_cut": [{"texts": list(some)} for some in self.alike[:_LISTED]],
        }


def find_cut(texts: Iterable[str], readers: Sequence[Reader]) -> Cut:
    """Reads distinct texts with tokenizers whose encoders cut at their end."""
    different = sorted(set(texts))
    over: dict[str, dict[str, int]] = {}
    seen: dict[str, list[str]] = {}
    for start in range(0, len(different), _AT_ONCE):
        some = different[start : start + _AT_ONCE]
        keys = [hashlib.blake2b(digest_size=16) for _ in some]
        for reader in readers:
            # Not truncated by the tokenizer: it would not say how long they were.
            rows: Any = reader.tokenizer(some, verbose=False)["input_ids"]
            for text, ids, key in zip(some, rows, keys, strict=True):
                if len(ids) > reader.limit:
                    tokens = over.setdefault(text, {})
                    tokens[reader.name] = max(len(ids), tokens.get(reader.name, 0))
                    ends = [ids[-1]] if reader.marks_end else []
                    ids = [*ids[: reader.limit - len(ends)], *ends]
                key.update(json.dumps(ids).encode())
        for text, key in zip(some, keys, strict=True):
            seen.setdefault(key.hexdigest(), []).append(text)
    return Cut(
        count=len(different),
        limits={reader.name: reader.limit for reader in readers},
        flags={reader.name: reader.flag for reader in readers},
        texts=over,
        alike=[
            some for some in seen.values() if len(some) > 1 and any(one in over for one in some)
        ],
    )


def _short(text: str) -> str:
    """A text for the screen: its beginning and, which tells long ones apart, its end."""
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
    return repr(text)
