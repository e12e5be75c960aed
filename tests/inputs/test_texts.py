"""Cached embeddings: what a run reads does not hang on who has filled the cache before it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dojo import data
from dojo.inputs import texts
from dojo.models import sd3
from dojo.run import optim
from dojo.run import run as training

WORDS = [f"{number} red circles on the left of a small green square" for number in range(12)]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(model: Path, folder: Path, threads: int, words: list[str]) -> dict[str, Tensor]:
    """The embeddings of these words that a run with so many threads reads."""
    torch.set_num_threads(threads)
    options = training.RunArgs(output_dir=folder / "run", report_to="none", mixed_precision="no")
    run = training.start(options, optim.OptimArgs(max_train_steps=1))
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(model), max_sequence_length=24)
    config = sd3.open_model(args)
    cache = data.TextCacheArgs(latent_cache_dir=folder / "cache")
    found: Any = texts.prepare(run, config, cache, [words])
    return found(words)


def test_equal_runs_read_equal_embeddings_whatever_the_cache_held_before(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = rows(tiny_sd3, tmp_path / "alone", 2, WORDS)
    # Another number of threads shares the sums out in another way; other words, other batches.
    rows(tiny_sd3, tmp_path / "shared", 1, WORDS)
    rows(tiny_sd3, tmp_path / "shared", 2, WORDS[:5])
    after = rows(tiny_sd3, tmp_path / "shared", 2, WORDS)
    for name, value in alone.items():
        assert torch.equal(after[name], value), name
    # And it is a cache: the same run encodes nothing.
    monkeypatch.setattr(sd3.TextEncoders, "load", lambda *_, **__: pytest.fail("encoded again"))
    rows(tiny_sd3, tmp_path / "shared", 2, WORDS)
