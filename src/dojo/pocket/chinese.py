"""The captions of the pocket world in Chinese.

Every caption of the grammar (`dojo.pocket.scenes`) has one Chinese form, which says no more and no
less, and the way back is unique:

    一个五角星                                  a star
    一个五角星和一个圆环                        a star and a ring
    三个蓝色圆形                                three blue circles
    一个小的红色五角星，灰色背景                a small red star on a gray background
    一个红色五角星在一个圆环的左边              a red star left of a ring
    一个五角星在左上角                          a star at the top left
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dojo.pocket import scenes
from dojo.pocket.scenes import Part, Spec

SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "ring": "圆环",
    "cross": "十字形",
    "heart": "爱心",
}
COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色"}
BACKGROUNDS = {"white": "白色", "gray": "灰色", "black": "黑色"}
SIZES = {"large": "大的", "small": "小的"}  # not 大, since 大红色 is a shade of red
COUNTS = {1: "一个", 2: "两个", 3: "三个", 4: "四个"}
POSITIONS = {
    "in the center": "中间",
    "on the left": "左边",
    "on the right": "右边",
    "at the top": "顶部",
    "at the bottom": "底部",
    "at the top left": "左上角",
    "at the top right": "右上角",
    "at the bottom left": "左下角",
    "at the bottom right": "右下角",
}
RELATIONS = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}
AND, AT, OF, COMMA, GROUND = "和", "在", "的", "，", "背景"


def words() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    tables = (SHAPES, COLORS, BACKGROUNDS, SIZES, COUNTS, POSITIONS, RELATIONS)
    found = {word for table in tables for word in table.values()}
    return tuple(sorted(found | {AND, AT, OF, COMMA, GROUND}))


def caption(spec: Spec) -> str:
    """Says a spec in Chinese; the inverse of `parse`."""
    said = _phrase(spec.parts[0])
    if len(spec.parts) == 2:
        other = _phrase(spec.parts[1])
        related = spec.relation and f"{AT}{other}{OF}{RELATIONS[spec.relation]}"
        said += related or AND + other
    if spec.position:
        said += AT + POSITIONS[spec.position]
    if spec.background:
        said += COMMA + BACKGROUNDS[spec.background] + GROUND
    return said


def _phrase(part: Part) -> str:
    size = SIZES[part.size] if part.size else ""
    color = COLORS[part.color] if part.color else ""
    return COUNTS[part.count] + size + color + SHAPES[part.shape]


def _one_of(options: Iterable[str]) -> str:
    return "(" + "|".join(sorted(options, key=len, reverse=True)) + ")"


_PART = (
    f"{_one_of(COUNTS.values())}{_one_of(SIZES.values())}?{_one_of(COLORS.values())}?"
    f"{_one_of(SHAPES.values())}"
)
_CAPTION = re.compile(
    f"{_PART}(?:{AND}{_PART}|{AT}{_PART}{OF}{_one_of(RELATIONS.values())})?"
    f"(?:{AT}{_one_of(POSITIONS.values())})?"
    f"(?:[{COMMA},]{_one_of(BACKGROUNDS.values())}{GROUND})?"
)


def parse(text: str) -> Spec:
    """Reads a Chinese caption back; a comma may be a Latin one, a full stop may end it.

    Raises:
        ValueError: the text is not in the grammar.
    """
    match = _CAPTION.fullmatch(re.sub(r"\s", "", text).removesuffix("。"))
    if match is None:
        raise ValueError(f"not a Chinese caption of the pocket grammar: {text!r}")
    groups = match.groups()
    parts = [_part(groups[start : start + 4]) for start in (0, 4, 8) if groups[start]]
    return Spec(
        parts=tuple(parts),
        position=_key(POSITIONS, groups[13]),
        relation=_key(RELATIONS, groups[12]),
        background=_key(BACKGROUNDS, groups[14]),
    )


def _part(groups: tuple[str | None, ...]) -> Part:
    count, size, color, shape = groups
    number = next(one for one, word in COUNTS.items() if word == count)
    named = _key(SHAPES, shape)
    assert named is not None  # the pattern demands it
    return Part(named, color=_key(COLORS, color), size=_key(SIZES, size), count=number)


def _key(table: Mapping[str, str], word: str | None) -> str | None:
    """The English of a Chinese word; None of none."""
    return next((key for key, value in table.items() if value == word), None)


def both(spec: Spec) -> tuple[str, str]:
    """What a spec is called in English and in Chinese."""
    return scenes.caption(spec), caption(spec)


def read(text: str) -> Spec:
    """Reads a caption of either language.

    Raises:
        ValueError: it is in neither grammar.
    """
    return scenes.parse(text) if text.isascii() else parse(text)


def translated(text: str) -> str:
    """An English caption in Chinese, a Chinese one in English.

    Raises:
        ValueError: it is in neither grammar.
    """
    english, chinese = both(read(text))
    return chinese if text.isascii() else english
