"""Imports go down, never up, never in a circle: the table of the library's layers, enforced."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "dojo"

# Package or module: what it may import of ours, from the ground up. A dotted name allows that one
# module of a package only, and as a row it is one module of its own. What is not listed fails: a
# new door is a decision.
TABLE = """
loading:
lazy: loading
bars:
tables:
rng:
cli:
launch: cli
files: cli
maths: rng
data: cli files rng
run: cli doctor files launch
report: cli files
web: cli
watch: cli files launch report web
models: cli data.geometry files maths rng run
download: models.catalogue
finetune: cli files maths models rng run
doctor: cli
sweep: cli files report
completion: cli
configure: cli data doctor finetune inputs models
lora: finetune
publish: cli files report run
publish.__main__: cli files models publish report run
pocket: cli files finetune maths models report rng run
rewards: cli data files models pocket.atoms pocket.scenes pocket.verifier
data.__main__: cli data inputs
look: cli data files inputs models report
caption: cli data files models rewards
inputs: cli data files finetune launch maths models pocket.compositions pocket.scenes rewards rng
    run
evaluate: cli data files finetune inputs launch maths models report rewards rng run web
pairs: cli data evaluate files inputs models rewards rng
methods: cli data evaluate finetune inputs maths models rewards rng run
pocket.proof_arms: cli methods pocket
pocket.proof_rewards: cli pocket pocket.proof_arms
bench: cli data doctor files finetune maths methods models run
bench.common_share: bench cli data files finetune inputs maths methods models rewards rng run
"""


def read_table(text: str) -> dict[str, set[str]]:
    """The rows of the table; what is indented goes on with the row above."""
    joined = text.replace("\n    ", " ").splitlines()
    rows = [line.partition(":") for line in joined if line and not line.startswith("#")]
    return {name: set(below.split()) for name, _, below in rows}


ALLOWED = read_table(TABLE)
# What stands for a big library may be asked for it everywhere, and so may a bar or a table.
ANYWHERE = {"lazy", "loading", "bars", "tables"}
# What the modules may import of others, where lightness is the point.
THIRD_PARTY = {
    **{"rng": {"torch"}, "maths": {"torch"}},
    "cli": {"tyro", "tqdm", "yaml"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below `dojo`; a package stands for its own __init__."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path, package: str = "") -> Iterator[str]:
    """The full names of what a file imports, wherever in the file it does so.

    `package` is the dotted package the file belongs to, which relative imports start from.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from dojo.maths import flow` names a module, `from dojo.maths.flow import loss` a
            # function in one: both spellings are given; the reader below takes what is a module.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def of_ours(name: str, path: Path) -> set[str]:
    """The modules of the library that the module `name` imports, as dotted names below `dojo`."""
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = f"dojo.{parent}".rstrip(".")
    found = set()
    for full in imports(path, package):
        below = full.removeprefix("dojo.")
        if full.startswith("dojo.") and below in modules():
            found.add(below)
    # `dojo.pocket` named only on the way to `dojo.pocket.verifier` is not an import of its own.
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)}


def unit(name: str) -> str:
    """The row of the table that a module belongs to: what a package does as a command stands above
    what imports the package, and may have one of its own."""
    return name if name in ALLOWED else name.split(".")[0]


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """One circle in a graph, as the names along it, or None."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return None
        for other in sorted(edges.get(node, ())):
            if found := walk(other, [*trail, node]):
                return found
        done.add(node)
        return None

    for start in sorted(edges):
        if found := walk(start, []):
            return found
    return None


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_the_table_allows(name: str) -> None:
    row = unit(name)
    assert row in ALLOWED, f"dojo.{name} has no row in the table of tests/test_layers.py"
    for imported in of_ours(name, modules()[name]):
        if unit(imported) in {row, *ANYWHERE}:
            continue
        allowed = unit(imported) in ALLOWED[row] or imported in ALLOWED[row]
        assert allowed, f"dojo.{name} imports dojo.{imported}, which its layer does not allow"


@pytest.mark.parametrize("name", [name for name in modules() if unit(name) in THIRD_PARTY])
def test_the_light_modules_import_nothing_heavy(name: str) -> None:
    light = {"dojo", *THIRD_PARTY[unit(name)], *sys.stdlib_module_names}
    heavy = {full.split(".")[0] for full in imports(modules()[name], "dojo")} - light
    assert not heavy, f"dojo.{name} imports {', '.join(sorted(heavy))}"


def test_the_table_itself_goes_down_only() -> None:
    assert circle({row: {unit(one) for one in below} for row, below in ALLOWED.items()}) is None
    for row, below in ALLOWED.items():
        unknown = {unit(one) for one in below} - set(ALLOWED)
        assert not unknown, f"the row of {row} allows what has no row: {unknown}"


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {name: of_ours(name, path) for name, path in modules().items()}
    found = circle(edges)
    assert found is None, " -> ".join(found or [])


def test_a_circle_is_found_where_there_is_one() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_relative_and_nested_imports_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from .. import files\n    from .scenes import draw\n")
    names = set(imports(path, "dojo.pocket"))
    assert {"dojo.files", "dojo.pocket.scenes"} <= names


def test_the_maths_loads_without_the_libraries_of_the_parts() -> None:
    names = [f"dojo.{name}" for name in modules() if unit(name) in THIRD_PARTY]
    heavy = ["diffusers", "transformers", "accelerate", "peft", "datasets"]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_families_of_models_are_named_in_their_packages_only() -> None:
    # The tables of LoRA files' names, and demo.py's single files, are told apart by family; and
    # another program's files have values of that name.
    known = {"finetune/lora/bases.py", "evaluate/pipelines.py", "configure/simpletuner.py"}
    rooms = ("models", "pocket", "bench")  # the pocket models are of families; so is what is timed
    found = {
        path.relative_to(SOURCE).as_posix()
        for name, path in modules().items()
        if unit(name).split(".")[0] not in rooms
        and re.search("sd3|sd15|sdxl|kolors|hunyuandit", path.read_text(encoding="utf-8"))
    }
    assert found == known


def test_no_script_imports_another_and_the_library_imports_none() -> None:
    scripts = [*sorted(ROOT.glob("train_*.py")), *ROOT.glob("demo.py")]
    names = {path.stem for path in scripts}
    for path in [*scripts, *modules().values()]:
        wrong = {full.split(".")[0] for full in imports(path)} & names
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
