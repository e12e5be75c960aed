"""CLIP's tokenizer as a folder, made of the vocabulary that open_clip brings along.

The 49,408 tokens are 256 bytes, 256 bytes that end a word, 48,894 pairs in the order in which they
were joined, and two marks (openai/CLIP, simple_tokenizer.py); OpenCLIP's encoders read the same.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

TOKENS = 49_408
LENGTH = 77  # places that a caption has
START, END = "<|startoftext|>", "<|endoftext|>"
_PAIRS = TOKENS - 2 * 256 - 2


def write(folder: Path, *, pad: str = END) -> None:
    """Writes the tokenizer's files, from which `CLIPTokenizer.from_pretrained` makes one.

    Args:
        pad: what fills a caption up: the end mark for OpenAI's CLIP, "!" (token 0) for OpenCLIP.
    """
    words, pairs = _vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *pairs, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", marks)
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **marks,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@cache
def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Token to id, and the pairs that are joined, first ones first."""
    found = importlib.util.find_spec("open_clip")  # to import it takes a second
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = file.read().split("\n")[1 : _PAIRS + 1]  # behind a line that names the version
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(pair.split()) for pair in pairs]
    tokens += [START, END]
    return {token: i for i, token in enumerate(tokens)}, pairs


def _letters() -> list[str]:
    """The sign that stands for each byte: printable ones for themselves, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
