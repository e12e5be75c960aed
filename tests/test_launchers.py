"""The launchers pass flags that their scripts know; the accelerate configurations load."""

import importlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dojo import cli

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
LAUNCHERS = [*sorted((ROOT / "scripts").glob("train_*.sh")), ROOT / "scripts" / "demo.sh"]
each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)


def record(launcher: Path, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """What a launcher would have started, as a list of words, program first."""
    result, words = launch(launcher, tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return words


def launch(
    launcher: Path, tmp_path: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a launcher with stand-ins for accelerate and python that write down their arguments."""
    log = tmp_path / "words"
    for name in ("accelerate", "python", "python3"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >"{log}"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    result = subprocess.run(
        ["bash", str(launcher), *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            # Hub ids: nothing has to be downloaded for this test.
            "MODEL_NAME": "someone/model",
            "DATASET_NAME": "someone/data",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            # An active environment: the launcher must not put .venv before the stand-ins.
            "VIRTUAL_ENV": str(tmp_path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result, log.read_text().split("\0")[:-1] if log.exists() else []


def split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """The words before the script, the script, and its flags."""
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[:place], words[place], words[place + 1 :]


def parse(script: str, flags: list[str]) -> object:
    """The flags as the script itself reads them."""
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not written yet")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(Path(script).stem)
    return cli.parse(module.Args, module.__doc__, flags)


@each_launcher
def test_the_script_understands_the_launchers_flags(launcher: Path, tmp_path: Path) -> None:
    _, script, flags = split(record(launcher, tmp_path))
    assert script == f"{launcher.stem}.py"
    parse(script, flags)


@each_launcher
def test_further_flags_are_passed_on_and_understood(launcher: Path, tmp_path: Path) -> None:
    further = ["--seed", "7", "--output_dir", "outputs/with space"]
    _, script, flags = split(record(launcher, tmp_path, *further))
    assert flags[-len(further) :] == further
    parse(script, flags)


@each_launcher
def test_the_variables_at_the_top_can_be_set_from_outside(launcher: Path, tmp_path: Path) -> None:
    words = record(launcher, tmp_path, MODEL_NAME="other/model", OUTPUT_DIR="outputs/other")
    assert words[words.index("--pretrained_model_name_or_path") + 1] == "other/model"
    assert words[words.index("--output_dir") + 1] == "outputs/other"


@pytest.mark.parametrize("launcher", LAUNCHERS[:-1], ids=lambda path: path.name)
def test_the_users_resolutions_replace_the_launchers(launcher: Path, tmp_path: Path) -> None:
    _, script, flags = split(record(launcher, tmp_path, "--resolution", "512", "768"))
    args: Any = parse(script, flags)
    assert args.data.resolution == (512, 768)


@each_launcher
def test_a_missing_model_folder_is_one_sentence_with_the_remedy(
    launcher: Path, tmp_path: Path
) -> None:
    result, words = launch(launcher, tmp_path, MODEL_NAME="models/not-there")
    assert result.returncode == 2
    assert not words
    assert "models/not-there" in result.stderr
    assert "scripts/download.sh" in result.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS[:-1], ids=lambda path: path.name)
def test_training_goes_through_accelerate_with_a_configuration(
    launcher: Path, tmp_path: Path
) -> None:
    before, _, flags = split(record(launcher, tmp_path))
    config = "scripts/accelerate/one_gpu.yaml"
    assert before == ["accelerate", "launch", "--quiet", "--config_file", config]
    assert flags[flags.index("--resume_from_checkpoint") + 1] == "latest"

    several = "scripts/accelerate/multi_gpu.yaml"
    before, _, _ = split(record(launcher, tmp_path, ACCELERATE_CONFIG=several, NUM_PROCESSES="4"))
    assert before[3:] == ["--config_file", several, "--num_processes", "4"]


def test_the_users_prompts_replace_those_of_the_demo(tmp_path: Path) -> None:
    demo = ROOT / "scripts" / "demo.sh"
    words = record(demo, tmp_path, "--prompt", "a red fox", "a blue boat")
    assert words.count("--prompt") == 1
    assert words[-2:] == ["a red fox", "a blue boat"]


def test_the_demo_runs_without_a_lora(tmp_path: Path) -> None:
    words = record(ROOT / "scripts" / "demo.sh", tmp_path, LORA_WEIGHTS_PATH="")
    assert "--lora_weights_path" not in words
    assert "--compare" not in words


def test_the_expected_configurations_exist() -> None:
    names = {path.stem for path in CONFIGURATIONS}
    assert names == {"one_gpu", "multi_gpu", "fsdp2", "deepspeed_zero2"}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    # Unknown keys are an error of accelerate's own at the top level.
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "bf16"

    # Below it, a key that `accelerate launch` has no option for would be ignored in silence.
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section or {}) <= options

    # And what the launcher makes of it.
    args = parser.parse_args(["--config_file", str(path), "train_lora_sd3.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.mixed_precision == "bf16"
    assert args.num_processes == (1 if path.stem == "one_gpu" else 2)
    assert bool(args.multi_gpu) == (path.stem == "multi_gpu")
    assert bool(args.use_fsdp) == (path.stem == "fsdp2")
    assert bool(args.use_deepspeed) == (path.stem == "deepspeed_zero2")


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2"])
def test_what_was_not_run_says_so_in_its_first_line(name: str) -> None:
    path = ROOT / "scripts" / "accelerate" / f"{name}.yaml"
    assert path.read_text().splitlines()[0].startswith("# not run here")


def test_fsdp_wraps_the_blocks_that_sd3_really_has() -> None:
    from diffusers import SD3Transformer2DModel

    config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / "fsdp2.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.fsdp_config is not None
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert wrapped == SD3Transformer2DModel._no_split_modules
