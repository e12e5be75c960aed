"""The text in pictures: what is wanted, how near a reading comes, and the two readers."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    AutoImageProcessor,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)
from transformers.models.pp_ocrv5_server_det.image_processing_pp_ocrv5_server_det import (
    PPOCRV5ServerDetImageProcessor,
)
from transformers.models.pp_ocrv5_server_rec.image_processing_pp_ocrv5_server_rec import (
    PPOCRV5ServerRecImageProcessor,
)

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import loading, ocr, ppocr
from dojo.rewards.scorer import Place

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = ["blank", *"abcdef", " "]
PUBLISHED = "ocr[det=models/PP-OCRv5_{0}_det_safetensors,rec=models/PP-OCRv5_{0}_rec_safetensors]"


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


@pytest.mark.parametrize("text", ["ocr", PUBLISHED.format("mobile"), PUBLISHED.format("server")])
def test_the_reader_reads_what_is_written(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if text == "ocr":
        pytest.importorskip("rapidocr")
    elif not Path(text.partition("rec=")[2].rstrip("]")).is_dir():
        pytest.skip("the weights are not here")
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 48)
    pictures = []
    for word in ("Hello", "World", ""):
        picture = Image.new("RGB", (320, 160), "white")
        ImageDraw.Draw(picture).text((160, 80), word, fill="darkred", font=font, anchor="mm")
        pictures.append(np.asarray(picture))
    images = torch.from_numpy(np.stack([*pictures, pictures[0]])).permute(0, 3, 1, 2) / 255
    prompts = ['a sign "hello"', 'a sign "hello"', 'a sign "hello"', "no quotes"]
    output = rewards.load(text)(images, prompts)
    assert output.scores[0] == 1
    assert output.scores[1] <= 0.6
    assert output.scores[2] == 0
    assert output.valid.tolist() == [True, True, True, False]


# -- PP-OCR by transformers -------------------------------------------------------------------


def backbone(*strides: Any) -> dict[str, Any]:
    """The configuration of a PP-LCNetV3 with a few channels."""
    widths = itertools.pairwise((8, 8, 8, 16, 16, 16))
    blocks = [[3, *pair, stride, False] for pair, stride in zip(widths, (1, *strides), strict=True)]
    return {
        "model_type": "pp_lcnet_v3",
        "stem_channels": 8,
        "conv_symmetric_num": 1,
        "block_configs": [[block] for block in blocks],
        "out_features": ["stage2", "stage3", "stage4", "stage5"],
        "out_indices": [2, 3, 4, 5],
    }


@pytest.fixture(scope="module")
def rec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random recogniser whose answers change along the line."""
    folder = tmp_path_factory.mktemp("models") / "tiny_rec"
    torch.manual_seed(0)
    config: Any = PPOCRV5MobileRecConfig(
        backbone_config=backbone([2, 1], [1, 2], [2, 1], [2, 1]),
        hidden_size=16,
        num_attention_heads=2,
        depth=1,
        head_out_channels=len(CHARACTERS),
    )
    network: Any = PPOCRV5MobileRecForTextRecognition(config)
    for module in network.modules():  # initial weights let the signal die away
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(2, 3, 48, 96) * 2 - 1)
        network.head.head.weight.mul_(100)
    network.save_pretrained(folder)
    PPOCRV5ServerRecImageProcessor(character_list=CHARACTERS).save_pretrained(folder)  # pyright: ignore
    return folder


