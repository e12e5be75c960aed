"""New words for CLIP: what a prompt calls them, which vectors stand for them, where they begin.

A word such as `<dog>` has one vector or several. In a prompt it becomes as many tokens, as
diffusers spells them: `<dog> <dog>_1 <dog>_2`. Tokenizers are taught these tokens, and the encoders
get rows for them behind their table of embeddings, which stays as it is (`table.py`). A T5 learns
no words: it reads what a word was begun from, or nothing in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo import rng
from dojo.cli import UserError
from dojo.lazy import torch, transformers

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = ("text_encoder", "text_encoder_2")
"""Folders of the encoders that learn words, in their order."""
_WORD = re.compile(r"[!-~]+")
_LEFT, _RIGHT = "(?<![0-9A-Za-z])", "(?![0-9A-Za-z])"
_MOST = 64  # vectors of a word; CLIP reads 75 tokens


@dataclass(frozen=True, kw_only=True)
class Word:
    """One new word."""

    text: str
    """as captions and prompts have it"""
    vectors: int = 1
    start: str | None = None
    """the word that its vectors begin as; None is none: they are drawn"""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """what its vectors are [vectors, D], by the encoder's folder, where they have been learned"""

    def __post_init__(self) -> None:
        if not _WORD.fullmatch(self.text) or self.text != self.text.lower():
            raise ValueError(
                f"{self.text!r}: a new word is one word of small letters, digits and signs, such "
                "as <dog>: CLIP's tokenizer knows no capitals"
            )
        if not 1 <= self.vectors <= _MOST:
            raise ValueError(f"{self.text}:{self.vectors}: a word has 1 to {_MOST} vectors")

    @classmethod
    def read(cls, text: str, start: str | None) -> Word:
        """The word of an option: `<dog>`, or `<dog>:4` with four vectors.

        Raises:
            ValueError: it is none.
        """
        word, colon, number = text.rpartition(":")
        if colon and number.isdigit():
            return cls(text=word, vectors=int(number), start=start)
        return cls(text=text, start=start)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Its tokens, one for each vector."""
        return (self.text, *(f"{self.text}_{k}" for k in range(1, self.vectors)))

    @property
    def whole(self) -> bool:
        """Whether it is not looked for within longer words: it begins or ends like one."""
        return self.text[0].isalnum() or self.text[-1].isalnum()

    @property
    def file(self) -> str:
        """The name of its file: other programs take the word to write from it."""
        return re.sub(r"[^a-z0-9_.-]", "", self.text).strip(".") + ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Words:
    """The new words of a model."""

    words: tuple[Word, ...]
    seed: int = 0
    """of the vectors that are drawn"""
    keep_norm: bool = False
    """the vectors keep the length that they begin with"""
    flag: str = "--new_tokens"
    """what the user named them with"""

    def __post_init__(self) -> None:
        pieces = [piece for word in self.words for piece in word.pieces]
        twice = {piece for piece in pieces if pieces.count(piece) > 1}
        if twice:
            raise ValueError(f"{self.flag}: {min(twice)} is there twice")
        names = [word.file for word in self.words]
        for word in self.words:
            if word.file == ".safetensors" or names.count(word.file) > 1:
                raise ValueError(
                    f"{self.flag}: {word.text} needs letters or digits that no other word has: its "
                    f"file is called by them"
                )

    @property
    def pieces(self) -> tuple[str, ...]:
        """The tokens of all words, in the order of their vectors."""
        return tuple(piece for word in self.words for piece in word.pieces)

    @property
    def vectors(self) -> int:
        """How many vectors all words have."""
        return len(self.pieces)

    def find(self, text: str) -> list[Word]:
        """The words that a text has."""
        forms = self._forms()
        said = {forms[found[0].lower()] for found in self._pattern(forms).finditer(text)}
        return [word for word in self.words if word.text in said]

    def spelled(self, text: str) -> str:
        """A text in which every word has all its tokens; one that is spelled already stays.

        Between a word that tokenizers know as a whole one and letters that touch it, Chinese ones,
        there will be a space: CLIP reads the same with and without.
        """
        spellings = {word.text: " ".join(word.pieces) for word in self.words}
        apart = {word.text for word in self.words if word.whole}
        return self._said(text, spellings, apart)

    def replaced(self, text: str) -> str:
        """A text for an encoder that knows no new words: what they begin as, or nothing."""
        said = self._said(text, {word.text: word.start or "" for word in self.words})
        return " ".join(said.split()) if said != text else text

    def _said(self, text: str, instead: Mapping[str, str], apart: Set[str] = frozenset()) -> str:
        forms = self._forms()

        def put(found: re.Match[str]) -> str:
            word = forms[found[0].lower()]
            if word not in apart:
                return instead[word]
            around = (text[: found.start()][-1:], text[found.end() :][:1])
            before, after = (" " if one.isalnum() or one == "_" else "" for one in around)
            return f"{before}{instead[word]}{after}"

        return self._pattern(forms).sub(put, text)

    def _forms(self) -> dict[str, str]:
        """The words by what stands for them in a text: themselves, or all their tokens."""
        forms = {" ".join(word.pieces): word.text for word in self.words}
        return forms | {word.text: word.text for word in self.words}

    @staticmethod
    def _pattern(forms: Mapping[str, str]) -> re.Pattern[str]:
        """Finds them, the longest first, so that a word that is part of another is not found in it.

        A word that begins or ends with a letter or a digit does so in the text too: `sks` is not in
        "masks", and is in "一只sks狗". Words are ASCII. Of all letters that Unicode folds together
        `lower` knows fewer: a long s would be found as an s and not be known then.
        """
        longest_first = sorted(forms, key=len, reverse=True)
        text = "|".join(
            rf"{_LEFT if form[0].isalnum() else ''}{re.escape(form)}"
            rf"{_RIGHT if form[-1].isalnum() else ''}(?!_\d)"
            for form in longest_first
        )
        return re.compile(text, re.IGNORECASE | re.ASCII)

    @property
    def settings(self) -> dict[str, object]:
        """What cached embeddings hang on: those of T5 alone are read, CLIP's are made anew."""
        told = [(word.text, word.vectors, word.start) for word in self.words]
        return {"new words": told}

    # -- tokenizers and encoders ------------------------------------------------------------------

    def reader(self, tokenizer: Any) -> Taught:
        """A CLIP's tokenizer that knows the words.

        Raises:
            UserError: it knows one of them already.
        """
        known = tokenizer.get_vocab()
        for piece in self.pieces:
            if piece in known or f"{piece}</w>" in known:
                raise UserError(
                    f"{self.flag}: {piece} is a token of this model already; take a word that it "
                    f"does not know, such as <{re.sub('[^a-z0-9_-]', '', piece) or 'new'}>"
                )
        whole = [piece for word in self.words if word.whole for piece in word.pieces]
        known_whole = {piece: transformers.AddedToken(piece, single_word=True) for piece in whole}
        tokenizer.add_tokens([known_whole.get(piece, piece) for piece in self.pieces])
        return Taught(tokenizer, self.spelled)

    def deaf(self, tokenizer: Any) -> Taught:
        """The tokenizer of an encoder that learns no words."""
        return Taught(tokenizer, self.replaced)

    def teach(self, part: str, tokenizer: Any, encoder: Any) -> Taught:
        """Gives a CLIP rows for the words, frozen, and returns the tokenizer that goes with it.

        Args:
            part: the encoder's folder.
        Raises:
            UserError: a word is known already, or what it should begin as has more tokens than it.
        """
        from dojo.models.table import NewRows

        first = len(tokenizer)
        tower = getattr(encoder, "text_model", encoder)
        table = tower.embeddings.token_embedding
        rows = torch.cat([self._begin(word, part, tokenizer, table) for word in self.words])
        taught = self.reader(tokenizer)
        tower.embeddings.token_embedding = NewRows(table, rows, first, keep_norm=self.keep_norm)
        # Where a configuration names a wrong end of the text (2, in SDXL's and SD3's), transformers
        # takes the largest number of a row for it, which a new token is.
        tower.eos_token_id = tokenizer.eos_token_id
        return taught

    def _begin(self, word: Word, part: str, tokenizer: Any, table: Any) -> Tensor:
        """The vectors of a word: learned ones, those of another word, or drawn: [vectors, D]."""
        weight = table.weight.detach().float()
        if word.rows:
            return self._learned(word, part, weight)
        if word.start is None:
            keys = [(self.seed, "new word", part, piece) for piece in word.pieces]
            noise = rng.normal(weight.shape[1:], keys, weight.device)
            return weight.mean(0) + weight.std(0) * noise
        ids = tokenizer(word.start, add_special_tokens=False)["input_ids"]
        if not ids or len(ids) > word.vectors:
            raise UserError(
                f"--initializer_token: {word.start!r} is {len(ids)} tokens, and {word.text} has "
                f"{word.vectors} vectors: take another word, or {word.text}:{max(1, len(ids))}"
            )
        return weight[[ids[k % len(ids)] for k in range(word.vectors)]]

    def _learned(self, word: Word, part: str, weight: Tensor) -> Tensor:
        rows = word.rows.get(part)
        if rows is None or rows.shape != (word.vectors, weight.shape[1]):
            has = "none" if rows is None else f"those of {rows.shape[-1]} numbers"
            raise UserError(
                f"{self.flag}: {word.text} was learned for another model: its {part} reads vectors "
                f"of {weight.shape[1]} numbers, and the file has {has}"
            )
        return rows.to(weight)


