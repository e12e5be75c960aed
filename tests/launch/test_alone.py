"""One process needs no launcher: what it is started with is what accelerate would start it with."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch as accelerates
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from dojo.launch import COMMAND, alone

ROOT = Path(__file__).resolve().parents[2]
ONE = str(ROOT / "scripts" / "accelerate" / "one_gpu.yaml")
SEVERAL = str(ROOT / "scripts" / "accelerate" / "multi_gpu.yaml")


def by_accelerate(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """The command and the environment that accelerate's own launcher makes of its options."""
    made: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        accelerates,
        "simple_launcher",
        lambda args: made.append(prepare_simple_launcher_cmd_env(args)),
    )
    accelerates.launch_command(accelerates.launch_command_parser().parse_args(words))
    [found] = made
    return found


@pytest.mark.parametrize("threads", [None, "3"])
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("number", [[], ["--num_processes", "1"], ["--num-processes=1"]])
def test_the_process_is_accelerates(
    number: list[str],
    precision: str,
    threads: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    text = (
        Path(ONE)
        .read_text(encoding="utf-8")
        .replace("precision: bf16", f"precision: '{precision}'")
    )
    config = tmp_path / "one.yaml"
    config.write_text(text, encoding="utf-8")
    words = ["--quiet", "--config_file", str(config), *number, "t.py", "--quiet", "--prompt", "a b"]
    found = alone(words)
    assert found is not None
    command, environment = found
    theirs, whole = by_accelerate(words, monkeypatch)
    assert command == theirs
    assert {**os.environ, **environment} == whole
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision


@pytest.mark.parametrize(
    "words",
    [
        ["--config_file", SEVERAL, "t.py"],
        ["--config_file", ONE, "--num_processes", "2", "t.py"],
        ["--config_file", ONE, "--cpu", "t.py"],
        ["--config_file", ONE, "--module", "t"],
        ["--config_file", ONE],
        ["--config_file"],
        ["--config_file", "nowhere.yaml", "t.py"],
        ["t.py"],
        [],
    ],
)
def test_everything_else_is_left_to_accelerate(words: list[str]) -> None:
    assert alone(words) is None


@pytest.mark.parametrize(
    "line", ["fsdp_config: {}", "gpu_ids: '1'", "use_cpu: true", "dynamo_config: {a: 1}", "- a"]
)
def test_a_configuration_that_says_more_is_left_to_accelerate(line: str, tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    kept = [one for one in Path(ONE).read_text().splitlines() if not one.startswith("use_cpu")]
    config.write_text("\n".join([line] if line.startswith("-") else [*kept, line]))
    assert alone(["--config_file", str(config), "t.py"]) is None


def test_the_script_becomes_the_process_and_hears_the_command(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.write_text(
        "import os, sys\n"
        f"print(os.getpid(), os.environ[{COMMAND!r}], sys.argv[1:], 'torch' in sys.modules)\n"
    )
    words = [sys.executable, "-m", "dojo.launch", "--quiet", "--config_file", ONE]
    with subprocess.Popen(
        [*words, str(script), "--a", "b"], stdout=subprocess.PIPE, text=True
    ) as one:
        said, _ = one.communicate(timeout=120)
    assert one.returncode == 0
    assert said.split()[0] == str(one.pid)
    assert f"python -m dojo.launch --quiet --config_file {ONE} {script} --a b ['--a', 'b']" in said
