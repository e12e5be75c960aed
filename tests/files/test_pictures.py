"""Pictures: file names, labelled grids, the contact sheet, letters that a font may lack."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dojo.files import pictures


def solid(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts of its own."""
    pictures._fonts_of.cache_clear()
    monkeypatch.setattr(pictures, "_system_fonts", list)
    yield
    pictures._fonts_of.cache_clear()


def syllable_font(path: Path) -> Path:
    """A font that has the letters a, b, x and the Ethiopic ሀ, each a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    names = {ord("a"): "a", ord("b"): "b", ord("x"): "x", ord("ሀ"): "syllable"}
    order = [".notdef", *names.values()]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    builder.setupGlyf(dict.fromkeys(order, square))
    builder.setupHorizontalMetrics({name: (600, 0) for name in order})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Syllable", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5, 0.999, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    (picture,) = pictures.to_pil(values)
    assert picture.size == (5, 1)
    row = [picture.getpixel((x, 0)) for x in range(5)]
    assert row == [(value,) * 3 for value in (0, 0, 128, 255, 255)]


def test_a_slug_keeps_words_of_any_script_within_a_file_systems_limit() -> None:
    assert pictures.slug("a/b: *weird* prompt?") == "a_b_weird_prompt"
    assert pictures.slug("一只猫，在/屋顶") == "一只猫_在_屋顶"
    assert pictures.slug(" ?! ") == "empty"
    assert pictures.slug("cafe\u0301") == pictures.slug("café")  # one name for one text
    assert len(pictures.slug("x" * 500)) == 60
    assert len(pictures.slug("\U00020000" * 100).encode()) <= 180


def test_cells_of_a_grid_keep_their_aspect_and_may_be_empty() -> None:
    rows = [[solid("red"), solid("blue", (128, 64))], [None, solid("lime", (32, 64))]]
    sheet = pictures.labelled_grid(rows, row_labels=["a", "b"], column_labels=["x", "y"], cell=64)
    left, top, step_x, step_y = pictures._LABEL_WIDTH, 26, 128 + 6, 64 + 6
    assert sheet.size == (left + 2 * step_x, top + 2 * step_y)

    def at(column: int, row: int, x: int) -> object:
        return sheet.getpixel((left + column * step_x + x, top + row * step_y + 32))

    white, red, blue, lime = (255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 255, 0)
    assert [at(0, 0, 63), at(0, 0, 64)] == [red, white]
    assert [at(1, 0, 127), at(1, 0, 128)] == [blue, white]
    assert [at(0, 1, 32), at(1, 1, 31), at(1, 1, 32)] == [white, lime, white]


def test_steps_are_thinned_out_between_the_first_and_the_last() -> None:
    assert pictures.thin_out([0, 5, 7], 8) == [0, 5, 7]
    steps = list(range(0, 10_001, 100))
    kept = pictures.thin_out(steps, 8)
    assert (len(kept), kept[0], kept[-1]) == (8, 0, 10_000)
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 100


def test_a_contact_sheet_is_made_from_the_files_alone(tmp_path: Path) -> None:
    assert pictures.contact_sheet(tmp_path) is None
    for step in (0, 2, 10, 300):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        solid("red").save(folder / "00-a-seed0.png")
        if step == 10:
            solid("blue").save(folder / "01-b-seed0.png")
    (tmp_path / "step-7").mkdir()  # a kill left it empty
    sheet = pictures.contact_sheet(tmp_path, last_step=10)
    assert sheet is not None
    left, step = pictures._LABEL_WIDTH, 198
    assert sheet.size == (left + 3 * step, 26 + 2 * step)  # 0, 2, 10 in the order of numbers
    assert sheet.getpixel((left + 2 * step + 9, 26 + step + 9)) == (0, 0, 255)
    assert sheet.getpixel((left + 9, 26 + step + 9)) == (255, 255, 255)

    rows = [{"file": "01-b-seed0.png", "label": "01 b"}, {"file": "gone.png", "label": "02"}]
    (tmp_path / "prompts.json").write_text(json.dumps({"pictures": rows}))
    only = pictures.contact_sheet(tmp_path, last_step=10)
    assert only is not None
    assert only.size == (left + 3 * step, 26 + step)


def test_a_note_stands_below_its_picture_and_moves_no_other(no_fonts: None) -> None:
    rows = [[solid("red"), None], [solid("blue"), solid("lime")]]
    labels = {"row_labels": ["a", "b"], "column_labels": ["x", "y"], "cell": 64}
    plain = pictures.labelled_grid(rows, **labels)
    sheet = pictures.labelled_grid(rows, notes=[["0.5", "unseen"], ["", "0.75"]], **labels)
    left, top, line = pictures._LABEL_WIDTH, 26, pictures._LINE
    assert sheet.size == (plain.width, plain.height + 2 * line)

    def darkest(column: int, row: int) -> int:
        x, y = left + column * 70, top + row * (70 + line) + 64
        return min(sheet.crop((x, y, x + 64, y + line)).convert("L").tobytes())

    below = [[darkest(column, row) < 100 for column in (0, 1)] for row in (0, 1)]
    assert below == [[True, False], [False, True]]
    for color, column, row in (((255, 0, 0), 0, 0), ((0, 0, 255), 0, 1), ((0, 255, 0), 1, 1)):
        x, y = left + column * 70, top + row * (70 + line)
        assert sheet.getpixel((x, y)) == sheet.getpixel((x + 63, y + 63)) == color


def test_a_contact_sheet_shows_the_rewards_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    grid = pictures.labelled_grid

    def labelled_grid(*args: Any, notes: Any = None, **options: Any) -> Image.Image:
        seen.append(notes)
        return grid(*args, notes=notes, **options)

    monkeypatch.setattr(pictures, "labelled_grid", labelled_grid)
    for step in (0, 5):
        (tmp_path / f"step-{step}").mkdir()
        for name in ("00-a.png", "01-b.png"):
            solid("red").save(tmp_path / f"step-{step}" / name)
    plain = pictures.contact_sheet(tmp_path)
    (tmp_path / "step-5" / "scores.csv").write_text(
        'file,prompt,seed,reward\n01-b.png,"a, b",0,0.123456\n00-a.png,a,0,nan\n,c,0,9\n'
    )
    scored = pictures.contact_sheet(tmp_path)
    assert seen == [None, [["", "nan"], ["", "0.123"]]]
    assert plain is not None
    assert scored is not None
    assert scored.height == plain.height + 2 * pictures._LINE


def written(text: str) -> Image.Image:
    """A line on white."""
    sheet = Image.new("RGB", (400, 30), "white")
    pictures.write(ImageDraw.Draw(sheet), (4, 4), pictures.drawable(text))
    return sheet


def test_letters_that_no_font_has_are_spelled_out_and_not_drawn_as_boxes(no_fonts: None) -> None:
    assert pictures.drawable("Ελλάδα, привет:\n a-b]c^\\d") == "Ελλάδα, привет: a-b]c^\\d"
    assert pictures.drawable("00 ሀ seed 0") == "00 U+1200 seed 0"
    assert pictures.drawable("\U00013000") == "U+13000"


def test_a_chinese_prompt_is_text_on_a_machine_without_fonts(no_fonts: None) -> None:
    said = "一只戴帽子的猫，高质量。「星空」 seed 0"
    assert pictures.drawable(said) == said
    boxes = [written(char).tobytes() for char in "猫狗"]
    assert boxes[0] != boxes[1]
    assert min(written("猫").convert("L").tobytes()) < 100  # something dark is there


def test_latin_text_is_drawn_as_by_one_font_alone(no_fonts: None) -> None:
    text, font = "a photo of Zoë, AVATAR – №5 привет", ImageFont.truetype(pictures._base_font(), 13)
    for centred, anchor in ((False, "la"), (True, "mm")):
        ours, theirs = (Image.new("RGB", (400, 30), "white") for _ in range(2))
        pictures.write(ImageDraw.Draw(ours), (200, 12), pictures.drawable(text), centred=centred)
        ImageDraw.Draw(theirs).text((200, 12), text, fill="black", font=font, anchor=anchor)
        assert ours.tobytes() == theirs.tobytes()
    assert pictures.length(text) == font.getlength(text)


def test_letters_beside_chinese_stay_where_they_were(no_fonts: None) -> None:
    width = int(pictures.length("a cat "))
    alone, beside = (
        written(text).crop((0, 0, 4 + width, 30)).tobytes() for text in ("a cat", "a cat 猫")
    )
    assert alone == beside
    assert pictures.length("a cat 猫") == pictures.length("a cat ") + pictures.length("猫")
    centred = Image.new("L", (400, 30), "white")
    pictures.write(ImageDraw.Draw(centred), (200, 15), "ab猫", centred=True)
    box = ImageOps.invert(centred).getbbox()
    assert box is not None
    assert abs((box[0] + box[2]) / 2 - 200) < 2
    assert abs((box[1] + box[3]) / 2 - 15) < 3


def test_the_shipped_font_has_the_characters_that_it_is_said_to_have() -> None:
    font = TTFont(pictures._CHINESE_FONT)
    known = {chr(code) for code in font.getBestCmap() or ()}
    claimed = {char for char in map(chr, range(0x80, 0x10000)) if pictures.is_chinese(char)}
    assert claimed <= known
    assert len(claimed) > 7000
    assert Path(pictures._CHINESE_FONT).stat().st_size < 1.6e6
    names = " ".join(str(name) for name in font["name"].names if name.nameID in (1, 4, 6))
    assert "Source" not in names  # which the licence reserves
    licence = Path(pictures._CHINESE_FONT).with_name("OFL.txt").read_text()
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence


def test_a_font_of_the_machine_is_taken_for_what_the_others_lack(
    tmp_path: Path, no_fonts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts = [str(broken), str(syllable_font(tmp_path / "syllable.ttf"))]
    monkeypatch.setattr(pictures, "_system_fonts", lambda: fonts)
    assert pictures.drawable("ab ሀx猫") == "ab ሀx猫"
    runs = [(Path(str(font.path)).name, part) for font, part in pictures._runs("ab ሀx猫")]
    assert runs == [
        ("DejaVuSans.ttf", "ab "),
        ("syllable.ttf", "ሀ"),
        ("DejaVuSans.ttf", "x"),
        ("dojo-cjk.otf", "猫"),
    ]
    sheet = pictures.labelled_grid([[solid("white")]], row_labels=["ሀ"], column_labels=[""])
    label = sheet.crop((0, 26, pictures._LABEL_WIDTH, 60))
    assert min(label.convert("L").tobytes()) < 50  # something dark is there


def test_labels_are_wrapped_between_words_and_within_what_is_too_long() -> None:
    lines = pictures._wrap("a long label with " + "x" * 60, 100)
    assert all(pictures.length(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == "alonglabelwith" + "x" * 60
    assert lines[0].endswith(("long", "label"))
    assert pictures._wrap("猫" * 3, int(pictures.length("猫") * 1.5)) == ["猫"] * 3
