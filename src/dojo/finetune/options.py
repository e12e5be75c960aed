"""Which of a network's weights are trained, where the script leaves it to the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dojo.cli import UserError, option, ranges
from dojo.finetune.adapters import Adapters
from dojo.finetune.contract import Trained
from dojo.finetune.lora import LoraArgs
from dojo.finetune.whole import AllWeights, WholeArgs
from dojo.models.family import Model
from dojo.run.optim import OptimArgs
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
        UserError: `--lora_dropout`, under which two passes differ, or weights of adapters in half
            precision.
    """
    if args.finetune == "full":
        _refuse_storage(lora)
        return AllWeights(run, full)
    if lora.lora_dropout:
        raise UserError("--lora_dropout: the network and its reference would not be comparable")
    if full.train_dtype == "bf16":
        raise UserError(
            "--train_dtype bf16 goes with --finetune full: adapters are float32, since bfloat16 "
            "would round their small steps away"
        )
    return Adapters(run, lora)


def _refuse_storage(args: LoraArgs) -> None:
    """
    Raises:
        UserError: weights that are trained should be stored as only frozen ones can.
    """
    if args.base_precision != "bf16":
        raise UserError(
            f"--base_precision {args.base_precision} stores frozen weights: use --finetune lora, "
            "or for every weight --train_dtype bf16"
        )
    if args.blocks_on_cpu:
        raise UserError(
            f"--blocks_on_cpu {args.blocks_on_cpu} fetches frozen weights: use --finetune lora, or "
            "for every weight --train_dtype bf16 with --activations_on_cpu"
        )


@dataclass(frozen=True, kw_only=True)
class TextEncoderArgs:
    """The CLIP text encoders."""

    train_text_encoder: bool = False
    """train adapters on the CLIP text encoders too; T5 stays as it is"""
    text_encoder_lr: float = 5e-6
    """their learning rate"""
    text_encoder_2_lr: float | None = None
    """that of the second one, CLIP-G; unset is the same"""

    def __post_init__(self) -> None:
        ranges.check(self, "text_encoder_lr text_encoder_2_lr", above=0)
        if self.text_encoder_2_lr is not None and not self.train_text_encoder:
            raise ValueError("--text_encoder_2_lr needs --train_text_encoder")

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of the first and of the second CLIP."""
        first, second = self.text_encoder_lr, self.text_encoder_2_lr
        return first, first if second is None else second

    def check(self, optim: OptimArgs) -> None:
        """
        Raises:
            ValueError: other rates than the network's, with an optimizer that has one.
        """
        one_rate = set(self.rates) == {optim.learning_rate}
        if self.train_text_encoder and optim.kind == "prodigy" and not one_rate:
            raise ValueError("--optimizer prodigy has one rate: --text_encoder_lr must equal it")

    def check_model(self, model: Model) -> None:
        """
        Raises:
            UserError: a rate of an encoder that the model does not have, or encoders that train
                where and as frozen ones may compute.
        """
        frozen = ("text_encoder_device", "text_encoder_precision")
        for name in frozen if self.train_text_encoder else ():
            value = getattr(model.args, name)
            if value != "auto":
                raise UserError(
                    f"--{name} {value} is for frozen text encoders: leave it out, or "
                    "--train_text_encoder"
                )
        if self.text_encoder_2_lr is not None and "text_encoder_2" not in model.text_encoders:
            raise UserError(f"--text_encoder_2_lr: {model.name} has one text encoder")
