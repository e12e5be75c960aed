"""The end of a run: its result, card, report and upload, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dojo import report
from dojo.files.records import read_if_whole
from dojo.publish.card import write_card
from dojo.publish.hubs import upload
from dojo.run.folders import options

if TYPE_CHECKING:  # the command line of this package has no run
    from dojo.run.learner import Learner
    from dojo.run.run import Run


class Base(Protocol):
    """The model that was trained."""

    @property
    def folder(self) -> Path:
        """Of its configurations."""
        ...

    @property
    def opens_in_diffusers(self) -> bool:
        """Whether diffusers' `from_pretrained` reads what the user named."""
        ...


class Result(Protocol):
    """What was trained."""

    @property
    def model(self) -> Base:
        """Of which model it is."""
        ...

    @property
    def card_weights(self) -> str:
        """The file of a LoRA, as the model card calls it; "" for a whole pipeline."""
        ...

    def save_result(self, folder: Path) -> Path:
        """Writes what the training was for, and returns the file or folder that holds it."""
        ...


class Evaluation(Protocol):
    """What looked at the model from time to time."""

    def finish(self) -> None:
        """Writes what is to be said of all its looks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the model card says that no option does."""

    title: str
    dataset: str
    """hub id or folder of the data"""
    tags: Sequence[str]
    """by which the hub finds it"""
    instance_prompt: str | None = None
    """the words that call up the subject"""


def finish(
    run: Run, args: Any, learner: Learner, trained: Result, evaluate: Evaluation, card: Card
) -> None:
    """Writes the averaged result with its card and report, ends the run and uploads.

    Args:
        args: the script's options.
    """
    folder = run.output_dir
    result = folder / trained.card_weights
    with learner.result() as writing:
        if writing:
            result = trained.save_result(folder)
    if run.main:
        evaluate.finish()
        write_card(
            folder,
            base_model=args.model.pretrained_model_name_or_path,
            options=options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            weights=trained.card_weights,
            pipeline=class_of(trained.model.folder),
            opens=trained.model.opens_in_diffusers,
            **vars(card),
        )
        report.write(folder)
    run.finish()
    run.say(f"done: {result}")
    if run.main:
        upload(folder, args.publish)


def class_of(folder: Path) -> str | None:
    """diffusers' class of a model's folder, or None where it does not say it."""
    return read_if_whole(folder / "model_index.json").get("_class_name")
