"""Cached embeddings: what a run reads does not hang on who has filled the cache before it."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dojo import data
from dojo.cli import UserError
from dojo.finetune import TextEncoderArgs
from dojo.inputs import texts
from dojo.models import loaded, sd3
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model
from dojo.run import machine, optim
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
    options = training.RunArgs(output_dir=folder / "run", report_to=("none",), mixed_precision="no")
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


def test_encoders_on_the_cpu_beside_a_gpu_have_all_cores_whatever_a_launcher_set(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as accelerate and torchrun do
    monkeypatch.setattr(machine, "_usable_cores", lambda: 4)
    rows(tiny_sd3, tmp_path / "plain", 4, WORDS[:2])
    monkeypatch.setattr(training.Run, "device", torch.device("meta"))  # not the CPU
    monkeypatch.setattr(texts, "device_of", lambda *_: torch.device("cpu"))
    seen = list[int]()
    said = sd3.TextEncoders.said

    def watched(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return said(*args)

    monkeypatch.setattr(sd3.TextEncoders, "said", watched)
    rows(tiny_sd3, tmp_path / "plain", 1, WORDS[:2])
    assert not seen, "the cache of as many threads holds"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rows(tiny_sd3, tmp_path / "launched", 1, WORDS[:2])
    assert {*seen} == {2}
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.threads_beside(torch.device("cuda"), torch.device("cpu")) is None
    assert machine.threads_beside(torch.device("cpu"), torch.device("cpu")) is None


# -- one encoder after another ----------------------------------------------------------------


@pytest.fixture(params=["sd15", "sd3", "sdxl"])
def model(request: pytest.FixtureRequest) -> Model:
    """An untrained model of a family."""
    folder = str(request.getfixturevalue(f"tiny_{request.param}"))
    opened = open_model(ModelArgs(pretrained_model_name_or_path=folder))
    short = {"max_sequence_length": 24} if hasattr(opened.args, "max_sequence_length") else {}
    return replace(opened, args=replace(opened.args, **short))


def a_run(folder: Path) -> training.Run:
    options = training.RunArgs(output_dir=folder / "run", report_to=("none",), mixed_precision="no")
    return training.start(options, optim.OptimArgs(max_train_steps=1))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many encoders are alive when one has been loaded, at every load."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    load = loaded.network

    def network(*args: Any, **options: Any) -> Any:
        made = load(*args, **options)
        gc.collect()
        alive.append(weakref.ref(made))
        counts.append(sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(loaded, "network", network)
    return counts


def test_encoders_come_one_after_another_and_say_what_they_say_together(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = model.load_text(torch.float32, torch.device("cpu"))
    expected = [together([word]) for word in WORDS[:3]]
    del together
    counts = counted(monkeypatch)
    cache = data.TextCacheArgs(latent_cache_dir=tmp_path / "cache")
    found = texts.prepare(a_run(tmp_path), model, cache, [WORDS, [""]])
    assert counts == [1] * len(model.text_encoders)
    for word, embeds in zip(WORDS, expected, strict=False):
        row = found([word])
        assert row.keys() == embeds.keys() == set(model.embed_names)
        assert all(torch.equal(row[name], value) for name, value in embeds.items())
    # Afterwards there are shards and their settings, and nothing of what lay aside.
    left = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left == {".safetensors", ".json", ".TAG"}


def test_encoders_that_train_are_loaded_when_the_cache_is_full(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdxl = open_model(ModelArgs(pretrained_model_name_or_path=str(tiny_sdxl)))
    counts = counted(monkeypatch)
    cache = data.TextCacheArgs(latent_cache_dir=tmp_path / "cache")
    found = texts.prepare(a_run(tmp_path), sdxl, cache, [WORDS[:2]], trained=True)
    assert counts == [1, 1, 1, 2]
    assert found.encoders is not None
    with torch.no_grad():
        live, frozen = found(WORDS[:1]), texts.Texts(found.lookup, found.device, sdxl)(WORDS[:1])
    for name, value in frozen.items():
        torch.testing.assert_close(live[name], value)


def test_text_encoders_may_compute_on_the_cpu_of_a_run_on_a_gpu(tiny_sd15: Path) -> None:
    run: Any = SimpleNamespace(device=torch.device("cuda"))
    choices: dict[Literal["auto", "cpu"], str] = {"auto": "cuda", "cpu": "cpu"}
    for choice, kind in choices.items():
        args: Any = ModelArgs(
            pretrained_model_name_or_path=str(tiny_sd15), text_encoder_device=choice
        )
        assert texts.device_of(run.device, open_model(args)).type == kind


@pytest.mark.parametrize(
    "flag", [{"text_encoder_device": "cpu"}, {"text_encoder_precision": "int8"}]
)
def test_encoders_that_train_do_so_as_the_run_does(tiny_sd15: Path, flag: dict[str, Any]) -> None:
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(tiny_sd15), **flag))
    TextEncoderArgs().check_model(model)
    ((name, value),) = flag.items()
    with pytest.raises(UserError, match=f"--{name} {value} is for frozen text encoders"):
        TextEncoderArgs(train_text_encoder=True).check_model(model)
