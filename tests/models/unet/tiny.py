"""Untrained pipelines of three families, small enough for any test."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dojo.models.unet import single_file

TOKENS = 49_408
PARTS = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}


def clip(kind: Any, hidden: int, activation: str, **options: Any) -> Any:
    """A CLIP of two layers with heads of 64."""
    config = CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **options,
    )
    return kind(config)


def unet(family: str, **options: Any) -> UNet2DConditionModel:
    """A UNet of two levels, the first with one ResNet and attention in SD1 and SD2."""
    plain, attending = "DownBlock2D", "CrossAttnDownBlock2D"
    downs = [plain, attending] if family == "sdxl" else [attending, plain]
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "cross_attention_dim": {"sd1": 64, "sd2": 128, "sdxl": 192}[family],
        "down_block_types": downs,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(downs)],
        "attention_head_dim": 8 if family == "sd1" else (1, 2),
        "use_linear_projection": family != "sd1",
        "transformer_layers_per_block": (1, 2) if family == "sdxl" else 1,
    }
    if family == "sdxl":
        settings |= ADDED
    return UNet2DConditionModel(**(settings | options))


def pipeline(family: str, tokenizers: Path) -> Any:
    """A whole pipeline of which no two tensors are equal and none is zero.

    Args:
        tokenizers: a folder with `tokenizer` and, for SDXL, `tokenizer_2`.
    """
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    first = "tokenizer_2" if family == "sd2" else "tokenizer"  # OpenCLIP fills up with zeros
    parts: dict[str, Any] = {
        "unet": unet(family),
        "vae": vae,
        "tokenizer": CLIPTokenizer.from_pretrained(tokenizers / first),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, **options),
        "feature_extractor": None,
    }
    if family == "sd2":
        parts["text_encoder"] = clip(CLIPTextModel, 128, "gelu")
    else:
        parts["text_encoder"] = clip(CLIPTextModel, 64, "quick_gelu", projection_dim=64)
    if family == "sdxl":
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2")
        parts["text_encoder_2"] = clip(CLIPTextModelWithProjection, 128, "gelu", projection_dim=128)
        made: Any = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        made = diffusers.StableDiffusionPipeline(**parts)
    generator = torch.Generator().manual_seed(0)
    for part in PARTS[family]:
        for param in getattr(made, part).parameters():
            param.data = 0.1 * torch.randn(param.shape, generator=generator)
    made.set_progress_bar_config(disable=True)
    return made


def equal(first: Any, second: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether two networks hold the same tensors, the first's rounded to `dtype`."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].to(dtype or ours[name].dtype), theirs[name]) for name in ours
    )


class Source:
    """A pipeline, the same as a folder of parts, and the same as one file."""

    def __init__(self, family: str, place: Path, tokenizers: Path) -> None:
        self.family, self.parts = family, PARTS[family]
        self.pipeline = pipeline(family, tokenizers)
        self.folder, self.path = place / "folder", place / "whole.safetensors"
        self.pipeline.save_pretrained(self.folder)
        single_file.save(self.path, self.pipeline, family=family)


def same_parts(source: Source, path: Path, dtype: torch.dtype | None = None) -> None:
    """Claims that a file's parts are those of a pipeline to the bit, rounded to `dtype`."""
    file = single_file.inspect(path)
    single_file.check(file, source.folder)
    for part in source.parts:
        read = single_file.load(file, part, source.folder, torch.float32)
        ours: Any = getattr(source.pipeline, part)
        wanted = {
            name: (value.to(dtype).float() if dtype else value)
            for name, value in ours.state_dict().items()
        }
        found = read.state_dict()
        assert wanted.keys() == found.keys(), part
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), part


def picture(pipeline: Any) -> torch.Tensor:
    """What a pipeline draws in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red star",
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
