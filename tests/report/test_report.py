"""report.html: self-contained, escaped, and made from whatever a run's folder holds."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dojo import report
from dojo.cli import UserError
from dojo.report.__main__ import main
from dojo.report.curves import charts, smoothed

EVIL = "一只猫 <script>alert('x')</script> \"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "hr", "link", "input", "line", "polyline", "circle"}


class Page(HTMLParser):
    """The elements of a page, and whether every one that opens closes again."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def record(**more: Any) -> dict[str, Any]:
    return {
        "args": {
            "model": {"pretrained_model_name_or_path": "models/pocket-sd3", "revision": None},
            "run": {"output_dir": "outputs/cat", "hub_token": "hf_secret", "keep_tokens": 2},
            "data": {"dataset_name": "datas/pocket-hearts"},
            "validation": {"validation_prompt": [EVIL]},
        },
        "seed": 3,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.15.0"},
        **more,
    }


def trained(folder: Path) -> Path:
    """A run's folder with everything, and a caption that would like to be a script."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(record()))
    rows: list[dict[str, float]] = []
    for step in range(0, 101, 10):
        rows.append({"step": step, "loss": 1 / (step + 1), "lr": 1e-4, "grad_norm": 0.5})
        rows[-1] |= {"images_per_s": 9.5, "memory_gib": 1.5, "seconds_train": 3.0, "epoch": step}
        rows.append({"step": step, "eval_loss": 0.5, "train_eval_loss": 0.4, "eval_gap": 0.1})
        rows[-1] |= {"eval_loss_sigma_1": 0.2, "eval_loss_sigma_2": 0.8, "clip_score": 25.0}
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 110, "lo']))
    (folder / "finished.json").write_text('{"step": 100}')
    bad = {"name": "破损/图.jpg", "reason": EVIL}
    buckets = [{"height": 512, "width": 1024, "pictures": 7}]
    content = {"train": 54, "held_out": 10, "buckets": buckets, "left_out": [bad] * 90}
    (folder / "data_report.json").write_text(json.dumps(content, ensure_ascii=False))
    card = f"# LoRA of {EVIL}\n\n```python\npipe.load_lora_weights('cat')  # <b>\n```\n"
    (folder / "README.md").write_text(card)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x" * 2048)
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "optimizer.pt").write_bytes(b"x" * 3 * 2**20)
    (folder / "link").symlink_to(folder / "checkpoint-100")
    for step in (0, 100):
        place = folder / "validation" / f"step-{step}"
        place.mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(place / "00-cat-seed0.png")
    row = {"file": "00-cat-seed0.png", "label": "00 seed 0: cat", "prompt": EVIL, "negative": ""}
    text = json.dumps({"pictures": [{**row, "guidance_scale": 4.5}]})
    (folder / "validation" / "prompts.json").write_text(text)
    return folder


def read(folder: Path) -> tuple[str, Page]:
    path = report.write(folder)
    assert path == folder / "report.html"
    text = path.read_text("utf-8")
    return text, Page(text)


def test_the_page_says_what_was_run_and_what_came_of_it(tmp_path: Path) -> None:
    text, page = read(trained(tmp_path / "run"))
    for words in ("models/pocket-sd3", "datas/pocket-hearts", "NVIDIA H200", "torch 2.15.0"):
        assert words in page.text
    for heading in ("Training loss", "Eval loss by noise level", "CLIP score", "Learning rate"):
        assert heading in page.text
    assert "held out: 0.5" in page.text
    assert "level 1, least noise: 0.2" in page.text
    assert "level 2, most noise: 0.8" in page.text
    assert page.tags.count("svg") == 8
    assert "pipe.load_lora_weights('cat')  # <b>" in page.text
    assert "train 33.0 s 100%" in page.text
    assert "pytorch_lora_weights.safetensors 2.0 KiB" in page.text
    assert "checkpoint-100/ 3.0 MiB" in page.text
    assert re.search(r" link \d+ bytes", page.text)  # not the size of what it points to
    assert "steps 100 " in page.text
    assert "train 54 held out 10" in page.text
    assert f"00 seed 0: cat {EVIL}" in page.text
    assert "left out (90)" in page.text
    assert "and 50 more" in page.text
    assert text.count("破损/图.jpg") == 40
    assert "keep_tokens 2" in page.text
    assert "revision unset" in page.text


def test_a_page_bears_the_name_of_its_run(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    (folder / "README.md").unlink()
    assert "Run run" in read(folder)[1].text
    (folder / "args.json").write_text(json.dumps({"args": {"run": {"run_name": EVIL}}}))
    assert f"Run {EVIL}" in read(folder)[1].text


def test_an_evaluation_in_another_way_is_shown_beside_the_plain_one(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    _, plain = read(folder)
    place = folder / "validation-guided" / "step-100"
    place.mkdir(parents=True)
    Image.new("RGB", (64, 64), "blue").save(place / "00-cat-seed0.png")
    row = {"step": 100, "eval_reward": 0.25, "eval_guided_reward": 0.75}
    row |= {"eval_kl": 0.1, "eval_guided_kl": 0.2, "eval_guided_reward/pocket": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    _, page = read(folder)
    assert "Validation pictures by step, guided" in page.text
    assert page.tags.count("img") == plain.tags.count("img") + 1
    assert page.texts.count("held out: 0.25") == page.texts.count("held out, guided: 0.75") == 1
    assert "held out, guided: 0.2" in page.text
    assert page.tags.count("svg") == 3  # reward, its one part, distance


def test_no_text_of_a_run_becomes_markup_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    text, page = read(trained(tmp_path / "run"))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 4  # whole, as text: heading, options, data, prompts
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href", "data", "action")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "hf_secret" not in text
    assert str(tmp_path) not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.parametrize("missing", ["args.json", "metrics.jsonl", "others"])
def test_a_folder_with_little_in_it_gives_a_page(tmp_path: Path, missing: str) -> None:
    folder = trained(tmp_path / "run")
    for path in folder.iterdir():
        if path.name == missing or (missing == "others" and path.name != "args.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _, page = read(folder)
    assert ("so far" in page.text) == (missing == "others")
    assert "Files" in page.text
    assert ("svg" in page.tags) == (missing == "args.json")
    assert ("img" in page.tags) == (missing != "others")


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    folder = trained(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_the_page_stays_small_whatever_the_pictures_and_curves(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    noise = Image.frombytes("RGB", (1800, 900), random.Random(0).randbytes(1800 * 900 * 3))
    for name in ("contact_sheet", "before_after", "compare", "more"):
        noise.save(folder / f"{name}.png", compress_level=0)
    rows = ({"step": step, "loss": step % 7, "reward/x": step} for step in range(50_000))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = read(folder)
    assert len(text.encode()) < 5_000_000
    assert page.tags.count("img") == 3
    widths = [int(width) for width in re.findall(r"--width: (\d+)px", text)]
    assert len(widths) == 3
    assert max(widths) <= 1600


# -- curves -----------------------------------------------------------------------------------


def drawings(rows: list[dict[str, Any]]) -> list[ET.Element]:
    return [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", charts(rows), re.S)]


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.5] * 5,
        [0.1 + 1e-17, 0.1, 0.3 - 0.2],
        [0.0, 0.0],
        [-1e-9, 1e-9],
        [1e12, -1e12],
        [float("nan"), 1.0, float("inf"), 2.0],
        list(range(5000)),
    ],
    ids=lambda values: f"{len(values)} from {values[0]:g}",
)
def test_every_point_lies_inside_its_drawing(values: list[float]) -> None:
    (drawing,) = drawings([{"step": 10 * i, "kl": value} for i, value in enumerate(values)])
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    lines = drawing.findall("polyline")
    assert lines
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
    labels = [text.text for text in drawing.findall("text") if text.get("class") == "y"]
    assert len(set(labels)) == len(labels) >= 2


def test_a_peak_survives_the_thinning() -> None:
    rows = [{"step": i, "grad_norm": 100.0 if i == 4321 else 1.0} for i in range(20_000)]
    (drawing,) = drawings(rows)
    (line,) = drawing.findall("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) < 400
    tops = [x for x, y in points if y == min(y for _, y in points)]
    left, right = points[0][0], points[-1][0]
    assert tops[0] == pytest.approx(left + (right - left) * 4321 / 19_999, abs=0.2)


def test_what_a_script_logs_of_its_own_gets_a_chart_and_text_is_passed_over() -> None:
    rows = [{"step": 1, "reward/aesthetic": 5.0, "kl": 0.1, "note": "text", "seconds_x": 1.0}]
    html = charts(rows)
    assert "Reward: aesthetic" in html
    assert "Distance from the base model" in html
    assert "note" not in html
    assert "seconds" not in html
    assert charts([{"step": 1}]) == ""


def test_the_smoothed_curve_is_the_mean_of_its_neighbours() -> None:
    curve = [(float(i), float(i * i)) for i in range(7)]
    expected = [0.5, 5 / 3, 14 / 3, 29 / 3, 50 / 3, 77 / 3, 61 / 2]
    assert [value for _, value in smoothed(curve, 1)] == pytest.approx(expected)
    constant = [(float(i), 3.0) for i in range(50)]
    assert [value for _, value in smoothed(constant, 9)] == pytest.approx([3.0] * 50)


def test_a_report_of_ones_own_stays_and_an_earlier_one_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "run")
    report.write(folder)
    assert main([str(folder)]) == 0
    (folder / "report.html").write_text("mine")
    assert main([str(folder)]) == 2
    assert "report.html is there already" in capsys.readouterr().err
    assert (folder / "report.html").read_text() == "mine"


def test_a_damaged_picture_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "validation" / "step-1").mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    for name in ("empty.png", "validation/step-1/00.png"):
        (folder / name).touch()
    (folder / "contact_sheet.png").write_bytes((folder / "whole.png").read_bytes()[:40])
    text = report.write(folder).read_text()
    assert "<figcaption>Whole</figcaption>" in text
    assert text.count("<figure>") == 1
