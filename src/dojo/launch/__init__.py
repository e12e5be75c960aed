"""How a script was started, in words that start it again; and `accelerate launch` made audible.

`python -m dojo.launch` takes accelerate's own options. With accelerate 1.15 a script that is
started alone never hears of a SIGTERM to its launcher, which also turns every exit code into 1; and
torchrun 2.14 answers a signal with a traceback and code 1, after at most 30 seconds. Here the
launcher becomes the script where there is one process, and otherwise gives the processes the time
to write a checkpoint and ends with their code.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from dojo.cli import config

COMMAND = "SD_DOJO_COMMAND"  # in the environment: what the user's command line was
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun leaves its processes to end in
_ANEW = "overwrite_output_dir"
_LAUNCHERS = ("torchrun", "torch.distributed.run", "accelerate", "dojo.launch")


def parent() -> list[str]:
    """The words of the launcher that started this process, or nothing where none did."""
    try:
        above = psutil.Process().parent()
        words = above.cmdline() if above else []
    except psutil.Error:
        return []
    found = any(Path(word).name in _LAUNCHERS or word in _LAUNCHERS for word in words[:3])
    return words if found else []


def command() -> str:
    """The user's command line with `--resume_from_checkpoint latest`, ready for a shell.

    It holds in the folder that it was given in. Of the environment only ACCELERATE_USE_CPU is
    written down, without which processes on a CPU know nothing of each other.
    """
    if own := os.environ.get(COMMAND):
        return resumed(shlex.split(own))
    launcher = parent()
    words = launcher or list(sys.orig_argv)
    text = resumed([_short(words[0]), *words[1:]] if words else [])
    by_accelerate = any(Path(word).name == "accelerate" for word in launcher[:3])
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and not by_accelerate:
        text = f"ACCELERATE_USE_CPU=true {text}"
    return text


def resumed(words: Sequence[str]) -> str:
    """A command line that goes on where it stood: no `--overwrite_output_dir`, which would win."""
    kept: list[str] = []
    rest = list(words)
    # `python /somewhere/bin/torchrun` is what a system makes of `torchrun`.
    if len(rest) > 1 and "python" in Path(rest[0]).name and Path(rest[1]).name in _LAUNCHERS:
        rest = [_short(rest[1]), *rest[2:]]
    while rest:
        word = rest.pop(0)
        flag, _, value = word.replace("-", "_").partition("=")
        if flag == "__resume_from_checkpoint":
            if not value and rest:
                rest.pop(0)
        elif flag != "__overwrite_output_dir":
            kept.append(word)
    return shlex.join([*kept, *_not_anew(kept), "--resume_from_checkpoint", "latest"])


def _not_anew(words: Sequence[str]) -> list[str]:
    """A flag against `overwrite_output_dir` in the file that `--config` names."""
    with suppress(config.ConfigError):
        path, _ = config.split(words)
        if path and str(config.read(path).value(_ANEW)).lower() not in ("none", "false"):
            return [f"--{_ANEW}", "False"]
    return []


def _short(program: str) -> str:
    """A program's name where the shell finds it by that, else its path."""
    name = Path(program).name
    found = shutil.which(name)
    # Not resolved: the pythons of two environments may be links to one.
    return name if found and Path(found).absolute() == Path(program).absolute() else program


def asked_processes() -> int | None:
    """How many processes the launcher's command line asks for, or None where it says nothing."""
    words = " ".join(shlex.split(os.environ.get(COMMAND, "")) or parent())
    numbers = re.findall(r"--(?:num[-_]processes|nproc[-_]per[-_]node)[ =](\d+)(?= |$)", words)
    for name in re.findall(r"--config[-_]file[ =](\S+)", words)[-1:]:
        with suppress(OSError):
            text = Path(name).read_text(encoding="utf-8")
            numbers = re.findall(r"^num_processes: *(\d+)", text, re.MULTILINE) + numbers
    return int(numbers[-1]) if numbers else None


def asks_for_fsdp() -> bool:
    """Whether environment, launcher's command line or its configuration ask for accelerate's FSDP.

    Without several GPUs accelerate reads the last two and hands nothing on.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        return True
    words = shlex.split(os.environ.get(COMMAND, "")) or parent()
    text = " ".join(words)
    if re.search(r"--use[-_]fsdp(?= |$)", text):
        return True
    names = re.findall(r"--config[-_]file[ =](\S+)", text)[-1:]
    if not names and any(Path(word).name in ("accelerate", "dojo.launch") for word in words[:3]):
        from accelerate.commands.config.config_args import default_yaml_config_file

        names = [default_yaml_config_file]
    for name in names:
        with suppress(OSError):
            text = Path(name).read_text(encoding="utf-8")
            return bool(re.search(r"^distributed_type: *['\"]?FSDP\b", text, re.MULTILINE))
    return False


# What a configuration says that starts one process of this machine and asks for nothing else.
_ONE_PROCESS = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO",),
    "num_machines": (1,),
    "num_processes": (1,),
    "machine_rank": (0,),
    "main_training_function": ("main",),
    "mixed_precision": ("no", "fp16", "bf16"),
    "use_cpu": (False,),
    "debug": (False,),
}


def alone(words: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """The command and the environment of a script that is started as one process.

    They are those that accelerate would make, whose launcher takes seconds to be imported. None
    where it has to be asked: several processes, options or a configuration beyond the simplest.

    Args:
        words: after `python -m dojo.launch`.
    """
    rest, said = list(words), dict[str, Any]()
    while rest and rest[0].startswith("-"):
        flag, _, value = rest.pop(0).partition("=")
        flag = flag.replace("-", "_")
        if flag in ("__config_file", "__num_processes"):
            if not value and not rest:
                return None
            said[flag] = value or rest.pop(0)
        elif flag not in ("__quiet", "_q"):
            return None
    if not rest or said.get("__num_processes", "1") != "1" or "__config_file" not in said:
        return None
    try:
        config = yaml.safe_load(Path(said["__config_file"]).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    told = config if isinstance(config, dict) else {}
    if not {"distributed_type", "num_processes", "mixed_precision"} <= set(told):
        return None
    if any(told[key] not in _ONE_PROCESS.get(key, ()) for key in told):
        return None
    environment = {
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_MIXED_PRECISION": told["mixed_precision"],
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return [sys.executable, *rest], environment


def main() -> None:
    """Starts a script as `accelerate launch` would."""
    os.environ[COMMAND] = shlex.join(["python", "-m", "dojo.launch", *sys.argv[1:]])
    os.environ.setdefault(GRACE, "600")
    if found := alone(sys.argv[1:]):
        words, environment = found
        os.execvpe(words[0], words, {**os.environ, **environment})
    _launch()


def _launch() -> None:
    """By accelerate's launcher, which becomes the script where it starts one process."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def become(args: Any) -> None:
        if (args.num_processes or 1) > 1:  # without a GPU accelerate would start one
            os.environ["ACCELERATE_USE_CPU"] = "true"
            launch.multi_gpu_launcher(args)
            return
        words, environment = prepare_simple_launcher_cmd_env(args)
        sys.stdout.flush()
        os.execvpe(words[0], words, environment)

    launch.simple_launcher = become
    try:
        launch.launch_command(launch.launch_command_parser().parse_args())
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        sys.exit(next((128 - code if code < 0 else code for code in codes if code), 1))
