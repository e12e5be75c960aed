"""Claims about what the processes of a run know of each other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import accelerate
import pytest

from dojo import data
from dojo.cli import UserError
from dojo.inputs import pictures
from dojo.run import processes


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


def test_latents_are_cached_only_where_all_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = one_of_two(monkeypatch, main=False)
    cache, unused = data.CacheArgs(latent_cache_dir=tmp_path / "cache"), cast("Any", None)
    with pytest.raises(UserError, match="--latent_cache_dir"):
        pictures.latents_of(run, unused, unused, unused, unused, cache)
