"""The trackers that show a run's numbers: tensorboard, wandb, swanlab."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.run import folders

if TYPE_CHECKING:
    import accelerate

TRACKERS = ("tensorboard", "wandb", "swanlab")


def chosen(choice: str) -> list[Any]:
    """The trackers that `--report_to` means.

    Raises:
        UserError: it is not installed.
    """
    if choice == "none":
        return []
    names = [name for name in TRACKERS if choice in (name, "all") and find_spec(name)]
    if choice != "all" and not names:
        raise UserError(f"--report_to {choice}: the package {choice} is not installed")
    return names


def files(project: str) -> list[str]:
    """What the trackers write below the output folder, as patterns: they choose the names."""
    board = f"logs/{glob.escape(project)}/*"
    return [
        *(f"{board}events.out.tfevents.*", f"{board}hparams.yml"),
        *("logs/wandb/*run-*/*", "logs/wandb/*latest-run", "logs/wandb/*debug*.log"),
        *("logs/swanlab/run-*/*", "logs/swanlab/.gitignore"),
    ]


def _flat(args: Any) -> dict[str, Any]:
    """The options as trackers want them: no groups, only simple values."""
    simple = (bool, int, float, str)
    return {
        name: value if isinstance(value, simple) else str(value)
        for group in folders.options(args).values()
        for name, value in (group.items() if isinstance(group, dict) else [])
    }


def start(accelerator: accelerate.Accelerator, args: Any, logs: Path) -> None:
    """Starts them for a run.

    Args:
        args: the script's options, which they store.
        logs: folder of what they write.
    Raises:
        UserError: one did not start.
    """
    choice = args.run.report_to
    if accelerator.is_main_process and choice in ("wandb", "all"):
        (logs / "wandb").mkdir(parents=True, exist_ok=True)  # it would go elsewhere without
    places = {"wandb": {"dir": logs}, "swanlab": {"logdir": str(logs / "swanlab")}}
    try:
        with _masked_command_line():
            accelerator.init_trackers(
                args.run.tracker_project_name, config=_flat(args), init_kwargs=places
            )
    except Exception as error:  # each has its own kind: no key, no network
        raise UserError(
            f"--report_to {choice}: the tracker did not start "
            f"({str(error).strip().splitlines()[0]}); without an account or a network set "
            "WANDB_MODE=offline, SWANLAB_MODE=offline"
        ) from error


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Trackers store the command line: they find it without the secrets of its addresses."""
    words = sys.argv
    sys.argv = [hide(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words
