"""Tokenizers of the pocket world: small vocabularies in which every caption of the grammar is one
token per word and any other text still has tokens (bytes for CLIP and ChatGLM, characters for T5).
"""

from __future__ import annotations

import functools
import itertools
import random
import string
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from dojo.lazy import transformers
from dojo.pocket import chinese, scenes

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


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """Byte-level BPE in CLIP's own form; SD3's second tokenizer pads with "!" (id 0)."""
    vocab, merges = _byte_pairs(grammar_words())
    pairs: Any = [*merges]
    return transformers.CLIPTokenizer(
        vocab=dict(vocab), merges=pairs, pad_token=pad_token, model_max_length=CLIP_LENGTH
    )


@functools.cache
def _byte_pairs(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges that make each word one token; ids in CLIP's order (bytes, merges, start, end).

    The commonest pair is merged first, of several the first by the alphabet. The trainer of
    `tokenizers` takes any of several, another one at every call: words would change their numbers
    from process to process, and an encoder knows its own numbers only.
    """
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(split) > 1 for split in splits):
        counts = Counter(pair for split in splits for pair in itertools.pairwise(split))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [_merged(split, best) for split in splits]
    alphabet = _clip_alphabet()
    symbols = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(p) for p in merges]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


def _merged(split: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's pieces with every occurrence of a pair made one piece."""
    pieces: list[str] = []
    for piece in split:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _clip_alphabet() -> list[str]:
    """The 256 byte symbols, the printable ones first, so that "!" has id 0 as in CLIP."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A unigram vocabulary: a piece for each word of the grammar, characters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -2.0) for word in grammar_words() if len(word) > 1]
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces += [(letter, -9.0) for letter in letters]
    pieces.append(("▁a", -2.0))
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def glm_tokenizer(folder: Path) -> Any:
    """ChatGLM's own tokenizer with a piece for each word of the grammar, English or Chinese, and
    bytes for the rest; its `tokenizer.model` is written to `folder`."""
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ChatGLMTokenizer.vocab_files_names["vocab_file"]
    path.write_bytes(glm_vocabulary())
    return ChatGLMTokenizer(str(path))


@functools.cache
def glm_vocabulary() -> bytes:
    """A `tokenizer.model` of sentencepiece, made by hand: a unigram model, text as it is."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    kinds = proto.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL)]
    pieces += [("</s>", 0.0, kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", -20.0, kinds.BYTE) for byte in range(256)]
    own = ["▁", *("▁" + word for word in grammar_words()), *chinese.words()]
    pieces += [(word, -2.0, kinds.NORMAL) for word in own]
    model = proto.ModelProto(
        pieces=[kinds(piece=text, score=score, type=kind) for text, score, kind in pieces],
        trainer_spec=proto.TrainerSpec(
            model_type=proto.TrainerSpec.UNIGRAM,
            vocab_size=len(pieces),
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        ),
        normalizer_spec=proto.NormalizerSpec(name="identity"),
    )
    return model.SerializeToString(deterministic=True)
