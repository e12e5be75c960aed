"""What the tests of the proofs' scripts share: running one, and what it would start."""

import os
import shutil
import stat
import subprocess
from pathlib import Path


def bash(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, with these variables beside the environment's."""
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def recorded(script: Path, folder: Path, *arguments: str, best: str = "") -> list[list[str]]:
    """What a copy of the script in `folder` would have started, as lists of words.

    Args:
        best: what a command with --best answers.
    """
    copy, log = folder / "copy", folder / "log"
    shutil.copytree(script.parent / "lib", copy / "scripts" / "lib", dirs_exist_ok=True)
    shutil.copy(script, copy / "scripts")
    (copy / "scripts" / "setup.sh").write_text("")
    program = copy / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f'#!/usr/bin/env bash\n(printf "%s\\n" "$@"; echo "==") >>"{log}"\n'
        f'[[ " $* " != *" --best "* ]] || printf "{best}"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    log.write_text("")
    result = bash(copy / "scripts" / script.name, *arguments)
    assert result.returncode == 0, result.stderr
    return [text.splitlines() for text in log.read_text().split("==\n")[:-1]]


def unspread(words: list[str]) -> tuple[int, list[str]]:
    """How many processes a command starts, and of what, without torchrun's words."""
    if words[:2] != ["-m", "torch.distributed.run"]:
        return 1, words
    assert words[2:4] == ["--standalone", "--nproc_per_node"]
    return int(words[4]), words[5:]