class Taught:
    """A tokenizer before which texts are changed; in all else the one inside."""

    added_tokens_encoder: Mapping[str, int] = {}
    """nothing that diffusers' pipelines would spell for themselves"""

    def __init__(self, inner: Any, change: Any) -> None:
        self.inner, self._change = inner, change

    def __call__(self, text: str | Sequence[str], *args: Any, **options: Any) -> Any:
        changed = self._change(text) if isinstance(text, str) else [*map(self._change, text)]
        return self.inner(changed, *args, **options)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def widths(folder: Path, parts: Sequence[str]) -> dict[str, int]:
    """Numbers of a vector, by the folder of the CLIP."""
    return {
        part: int(json.loads((folder / part / "config.json").read_text())["hidden_size"])
        for part in parts
        if part in CLIPS
    }


def teach_pipeline(pipeline: Any, words: Words) -> None:
    """Gives a pipeline of diffusers learned words: its CLIPs and all its tokenizers.

    Raises:
        UserError: they are another model's, or one of them is known already.
    """
    for part in (*CLIPS, "text_encoder_3"):
        tokenizer = part.replace("text_encoder", "tokenizer")
        encoder, inner = (getattr(pipeline, name, None) for name in (part, tokenizer))
        if inner is None:
            continue
        if part not in CLIPS:
            setattr(pipeline, tokenizer, words.deaf(inner))
        elif encoder is not None:
            setattr(pipeline, tokenizer, words.teach(part, inner, encoder))


def known(words: Sequence[Word]) -> Words:
    """Learned words of several files.

    Raises:
        UserError: two have one name.
    """
    try:
        return Words(words=tuple(words), flag="--embeddings")
    except ValueError as error:
        raise UserError(str(error)) from error
