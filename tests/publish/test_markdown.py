"""Prompts, captions and names in a model card show as they are, whatever is in them."""

import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from dojo.publish import markdown, write_card

PARSER = MarkdownIt("gfm-like", {"linkify": False, "html": True})
NASTY = [
    "a | b || c",
    "`code` and ``more``",
    "`",
    "[link](http://x) ![picture](y) [ref]: z",
    "<script>alert(1)</script> &amp; <b>",
    "*bold* _it_ **x** ~~no~~ # heading",
    "one\ntwo\n\n# three\n- four",
    "---\nlicense: mit\n---",
    "ends in \\",
    "``` \n```python\nimport os\n```",
    "$x$ @someone 1. one",
]


def text_of(rendered: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", rendered)).strip()


@pytest.mark.parametrize("text", NASTY)
def test_a_text_shows_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    assert PARSER.render(f"Say {markdown.plain(text)} now.").count("<") == 2  # the paragraph's own
    assert text_of(PARSER.render(f"# {markdown.plain(text)}")) == line
    (rendered,) = re.findall(r"<code>(.*)</code>", PARSER.render(f"Use {markdown.code(text)}."))
    assert unescape(rendered) == line
    (name,) = re.findall(r'alt="(.*?)"', PARSER.render(markdown.picture(text, "a b.png")))
    assert unescape(name) == line
    table = f"| a | b |\n| - | - |\n| {markdown.code(text, in_table=True)} | "
    rendered = PARSER.render(f"{table}{markdown.plain(text)} |\n")
    assert [text_of(cell) for cell in re.findall(r"<td>(.*?)</td>", rendered)] == [line, line]
    (rendered,) = re.findall(r"(?s)<code.*?>(.*)</code>", PARSER.render(markdown.block([text], "")))
    assert unescape(rendered) == f"{text}\n"


@pytest.mark.parametrize("text", NASTY)
def test_a_card_takes_any_prompt_trigger_and_data_set(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "validation" / "step-2"
    folder.mkdir(parents=True)
    (folder / "00-x-seed1.png").write_bytes(b"")
    options = {
        "model": {},
        "validation": {"validation_prompt": [text]},
        "optim": {"lr_scheduler": text},
        "reward": {"reward": "vlm[url=http://me:hidden@host/v1]"},
    }
    write_card(
        tmp_path,
        title=f"LoRA: {text}",
        base_model=f"here/{text}",
        dataset=text,
        options=options,
        steps=2,
        tags=["lora"],
        instance_prompt=text,
    )
    card = (tmp_path / "README.md").read_text()
    assert "hidden" not in card
    _, header, body = card.split("---\n", 2) if not text.startswith("---") else _parts(card)
    assert yaml.safe_load(header)["instance_prompt"] == text
    assert yaml.safe_load(header)["widget"][0]["text"] == text
    tokens = PARSER.parse(body)
    heads = [tokens[i + 1].content for i, one in enumerate(tokens) if one.type == "heading_open"]
    assert heads[1:] == ["Trigger words", "Use", "Training", "Licence"]
    assert "html_block" not in {one.type for one in tokens}
    inside = {child.type for one in tokens for child in one.children or ()}
    assert not inside & {"html_inline", "link_open", "strong_open", "em_open"}
    (code,) = [one.content for one in tokens if one.type == "fence"]
    compile(code, "card", "exec")


def _parts(card: str) -> tuple[str, str, str]:
    begin, end = re.match(r"---\n", card), re.search(r"(?m)^---$", card[4:])
    assert begin is not None
    assert end is not None
    return "", card[4 : 4 + end.start()], card[4 + end.end() :]