@pytest.fixture(scope="module")
def det(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random detector."""
    folder = tmp_path_factory.mktemp("models") / "tiny_det"
    torch.manual_seed(0)
    config: Any = PPOCRV5MobileDetConfig(
        backbone_config=backbone(2, 2, 2, 2),
        neck_out_channels=16,
        layer_list_out_channels=[8, 16, 16, 16],
    )
    network: Any = PPOCRV5MobileDetForObjectDetection(config)
    network.save_pretrained(folder)
    PPOCRV5ServerDetImageProcessor().save_pretrained(folder)
    return folder


def collapsed(classes: list[int]) -> str:
    """Connectionist temporal classification (Graves et al. 2006): repeats go, then blanks."""
    return "".join(CHARACTERS[c] for c, _ in itertools.groupby(classes) if c != 0)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("height", "width"), [(48, 400), (48, 200), (30, 300)])
def test_a_recogniser_reads_the_whole_picture_as_one_line(
    rec: Path, height: int, width: int
) -> None:
    picture = noise(height, width)
    # By hand: 48 pixels high, in [-1, 1], on the right grey up to 320 pixels.
    scaled = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    size = (48, math.ceil(48 * width / height))
    if size != scaled.shape[-2:]:
        scaled = torch.nn.functional.interpolate(scaled, size, mode="bilinear", antialias=True)
    pixels = torch.nn.functional.pad(scaled / 127.5 - 1, (0, max(0, 320 - size[1])))
    network: Any = PPOCRV5MobileRecForTextRecognition.from_pretrained(rec).eval()
    with torch.no_grad():
        classes = network(pixels).last_hidden_state[0].argmax(-1).tolist()
    expected = collapsed(classes)
    assert len(set(expected)) > 2
    assert ppocr.PpOcr(Place(), rec=str(rec))(picture) == expected
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    output = rewards.load(f"ocr[rec={rec}]")(images, [f'"{expected}"'])
    assert output.scores.tolist() == [1.0]


@pytest.mark.parametrize("classes", [[1, 1, 0, 1, 2, 2, 0, 0, 3], [0, 0, 0], [4, 0, 4, 4, 7, 5]])
def test_chosen_probabilities_are_read_by_ctc(
    rec: Path, classes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ppocr.PpOcr(Place(), rec=str(rec))
    likely = torch.nn.functional.one_hot(torch.tensor([classes]), len(CHARACTERS)) * 0.4 + 0.1
    monkeypatch.setattr(reader.recogniser, "network", answers(likely))
    assert reader(noise(48, 99)) == collapsed(classes)


def answers(output: Any) -> Any:
    """A network that gives this output, or what this function makes of its pixels."""

    def network(pixel_values: torch.Tensor) -> SimpleNamespace:
        result = output(pixel_values) if callable(output) else output
        return SimpleNamespace(last_hidden_state=result)

    return network


def test_a_probability_map_becomes_boxes(
    rec: Path, det: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2")
    reader = ppocr.PpOcr(Place(), rec=str(rec), det=str(det))
    assert reader.detector is not None
    picture = noise(200, 290)  # the network sees 192 x 288, multiples of 32
    likely = torch.zeros(1, 1, 192, 288)
    seen = [(20, 30, 100, 20), (150, 100, 90, 40)]  # left, top, width, height
    for left, top, width, height in seen:
        likely[..., top : top + height, left : left + width] = 0.9
    likely[..., 160:180, 20:100] = 0.5  # in doubt
    likely[..., 5:7, 200:260] = 0.9  # too thin
    monkeypatch.setattr(reader.detector, "network", answers(likely))
    boxes = sorted(reader.boxes(picture))
    assert len(boxes) == 2
    for box, (left, top, width, height) in zip(boxes, seen, strict=True):
        # The network was trained on shrunken lines: 1.5 area / perimeter is added on each side.
        w, h = width - 1, height - 1
        grown = 1.5 * w * h / (2 * (w + h))
        x = [(left - grown) * 290 / 288, (left + w + grown) * 290 / 288]
        y = [(top - grown) * 200 / 192, (top + h + grown) * 200 / 192]
        expected = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
        np.testing.assert_allclose(box, expected, atol=1.1)


def test_lines_are_found_cut_out_and_read_in_order(
    rec: Path, det: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars of colour stand for lines of text, and the networks tell colours from white."""
    pytest.importorskip("cv2")
    colours = {"a": (200, 0, 0), "b": (0, 160, 0), "c": (0, 0, 200), "d": (180, 180, 0)}
    picture = Image.new("RGB", (320, 224), "white")
    pen = ImageDraw.Draw(picture)
    for colour, place in zip(
        colours.values(),
        [(170, 20, 300, 50), (20, 150, 300, 200), (20, 30, 140, 58), (150, 84, 180, 140)],
        strict=True,
    ):
        pen.rectangle(place, fill=colour)
    scorer: Any = loading.scorer_class("ocr")(Place(), rec=str(rec), det=str(det))
    reader = scorer.read

    def detect(pixels: torch.Tensor) -> torch.Tensor:
        white = pixels.amax(dim=(2, 3), keepdim=True)
        return (pixels < white - 0.1).any(dim=1, keepdim=True) * 0.9

    def recognise(pixels: torch.Tensor) -> torch.Tensor:
        line = pixels[0, :, 12:36, 40:60].mean(dim=(1, 2)) * 127.5 + 127.5
        wanted = torch.tensor(list(colours.values()), dtype=torch.float32)
        nearest = 1 + int((wanted - line).abs().sum(dim=1).argmin())
        return torch.nn.functional.one_hot(torch.tensor([[nearest, 0]]), len(CHARACTERS)).float()

    monkeypatch.setattr(reader.detector, "network", answers(detect))
    monkeypatch.setattr(reader.recogniser, "network", answers(recognise))
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert reader(picture) == "cadb"
    scores = scorer.score(images.expand(3, -1, -1, -1), ['"c a d b"', '"cabd"', "none"], None)
    assert scores[:2] == [1, 0.5]
    assert math.isnan(scores[2])


def test_boxes_are_read_like_a_page() -> None:
    def box(left: int, top: int, right: int, bottom: int) -> ppocr.Box:
        return (left, top), (right, top), (right, bottom), (left, bottom)

    page = [
        box(10, 14, 90, 40),
        box(100, 8, 200, 36),  # higher, yet of the same line
        box(205, 16, 220, 30),
        box(10, 50, 60, 70),
        box(70, 52, 90, 72),
        box(5, 80, 200, 99),
    ]
    for order in itertools.permutations(page):
        assert ppocr.reading_order(order) == page
    assert ppocr.reading_order([]) == []


def test_a_line_at_an_angle_is_cut_out_upright() -> None:
    line = noise(5, 20).resize((160, 40), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (240, 240), "white")
    picture.paste(line, (40, 100))
    box = ((40, 100), (200, 100), (200, 140), (40, 140))
    assert ppocr.cut_out(picture, box).tobytes() == line.tobytes()
    angle = math.radians(30)
    turned = picture.rotate(30, resample=Image.Resampling.BICUBIC)

    def corner(x: int, y: int) -> tuple[int, int]:
        dx, dy = x - 120, y - 120
        right = dx * math.cos(angle) + dy * math.sin(angle)
        down = dy * math.cos(angle) - dx * math.sin(angle)
        return round(120 + right), round(120 + down)

    a, b, c, d = (corner(*point) for point in box)
    found = ppocr.cut_out(turned, (a, b, c, d)).resize((160, 40))
    assert np.abs(np.asarray(found, int) - np.asarray(line, int)).mean() < 6


def test_a_tall_line_is_turned_to_the_left() -> None:
    picture = noise(90, 60)
    tall = ppocr.cut_out(picture, ((0, 0), (60, 0), (60, 90), (0, 90)))
    assert tall.tobytes() == picture.rotate(90, expand=True).tobytes()
    square = ppocr.cut_out(picture, ((0, 0), (60, 0), (60, 89), (0, 89)))
    assert square.size == (60, 89)


def test_the_networks_work_where_and_in_what_the_scorer_does(rec: Path, det: Path) -> None:
    pytest.importorskip("cv2")
    place = Place(device=torch.device("cpu"), dtype=torch.bfloat16)
    reader = ppocr.PpOcr(place, rec=str(rec), det=str(det))
    assert reader.detector is not None
    for network in (reader.detector.network, reader.recogniser.network):
        assert not network.training
        weights = list(network.parameters())
        assert {weight.dtype for weight in weights} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in weights)
    assert isinstance(reader(noise(64, 96)), str)


