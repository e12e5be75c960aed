"""Scores pictures, and serves scorers to other processes.

python -m dojo.rewards list
python -m dojo.rewards score aesthetic,pickscore --images outputs/demo
python -m dojo.rewards score aesthetic,pickscore --images outputs/grid --prompts prompts.txt
python -m dojo.rewards serve pickscore,hpsv2.1 --port 8000
"""

from __future__ import annotations

import argparse
import csv
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dojo import files
from dojo.bars import Bar
from dojo.cli import TrainingStopped, UserError, ended
from dojo.cli.masking import hide
from dojo.lazy import torch
from dojo.models.precisions import dtype_of, exact_float32
from dojo.rewards import Reward, check_prompts, load, table
from dojo.rewards.folder import RECORDS, read_picture, read_rows

_COLUMNS = ("file_name", "prompt", "score", "valid")  # of the table, before the components


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; a user's mistake is 2."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("reward", metavar="SPEC", help='scorers, as "aesthetic=0.5,pickscore"')
    common.add_argument("--device", help="by default a GPU where there is one")
    common.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the weights"
    )
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
        metavar="FILE",
        help="text with a line per picture in the order of their names, or .jsonl, .json or .csv "
        "with file_name and text (or prompt, caption), whose other columns are metadata; by "
        f"default what lies in DIR: {', '.join(RECORDS)}",
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
        print(hide(f"error: {error}"), file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(hide(f"stopped: {error}"), file=sys.stderr)
        return 1
    return 0


def _load(flags: argparse.Namespace, batch_size: int = 1) -> Reward:
    try:
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(flags.device or usual)
    except RuntimeError:
        raise UserError(f"--device: {flags.device} is no device") from None
    if batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    exact_float32()
    return load(flags.reward, device=device, dtype=dtype_of(flags.dtype), batch_size=batch_size)


# -- serve ------------------------------------------------------------------------------------


def _serve(flags: argparse.Namespace) -> None:
    try:
        from dojo.rewards.server import Server
    except ImportError as error:
        raise UserError(
            f"serve needs the packages uvicorn and starlette ({error}); install them with "
            '`pip install "sd-dojo[serve]"`'
        ) from error
    # A server is ended by either signal, once its last answer is out.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        reward = _load(flags, flags.batch_size)
        server = Server(reward, (flags.host, flags.port))
        host, port = server.server_address
        names = ", ".join(server.alone)
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {names} on http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)


# -- score ------------------------------------------------------------------------------------


def _score(flags: argparse.Namespace) -> None:
    rows = read_rows(flags.images, flags.prompts)
    output = flags.output or flags.images / "scores.csv"
    ours = ",".join(_COLUMNS)
    files.check_output(output, "--output", is_ours=lambda text: text.startswith(ours))
    reward = _load(flags)
    check_prompts(print, reward, rows)
    columns: dict[str, list[float]] = {name: [] for name in reward.weights}
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: what a reward that breaks has scored until then stays beside it.
    partial = output.with_name(f"{output.name}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file, torch.no_grad():
            writer = csv.writer(file)
            writer.writerow([*_COLUMNS, *columns])
            for row in Bar(rows, desc="scoring", unit="picture"):
                # One at a time: sizes may differ, and a score must not hang on the others.
                result = reward(read_picture(row.path), [row.text], [row.metadata])
                values = {name: float(column) for name, column in result.components.items()}
                for name, value in values.items():
                    columns[name].append(value)
                score = float(result.scores) if bool(result.valid) else float("nan")
                writer.writerow([row.name, row.text, score, bool(result.valid), *values.values()])
    except (UserError, TrainingStopped) as error:
        raise type(error)(f"{error}; the scores until then are in {partial}") from error
    partial.replace(output)
    for name, values in columns.items():
        known = np.array([value for value in values if value == value])
        summary = f"{known.mean():.4f} +- {known.std():.4f}" if len(known) else "no score"
        print(f"{name}: {summary} over {len(known)} of {len(values)} pictures")
    print(output)


if __name__ == "__main__":
    sys.exit(ended(main))
