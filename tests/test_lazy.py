"""Options are read before big libraries are: what stands for them until somebody uses them."""

import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dojo import lazy
from dojo.lazy import late, no_grad

ROOT = Path(__file__).resolve().parents[1]
BIG = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "scipy",
    "matplotlib",
    "datasets",
)
# What users start. Each reads its options in `main`; importing it is all that comes before.
NO_SUCH = "no_such_name"
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    for path in (ROOT / "src" / "dojo").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    if path.parent.name != "bench" or path.name == "__main__.py"  # the rest it starts itself
)


def in_a_new_process(program: str) -> str:
    """What a program prints in a Python that has imported nothing."""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_no_script_and_no_command_imports_a_big_library_before_its_options_are_read() -> None:
    assert len(SCRIPTS) >= 20
    assert len(COMMANDS) >= 15
    program = (
        "import importlib, sys\n"
        f"for name in {['demo', *SCRIPTS, *COMMANDS]!r}:\n"
        "    importlib.import_module(name)\n"
        f"    found = [one for one in {BIG!r} if one in sys.modules]\n"
        "    if found: sys.exit(f'{name} imports {found}')\n"
    )
    assert not in_a_new_process(program)


# `python -m dojo.launch --help` is accelerate's own.
HELPFUL = [one.removesuffix(".__main__") for one in COMMANDS if one != "dojo.launch.__main__"]


@pytest.mark.parametrize(
    ("words", "commands"), [(["--help"], HELPFUL), (["--lerning_rate", "1"], [])]
)
def test_help_and_a_misspelt_flag_need_none_either(words: list[str], commands: list[str]) -> None:
    program = (
        "import contextlib, io, runpy, sys\n"
        "def start(run, name):\n"
        f"    sys.argv = [name, *{words!r}]\n"
        "    for one in [one for one in sys.modules if one.split('.')[0] == 'dojo']:\n"
        "        del sys.modules[one]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        with contextlib.redirect_stderr(io.StringIO()):\n"
        "            run(name, run_name='__main__')\n"
        f"    found = [one for one in {BIG!r} if one in sys.modules]\n"
        "    if found: sys.exit(f'{name} imports {found}')\n"
        "start(runpy.run_path, 'train_lora_sd3.py')\n"
        "def module(name, run_name):\n"
        "    runpy.run_module(name, run_name=run_name, alter_sys=True)\n"
        f"for name in {commands!r}: start(module, name)\n"
        "print('[]', file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.stderr.strip().splitlines()[-1] == "[]"


def test_what_is_late_is_the_module_itself_in_all_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lazy.torch.Tensor is torch.Tensor
    assert lazy.nn.Linear is nn.Linear
    assert isinstance(lazy.torch, types.ModuleType)
    assert dir(lazy.torch) == dir(torch)
    before = torch.get_num_threads
    with monkeypatch.context() as patched:
        patched.setattr(lazy.torch, "get_num_threads", lambda: 77)
        assert torch.get_num_threads() == 77
        patched.delattr(lazy.torch, "get_num_interop_threads")
        assert not hasattr(torch, "get_num_interop_threads")
    assert torch.get_num_threads is before
    assert hasattr(torch, "get_num_interop_threads")


def test_a_library_that_is_missing_is_missed_at_its_first_use() -> None:
    missing = late("no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        _ = missing.anything
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = getattr(lazy.torch, NO_SUCH)


def test_no_grad_is_torchs_around_each_call() -> None:
    weight = torch.ones(2, requires_grad=True)

    @no_grad
    def double(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        """Twice as much."""
        return times * x

    assert not double(weight).requires_grad
    assert double(weight, times=3).tolist() == [3, 3]
    assert (2 * weight).requires_grad
    assert (double.__name__, double.__doc__) == ("double", "Twice as much.")

    @no_grad
    def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.is_grad_enabled()


def test_a_second_thread_waits_for_the_import_that_a_first_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_module.py").write_text(
        "import gate\ngate.begun.set()\ngate.go.wait(60)\nvalue = 7\n"
    )
    gate: Any = types.ModuleType("gate")
    gate.begun, gate.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "gate", gate)
    monkeypatch.syspath_prepend(tmp_path)
    module = late("slow_module")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: module.value)
        assert gate.begun.wait(60)
        second = pool.submit(lambda: module.value)
        gate.go.set()
        assert (first.result(60), second.result(60)) == (7, 7)
    sys.modules.pop("slow_module")
