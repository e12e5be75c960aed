"""The trackers that show a run's numbers: tensorboard, wandb, swanlab, mlflow."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.run import folders

if TYPE_CHECKING:
    import accelerate

TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")


def chosen(choices: Sequence[str]) -> list[Any]:
    """The trackers that `--report_to` means.

    Raises:
        UserError: one that it names is not installed.
    """
    installed = [name for name in TRACKERS if find_spec(name)]
    missing = [name for name in TRACKERS if name in choices and name not in installed]
    if missing:
        told = ", ".join(
            f"the package {name} is not installed (pip install {_package(name)})"
            for name in missing
        )
        raise UserError(f"--report_to {' '.join(choices)}: {told}")
    return [name for name in installed if name in choices or "all" in choices]


def _package(name: str) -> str:
    """What pip is told to install: an extra, but for the one that comes with the requirements."""
    return name if name == "tensorboard" else f'-e ".[{name}]"'


def files(project: str) -> list[str]:
    """What the trackers write below the output folder, as patterns: they choose the names."""
    board = f"logs/{glob.escape(project)}/*"
    return [
        *(f"{board}events.out.tfevents.*", f"{board}hparams.yml"),
        *("logs/wandb/*run-*/*", "logs/wandb/*latest-run", "logs/wandb/*debug*.log"),
        *("logs/swanlab/run-*/*", "logs/swanlab/.gitignore"),
        *("logs/mlflow.db*", "logs/mlflow/*/artifacts/*"),
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
    names, name = [str(tracker) for tracker in accelerator.log_with], args.run.name
    if accelerator.is_main_process and "wandb" in names:
        (logs / "wandb").mkdir(parents=True, exist_ok=True)  # it would go elsewhere without
    places: dict[str, Any] = {
        "wandb": {"dir": logs, "name": name},
        "swanlab": {"logdir": str(logs / "swanlab"), "experiment_name": name},
        "mlflow": {"run_name": name},
    }
    try:
        if accelerator.is_main_process and "mlflow" in names:
            places["mlflow"] |= _place_of_mlflow(logs)
        with _masked_command_line():
            accelerator.init_trackers(
                args.run.tracker_project_name, config=_flat(args), init_kwargs=places
            )
    except Exception as error:  # each has its own kind: no key, no network
        raise UserError(
            f"--report_to {' '.join(args.run.report_to)}: the tracker did not start "
            f"({str(error).strip().splitlines()[0]}); without an account or a network set "
            "WANDB_MODE=offline, SWANLAB_MODE=offline"
        ) from error


def _place_of_mlflow(logs: Path) -> dict[str, Any]:
    """Keeps the records in the run's folder, where no server is named; its words for accelerate.

    Unset, mlflow would write into the folder that the command was started in.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    mlflow: Any = import_module("mlflow")
    logs.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{(logs / 'mlflow.db').resolve()}")
    return {"logging_dir": (logs / "mlflow").resolve().as_uri()}


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Trackers store the command line: they find it without the secrets of its addresses."""
    words = sys.argv
    sys.argv = [hide(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words
