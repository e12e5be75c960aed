"""Publishes a finished result: a LoRA folder, a pipeline folder, a checkpoint-N or a run's best.

    python -m dojo.publish outputs/hearts                        under the folder's name
    python -m dojo.publish outputs/hearts --hub_model_id me/hearts --private
    python -m dojo.publish outputs/hearts --modelscope_model_id me/hearts

A folder without a model card gets one. Tokens come from HF_TOKEN or `hf auth login`, and from
MODELSCOPE_API_TOKEN or `modelscope login`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dojo.cli import UserError, ended, trouble_with_place
from dojo.files import outputs
from dojo.files.records import read_table
from dojo.models import opening
from dojo.models.family import ModelArgs
from dojo.publish.card import WEIGHTS, write_card
from dojo.publish.hubs import PublishArgs, find_result, name_of, run_of, upload
from dojo.publish.learned import EMBEDDINGS
from dojo.publish.result import class_of
from dojo.run.best import RECORD

_ON_THE_COMMAND_LINE = "rather set {}: every user of the machine sees this command"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; a user's mistake is 2."""
    parser = argparse.ArgumentParser(
        prog="python -m dojo.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="what to publish")
    parser.add_argument(
        "--push_to_hub",
        action="store_true",
        help="to the Hugging Face Hub; the default unless --modelscope_model_id is given",
    )
    parser.add_argument("--hub_model_id", help="repository there, name or owner/name")
    parser.add_argument("--hub_token", help=_ON_THE_COMMAND_LINE.format("HF_TOKEN"))
    parser.add_argument("--modelscope_model_id", help="repository on ModelScope, owner/name")
    parser.add_argument(
        "--modelscope_token", help=_ON_THE_COMMAND_LINE.format("MODELSCOPE_API_TOKEN")
    )
    parser.add_argument(
        "--private", "--hub_private_repo", action="store_true", help="make new repositories private"
    )
    flags = parser.parse_args(argv)
    args = PublishArgs(
        push_to_hub=flags.push_to_hub or bool(flags.hub_model_id) or not flags.modelscope_model_id,
        hub_model_id=flags.hub_model_id,
        hub_token=flags.hub_token,
        hub_private_repo=flags.private,
        modelscope_model_id=flags.modelscope_model_id,
        modelscope_token=flags.modelscope_token,
    )
    try:
        weights = find_result(flags.folder)
        args.check(flags.folder)
        if not (flags.folder / "README.md").is_file():
            for folder in (flags.folder, flags.folder.resolve().parent):  # of a run's part
                outputs.join(folder)
            _write_card(flags.folder, weights, args.hub_model_id)
        upload(flags.folder, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (text := trouble_with_place(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0


def _write_card(folder: Path, weights: str, repo_id: str | None) -> None:
    """A card from what the folder, or the run that it is a part of, tells of itself."""
    options = read_table(run_of(folder) / "args.json").get("args", {})
    model, data = options.get("model", {}), options.get("data", {})
    base = model.get("pretrained_model_name_or_path") or ""
    records = (read_table(folder / name) for name in ("state.json", RECORD, "finished.json"))
    state = next(filter(None, records), {})
    places = ("dataset_name", "train_data_dir", "instance_data_dir", "data_config")
    kinds = {WEIGHTS: ("LoRA", "lora"), EMBEDDINGS: ("Learned words", "textual_inversion")}
    kind = kinds.get(weights, ("Fine-tuned model", "full-fine-tuning"))
    write_card(
        folder,
        title=f"{kind[0]}: {name_of(folder)}",
        base_model=base,
        dataset=next((data[place] for place in places if data.get(place)), ""),
        options=options,
        steps=state.get("step", 0),
        tags=(kind[1], "text-to-image"),
        weights=weights,
        repo_id=repo_id,
        **_opened(base),
    )


def _opened(base: str) -> dict[str, Any]:
    """How diffusers opens the base, as far as its folder is here still and can be read."""
    folder = Path(base).expanduser()
    if not base or not folder.is_dir():
        return {}
    try:
        model = opening.open_model(ModelArgs(pretrained_model_name_or_path=base))
    except UserError:
        return {"pipeline": class_of(folder)}
    return {"pipeline": class_of(model.folder), "opens": model.opens_in_diffusers}


if __name__ == "__main__":
    sys.exit(ended(main))
