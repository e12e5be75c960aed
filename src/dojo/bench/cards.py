"""Which card, which command: for seven models and up to four recipes, what a run holds, computed.

Every row comes from the script that it names, by the way that `--fit` takes: the script plans, as
its dry run does, and options are tried for each size of card. No weights are needed, no network and
no GPU. `docs/cards.md` holds the tables, and a test compares it with what is printed here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from dojo import cli
from dojo.bench import models
from dojo.bench.table import markdown
from dojo.cli import UserError
from dojo.finetune import fit
from dojo.models import published
from dojo.run import phases

Recipe = Literal["lora", "full", "dreambooth_lora", "preference"]
RECIPES: dict[Recipe, str] = {
    "lora": "LoRA",
    "full": "full",
    "dreambooth_lora": "DreamBooth LoRA",
    "preference": "preference / RL",
}
_FAMILIES = {name: name for name in ("sd15", "sdxl", "kolors", "hunyuandit")}  # others: sd3
BATCH = 4
"""Samples of an optimizer step; a card that is too small takes them in parts."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CardArgs:
    """The tables of docs/cards.md."""

    model: tuple[
        Literal["sd15", "sdxl", "kolors", "hunyuandit", "sd3-medium", "sd35-medium", "sd35-large"],
        ...,
    ] = (
        *("sd15", "sdxl", "kolors", "hunyuandit"),
        *("sd3-medium", "sd35-medium", "sd35-large"),
    )
    """whose tables"""
    page: Path | None = None
    """write them into this page, between its two marks, instead of printing them"""


def main(args: CardArgs) -> None:
    """Prints the tables, or puts them into the page.

    Raises:
        UserError: the page or its marks are not there, or the package that some rows need.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("the tables have bases in nf4, which need it: pip install bitsandbytes")
    if args.page is None:
        print(tables(args.model))
        return
    if not args.page.is_file():
        raise UserError(f"--page: there is no {args.page}")
    args.page.write_text(put(args.page.read_text("utf-8"), tables(args.model)), "utf-8")


BEGIN, END = "<!-- computed: begin -->", "<!-- computed: end -->"


def put(page: str, text: str) -> str:
    """A page with another text between its marks.

    Raises:
        UserError: they are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"--page: the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def tables(names: tuple[str, ...]) -> str:
    """The tables of some models, as a text."""
    return "\n\n".join("\n".join(section(name)) for name in names)


def section(name: str) -> Iterator[str]:
    """What is said of one model."""
    model = published.MODELS[name]
    yield f"### {model.title}"
    yield ""
    with tempfile.TemporaryDirectory() as folder:
        tried: dict[Recipe, fit.Tried] = {
            recipe: plan(name, recipe, Path(folder)) for recipe in recipes(name)
        }
    yield markdown([needs(recipe, one) for recipe, one in tried.items()])
    yield ""
    rows = (
        {"card": f"{card} GB"} | {RECIPES[recipe]: cell(one, card) for recipe, one in tried.items()}
        for card in phases.CARDS
    )
    yield markdown(list(rows))
    yield ""
    yield "```bash"
    yield from (command(name, recipe) for recipe in recipes(name))
    yield "```"


def needs(recipe: Recipe, tried: fit.Tried) -> dict[str, str]:
    """The phases of a run with the options as they are."""
    found = {phase.name: f"{phase.size / _GIB:.1f}" for phase in tried.phases({})}
    return {"GiB, computed": RECIPES[recipe]} | {
        name: found.get(name, "") for name in phases.PHASES
    }


def cell(tried: fit.Tried, card: int) -> str:
    """What `--fit` chooses for a card, in a few words."""
    try:
        change = fit.choose(tried, card)
    except UserError:
        return "no"
    return ", ".join(_word(name, change) for name in change if name in _WORDS) or "as it is"


_WORDS = {
    "gradient_checkpointing": "checkpointing",
    "train_batch_size": "micro-batch {}",
    "base_precision": "base {}",
    "blocks_on_cpu": "{} blocks on the CPU",
    "text_encoder_precision": "texts {}",
    "text_encoder_device": "texts on the CPU",
    "enable_vae_slicing": "VAE slices",
    "enable_vae_tiling": "VAE tiles",
    "vae_dtype": "VAE {}",
}


def _word(name: str, change: Mapping[str, Any]) -> str:
    return _WORDS[name].format(change[name])


# ---- the commands ----


