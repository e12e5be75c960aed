"""The grammar of captions in Chinese: one form of every caption, and the way back."""

import itertools
import random

import pytest

from dojo.pocket import chinese, compositions, scenes
from dojo.pocket.scenes import Part, Spec


def specs() -> list[Spec]:
    draw = random.Random(0)
    shapes = scenes.SHAPES + scenes.NOVEL_SHAPES
    found = [scenes.random_spec(draw, shapes=shapes) for _ in range(2000)]
    return found + [compositions.random_spec(draw) for _ in range(500)]


def test_every_caption_has_a_chinese_form_that_says_the_same() -> None:
    for spec in specs():
        english, said = chinese.both(spec)
        assert chinese.read(said) == spec == chinese.read(english), said
        assert chinese.translated(english) == said
        assert chinese.translated(said) == english


def test_different_captions_are_different_in_chinese() -> None:
    found = set(specs())
    assert len({chinese.caption(spec) for spec in found}) == len(found) > 1000


@pytest.mark.parametrize(
    ("english", "said"),
    [
        ("a star", "一个五角星"),
        ("a star and a ring", "一个五角星和一个圆环"),
        ("three blue circles", "三个蓝色圆形"),
        (
            "a small red star on a gray background",
            "一个小的红色五角星，灰色背景",
        ),
        ("a red star left of a ring", "一个红色五角星在一个圆环的左边"),
        ("a star on the left", "一个五角星在左边"),
        ("two large crosses above a heart", "两个大的十字形在一个爱心的上方"),
    ],
)
def test_captions_are_said_as_one_would_say_them(english: str, said: str) -> None:
    assert chinese.translated(english) == said


def test_every_word_of_the_grammar_has_its_own_chinese_word() -> None:
    for table, own in (
        (chinese.SHAPES, scenes.SHAPES + scenes.NOVEL_SHAPES),
        (chinese.COLORS, scenes.COLORS),
        (chinese.BACKGROUNDS, scenes.BACKGROUNDS),
        (chinese.SIZES, scenes.SIZES),
        (chinese.POSITIONS, scenes.POSITIONS),
        (chinese.RELATIONS, scenes.RELATIONS),
    ):
        assert table.keys() == set(own)
        assert len(set(table.values())) == len(table)
    assert set(chinese.COUNTS) == {1, *scenes.COUNTS.values()}


def test_chinese_is_read_as_people_type_it() -> None:
    spec = Spec((Part("star", "red"),), background="gray")
    said = chinese.caption(spec)
    for typed in (
        said,
        said.replace("，", ","),
        said + "。",
        f" {said} ",
        "， ".join(said.split("，")),
    ):
        assert chinese.read(typed) == spec


def test_a_text_of_neither_grammar_is_refused() -> None:
    words = ("一只猫", "五角星", "一个五角星在", "一个大红色圆形", "a cat", "", "一个五角星 a star")
    for text in words:
        with pytest.raises(ValueError, match="grammar"):
            chinese.read(text)
    for first, second in itertools.pairwise(("两个", "三个")):
        with pytest.raises(ValueError, match="grammar"):
            chinese.read(first + second + "圆形")
