"""PP-OCR by transformers: a detector finds the lines of text in a picture, a recogniser reads them.

Published are PaddlePaddle/PP-OCRv5_{server,mobile}_{det,rec}_safetensors.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from dojo.cli import UserError
from dojo.lazy import torch, transformers
from dojo.models import loaded
from dojo.rewards import weights
from dojo.rewards.scorer import Place

Point = tuple[int, int]
Box = tuple[Point, Point, Point, Point]
"""The corners (x, y) of a rectangle at any angle, clockwise from the top left one."""

_KINDS = {"det": "AutoModelForObjectDetection", "rec": "AutoModelForTextRecognition"}


class PpOcr:
    """Reads a picture: `reader(picture)` is its text, line after line, without breaks.

    Text that stands on its head is not turned: nothing here tells it from upright text.
    """

    def __init__(self, place: Place, *, rec: str, det: str | None = None) -> None:
        """Loads the networks.

        Args:
            rec: folder or hub id of the recogniser.
            det: the same of the detector; without one the whole picture is taken for one line.
        Raises:
            UserError: one of them is not there or something else, or a package is missing.
        """
        if det is not None:
            try:
                importlib.import_module("cv2")  # transformers finds the boxes with it
            except ImportError as error:
                raise UserError(
                    f"--reward: ocr[det=...] needs the package opencv-python-headless ({error}); "
                    'install it with `pip install "sd-dojo[ocr]"`'
                ) from error
        self.recogniser = _Network(rec, "rec", place)
        self.detector = None if det is None else _Network(det, "det", place)
        characters = len(getattr(self.recogniser.processor, "character_list", ()))
        classes = self.recogniser.network.config.head_out_channels
        if characters < classes:
            raise UserError(
                f"--reward: {rec} names {characters} characters for the {classes} it can tell "
                "apart (character_list in its preprocessor_config.json)"
            )

    def __call__(self, picture: Image.Image) -> str:
        if self.detector is None:
            return self.read(picture)
        boxes = reading_order(self.boxes(picture))
        return "".join(self.read(cut_out(picture, box)) for box in boxes)

    def boxes(self, picture: Image.Image) -> list[Box]:
        """Where the detector sees lines of text, in no order."""
        assert self.detector is not None
        found = self.detector.processor.post_process_object_detection(
            self.detector(picture), target_sizes=torch.tensor([[picture.height, picture.width]])
        )
        return [_box(corners) for corners in found[0]["boxes"].tolist()]

    def read(self, line: Image.Image) -> str:
        """The text of a picture that shows one line and little else."""
        # One by one: the image processor would stretch the lines of a batch to one width.
        found = self.recogniser.processor.post_process_text_recognition(self.recogniser(line))
        return found[0]["text"]


class _Network:
    """A detector or a recogniser with the image processor that stands beside it."""

    def __init__(self, model: str, kind: Literal["det", "rec"], place: Place) -> None:
        where = weights.locate(model)
        try:
            config: Any = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
            if not re.fullmatch(rf"pp_ocrv\d+_\w+_{kind}", config.model_type):
                raise ValueError(f"it is a {config.model_type}, not a {kind} of PP-OCR")
            self.processor: Any = transformers.AutoImageProcessor.from_pretrained(
                where, trust_remote_code=False
            )
        except Exception as error:  # the libraries have many kinds of them
            raise weights.missing(model, error) from error
        network = loaded.network(
            *(getattr(transformers, _KINDS[kind]), where),
            flag="--reward",
            config=config,
            dtype=place.dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self.network: Any = network.requires_grad_(False).eval().to(place.device)
        self.place = place

    def __call__(self, picture: Image.Image) -> Any:
        """The output for one picture; its `last_hidden_state` are probabilities in float32."""
        pixels = self.processor(picture, return_tensors="pt").pixel_values
        output = self.network(pixel_values=pixels.to(self.place.device, self.place.dtype))
        output.last_hidden_state = output.last_hidden_state.float()  # numpy has no bfloat16
        return output


def _box(corners: Sequence[Sequence[int]]) -> Box:
    a, b, c, d = ((int(x), int(y)) for x, y in corners)
    return a, b, c, d


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Line by line from the top, each line from the left.

    A box is in a line if its middle is between top and bottom of the line's first, highest box.
    """
    lines: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: _mean(box, 1)):
        if lines and _mean(box, 1) < max(y for _, y in lines[-1][0]):
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line, key=lambda box: _mean(box, 0))]


def _mean(box: Box, axis: int) -> float:
    return sum(corner[axis] for corner in box) / 4


def cut_out(picture: Image.Image, box: Box) -> Image.Image:
    """The box as a picture of its own, with its top edge on top.

    One that is 1.5 times as high as wide, or higher, is taken for vertical writing and turned by 90
    degrees to the left, as PaddleOCR does.
    """
    top_left, top_right, bottom_right, bottom_left = box
    width = max(math.dist(top_left, top_right), math.dist(bottom_left, bottom_right))
    height = max(math.dist(top_left, bottom_left), math.dist(top_right, bottom_right))
    line = picture.transform(
        (max(1, round(width)), max(1, round(height))),
        Image.Transform.QUAD,
        (*top_left, *bottom_left, *bottom_right, *top_right),
        Image.Resampling.BICUBIC,
    )
    return line.transpose(Image.Transpose.ROTATE_90) if height >= 1.5 * width else line
