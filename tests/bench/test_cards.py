"""docs/cards.md: the tables are those that the command prints, and hang together."""

import re
from pathlib import Path
from typing import Any

import pytest

from dojo.bench import cards
from dojo.cli import UserError
from dojo.models import published
from dojo.run import phases
from tests.models.test_published import offline as offline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cards.md"


def of_page(name: str) -> str:
    """What the page says of a model."""
    text = PAGE.read_text("utf-8").split(cards.BEGIN)[1].split(cards.END)[0]
    place = 1 + list(published.MODELS).index(name)
    section = re.split(r"^### ", text, flags=re.M)[place]
    return section.removeprefix(f"{published.MODELS[name].title}\n")


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in published.MODELS if name != "sd15"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["sd15", *LONG])
def test_the_page_says_what_the_command_prints(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    printed = "\n".join(cards.section(name)).split("\n", 1)[1]
    assert of_page(name).strip() == printed.strip()


@pytest.mark.parametrize("name", published.MODELS)
def test_every_model_has_a_row_for_each_card_and_a_command_for_each_recipe(name: str) -> None:
    text = of_page(name)
    for card in phases.CARDS:
        assert f"| {card} GB |" in text
    alone = name in ("kolors", "hunyuandit")
    assert cards.recipes(name) == (["lora", "dreambooth_lora"] if alone else [*cards.RECIPES])
    for recipe in cards.recipes(name):
        assert cards.command(name, recipe) in text


@pytest.mark.parametrize("name", published.MODELS)
def test_what_fits_a_card_fits_every_larger_one(name: str) -> None:
    rows = [line.split(" | ")[1:] for line in of_page(name).splitlines() if " GB | " in line]
    for column in zip(*rows, strict=True):
        fits = [cell.strip(" |") != "no" for cell in column]
        assert fits == sorted(fits)
        as_it_is = [cell.strip(" |") == "as it is" for cell in column]
        assert as_it_is == sorted(as_it_is)


def test_tables_go_between_the_marks_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"before\n{cards.BEGIN}\nold\n{cards.END}\nafter\n"
    once = cards.put(page, "new")
    assert once == f"before\n{cards.BEGIN}\nnew\n{cards.END}\nafter\n"
    assert cards.put(once, "new") == once
    with pytest.raises(UserError, match="the page has no"):
        cards.put("nothing", "new")
    monkeypatch.setattr(cards, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="there is no"):
        cards.main(cards.CardArgs(page=tmp_path / "none.md"))
    monkeypatch.setattr(cards, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        cards.main(cards.CardArgs())


def test_a_choice_is_told_in_a_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    change: dict[str, Any] = {"gradient_checkpointing": True, "train_batch_size": 2}
    change |= {"gradient_accumulation_steps": 2, "base_precision": "nf4"}
    monkeypatch.setattr(cards.fit, "choose", lambda *_: change)
    tried: Any = None
    assert cards.cell(tried, 12) == "checkpointing, micro-batch 2, base nf4"
    monkeypatch.setattr(cards.fit, "choose", lambda *_: {})
    assert cards.cell(tried, 12) == "as it is"

    def refuse(*_: object) -> None:
        raise UserError("nothing fits")

    monkeypatch.setattr(cards.fit, "choose", refuse)
    assert cards.cell(tried, 12) == "no"
