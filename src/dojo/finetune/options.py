"""Which of a network's weights are trained, where the script leaves it to the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dojo.cli import UserError, option
from dojo.finetune.adapters import Adapters
from dojo.finetune.contract import Trained
from dojo.finetune.lora import LoraArgs
from dojo.finetune.whole import AllWeights, WholeArgs
from dojo.run.run import Run


@dataclass(frozen=True, kw_only=True)
class FinetuneArgs:
    """What of the model is trained."""

    finetune: Literal["lora", "full"] = option("lora", common=True)
    """lora: adapters (--rank and the like); full: every weight (--train_dtype and the like)"""


@dataclass(frozen=True, kw_only=True)
class FinetuneAllArgs(FinetuneArgs):
    """What of the model is trained; by default all of it."""

    finetune: Literal["lora", "full"] = option("full", common=True)
    """lora: adapters (--rank and the like); full: every weight (--train_dtype and the like)"""


def choose(args: FinetuneArgs, run: Run, *, lora: LoraArgs, full: WholeArgs) -> Trained:
    """What `--finetune` says, for methods that compare two passes over one input.

    Raises:
        UserError: `--lora_dropout`, under which two passes differ.
    """
    if args.finetune == "full":
        return AllWeights(run, full)
    if lora.lora_dropout:
        raise UserError("--lora_dropout: the network and its reference would not be comparable")
    return Adapters(run, lora)
