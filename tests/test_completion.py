"""Claims about `python -m dojo.completion`: bash offers a script's flags and choices."""

import subprocess
from pathlib import Path

import pytest

from dojo import completion


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(completion.text("bash"))
    return path


def offered(script: Path, *words: str) -> list[str]:
    """What is offered for the last of the words."""
    given = " ".join(f"'{word}'" for word in words)
    program = f"source {script}; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _sd_dojo; "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_flags_of_the_script_on_the_line_are_offered(script: Path) -> None:
    assert offered(script, "python", "train_lora_sd3.py", "--ran") == [
        "--random_crop",
        "--random_flip",
        "--rank",
    ]
    assert "--config" in offered(script, "accelerate", "launch", "/x/train_full_sd15.py", "--c")
    assert offered(script, "bash", "scripts/train_lora_sd3.sh", "--flow") == ["--flow_shift"]
    assert offered(script, "python", "demo.py", "--vers") == ["--versus"]


def test_a_script_s_own_flags_and_no_others(script: Path) -> None:
    assert offered(script, "python", "train_full_sd15.py", "--flow") == []
    assert offered(script, "python", "else.py", "--ran") == []


def test_choices_are_offered_behind_their_flag(script: Path) -> None:
    words = ("python", "train_lora_sd3.py", "--mixed_precision")
    assert offered(script, *words, "") == ["no", "fp16", "bf16"]
    assert offered(script, *words, "b") == ["bf16"]


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["tcsh"]) == 2
    assert "source <(python -m dojo.completion bash)" in capsys.readouterr().err
    assert completion.text("zsh").startswith("autoload")
