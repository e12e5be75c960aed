"""Training every weight of a network: which ones, checkpoints, and the pipeline that results.

A checkpoint holds `transformer/` (and `transformer_ema/`), for a UNet `unet/` (and `unet_ema/`), as
diffusers reads them; the result is a whole pipeline folder, and of SD3 on request one file with the
original names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dojo.cli import TrainingStopped, UserError
from dojo.files import outputs
from dojo.files.tensors import obey_umask
from dojo.models import loaded, sd3, sd15
from dojo.models.folder import TRANSFORMER, part_of
from dojo.run import finite

_EMA = "_ema"
AVERAGE = TRANSFORMER + _EMA
RESULT = "model_index.json"
SINGLE_FILE = "model.safetensors"
PRESETS = {"adaln": r"(.*\.)?(norm1|norm1_context|norm_out)\.linear\..*"}
_STORED = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class WholeArgs:
    """What is trained, and in which form the result is saved."""

    train_dtype: Literal["fp32", "bf16"] = "fp32"
    """the trained weights: fp32 masters (with autocast by --mixed_precision), or bf16 whose lower
    16 bits the optimizer keeps (adamw, lion, adafactor): float32's steps, a fifth less memory"""
    freeze: tuple[str, ...] = ()
    """weights that stay as they are: adaln (SD3's modulation layers, a third of SD3.5-Medium's
    weights), parts of names (pos_embed, context_embedder, transformer_blocks.0, conv_in), or re:
    and a regular expression over full names"""
    save_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """precision of the result's network (and single file); checkpoints keep the training's own"""
    max_shard_size: str = "5GB"
    """largest file of the result's network"""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(GB|MB|KB)", self.max_shard_size):
            raise ValueError("--max_shard_size is a number with GB, MB or KB, such as 5GB")

    def check(self, dtype: torch.dtype) -> None:
        """Refuses bfloat16 weights in a run that computes in another precision.

        Raises:
            UserError: naming the flag that is missing.
        """
        if self.train_dtype == "bf16" and dtype != torch.bfloat16:
            raise UserError("--train_dtype bf16 needs --mixed_precision bf16")

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained weights."""
        return DTYPES[self.train_dtype]


@dataclass(frozen=True, kw_only=True)
class FullArgs(WholeArgs):
    """The same for SD3, which other programs know as one file too."""

    single_file: bool = False
    """also write model.safetensors: all of it with the original SD3 names, for other programs"""
    single_file_without_t5: bool = False
    """leave T5 out of that file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.single_file_without_t5 and not self.single_file:
            raise ValueError("--single_file_without_t5 needs --single_file")


def average(part: str) -> str:
    """The folder of a checkpoint that holds the averaged weights of a part."""
    return part + _EMA


def thaw(network: nn.Module, args: WholeArgs) -> list[nn.Parameter]:
    """Makes the weights trainable but for the frozen ones, and returns those that train.

    The text query of SD3's last block is left alone: nothing reads it, its gradient is zero, and
    weight decay would eat it.

    Raises:
        UserError: a pattern of `--freeze` matches nothing, or everything is frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    still = set(_dead(names))
    for word in args.freeze:
        pattern = PRESETS.get(word.lower(), rf"(.*\.)?{re.escape(word)}(\..*)?")
        if word.startswith("re:"):
            pattern = word.removeprefix("re:")
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"--freeze: {word!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"--freeze: {word!r} matches no weight; there are, for example, "
                f"{', '.join(names[:4])}"
            )
        still |= found
    for name, param in network.named_parameters():
        param.requires_grad_(name not in still)
    params = [param for param in network.parameters() if param.requires_grad]
    if not params:
        raise UserError(f"--freeze {' '.join(args.freeze)} leaves nothing to train")
    return params


def _dead(names: list[str]) -> list[str]:
    blocks = [int(m[1]) for name in names if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    if not blocks:
        return []
    parts = ("attn.add_q_proj", "attn.norm_added_q")
    prefixes = tuple(f"transformer_blocks.{max(blocks)}.{part}." for part in parts)
    return [name for name in names if name.startswith(prefixes)]


def save(folder: Path, network: Any) -> None:
    """Writes the network in its own precision, for a checkpoint."""
    network.save_pretrained(folder)


def restore(folder: Path, network: Any) -> None:
    """Reads a checkpoint's network back, to the bit.

    Raises:
        UserError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is no checkpoint of full fine-tuning: no {folder.name}")
    flag = "--resume_from_checkpoint"
    saved = loaded.network(type(network), folder, flag=flag, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())


def save_result(
    folder: Path,
    transformer: Any,
    config: sd3.Config,
    model: sd3.ModelArgs,
    args: FullArgs,
    shift: float,
) -> None:
    """Writes the whole pipeline, every component, so that one plain call loads the folder."""
    dtype = DTYPES[args.save_dtype]
    outputs.discard(folder / SINGLE_FILE)  # of a longer run's shorter past
    cast = _save_network(folder, transformer, args)
    config.save_scheduler(folder, shift)
    sd3.copy_parts(config, model, folder, ("vae", *sd3.TEXT_FOLDERS))
    if args.single_file:
        modules: dict[str, Any] = sd3.load_text_pipeline(config, model, dtype).components
        exact = replace(model, vae_dtype="no")  # whatever it was encoded with
        modules["vae"] = sd3.load_vae(config, exact, torch.device("cpu"))
        parts = {name: modules[name].state_dict() for name in _STORED if modules[name] is not None}
        sd3.save_single_file(
            outputs.own(folder / SINGLE_FILE),
            {**parts, "transformer": cast},
            dtype,
            with_t5=not args.single_file_without_t5,
            title=folder.resolve().name,
        )


def save_result_sd15(
    folder: Path, unet: Any, config: sd15.Config, model: sd15.ModelArgs, args: WholeArgs
) -> None:
    """The same for Stable Diffusion 1."""
    _save_network(folder, unet, args)
    sd15.copy_parts(config, model, folder, ("vae", "scheduler", *sd15.TEXT_FOLDERS))


def _save_network(folder: Path, network: Any, args: WholeArgs) -> dict[str, Tensor]:
    """Writes the network's folder of a result, and returns its weights as they are in it."""
    place = folder / part_of(network)
    with torch.device("meta"):
        twin: Any = type(network).from_config(network.config)
    dtype = DTYPES[args.save_dtype]
    cast = {name: value.to("cpu", dtype) for name, value in network.state_dict().items()}
    if finite.not_finite({"weights": cast.values()}):
        raise TrainingStopped(
            f"the result's weights are too large for --save_dtype {args.save_dtype}: it was not "
            "written; give --resume_from_checkpoint latest --save_dtype bf16 (or fp32)"
        )
    twin.load_state_dict(cast, assign=True)

    def write(inside: Path) -> None:
        twin.save_pretrained(inside, max_shard_size=args.max_shard_size)
        for path in inside.glob("*.safetensors"):
            obey_umask(path)

    outputs.fill(place, write)
    return cast
