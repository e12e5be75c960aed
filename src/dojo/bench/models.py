"""Model folders of the published sizes with random weights, for machines without a model hub.

Transformer and autoencoder are as large as Stability's; the text encoders have the real widths and
token counts but one or two layers, since their outputs are computed once and cached. What is not a
size comes from the pocket SD3: tokenizers, scheduler, the other settings.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dojo.cli import UserError
from dojo.files import tensors
from dojo.run import checkpoint

ROOT = Path(__file__).resolve().parents[3]
POCKET = ROOT / "models" / "pocket-sd3"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Size = Literal["sd35-medium", "sd35-large"]

CLIP_TOKENS = 77
RECIPE = "bench.json"  # in a made folder: what it was made from
_STD = 0.02  # small enough for 38 layers, large enough for gradients everywhere
_NUM_DRAWS = 16_777_213  # a prime: no two rows of a matrix begin at the same draw

_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE = {
    **_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
TRANSFORMERS: dict[str, dict[str, Any]] = {"sd35-medium": _MEDIUM, "sd35-large": _LARGE}
_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}


def _clip(width: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "max_position_embeddings": CLIP_TOKENS,
    }


_T5 = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 1}
_KINDS: dict[str, Any] = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def settings(size: Size) -> dict[str, dict[str, Any]]:
    """The config.json of every part that has weights.

    Raises:
        UserError: the pocket SD3, which they start from, is not there.
    """
    if not (POCKET / "model_index.json").is_file():
        raise UserError(f"{POCKET} is missing: start the benchmark from a clone of the repository")
    sizes = {
        "transformer": TRANSFORMERS[size],
        "vae": _VAE,
        "text_encoder": _clip(768, 12),
        "text_encoder_2": _clip(1280, 20),
        "text_encoder_3": _T5,
    }
    return {
        part: {**json.loads((POCKET / part / "config.json").read_text()), **own}
        for part, own in sizes.items()
    }


def on_meta(part: str, config: dict[str, Any]) -> nn.Module:
    """A part of a model without memory for its weights."""
    kind = _KINDS[part]
    with torch.device("meta"):
        if hasattr(kind, "from_config"):  # diffusers
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


def write_settings(folder: Path, size: Size) -> None:
    """Everything of a model folder but the weights; enough to count its operations."""
    for part, config in settings(size).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(POCKET / "model_index.json", folder)
    for part in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(POCKET / part, folder / part)
    for part in ("tokenizer", "tokenizer_2"):
        path = folder / part / "tokenizer_config.json"
        longer = {**json.loads(path.read_text()), "model_max_length": CLIP_TOKENS}
        path.write_text(json.dumps(longer, indent=2))


def make_model(size: Size, dtype: str, folder: Path) -> Path:
    """A whole model folder: the one that is there, or a new one under the same name.

    A folder that was left half-made, or was made from other settings, is made again.

    Args:
        dtype: fp32 or bf16, of the weights on the disk.
    """
    recipe = {"dtype": dtype, "std": _STD, "settings": settings(size)}
    marker = folder / RECIPE
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return folder

    def write(partial: Path) -> None:
        write_settings(partial, size)
        noise = torch.randn(_NUM_DRAWS, generator=torch.Generator().manual_seed(0)) * _STD
        noise = noise.to(DTYPES[dtype])
        for part, config in settings(size).items():
            name = "model" if part.startswith("text") else "diffusion_pytorch_model"
            sources = {
                key: _source(key, tensor.shape, noise)
                for key, tensor in on_meta(part, config).state_dict().items()
                if key != "encoder.embed_tokens.weight"  # T5's, the same as shared.weight
            }
            tensors.save(partial / part / f"{name}.safetensors", sources)
        (partial / RECIPE).write_text(json.dumps(recipe))

    checkpoint.write_whole(folder, write)
    return folder


def _source(name: str, shape: torch.Size, noise: Tensor) -> tensors.Source:
    """Makes one tensor when it is written: small normal numbers, ones for norms, no biases.

    The same draws serve every tensor: drawing 8 billion numbers would take minutes.
    """
    count = math.prod(shape)

    def make(device: str) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=noise.dtype, device=device)
        if len(shape) < 2:
            value = 1.0 if name.endswith("weight") else 0.0
            return torch.full(shape, value, dtype=noise.dtype)
        times = -(-count // len(noise))  # rounded up; no copy of the draws for a small tensor
        return (noise.repeat(times) if times > 1 else noise)[:count].view(shape)

    return make
