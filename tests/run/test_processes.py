"""Claims about what the processes of a run know of each other and of their machine."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import accelerate
import pytest
import torch

from dojo import data
from dojo.cli import UserError
from dojo.inputs import pictures
from dojo.models.precisions import exact_float32
from dojo.run import OptimArgs, RunArgs, machine, processes, start
from tests.processes import together


def one_of_two(monkeypatch: pytest.MonkeyPatch, *, main: bool) -> processes.Processes:
    """A process that hears nothing of the other one but what it says itself."""
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda words: words)
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda words: words)
    monkeypatch.setattr(processes, "_PATIENCE", 0.0)
    accelerator: Any = SimpleNamespace(
        num_processes=2, is_main_process=main, wait_for_everyone=lambda: None
    )
    return processes.Processes(accelerator)


def test_a_folder_that_another_machine_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    one_of_two(monkeypatch, main=True).check_shared(folder, "--latent_cache_dir")
    assert list(folder.iterdir()) == []
    other = one_of_two(monkeypatch, main=False)  # what the first one writes is not here
    other.check_shared(folder, "--class_data_dir", lacking=False)
    with pytest.raises(UserError, match=r"--latent_cache_dir .*cache is not the same folder"):
        other.check_shared(folder, "--latent_cache_dir")


def opened(folder: Path, shared: str) -> None:
    """In one of two processes that are told to be machines: opens a run, and says what came."""
    rank = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"] = "1" if shared != "one machine" else "2"
    processes._PATIENCE = 0.5 if shared == "no" else 60.0
    name = "run" if shared == "yes" else f"run{rank}"
    try:
        options = RunArgs(output_dir=folder / name, report_to=("none",), mixed_precision="no")
        start(options, OptimArgs(max_train_steps=1))
        said = "begun"
    except UserError as error:
        said = str(error)
    (folder / f"{rank}.txt").write_text(said)


@pytest.mark.parametrize("shared", ["yes", "no", "one machine"])
def test_machines_that_do_not_see_one_output_folder_are_refused_together(
    shared: str, tmp_path: Path
) -> None:
    code, log = together(opened, (tmp_path, shared), tmp_path, processes=2)
    assert code == 0, log
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    if shared != "no":
        assert said == ["begun", "begun"]
        return
    assert all("not the same folder on all machines" in one for one in said)
    assert "give --output_dir a folder that all of them share" in said[0]
    assert not list(tmp_path.glob("run*"))  # the first one's, made for this


def test_latents_are_cached_only_where_all_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = one_of_two(monkeypatch, main=False)
    cache, unused = data.CacheArgs(latent_cache_dir=tmp_path / "cache"), cast("Any", None)
    with pytest.raises(UserError, match="--latent_cache_dir"):
        pictures.latents_of(run, unused, unused, unused, unused, cache)


def test_caches_tell_tensorfloat_from_float() -> None:
    flags: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    try:
        for flag in flags:
            flag.allow_tf32 = True
        assert machine.arithmetic(gpu) == {"tf32": "yes"}
        assert "tf32" not in machine.arithmetic(cpu)
        exact_float32()
        assert machine.arithmetic(gpu) == {}
        assert not any(flag.allow_tf32 for flag in flags)
    finally:
        for flag, was in zip(flags, before, strict=True):
            flag.allow_tf32 = was
