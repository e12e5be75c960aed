"""Training every weight of the transformer: which ones, checkpoints, and the pipeline that results.

A checkpoint holds `transformer/` (and `transformer_ema/`) as diffusers reads them; the result is a
whole pipeline folder, and on request one file with the original names.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from dojo import sd3
from dojo.cli import UserError
from dojo.tensors import obey_umask

TRANSFORMER, AVERAGE = "transformer", "transformer_ema"
RESULT = "model_index.json"
SINGLE_FILE = "model.safetensors"
PRESETS = {"adaln": r"(.*\.)?(norm1|norm1_context|norm_out)\.linear\..*"}
_STORED = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FullArgs:
    """What is trained, and in which form the result is saved."""

    train_dtype: Literal["fp32", "bf16"] = "fp32"
    """the trained weights: fp32 masters (with autocast by --mixed_precision), or bf16 with Kahan
    compensation in the optimizer (adamw, lion), for less memory"""
    freeze: tuple[str, ...] = ()
    """weights that stay as they are: adaln (the modulation layers, a third of SD3.5-Medium's
    weights), parts of names (pos_embed, context_embedder, transformer_blocks.0), or re: and a
    regular expression over full names"""
    save_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """precision of the result's transformer and of the single file; checkpoints keep the
    training's own"""
    max_shard_size: str = "5GB"
    """largest file of the result's transformer"""
    single_file: bool = False
    """also write model.safetensors: all of it with the original SD3 names, for other programs"""
    single_file_without_t5: bool = False
    """leave T5 out of that file"""

    def __post_init__(self) -> None:
        if self.single_file_without_t5 and not self.single_file:
            raise ValueError("--single_file_without_t5 needs --single_file")
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


def thaw(transformer: nn.Module, args: FullArgs) -> list[nn.Parameter]:
    """Makes the weights trainable but for the frozen ones, and returns those that train.

    The last block's text query is left alone: nothing reads it, its gradient is zero, and weight
    decay would eat it.

    Raises:
        UserError: a pattern of `--freeze` matches nothing, or everything is frozen.
    """
    names = [name for name, _ in transformer.named_parameters()]
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
    for name, param in transformer.named_parameters():
        param.requires_grad_(name not in still)
    params = [param for param in transformer.parameters() if param.requires_grad]
    if not params:
        raise UserError(f"--freeze {' '.join(args.freeze)} leaves nothing to train")
    return params


def _dead(names: list[str]) -> list[str]:
    blocks = [int(m[1]) for name in names if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    parts = ("attn.add_q_proj", "attn.norm_added_q")
    prefixes = tuple(f"transformer_blocks.{max(blocks)}.{part}." for part in parts)
    return [name for name in names if name.startswith(prefixes)]


def save(folder: Path, transformer: Any) -> None:
    """Writes the transformer in its own precision, for a checkpoint."""
    transformer.save_pretrained(folder)


def restore(folder: Path, transformer: nn.Module) -> None:
    """Reads a checkpoint's transformer back, to the bit.

    Raises:
        UserError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is no checkpoint of full fine-tuning: no {folder.name}")
    dtype = next(transformer.parameters()).dtype
    saved: Any = SD3Transformer2DModel.from_pretrained(folder, dtype=dtype)
    transformer.load_state_dict(saved.state_dict())


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
    with torch.device("meta"):
        twin: Any = SD3Transformer2DModel.from_config(transformer.config)
    cast = {name: value.to("cpu", dtype) for name, value in transformer.state_dict().items()}
    twin.load_state_dict(cast, assign=True)
    # Of a longer run's shorter past: its shards and its index would stand beside the new files.
    shutil.rmtree(folder / TRANSFORMER, ignore_errors=True)
    (folder / SINGLE_FILE).unlink(missing_ok=True)
    twin.save_pretrained(folder / TRANSFORMER, max_shard_size=args.max_shard_size)
    for path in (folder / TRANSFORMER).glob("*.safetensors"):
        obey_umask(path)
    config.make_scheduler(shift).save_pretrained(folder / "scheduler")
    sd3.copy_parts(config, model, folder, ("vae", *sd3.TEXT_FOLDERS))
    if args.single_file:
        modules: dict[str, Any] = sd3.load_text_pipeline(config, model, dtype).components
        exact = replace(model, vae_dtype="no")  # whatever it was encoded with
        modules["vae"] = sd3.load_vae(config, exact, torch.device("cpu"))
        parts = {name: modules[name].state_dict() for name in _STORED if modules[name] is not None}
        sd3.save_single_file(
            folder / SINGLE_FILE,
            {**parts, "transformer": cast},
            dtype,
            with_t5=not args.single_file_without_t5,
            title=folder.resolve().name,
        )
