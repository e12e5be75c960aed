"""Folders that look like runs: rows, options, pictures, a lock, a log."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from PIL import Image

MARKUP = "<img src=x onerror=\"document.title='hit'\"> & <script>document.title='hit'</script>"


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {
            **{"step": step, "epoch": step / 10, "loss": 1 / (step + 1), "lr": 1e-4},
            **{"grad_norm": 0.5, "seconds_train": 2.0, "seconds_data": 0.5},
        }
        for step in range(first, last + 1)
    ]


def append(folder: Path, new: list[dict[str, Any]]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in new))


def make(folder: Path, *, last: int = 20, options: dict[str, Any] | None = None) -> Path:
    """A run of 100 steps that has been stopped."""
    folder.mkdir(parents=True)
    args = {"optim": {"learning_rate": 1e-4, "max_train_steps": 100} | (options or {})}
    args |= {"run": {"output_dir": str(folder), "hub_token": "hf_secret"}}
    record = {"script": "train_lora_sd3.py", "args": args, "seed": 3, "num_steps": 100}
    (folder / "args.json").write_text(json.dumps(record))
    append(folder, rows(1, last))
    return folder


def draw(folder: Path, step: int, label: str = "a red star") -> Path:
    """Validation pictures of a step."""
    place = folder / "validation" / f"step-{step}"
    place.mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, step % 256, 40)).save(place / "0.png")
    pictures = [{"file": "0.png", "label": label}]
    (folder / "validation" / "prompts.json").write_text(json.dumps({"pictures": pictures}))
    return place / "0.png"


def start(folder: Path) -> None:
    """Makes it look at work, by this process."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "", "by": "train.py"}
    (folder / ".lock").write_text(json.dumps(holder))
