"""Big libraries are imported without searches for garbage, and only as much of them as is used."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dojo import cli, loading
from dojo.finetune import fit, lora
from dojo.run import OptimArgs

ROOT = Path(__file__).resolve().parents[1]
# What a training run has no use for, and what once came with its libraries.
UNUSED = (
    "torch._inductor.compile_fx",
    "networkx",
    "matplotlib",
    "pandas",
    "datasets",
    "sklearn",
    "requests",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.stats",
    "torchvision.datasets",
    "torchvision.models",
    "tensorflow",
    "deepspeed",
    "lpips",
    "gradio",
    "wandb",
    "diffusers.training_utils",
    "dojo.run.sharding",
)
ASKING = """
import gc, os
seen.append((gc.isenabled(), os.environ.get("TORCHDYNAMO_DISABLE")))
"""


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which no run has begun; what a test freezes is thawed, but for what was."""
    frozen = gc.get_freeze_count()
    monkeypatch.setattr(loading, "_state", loading._State())
    yield
    if gc.get_freeze_count() != frozen:
        gc.collect()


def library(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, text: str = ASKING) -> Any:
    """A module that notes how it is imported, in a list."""
    seen: list[Any] = []
    (folder / f"{name}.py").write_text(f"from {name}_seen import seen\n{text}")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, f"{name}_seen", SimpleNamespace(seen=seen))  # pyright: ignore
    monkeypatch.setitem(sys.modules, name, None)  # so that it is as before afterwards
    monkeypatch.delitem(sys.modules, name)
    return seen


@pytest.mark.usefixtures("state")
def test_no_garbage_is_looked_for_during_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = library(tmp_path, "big_library", monkeypatch)
    frozen = gc.get_freeze_count()
    assert loading.load("big_library") is sys.modules.pop("big_library")
    assert seen == [(False, None)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen  # a network may be in a circle by now
    library(tmp_path, "broken_library", monkeypatch, "1 / 0")
    with pytest.raises(ZeroDivisionError):
        loading.load("broken_library")
    assert gc.isenabled()


@pytest.mark.usefixtures("state")
def test_what_is_imported_before_there_is_a_network_is_never_looked_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, "early_library", monkeypatch, "many = [[] for _ in range(1000)]\n")
    monkeypatch.setattr(loading, "LIBRARIES", ("early_library",))
    frozen = gc.get_freeze_count()
    loading.begin(bitsandbytes=True)
    circle: list[Any] = []
    circle.append(circle)
    died: list[str] = []

    class Tells:
        def __del__(self) -> None:
            died.append("collected")

    circle.append(Tells())
    del circle
    loading.settle()
    assert died == ["collected"]  # not kept with it
    assert gc.get_freeze_count() > frozen + 1000
    frozen = gc.get_freeze_count()
    with loading.loading():
        pass
    assert gc.get_freeze_count() <= frozen


