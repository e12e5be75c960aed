"""What a step of `python -m dojo.bench check` found, on the disk as soon as it is known.

A step works in a process of its own and may be killed or die at any line; what it had found until
then is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.files.records import read_if_whole

if TYPE_CHECKING:
    import torch


class Skip(Exception):
    """Why a step cannot be done here, in a sentence."""


@dataclass(frozen=True)
class Place:
    """Where the steps work."""

    folder: Path
    """for models, pictures, runs"""
    pocket: bool = False
    """the pocket models, on whatever there is, instead of models of the published sizes on a GPU"""

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU where there is none."""
        import torch  # takes seconds, and the runner asks only once

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    @property
    def mixed_precision(self) -> str:
        """bfloat16 on a GPU; on a CPU it may be slow."""
        return "bf16" if self.on_gpu else "no"


@dataclass(frozen=True)
class Claim:
    """Something that ought to hold, and whether it does."""

    text: str
    value: str
    """what was found"""
    holds: bool


@dataclass
class Report:
    """What was found so far; every method writes the file anew."""

    file: Path | None = None
    claims: list[Claim] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """of docs/benchmarks.md, by the heading of their table"""
    skipped: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def claim(self, text: str, value: object, holds: bool) -> None:
        """Keeps whether something holds.

        Args:
            value: what was found.
        """
        self.claims.append(
            Claim(text, f"{value:.3g}" if isinstance(value, float) else str(value), bool(holds))
        )
        self._write()

    def below(self, text: str, value: float, limit: float) -> None:
        """Claims that a number is below another one; one that is not a number never is."""
        self.claim(f"{text} (below {limit:g})", float(value), value < limit)

    def note(self, name: str, value: Any) -> None:
        """Keeps a number, or anything that JSON holds."""
        self.numbers[name] = value
        self._write()

    def row(self, table: str, row: Mapping[str, str]) -> None:
        """Keeps a row of a table in docs/benchmarks.md."""
        self.rows.setdefault(table, []).append(dict(row))
        self._write()

    def skip(self, why: str) -> None:
        """Says in a sentence what could not be done here."""
        self.skipped.append(why)
        self._write()

    def remark(self, text: str) -> None:
        """Says something that is worth knowing and nobody's failure."""
        self.remarks.append(text)
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")
            partial.replace(self.file)


def read(file: Path) -> Report:
    """What a step left; an empty report where it left nothing."""
    found = read_if_whole(file)
    return Report(
        claims=[Claim(**claim) for claim in found.get("claims", ())],
        numbers=found.get("numbers", {}),
        rows=found.get("rows", {}),
        skipped=found.get("skipped", []),
        remarks=found.get("remarks", []),
    )
