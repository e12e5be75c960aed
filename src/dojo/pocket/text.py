"""Tokenizers of the pocket world: small vocabularies in which every caption of the grammar is one
token per word and any other text still has tokens (bytes for CLIP, characters for T5).
"""

from __future__ import annotations

import functools
import json
import random
import string
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer

from dojo.pocket import scenes

CLIP_LENGTH = 20  # tokens, start and end included; the longest caption of the grammar takes 16
T5_LENGTH = 24  # tokens that the pocket SD3 sees most often in training


@functools.cache
def grammar_words() -> tuple[str, ...]:
    """Every word that a caption of the grammar can hold, and those of the novel shapes."""
    rng = random.Random(0)
    words = {word for _ in range(20_000) for word in scenes.sample(rng)[0].split()}
    for shape in scenes.NOVEL_SHAPES:
        words |= {shape, shape + "s"}
    return tuple(sorted(words))


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level BPE in CLIP's own form; SD3's second tokenizer pads with "!" (id 0)."""
    vocab, merges = _byte_pairs(grammar_words())
    return CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=CLIP_LENGTH
    )


def _byte_pairs(words: Sequence[str]) -> tuple[dict[str, int], Any]:
    """Merges that make each word one token; ids in CLIP's order (bytes, merges, start, end)."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(words, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = _clip_alphabet()
    symbols = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(p) for p in merges]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


def _clip_alphabet() -> list[str]:
    """The 256 byte symbols, the printable ones first, so that "!" has id 0 as in CLIP."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary: a piece for each word of the grammar, characters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -2.0) for word in grammar_words() if len(word) > 1]
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces += [(letter, -9.0) for letter in letters]
    pieces.append(("▁a", -2.0))
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
