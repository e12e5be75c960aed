"""The READMEs and docs/ explain every option of every script, name none that does not exist, and
hold commands that the scripts understand and links that lead somewhere."""

import importlib
import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from dojo import cli, download

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
READMES = ("README.md", "README_zh.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
# Findings and the way from other trainers quote their flags; the benchmarks have their own.
ELSEWHERE = ("docs/log.md", "docs/benchmarks.md", "docs/coming_from.md")
CHINESE = [page for page in PAGES if page.endswith("_zh.md")]
MANUAL = [page for page in PAGES if page not in ELSEWHERE]
MOST_LINES = 260  # of a README
# Flags that the texts may name although no script of ours has them.
OTHERS = {
    *("--help", "--dev", "--nproc_per_node", "--quiet", "--source", "--config_file", "--multi_gpu"),
    "--nnodes",
    *("--gpus", "--ipc", "--rm", "--install"),  # docker, wsl
    *("--set", "--count"),  # python -m dojo.pocket.datasets
    *("--auto", "--cpu", "--cuda", "--rocm", "--resolve"),  # scripts/setup.sh, test_floors.sh
    *("--shape", "--lora_weights_path", "--compare", "--num_processes"),
    *("--images", "--prompts", "--host", "--port"),  # python -m dojo.rewards
    *("--num_images", "--min_margin"),  # python -m dojo.pairs
    *("--compositional", "--num_captions"),  # python -m dojo.pocket.score
    *("--set", "--language", "--count"),  # python -m dojo.pocket.datasets
    "--rows_per_file",  # python -m dojo.data
    *("--partial", "--base", "--scales", "--dynamic", "--input", "--output"),  # python -m dojo.lora
    *("--n", "--w", "--h", "--d", "--s", "--l"),  # behind a prompt in a text file
    *("--table", "--long", "--short", "--only", "--seeds", "--rewards"),  # scripts/prove_*.sh
    *("--json", "--steps", "--pocket", "--minutes", "--work_dir", "--tolerance"),  # doctor, bench
    *("--model", "--method", "--batch_size"),
    *("--objectives", "--num_groups"),  # python -m dojo.bench common_share
    "--config",  # of every script, dojo.cli's
    *("--answers", "--from_simpletuner", "--overwrite", "--launcher"),  # configure, sweep
    *("--nodes", "--requeue", "--signal", "--export"),  # Slurm's
    "--dynamo_backend",  # accelerate launch
    "--page",  # python -m dojo.bench cards
    *("--near_bits", "--max_shown", "--thumbnail"),  # python -m dojo.look
    *("--server", "--to", "--prompt", "--language", "--prefix"),  # python -m dojo.caption
    *("--max_pictures", "--max_tokens", "--max_side", "--replace_captions", "--workers"),
    *("--timeout", "--retries"),
    "--web",  # demo.py
    "--use_lora",  # what --finetune was once
    "--train_text_encoder_ti_frac",  # of diffusers' advanced scripts
}
_FENCE = re.compile(r"^ *```(?P<kind>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"(?:[A-Z_]+=\S* )*(?:python|bash|accelerate|torchrun|pip|touch|source) ")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def options(args: type) -> Iterator[str]:
    """Every flag of a script's options, groups unfolded."""
    for name, hint in get_type_hints(args).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from options(hint)
        else:
            yield f"--{name}"


def flags_of(script: str) -> set[str]:
    return set(options(importlib.import_module(script).Args))


def named_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z0-9_]+(?![\w-])", text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_explained(script: str) -> None:
    named = named_in("\n".join(map(text_of, ("README.md", *MANUAL))))
    missing = flags_of(script) - named
    assert not missing, f"neither README.md nor docs/ names {sorted(missing)} of {script}.py"


@pytest.mark.parametrize("page", [*READMES, *MANUAL])
def test_no_option_is_named_that_does_not_exist(page: str) -> None:
    known = {flag for script in (*SCRIPTS, "demo") for flag in flags_of(script)} | OTHERS
    unknown = named_in(text_of(page)) - known - {"--output_dir"}
    assert not unknown, f"{page} names {sorted(unknown)}"


def test_the_options_are_found() -> None:
    found = flags_of("train_lora_sd3")
    assert {"--rank", "--output_dir", "--validation_prompt"} <= found
    assert len(found) > 80
    assert fields(importlib.import_module("train_lora_sd3").Args)


# -- the front door -------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_a_front_door(readme: str) -> None:
    assert len(text_of(readme).splitlines()) <= MOST_LINES


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def skeleton(readme: str) -> dict[str, list[str]]:
    """What does not hang on the language: levels of headings, code, table columns, pictures."""
    text = text_of(readme)
    prose = without_fences(text)
    return {
        "headings": re.findall(r"^#+ ", prose, flags=re.MULTILINE),
        "code": [block[0] for block in _FENCE.finditer(text)],
        "rows": [
            str(row.count("|") - row.count("\\|"))
            for row in re.findall(r"^\|.*", prose, flags=re.MULTILINE)
        ],
        "pictures": re.findall(r"\(docs/images/[^)]*\)", text),
        "pages": [_english(link) for link in links(text) if link.startswith("docs/")],
        "list entries": re.findall(r"^(?:- |\d+\. )", prose, flags=re.MULTILINE),
        "flags": sorted(named_in(text)),
        "code spans": sorted(re.findall(r"`[^`\n]+`", prose)),
        "decimals": sorted(re.findall(r"\d+\.\d+", prose)),
        "gaps": re.findall(r"TODO-[A-Z]+", text),
    }


def _english(link: str) -> str:
    """What a link of a Chinese page leads to, in English; where that is too, without the anchor."""
    return re.sub(r"_zh\.md(#.*)?$", ".md", link)


def test_the_two_readmes_are_in_step() -> None:
    english, chinese = (skeleton(readme) for readme in READMES)
    for part, expected in english.items():
        assert chinese[part] == expected, part


@pytest.mark.parametrize("page", CHINESE)
def test_a_chinese_page_is_in_step_with_the_english_one(page: str) -> None:
    pair = (_english(page), page)
    english, chinese = (skeleton(one) for one in pair)
    for part, expected in english.items():
        assert chinese[part] == expected, part
    for one, other in (pair, pair[::-1]):
        assert Path(other).name in links(text_of(one))
    there, here = (
        sorted(link for link in map(_english, links(text_of(one))) if link != Path(pair[0]).name)
        for one in pair
    )
    assert there == here
    assert page in links(text_of("README_zh.md"))


def test_every_page_is_in_the_index() -> None:
    listed = {link.split("#")[0] for link in links(text_of("docs/README.md"))}
    names = {page.removeprefix("docs/") for page in PAGES}
    assert names - listed == {"README.md"}


# -- links ----------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """What a page's links and pictures point to; code is passed over."""
    prose = re.sub(r"`[^`\n]*`", "", without_fences(text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: dict[str, int] = {}
    names: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", without_fences(text), flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        kept = (c for c in shown if c in "-_ " or unicodedata.category(c)[0] in "LMN")
        name = "".join(kept).strip().replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def test_anchors_are_named_as_github_names_them() -> None:
    page = "# DPO: `train_dpo_sd15.py`\n\n## Memory, speed\n## Steps\n\n## Steps\n\n## 快速 开始\n"
    named = "dpo-train_dpo_sd15py memory-speed steps steps-1 快速-开始"
    assert anchors(page) == set(named.split())


@pytest.mark.parametrize("page", [*READMES, *PAGES])
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links(text_of(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_picture_is_shown_somewhere() -> None:
    shown = {Path(link).name for page in (*READMES, *PAGES) for link in links(text_of(page))}
    assert {path.name for path in (ROOT / "docs" / "images").iterdir()} <= shown


# -- commands -------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """The shell commands of a page: lines of bash blocks, and code in a line that starts one."""
    for block in _FENCE.finditer(text):
        lines = block["code"].replace("\\\n", " ").splitlines() if block["kind"] == "bash" else ()
        for line in lines:
            if not line.startswith("#"):
                yield from line.split(" && ")
    for span in re.findall(r"`([^`]+)`", without_fences(text)):
        line = " ".join(span.split())
        if _PROGRAM.match(line) and "..." not in line:
            yield line


def all_commands() -> list[str]:
    """Those of all pages, each once; a program's bare name (`accelerate launch`) is none."""
    found = {line.strip() for page in (*READMES, *PAGES) for line in commands(text_of(page))}
    return sorted(line for line in found if len(line.split()) > 1 and line != "accelerate launch")


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command sets, and its words."""
    words = shlex.split(line, comments=True)
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def understood(script: str, flags: Sequence[str]) -> None:
    """Parses flags as the script itself does; --help and lists end it well."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    if "--config" in flags:  # a file of the reader's
        return
    code: object = 0
    try:
        cli.parse(module.Args, module.__doc__, flags)
    except SystemExit as end:
        code = end.code
    assert code == 0, f"{script}.py refuses {' '.join(flags)}"


def launched(tmp_path: Path, words: Sequence[str], variables: dict[str, str]) -> list[str]:
    """What a launcher starts, as words: stand-ins for its programs write their arguments down."""
    log = tmp_path / "words"
    for name in ("accelerate", "python", "python3"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"{log}"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    named = {"MODEL_NAME": "someone/model", "DATASET_NAME": "someone/data"}
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(tmp_path), **named}
    result = subprocess.run(
        ["bash", *words], cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return log.read_text().split("\0")[:-1]


def check_script(words: Sequence[str]) -> None:
    """A training script or demo.py somewhere among the words, with its flags behind it."""
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).is_file(), words[place]
    understood(Path(words[place]).stem, words[place + 1 :])


def check_module(words: Sequence[str]) -> None:
    """`python -m dojo.X`: there is such a module that can be started."""
    spec = importlib.util.find_spec(words[0])
    assert spec, words[0]
    if spec.submodule_search_locations:
        assert importlib.util.find_spec(f"{words[0]}.__main__"), words[0]


def check_bash(words: Sequence[str], variables: dict[str, str], tmp_path: Path) -> None:
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    if script.name == "download.sh":
        names = [word for word in words[1:] if not word.startswith("--")]
        assert set(names) <= {*download.BY_NAME, "modelscope"}, names
    elif script.stem in (*SCRIPTS, "demo"):
        text = script.read_text()
        assert all(f"${{{name}" in text for name in variables), f"{words[0]}: {list(variables)}"
        if "INSTANCE_DIR" in variables:  # the launcher looks whether it is there
            variables["INSTANCE_DIR"] = str(tmp_path)
        check_script(launched(tmp_path, [str(script), *words[1:]], variables))


@pytest.mark.parametrize("line", all_commands())
def test_every_command_is_understood(line: str, tmp_path: Path) -> None:
    variables, words = words_of(line)
    match words:
        case ["python", "-m", module, *rest] if module.startswith("dojo."):
            check_module([module, *rest])
        case ["python" | "accelerate" | "torchrun" | "sbatch", *rest]:
            check_script(rest)
        case ["bash", *rest]:
            check_bash(rest, variables, tmp_path)
        case ["pip" | "source" | "export" | "touch" | "git", *_]:
            pass
        case _:
            pytest.fail(f"what is this? {line}")


# Seconds on an idle machine; it opens no model, and the launcher is the real one.
@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES)
def test_the_row_that_says_what_fits_runs_on_a_fresh_clone(readme: str, tmp_path: Path) -> None:
    (line,) = [line for line in commands(text_of(readme)) if "--fit" in line]
    variables, words = words_of(line)
    variables |= {"OUTPUT_DIR": str(tmp_path / "run"), "HF_HUB_OFFLINE": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **variables}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 yes" in done.stdout


def test_commands_are_found() -> None:
    assert [*commands("```bash\nbash a.sh  \\\n  --b\n```\nand `A=1 python c.py`, `python`")] == [
        "bash a.sh     --b",
        "A=1 python c.py",
    ]
    assert len(all_commands()) > 60
