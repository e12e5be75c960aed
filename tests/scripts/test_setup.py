"""What scripts/setup.sh installs for which machine, and what the container files leave out."""

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.scripts.test_shell import ROOT, bash, copy_of_the_scripts, stub

# Nothing listens there.
NOWHERE = "http://127.0.0.1:9/whl"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def torch_index(tmp_path: Path) -> Iterator[str]:
    """The address of an index that has wheels for the CPU and for ROCm 7.2."""
    for name in ("cpu", "rocm7.2"):
        (tmp_path / "index" / name / "torch").mkdir(parents=True)
    handler = functools.partial(Quiet, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Machine:
    """A copy of the scripts whose interpreter writes down what it is asked to install."""

    def __init__(self, folder: Path) -> None:
        self.repository = copy_of_the_scripts(folder / "clone")
        self.programs = folder / "programs"
        self.log = folder / "installed.log"
        self.folder = folder
        stub(
            self.repository / ".venv" / "bin",
            "python",
            f'if [[ "$1 $2" == "-m pip" ]]; then\n'
            f'    [[ "$3" != install ]] || echo "pip $*" >>"{self.log}"\n'
            f'    [[ "$3" != config ]] || echo "https://mirror.invalid/simple"\n'
            # Words of a mirror, as pip has them for every package.
            f'    [[ "$3" != install ]] || echo "WARNING: Location is ignored" >&2\n'
            f'    [[ "$3" == install && -n "${{PIP_FAILS:-}}" ]] || exit 0\n'
            f'    echo "no such version" >&2\n'
            f"    exit 1\n"
            f"fi\n"
            f'exec "{sys.executable}" -I -S "$@"',
        )
        for name in ("nvidia-smi", "rocminfo"):
            self.has(name, "exit 1")

    def has(self, name: str, text: str) -> None:
        stub(self.programs, name, text)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        surroundings = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "INSTALLER": "pip",
            "TORCH_INDEX": NOWHERE,
            "no_proxy": "127.0.0.1",
            "ROCM": "",
            "PIP_INDEX_URL": "",
            "UV_DEFAULT_INDEX": "",
            "UV_INDEX_URL": "",
        }
        script = self.repository / "scripts" / "setup.sh"
        return bash(
            script, *arguments, folder=self.folder, environment={**surroundings, **environment}
        )

    def installed(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_flag_torch_comes_from_where_everything_comes_from(
    machine: Machine, torch_index: str
) -> None:
    result = machine.setup(TORCH_INDEX=torch_index)
    assert result.returncode == 0, result.stderr
    [only] = machine.installed()
    assert "WARNING" not in result.stdout + result.stderr
    assert "WARNING" in (machine.repository / ".venv" / "dojo-install.log").read_text()
    assert only.endswith("-r requirements.txt")
    assert "--index-url" not in only
    assert "3.2 GB to download (a rough figure" in result.stdout


def test_a_cpu_gets_both_wheels_of_pytorchs_index_once(machine: Machine, torch_index: str) -> None:
    result = machine.setup("--cpu", TORCH_INDEX=torch_index)
    assert result.returncode == 0, result.stderr
    torch, rest = machine.installed()
    assert f"--index-url {torch_index}/cpu torch>=" in torch
    assert " torchvision>=" in torch
    assert "-r requirements.txt" in rest
    assert "0.4 GB" in result.stdout
    # Neither the same flag, nor none, nor an index that is away since, changes that.
    for again in (["--cpu"], [], ["--auto"]):
        assert "up to date" in machine.setup(*again).stdout
    assert len(machine.installed()) == 2

    other = machine.setup("--cuda")
    assert other.returncode == 1
    assert "remove the folder .venv" in other.stderr


def test_an_index_that_is_not_reached_is_named_and_pypi_taken(machine: Machine) -> None:
    result = machine.setup("--cpu")
    assert result.returncode == 0, result.stderr
    [said] = [line for line in result.stdout.splitlines() if NOWHERE in line]
    assert "was not reached" in said
    [only] = machine.installed()
    assert "--index-url" not in only
    assert "up to date" in machine.setup("--cpu").stdout


def test_new_requirements_keep_the_wheels_for_the_cpu(machine: Machine, torch_index: str) -> None:
    machine.setup("--cpu", TORCH_INDEX=torch_index)
    with (machine.repository / "requirements.txt").open("a") as requirements:
        requirements.write("einops\n")
    lost = machine.setup()
    assert lost.returncode == 1
    assert "was not reached" in lost.stderr
    assert machine.setup(TORCH_INDEX=torch_index).returncode == 0
    assert f"--index-url {torch_index}/cpu" in machine.installed()[2]


@pytest.mark.parametrize(
    ("program", "says", "found"),
    [
        ("nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "cuda"),
        ("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9", "cpu"),
        ("rocminfo", "echo '  Name: gfx942'", "rocm"),
    ],
)
def test_auto_looks_at_the_machine(
    machine: Machine, torch_index: str, program: str, says: str, found: str
) -> None:
    machine.has(program, says)
    result = machine.setup("--auto", TORCH_INDEX=torch_index, ROCM="7.2")
    assert result.returncode == 0, result.stderr
    assert f"--auto found: --{found}." in result.stdout
    indices = [line for line in machine.installed() if "--index-url" in line]
    folder = {"cuda": None, "cpu": "/cpu ", "rocm": "/rocm7.2 "}[found]
    assert bool(indices) == bool(folder)
    assert all(folder and folder in line for line in indices)


def test_rocm_is_not_replaced_by_another_torch(machine: Machine, torch_index: str) -> None:
    result = machine.setup("--rocm", TORCH_INDEX=torch_index, ROCM="6.1")
    assert result.returncode == 1
    assert "no wheels for ROCm 6.1" in result.stderr
    assert machine.installed() == []


def test_two_kinds_of_torch_are_refused(machine: Machine) -> None:
    result = machine.setup("--cpu", "--rocm")
    assert result.returncode == 2
    assert "--cpu and --rocm exclude each other" in result.stderr


def test_uv_installs_where_it_is_from_pips_mirror_and_counts_the_bytes(machine: Machine) -> None:
    lock = '[[packages]]\\nname = "a"\\nwheels = [{ size = 1700000000 }, { size = 2 }]\\n'
    lock += '[[packages]]\\nname = "b"\\nsdist = { size = 400000000 }\\n'
    machine.has(
        "uv",
        f"if [[ \"$2\" == compile ]]; then cat >/dev/null; printf '{lock}'; else\n"
        f'echo "uv $* from $UV_DEFAULT_INDEX" >>"{machine.log}"; echo "warning: words" >&2; fi',
    )
    result = machine.setup("--dev", INSTALLER="")
    assert result.returncode == 0, result.stderr
    assert "2.1 GB to download (computed" in result.stdout
    assert "warning" not in result.stdout + result.stderr
    everything, tools = machine.installed()
    assert everything.startswith("uv pip install")
    assert everything.endswith("-r requirements.txt from https://mirror.invalid/simple")
    assert "-e .[dev]" in tools


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_an_installation_that_fails_says_where_its_words_are(
    machine: Machine, installer: str
) -> None:
    machine.has("uv", "echo 'no such version' >&2; exit 1")
    result = machine.setup(INSTALLER=installer, PIP_FAILS="1")
    assert result.returncode == 1
    assert "no such version" in result.stderr
    assert "dojo-install.log" in result.stderr
    assert not (machine.repository / ".venv" / "dojo-stamp").exists()


def test_the_floors_are_those_of_the_requirements(tmp_path: Path) -> None:
    repository = copy_of_the_scripts(tmp_path / "clone")
    seen = tmp_path / "floors"
    python = stub(tmp_path, "python", "exit 0")
    stub(tmp_path / "bin", "uv", f'cat >/dev/null; cp "${{@: -2:1}}" "{seen}"')
    result = bash(
        repository / "scripts" / "test_floors.sh",
        "--resolve",
        folder=tmp_path,
        environment={
            "PYTHON": str(python),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        },
    )
    assert result.returncode == 0, result.stderr
    asked = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if ">=" in line]
    floors = seen.read_text().splitlines()
    assert len(floors) == len(asked)
    assert all(
        line.startswith(floor.replace("==", ">="))
        for line, floor in zip(asked, floors, strict=True)
    )


def test_the_floors_want_their_python(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "test_floors.sh"
    result = bash(script, folder=tmp_path, environment={"PYTHON": "no-python"})
    assert result.returncode == 1
    assert "PYTHON=" in result.stderr


def test_an_image_holds_what_git_holds_and_no_more() -> None:
    def lines(name: str) -> set[str]:
        text = (ROOT / name).read_text().splitlines()
        return {line.removeprefix("**/").rstrip("/") for line in text if line and line[0] != "#"}

    ours = lines(".gitignore") - {".venv", ".venv-floors"}
    assert lines(".dockerignore") == ours | {".git", ".venv*"}


def test_the_image_is_not_run_by_root_and_the_container_finds_its_folder() -> None:
    words = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    user, folder = ([line[1] for line in words if line[:1] == [key]] for key in ("USER", "WORKDIR"))
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert user == [container["remoteUser"]] == ["ubuntu"]
    assert folder == [container["workspaceFolder"]]
    assert f"target={folder[0]}," in container["workspaceMount"]
    copied = [word for line in words if line[:1] == ["COPY"] for word in line[2:-1]]
    assert all((ROOT / name).exists() for name in copied)