def script(name: str, recipe: Recipe) -> str:
    """The script of a recipe."""
    family = _FAMILIES.get(name, "sd3")
    if recipe == "preference":
        return "train_grpo_sd3.py" if family == "sd3" else f"train_dpo_{family}.py"
    return f"train_{recipe}_{family}.py"


def recipes(name: str) -> list[Recipe]:
    """Those that a model's family has a script for."""
    there: list[Recipe] = [
        recipe for recipe in RECIPES if (models.ROOT / script(name, recipe)).is_file()
    ]
    return there or [*RECIPES]  # outside a clone all are missing, which `_module` says


def size(name: str, recipe: Recipe) -> int:
    """Height and width of the pictures in pixels: the model's own, half of it for SD3's GRPO."""
    native = models.native_size(name)
    return native // 2 if script(name, recipe) == "train_grpo_sd3.py" else native


def flags(name: str, recipe: Recipe, place: Mapping[str, object]) -> list[str]:
    """The command line of a recipe, data apart."""
    model = published.MODELS[name]
    values: dict[str, object] = {
        "pretrained_model_name_or_path": model.hub_ids[0],
        **({"variant": model.variant} if model.variant else {}),
        **place,
        "resolution": size(name, recipe),
        "mixed_precision": "bf16",
    }
    if recipe == "preference" and "dpo" in script(name, recipe):
        values["finetune"] = "lora"
    if recipe == "dreambooth_lora":
        values |= {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    made = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*made, "--with_prior_preservation"] if recipe == "dreambooth_lora" else made


def command(name: str, recipe: Recipe) -> str:
    """The command that a user types."""
    data: dict[Recipe, dict[str, object]] = {
        "lora": {"dataset_name": "DATA"},
        "full": {"dataset_name": "DATA"},
        "dreambooth_lora": {"instance_data_dir": "DOGS", "class_data_dir": "CLASS"},
        "preference": {"dataset_name": "PAIRS"},
    }
    place = data[recipe]
    if script(name, recipe) == "train_grpo_sd3.py":
        place = {"prompt_file": "PROMPTS", "reward": "pickscore"}
    words = flags(name, recipe, {**place, "output_dir": "OUT"})
    pairs = " ".join(f'"{word}"' if " " in word else word for word in [*words, "--fit", "12"])
    lines = textwrap.wrap(
        f"accelerate launch {script(name, recipe)} {pairs}",
        *(100,),
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent="    ",
    )
    return " \\\n".join(lines)


def plan(name: str, recipe: Recipe, folder: Path) -> fit.Tried:
    """What the run of a recipe would hold, by its script.

    Args:
        folder: for small data; what has to be opened is made.
    """
    module = _module(script(name, recipe))
    data = _data(folder)
    places: dict[Recipe, dict[str, object]] = {
        "lora": {"dataset_name": data / "pictures", "validation_prompt": "a dog"},
        "full": {"dataset_name": data / "pictures", "validation_prompt": "a dog"},
        "dreambooth_lora": {
            "instance_data_dir": data / "pictures",
            "class_data_dir": data / "class",
            "validation_prompt": "a dog",
        },
        "preference": {"dataset_name": data / "pairs", "validation_prompt": "a dog"},
    }
    place = places[recipe]
    if script(name, recipe) == "train_grpo_sd3.py":
        place = {"prompt_set": "pocket", "reward": "pocket"}
    batch = {"train_batch_size": BATCH, "report_to": "none", "output_dir": folder / "out"}
    words = flags(name, recipe, {**place, **batch})
    args = cli.parse(module.Args, None, words)
    return fit.plan(module.main, args)


@cache
def _module(name: str) -> Any:
    """A training script as a module.

    Raises:
        UserError: there is no such script.
    """
    path = models.ROOT / name
    if not path.is_file():
        raise UserError(f"{path} is missing: start it from a clone of the repository")
    found = importlib.util.spec_from_file_location(f"dojo_cards_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for it
    found.loader.exec_module(module)
    return module


def _data(folder: Path) -> Path:
    """Two captioned pictures, and two pairs of them."""
    if (folder / "pairs").is_dir():
        return folder
    rows = {
        "pictures": [{"file_name": f"{i}.png", "text": f"a dog, {i}"} for i in range(2)],
        "pairs": [
            {"image_0": "0.png", "image_1": "1.png", "label_0": i, "caption": f"a dog, {i}"}
            for i in range(2)
        ],
    }
    for name, some in rows.items():
        (folder / name).mkdir()
        for i in range(2):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / name / f"{i}.png")
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / name / "metadata.jsonl").write_text(lines)
    return folder
