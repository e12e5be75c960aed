"""The READMEs name every option of every script, and nothing that does not exist."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
READMES = ("README.md", "README_zh.md")
# Flags that the texts may name although no script of ours has them.
OTHERS = {
    *("--help", "--dev", "--nproc_per_node", "--quiet", "--source", "--config_file", "--multi_gpu"),
    *("--shape", "--lora_weights_path", "--compare", "--num_processes"),
    *("--images", "--prompts", "--host", "--port"),  # python -m dojo.rewards
    "--partial",  # python -m dojo.lora
    *("--n", "--w", "--h", "--d", "--s", "--l"),  # behind a prompt in a text file
    *("--table", "--long", "--short"),  # scripts/prove_rl.sh, scripts/prove_preference.sh
}


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


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_named(readme: str, script: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    missing = flags_of(script) - named_in(text)
    assert not missing, f"{readme} does not name {sorted(missing)} of {script}.py"


@pytest.mark.parametrize("readme", READMES)
def test_no_option_is_named_that_does_not_exist(readme: str) -> None:
    known = {flag for script in (*SCRIPTS, "demo") for flag in flags_of(script)} | OTHERS
    unknown = named_in((ROOT / readme).read_text(encoding="utf-8")) - known
    assert not unknown, f"{readme} names {sorted(unknown)}"


def test_the_options_are_found() -> None:
    found = flags_of("train_lora_sd3")
    assert {"--rank", "--output_dir", "--validation_prompt"} <= found
    assert len(found) > 80
    assert fields(importlib.import_module("train_lora_sd3").Args)


def skeleton(readme: str) -> dict[str, list[str]]:
    """What does not hang on the language: levels of headings, code, table columns, pictures."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    code = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {
        "headings": re.findall(r"^#+ ", prose, flags=re.MULTILINE),
        "code": code,
        "rows": [
            str(row.count("|") - row.count("\\|"))
            for row in re.findall(r"^\|.*", prose, flags=re.MULTILINE)
        ],
        "pictures": re.findall(r"\(docs/images/[^)]*\)", text),
        "list entries": re.findall(r"^(?:- |\d+\. )", prose, flags=re.MULTILINE),
        "flags": sorted(named_in(text)),
        "gaps": re.findall(r"TODO-[A-Z]+", text),
    }


def test_the_two_readmes_are_in_step() -> None:
    english, chinese = (skeleton(readme) for readme in READMES)
    for part, expected in english.items():
        assert chinese[part] == expected, part
