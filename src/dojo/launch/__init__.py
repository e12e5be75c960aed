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

COMMAND = "SD_DOJO_COMMAND"  # in the environment: what the user's command line was
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun leaves its processes to end in
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
    return shlex.join([*kept, "--resume_from_checkpoint", "latest"])


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


def main() -> None:
    """Starts a script as `accelerate launch` would."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[COMMAND] = shlex.join(["python", "-m", "dojo.launch", *sys.argv[1:]])
    os.environ.setdefault(GRACE, "600")

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
