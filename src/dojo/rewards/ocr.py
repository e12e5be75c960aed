"""How much of the text that a prompt asks for can be read in the picture.

The wheel of rapidocr carries its models (PP-OCR v6, for Chinese and English), so nothing is
downloaded: `pip install "sd-dojo[ocr]"`. It reads on the CPU. With `det` and `rec`, the folders or
hub ids of PP-OCR's weights, transformers reads on the scorer's device instead. A picture that
repeats or surrounds the text scores in full, so watch the pictures.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.files.pictures import to_pil
from dojo.lazy import torch
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# Straight, curly, low and corner quotes; single ones are apostrophes too often.
_QUOTED = re.compile(r'"([^"]+)"|[“”„]([^“”„]+)[“”]|«([^»]+)»|「([^」]+)」')


class Ocr(Scorer):
    """1 - (edit distance to the wanted text) / (its length), 1 if the wanted text is in what was
    read; as Flow-GRPO (arXiv:2505.05470) scores it. Case and spaces do not count.

    The wanted text is the metadata's `ocr_text`, or else what stands in double quotes in the
    prompt, all of it in its order. Where there is neither, there is no score.

    Options: `rec` is PP-OCR's recogniser, `det` its detector, which finds the lines to read;
    without it the whole picture is read as one line. With neither, rapidocr finds and reads.
    """

    range = "0 to 1"
    checkpoint = "in the wheel of rapidocr; or det, rec: PaddlePaddle/PP-OCRv5_*_safetensors"
    size = "32 MB"
    places = ("rec", "det")
    licence = "Apache-2.0"

    def __init__(self, place: Place, *, det: str | None = None, rec: str | None = None) -> None:
        super().__init__(place)
        self.read: Callable[[Image.Image], str]
        if rec is not None:
            from dojo.rewards.ppocr import PpOcr

            self.read = PpOcr(place, rec=rec, det=det)
        elif det is not None:
            raise UserError("--reward: ocr[det=...] needs rec=... too, which reads what det finds")
        else:
            self.read = _rapidocr()

    def cannot_score(self, prompt: str, row: Mapping[str, Any]) -> str:
        if wanted(prompt, row):
            return ""
        return "it names no text to read: put it in double quotes, or into a column ocr_text"

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        rows = metadata or [{}] * len(prompts)
        targets = [wanted(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        return [
            likeness(target, self.read(picture)) if target else torch.nan
            for target, picture in zip(targets, to_pil(images), strict=True)
        ]


def _rapidocr() -> Callable[[Image.Image], str]:
    """The reader of the wheel; what it is not sure of is left out."""
    try:
        from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--reward: ocr needs the packages rapidocr and onnxruntime ({error}); "
            'install them with `pip install "sd-dojo[ocr]"`'
        ) from error
    engine: Any = RapidOCR(params={"Global.log_level": "error"})
    return lambda picture: "".join(engine(picture).txts or ())


def wanted(prompt: str, row: Mapping[str, Any]) -> str:
    """The text that the picture should show, as it is compared; empty if none is asked for."""
    told = row.get("ocr_text")
    if told is not None:
        return plain(str(told))
    return plain("".join("".join(groups) for groups in _QUOTED.findall(prompt)))


def plain(text: str) -> str:
    """Without case, spaces and variants of letters (full width, ligatures)."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def likeness(target: str, read: str) -> float:
    """In [0, 1]; `target` is plain already and not empty."""
    read = plain(read)
    if target in read:
        return 1.0
    return 1 - min(edits(target, read), len(target)) / len(target)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: how many insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (char != other)))
    return row[-1]
