"""The text in pictures: what is wanted, how near a reading comes, and the real reader."""

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import ocr


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [
        ('a sign that says "Open Now"', {}, "opennow"),
        ("a sign that says “Open Now”", {}, "opennow"),
        ('"Stop" above "Go" on a wall', {}, "stopgo"),
        ("ein Schild „Halt“ und «Suite»", {}, "haltsuite"),
        ("一块牌子写着「你好」", {}, "你好"),
        ("a dog's life, it's fine", {}, ""),
        ('a sign "left"', {"ocr_text": "RIGHT"}, "right"),
        ('"ＡＢＣ ﬁn"', {}, "abcfin"),
    ],
)
def test_the_wanted_text_is_what_stands_in_quotes(prompt: str, row: dict, expected: str) -> None:
    assert ocr.wanted(prompt, row) == expected


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_the_edit_distance_is_levenshteins(a: str, b: str, distance: int) -> None:
    assert ocr.edits(a, b) == distance
    assert ocr.edits(b, a) == distance


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("hello", 1.0),
        ("He l lo", 1.0),
        ("say hello there", 1.0),
        ("hallo", 0.8),
        ("", 0.0),
        ("something entirely different", 0.0),
    ],
)
def test_the_score_falls_with_every_wrong_letter(read: str, expected: float) -> None:
    assert ocr.likeness("hello", read) == pytest.approx(expected)


def test_without_the_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"sd-dojo\[ocr\]"):
        rewards.load("ocr")


def test_the_reader_reads_what_is_written() -> None:
    pytest.importorskip("rapidocr")
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 48)
    pictures = []
    for text in ("Hello", "World", ""):
        picture = Image.new("RGB", (320, 160), "white")
        ImageDraw.Draw(picture).text((160, 80), text, fill="darkred", font=font, anchor="mm")
        pictures.append(np.asarray(picture))
    images = torch.from_numpy(np.stack([*pictures, pictures[0]])).permute(0, 3, 1, 2) / 255
    prompts = ['a sign "hello"', 'a sign "hello"', 'a sign "hello"', "no quotes"]
    output = rewards.load("ocr")(images, prompts)
    assert output.scores[0] == 1
    assert output.scores[1] <= 0.6
    assert output.scores[2] == 0
    assert output.valid.tolist() == [True, True, True, False]
