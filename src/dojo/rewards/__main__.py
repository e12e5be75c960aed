"""Scores pictures, and serves scorers to other processes.

python -m dojo.rewards list
python -m dojo.rewards score aesthetic,pickscore --images outputs/grid --prompts prompts.txt
python -m dojo.rewards serve pickscore,hpsv2.1 --port 8000
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dojo.cli import TrainingStopped, UserError
from dojo.data.formats import picture_suffixes
from dojo.data.images import BadSample, read_image
from dojo.data.lines import split_lines, split_options
from dojo.rewards import Reward, load, table
from dojo.rewards.scorer import DTYPES
from dojo.rewards.server import Server


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; a user's mistake is 2."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("reward", metavar="SPEC", help='scorers, as "aesthetic=0.5,pickscore"')
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights")
    parser = argparse.ArgumentParser(
        prog="python -m dojo.rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the scorers there are")
    score = commands.add_parser("score", parents=[common], help="score a folder, write a CSV")
    score.add_argument("--images", type=Path, required=True, metavar="DIR")
    score.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="text with a line per picture in the order of their names, or .jsonl with file_name "
        "and text (or prompt); its other columns are metadata",
    )
    score.add_argument(
        "--output", type=Path, metavar="FILE", help="the CSV; DIR/scores.csv by default"
    )
    serve = commands.add_parser("serve", parents=[common], help="serve over HTTP")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--batch_size", type=int, default=16, help="pictures at a time")
    flags = parser.parse_args(argv)
    try:
        if flags.command == "list":
            print(table())
        elif flags.command == "score":
            _score(flags)
        else:
            _serve(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _load(flags: argparse.Namespace, batch_size: int = 1) -> Reward:
    try:
        device = torch.device(flags.device)
    except RuntimeError:
        raise UserError(f"--device: {flags.device} is no device") from None
    if batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    return load(flags.reward, device=device, dtype=DTYPES[flags.dtype], batch_size=batch_size)


# -- serve ------------------------------------------------------------------------------------


def _serve(flags: argparse.Namespace) -> None:
    reward = _load(flags, flags.batch_size)
    with Server(reward, (flags.host, flags.port)) as server:
        host, port = server.server_address[:2]
        names = ", ".join(server.alone)
        print(f"serving {names} on http://{host}:{port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


# -- score ------------------------------------------------------------------------------------


def _score(flags: argparse.Namespace) -> None:
    rows = read_rows(flags.images, flags.prompts)
    reward = _load(flags)
    output = flags.output or flags.images / "scores.csv"
    columns: dict[str, list[float]] = {name: [] for name in reward.weights}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="", encoding="utf-8") as file, torch.no_grad():
        writer = csv.writer(file)
        writer.writerow(["file_name", "prompt", "score", "valid", *columns])
        for row in tqdm(rows, desc="scoring", unit="picture"):
            # One at a time: sizes may differ, and a score must not hang on the others.
            result = reward(read_picture(row["path"]), [row["prompt"]], [row["metadata"]])
            values = {name: float(column) for name, column in result.components.items()}
            for name, value in values.items():
                columns[name].append(value)
            score = float(result.scores) if bool(result.valid) else float("nan")
            writer.writerow(
                [row["path"].name, row["prompt"], score, bool(result.valid), *values.values()]
            )
    for name, values in columns.items():
        known = np.array([value for value in values if value == value])
        summary = f"{known.mean():.4f} +- {known.std():.4f}" if len(known) else "no score"
        print(f"{name}: {summary} over {len(known)} of {len(values)} pictures")
    print(output)


def read_rows(folder: Path, prompts: Path) -> list[dict]:
    """The pictures of a folder with their prompts and metadata.

    Raises:
        UserError: something is missing, or the numbers differ.
    """
    if not folder.is_dir():
        raise UserError(f"--images: there is no folder {folder}")
    if not prompts.is_file():
        raise UserError(f"--prompts: there is no file {prompts}")
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in picture_suffixes())
    lines = split_lines(prompts.read_text(encoding="utf-8-sig"))
    if prompts.suffix != ".jsonl":
        if len(lines) != len(pictures) or not lines:
            raise UserError(
                f"{prompts} has {len(lines)} prompts, {folder} {len(pictures)} pictures"
            )
        return [
            {"path": path, "prompt": _prompt(prompts, line), "metadata": {}}
            for path, line in zip(pictures, lines, strict=True)
        ]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, prompt = Path(row["file_name"]), row.get("text", row.get("prompt"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{prompts}: entry {number} has no file_name") from None
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{prompts}: entry {number} leads out of the folder: {name}")
        path = folder / name
        if not isinstance(prompt, str) or not path.is_file():
            missing = "no text" if path.is_file() else f"a picture that is not there, {path}"
            raise UserError(f"{prompts}: entry {number} has {missing}")
        rows.append({"path": path, "prompt": prompt, "metadata": row})
    if not rows:
        raise UserError(f"{prompts} is empty")
    return rows


def _prompt(file: Path, line: str) -> str:
    """The prompt of a line, without the options that a picture was drawn with."""
    try:
        return split_options(line)[0]
    except ValueError as error:
        raise UserError(f"{file}: {line!r}: {error}") from None


def read_picture(path: Path) -> Tensor:
    """float32 [1, 3, H, W] in [0, 1]."""
    try:
        pixels = np.array(read_image(path, str(path)))
    except BadSample as error:
        raise UserError(f"--images: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


if __name__ == "__main__":
    sys.exit(main())
