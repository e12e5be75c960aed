"""A pipeline to draw with, whatever it is given as, and what it should draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from dojo import lora, sd3
from dojo.cli import UserError


def load_pipeline(name: str, dtype: torch.dtype, single_file_config: str | None = None) -> Any:
    """The pipeline of a folder, a hub id or a single SD3 file, quiet, on the CPU.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    flag = "--pretrained_model_name_or_path"
    folder = Path(name)
    if folder.is_file():
        model = sd3.ModelArgs(
            pretrained_model_name_or_path=name, single_file_config=single_file_config
        )
        pipeline: Any = sd3.load_pipeline(sd3.open_model(model), model, dtype, torch.device("cpu"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        is_lora = (folder / lora.WEIGHTS).is_file()
        hint = " (a LoRA folder goes to --lora_weights_path)" if is_lora else ""
        raise UserError(f"{flag}: {name} has no model_index.json{hint}")
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith(("models/", "outputs/"))):
        raise UserError(f"{flag}: there is no folder {name}")
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **_absent_parts(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{flag}: {name} could not be loaded ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _absent_parts(folder: Path) -> dict[str, None]:
    """Parts that a folder says it does not have (T5), as diffusers wants to be told again."""
    index = folder / "model_index.json"
    listed = json.loads(index.read_text()) if index.is_file() else {}
    names = ("text_encoder_3", "tokenizer_3")
    return {name: None for name in names if listed.get(name, [""])[0] is None}


@torch.no_grad()
def embeddings(
    pipeline: Any,
    prompt: str,
    negative_prompt: str,
    *,
    max_sequence_length: int,
    uncond: Literal["empty_string", "zeros"],
    t5_padding: Literal["unmodified", "zero"],
) -> dict[str, Tensor]:
    """What an SD3 pipeline takes in place of the prompts, as `--uncond` and `--t5_padding` say.

    Raises:
        UserError: another pipeline than SD3's.
    """
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        raise UserError("--uncond zeros and --t5_padding zero are for Stable Diffusion 3")
    encoders = sd3.TextEncoders(
        pipeline,
        max_sequence_length=max_sequence_length,
        t5_padding=t5_padding,
        width=pipeline.transformer.config["joint_attention_dim"],
        device=pipeline._execution_device,
    )
    found = dict(encoders([prompt]))
    for name, value in encoders([negative_prompt]).items():
        dropped = uncond == "zeros" and not negative_prompt
        found[f"negative_{name}"] = torch.zeros_like(value) if dropped else value
    return {name: value.to(encoders.device) for name, value in found.items()}
