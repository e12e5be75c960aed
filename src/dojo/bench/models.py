"""Model folders of the published sizes with random weights, for machines without a model hub.

The trained network and the autoencoder are as large as the published ones; the text encoders have
the real widths and token counts but one or two layers, since their outputs are computed once and
cached. What is not a size comes from the pocket models: tokenizers, scheduler, other settings.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import diffusers, torch, transformers
from dojo.models import published, sd3, sd15, sdxl
from dojo.models.precisions import dtype_of
from dojo.run import checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
POCKET = ROOT / "models" / "pocket-sd3"
_POCKET_SD15 = ROOT / "models" / "pocket-sd15"
POCKETS = {
    "pocket": POCKET,
    "pocket-sd15": _POCKET_SD15,
    "pocket-sdxl": ROOT / "models" / "pocket-sdxl",
}
Size = Literal["sd35-medium", "sd35-large", "sd15", "sdxl"]
Name = Literal["pocket", "pocket-sd15", "pocket-sdxl", "sd35-medium", "sd35-large", "sd15", "sdxl"]
# The package of the family that each of them is of.
FAMILIES: dict[str, Any] = {
    "pocket": sd3,
    "pocket-sd15": sd15,
    "pocket-sdxl": sdxl,
    "sd35-medium": sd3,
    "sd35-large": sd3,
    "sd15": sd15,
    "sdxl": sdxl,
}

# As docs/benchmarks.md calls them.
TITLES = {
    "pocket": "The pocket model",
    "pocket-sd15": "pocket SD1.5",
    "pocket-sdxl": "pocket SDXL",
    "sd35-medium": "SD3.5-Medium",
    "sd35-large": "SD3.5-Large",
    "sd15": "SD1.5",
    "sdxl": "SDXL",
}

CLIP_TOKENS = 77
_POCKET_SIZE = 64  # pixels, of every pocket model
_PIXELS_PER_LATENT = 8
RECIPE = "bench.json"  # in a made folder: what it was made from
_STD = 0.02  # small enough for 38 layers, large enough for gradients everywhere
_NUM_DRAWS = 16_777_213  # a prime: no two rows of a matrix begin at the same draw

# Copies, since the tests cut widths and depths down.
TRANSFORMERS = {name: {**published.TRANSFORMERS[name]} for name in ("sd35-medium", "sd35-large")}
UNETS = {name: {**sizes} for name, sizes in published.UNETS.items()}
_VAE_SIZES = published.VAE_SIZES


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


def _starts(family: Any) -> dict[str, Path]:
    """The folders of pocket models that the parts of a family's models begin as, sizes apart.

    SDXL is an SD1.5 with the second CLIP of an SD3.
    """
    parts = (family.Model.network_facts.part, "vae", "scheduler", *family.TEXT_FOLDERS)
    return {
        part: (POCKET if family is sd3 or part.endswith("_2") else _POCKET_SD15) / part
        for part in parts
    }


def settings(size: Size) -> dict[str, dict[str, Any]]:
    """The config.json of every part that has weights.

    Raises:
        UserError: a pocket model, which they start from, is not there.
    """
    for folder in (POCKET, _POCKET_SD15):
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{folder} is missing: start the benchmark from a clone of the repository"
            )
    sizes = {
        "transformer": TRANSFORMERS.get(size),
        "unet": UNETS.get(size),
        "vae": {**_VAE_SIZES, **published.VAES[size]},
        "text_encoder": _clip(768, 12),
        "text_encoder_2": _clip(1280, 20),
        "text_encoder_3": _T5,
    }
    return {
        part: {**json.loads((folder / "config.json").read_text()), **(sizes[part] or {})}
        for part, folder in _starts(FAMILIES[size]).items()
        if part in sizes
    }


def pocket(model: str) -> Path:
    """The folder of a pocket model.

    Raises:
        UserError: it is not there.
    """
    folder = POCKETS[model]
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--model {model}: {folder} is missing")
    return folder


def family_name(model: str) -> str:
    """What the names of scripts for a model end with."""
    return str(FAMILIES[model].__name__).rpartition(".")[2]


def native_size(model: str) -> int:
    """Height and width, in pixels, that a model was trained at."""
    others = {"hunyuandit": published.HUNYUANDIT}
    network = {**published.TRANSFORMERS, **TRANSFORMERS, **UNETS, **others}.get(model)
    return _POCKET_SIZE if network is None else _PIXELS_PER_LATENT * network["sample_size"]


def has_option(model: str, name: str) -> bool:
    """Whether the scripts of a model's family know an option of the model's."""
    return name in {field.name for field in fields(FAMILIES[model].ModelArgs)}


def on_meta(config: dict[str, Any]) -> nn.Module:
    """A part of a model without memory for its weights."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class.from_dict(config))


def write_settings(folder: Path, size: Size) -> None:
    """Everything of a model folder but the weights; enough to count its operations."""
    configs, family = settings(size), FAMILIES[size]
    for part, start in _starts(family).items():
        if part not in configs:
            shutil.copytree(start, folder / part)
            continue
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part], indent=2))
    (folder / "model_index.json").write_text(json.dumps(_index(family), indent=2))
    for part in ("tokenizer", "tokenizer_2"):
        path = folder / part / "tokenizer_config.json"
        if path.is_file():
            longer = {**json.loads(path.read_text()), "model_max_length": CLIP_TOKENS}
            path.write_text(json.dumps(longer, indent=2))


def _index(family: Any) -> dict[str, Any]:
    """What model_index.json says."""
    if family is not sdxl:
        start = POCKET if family is sd3 else _POCKET_SD15
        return json.loads((start / "model_index.json").read_text())
    small = json.loads((_POCKET_SD15 / "model_index.json").read_text())
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": small["_diffusers_version"],
        "force_zeros_for_empty_prompt": True,
        **{part: small[part] for part in _starts(sd15)},
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": small["tokenizer"],
    }


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
        noise = noise.to(dtype_of(dtype))
        for part, config in settings(size).items():
            name = "model" if part.startswith("text") else "diffusion_pytorch_model"
            sources = {
                key: _source(key, tensor.shape, noise)
                for key, tensor in on_meta(config).state_dict().items()
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