def test_what_is_no_ppocr_is_refused(rec: Path, det: Path, tmp_path: Path) -> None:
    import shutil

    def changed(name: str, *, without: str) -> Path:
        folder = Path(shutil.copytree(rec, tmp_path / name))
        (folder / without).unlink()
        return folder

    pickled = changed("pickled", without="model.safetensors")
    network = PPOCRV5MobileRecForTextRecognition.from_pretrained(rec)
    torch.save(network.state_dict(), pickled / "pytorch_model.bin")
    unnamed = changed("unnamed", without="preprocessor_config.json")
    AutoImageProcessor.from_pretrained(det).save_pretrained(unnamed)
    few = changed("few", without="preprocessor_config.json")
    PPOCRV5ServerRecImageProcessor(character_list=CHARACTERS[:-1]).save_pretrained(few)  # pyright: ignore
    for options, words in [
        (f"rec={tmp_path}/nothing", "nothing cannot be read"),
        ("rec=owner/name", "owner/name cannot be read"),
        (f"rec={ROOT}/models/pocket-clip", "it is a clip, not a rec"),
        (f"rec={det}", "it is a pp_ocrv5_mobile_det, not a rec"),
        (f"rec={pickled}", "pickled cannot be read .*safetensors"),
        (f"rec={few}", "few names 7 characters for the 8"),
        (f"rec={unnamed}", "unnamed"),
        (f"det={det}", "needs rec="),
    ]:
        with pytest.raises(UserError, match=words):
            rewards.load(f"ocr[{options}]")


def test_weights_that_are_missing_are_not_made_up(rec: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(rec, tmp_path / "half"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["head.head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"half is incomplete: it has no head\.head\.weight"):
        rewards.load(f"ocr[rec={folder}]")


def test_without_opencv_only_lines_are_read(
    rec: Path, det: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    rewards.load(f"ocr[rec={rec}]")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"opencv.*sd-dojo\[ocr\]"):
        rewards.load(f"ocr[rec={rec},det={det}]")
