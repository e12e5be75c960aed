"""Says in numbers what a training changed in drawn pictures: style, content, subject, class.

Nothing here asks the trained model: the verifier reads the scenes, arithmetic on colours finds the
style, and an ImageNet network looks at the subject. Pictures are uint8 [B, 64, 64, 3]. The proofs
read their runs and write their reports by the functions at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dojo.cli import UserError
from dojo.files.records import read_rows
from dojo.pocket import likeness, scenes, style, verifier


@dataclass(frozen=True)
class Measured:
    """A mean over pictures and its standard error."""

    mean: float
    error: float

    @property
    def percent(self) -> str:
        """For a share: 48 ± 3 %."""
        return f"{Measured(100 * self.mean, 100 * self.error).number} %"

    @property
    def number(self) -> str:
        """With one digit of the error: 0.44 ± 0.01; without it where it is 0."""
        if not self.error:
            return f"{self.mean:.3g}"
        digits = max(0, -math.floor(math.log10(self.error)))
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


def share(values: Sequence[bool]) -> Measured:
    """The share of true ones, with the binomial standard error."""
    mean = sum(values) / len(values)
    return Measured(mean, math.sqrt(mean * (1 - mean) / len(values)))


def average(values: Sequence[float]) -> Measured:
    """The mean with its standard error."""
    spread = float(np.std(values, ddof=1))
    return Measured(float(np.mean(values)), spread / math.sqrt(len(values)))


def content(found: np.ndarray, captions: Sequence[str]) -> dict[str, Measured]:
    """The share of pictures in which all of the caption holds, and the mean partial credit."""
    pairs = list(zip(found, [scenes.parse(caption) for caption in captions], strict=True))
    return {
        "strict": share([verifier.strict(picture, spec) for picture, spec in pairs]),
        "graded": average([verifier.graded(picture, spec) for picture, spec in pairs]),
    }


def framed(found: np.ndarray, captions: Sequence[str]) -> dict[str, Measured]:
    """The share in the framed style, and the content of the scenes without their frames."""
    scene = np.stack([style.inside(picture) for picture in found])
    framed = share([style.is_framed(picture) for picture in found])
    return {"style": framed, **content(scene, captions)}


def subject(found: np.ndarray, photographs: np.ndarray) -> dict[str, Measured]:
    """Likeness to photographs, and the probability that the network gives to dogs."""
    references, _ = likeness.look(photographs)
    features, dog = likeness.look(found)
    return {
        "likeness": average(likeness.likeness(features, references).tolist()),
        "dog": average(dog.tolist()),
    }


def photographs_alone(photographs: np.ndarray) -> dict[str, Measured]:
    """What `subject` would say of new photographs: each against the others."""
    features, dog = likeness.look(photographs)
    return {
        "likeness": average(likeness.likeness_among(features).tolist()),
        "dog": average(dog.tolist()),
    }


def drift(found: np.ndarray, before: np.ndarray) -> Measured:
    """The mean absolute difference of two stacks of pictures, in levels of 0 to 255."""
    return average(np.abs(found.astype(np.float32) - before).mean(axis=(1, 2, 3)).tolist())


# ---- Runs and reports ----


def metrics(folder: Path, script: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; one that a kill cut off is left out.

    Raises:
        UserError: there is no run; it names the `script` that makes it.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"there is no {path}: bash scripts/{script} makes it")
    return read_rows(path)[0]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Writes measurements in readable form."""
    path.write_text(json.dumps(content, indent=1, default=asdict) + "\n", encoding="utf-8")
