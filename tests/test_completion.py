"""Claims about `python -m dojo.completion`: a shell offers a script's flags and choices."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from dojo import completion

# What a shell does when the tabulator is pressed: the words are in COMP_WORDS already.
PRESSED = {
    "bash": "_sd_dojo; printf '%s\\n' \"${COMPREPLY[@]}\"",
    # zsh's own emulation, with words and CURRENT as its completion sets them.
    "zsh": 'words=("${COMP_WORDS[@]}"); CURRENT=$#words; compgen -F _sd_dojo -- "$words[-1]"',
}
# Without a file in the user's home, and without a question about who may write where.
BEGUN = {"bash": "", "zsh": "autoload -Uz compinit && compinit -u -D; "}


@dataclass(frozen=True)
class Shell:
    """A shell, and the file that it reads."""

    name: str
    file: Path


@pytest.fixture(
    scope="module",
    params=[
        "bash",
        pytest.param(
            "zsh", marks=pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
        ),
    ],
)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    path = tmp_path_factory.mktemp("completion") / f"completion.{request.param}"
    path.write_text(completion.text(request.param))
    return Shell(request.param, path)


def offered(shell: Shell, *words: str) -> list[str]:
    """What is offered for the last of the words."""
    given = " ".join(f"'{word}'" for word in words)
    program = f"{BEGUN[shell.name]}source {shell.file}; "
    program += f"COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; {PRESSED[shell.name]}"
    done = subprocess.run([shell.name, "-c", program], capture_output=True, text=True, check=True)
    assert not done.stderr
    # zsh is given all, and itself takes those that begin as the word does.
    return [word for word in done.stdout.split() if word.startswith(words[-1])]


def test_flags_of_the_script_on_the_line_are_offered(shell: Shell) -> None:
    assert offered(shell, "python", "train_lora_sd3.py", "--ran") == [
        "--random_crop",
        "--random_flip",
        "--rank",
    ]
    assert "--config" in offered(shell, "accelerate", "launch", "/x/train_full_sd15.py", "--c")
    assert offered(shell, "bash", "scripts/train_lora_sd3.sh", "--flow") == ["--flow_shift"]
    assert offered(shell, "python", "demo.py", "--vers") == ["--versus"]


def test_a_script_s_own_flags_and_no_others(shell: Shell) -> None:
    assert offered(shell, "python", "train_full_sd15.py", "--flow") == []
    assert offered(shell, "python", "else.py", "--ran") == []


def test_choices_are_offered_behind_their_flag(shell: Shell) -> None:
    words = ("python", "train_lora_sd3.py", "--mixed_precision")
    assert offered(shell, *words, "") == ["no", "fp16", "bf16"]
    assert offered(shell, *words, "b") == ["bf16"]


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["tcsh"]) == 2
    assert "source <(python -m dojo.completion bash)" in capsys.readouterr().err


def test_zsh_is_given_what_its_emulation_needs_and_can_read() -> None:
    text = completion.text("zsh")
    # Without compinit there is no compdef, which bashcompinit's own functions call.
    assert text.index("compinit;") < text.index("bashcompinit") < text.index("complete -o")
    # A letter behind a colon is a modifier there, and no number.
    assert not re.search(r"\$\{[^}]*:[A-Z]", text)