@pytest.mark.usefixtures("state")
def test_who_has_switched_the_search_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with loading.loading():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("before", [None, "0"])
def test_a_library_that_a_run_does_not_compute_with_is_not_made_ready_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if before:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
    seen = library(tmp_path, "bitsandbytes", monkeypatch)
    loading.begin(bitsandbytes=True)
    loading.load("diffusers")
    assert seen == []  # diffusers imports it itself, as it comes
    loading.begin(bitsandbytes=False)
    loading.load("torch")
    assert seen == []
    loading.load("diffusers")
    assert seen == [(False, "1")]
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before
    loading.load("peft")
    assert len(seen) == 1
    sys.modules.pop("bitsandbytes")


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module that waits until a run computes with it, and how often it was imported."""
    monkeypatch.setattr(loading, "_LATER", {"late_part": ("solve",)})
    text = "seen.append(1)\nother = 7\ndef solve(x, *, y=1):\n    return x + y\n"
    return library(tmp_path, "late_part", monkeypatch, text)


@pytest.mark.usefixtures("state")
def test_what_libraries_import_for_others_waits_until_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: list[Any]
) -> None:
    library(tmp_path, "using", monkeypatch, "import late_part\nfrom late_part import solve\n")
    loading.begin(bitsandbytes=True)
    using: Any = loading.load("using")
    assert part == []
    assert "late_part" not in sys.modules  # others find it as ever
    assert using.solve(1, y=2) == 3
    assert part == [1]
    library(tmp_path, "asking", monkeypatch, "from late_part import other\n")
    asking: Any = loading.load("asking")
    assert asking.other == 7
    for name in ("using", "asking", "late_part"):
        del sys.modules[name]


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize(
    "text", ["from late_part import other", "import late_part.x as other", "import not_there"]
)
def test_what_must_not_wait_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: list[Any], text: str
) -> None:
    library(tmp_path, "asking", monkeypatch, text)
    (tmp_path / "late_part").mkdir()
    (tmp_path / "late_part.py").rename(tmp_path / "late_part" / "__init__.py")
    (tmp_path / "late_part" / "x.py").touch()
    loading.begin(bitsandbytes=True)
    if "not_there" in text:
        with pytest.raises(ModuleNotFoundError, match="not_there"):
            loading.load("asking")
        assert part == []
        return
    asking: Any = loading.load("asking")
    assert asking.other is not None
    assert part == [1]
    for name in ("asking", "late_part", "late_part.x"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("state")
def test_what_is_installed_is_listed_for_who_looks_something_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def find() -> dict[str, list[str]]:
        asked.append(1)
        return {"PIL": ["pillow"]}

    monkeypatch.setattr(metadata, "packages_distributions", find)
    text = "from importlib import metadata\nfound = metadata.packages_distributions()\n"
    library(tmp_path, "listing", monkeypatch, text)
    found = loading.load("listing").found
    assert metadata.packages_distributions is find
    assert asked == []
    assert "PIL" in found
    assert found["PIL"] == ["pillow"]
    assert dict(found) == find()
    assert asked == [1, 1]  # the second is this test's own
    del sys.modules["listing"]


_TABLE = """
from functools import lru_cache
opened = []
@lru_cache
def create_import_structure_from_path(path):
    opened.append(path)
    return {"files": path}
"""


@pytest.mark.usefixtures("state")
def test_a_table_of_many_folders_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, "table", monkeypatch, _TABLE)
    library(tmp_path, "another", monkeypatch, _TABLE)
    monkeypatch.setattr(loading._OneReading, "module", "table")
    finders = list(sys.meta_path)
    for name, times in [("table", 1), ("another", 2)]:
        module: Any = loading.load(name)
        for path in [*range(200)] * 2:
            assert module.create_import_structure_from_path(path) == {"files": path}
        assert len(module.opened) == times * 200
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("optim", "precision", "uses"),
    [
        ({}, "bf16", False),
        ({}, "int8", False),
        ({}, "nf4", True),
        ({"use_8bit_adam": True}, "bf16", True),
        ({"optimizer": "paged_lion8bit"}, "bf16", True),
    ],
)
def test_a_run_computes_with_bitsandbytes_where_an_option_says_so(
    optim: dict[str, Any], precision: Any, uses: bool
) -> None:
    args = SimpleNamespace(
        optim=OptimArgs(**optim), lora=lora.LoraArgs(base_precision=precision), run=None
    )
    assert fit.uses_bitsandbytes(args) is uses


def test_a_command_ends_without_a_last_search(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("atexit.register", asked.append)
    monkeypatch.setattr(sys, "argv", ["x"])
    cli.run(lambda args: asked.append(args), OptimArgs, "words")
    assert asked[0] is gc.freeze
    assert len(asked) == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_sd3", "full_sd15"])
def test_a_run_imports_nothing_that_it_does_not_use(script: str, tmp_path: Path) -> None:
    family = script.partition("_")[2]
    words = [
        f"train_{script}.py",
        *("--pretrained_model_name_or_path", f"models/pocket-{family}"),
        *("--dataset_name", "datas/pocket-hearts", "--resolution", "64", "--seed", "0"),
        *("--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"),
        *("--latent_cache_dir", str(tmp_path / "cache")),
    ]
    program = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print([n for n in {UNUSED!r} if n in sys.modules], flush=True))\n"
        "def hits(): return sys.modules['transformers.utils.import_utils']"
        ".create_import_structure_from_path.cache_info().hits\n"
        "atexit.register(lambda: print('folders known:', hits() > 500, flush=True))\n"
        f"sys.argv = {words!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["folders known: True", "[]"]
