"""The configurations of the public models, as diffusers has them, fitted to a file's sizes.

Widths, depths and numbers of layers follow from the shapes of the tensors; what does not is the
family's rule: 8 heads in SD1, heads of 64 numbers elsewhere, groups of 32, and the schedule. Values
are those of the repositories that diffusers' `from_single_file` would fetch (stable-diffusion-v1-5,
stable-diffusion-2-base, stable-diffusion-2, stable-diffusion-xl-base-1.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dojo.cli import UserError
from dojo.models import published
from dojo.models.folders import FLAG
from dojo.models.unet.single_file.header import SingleFile
from dojo.models.unet.single_file.vocabulary import TOKENS

CONFIG_FLAG = "--single_file_config"
# Height and width, in latents, that a family was trained at.
_SIDES = {"sd1": 64, "sd2": 64, "sdxl": 128}
_SIDE_OF_V = 96  # SD2 that predicts v
TEXTS = {
    "sd1": {"text_encoder": published.CLIP_L},
    "sd2": {"text_encoder": published.CLIP_H},
    "sdxl": {"text_encoder": published.CLIP_L, "text_encoder_2": published.CLIP_G},
}
_HEAD = 64
_OPEN_CLIP_H_LAYERS = 24


def native_side(file: SingleFile) -> int:
    """Height and width in latents that a file's model was trained at, as far as one can tell."""
    v_of_sd2 = file.family == "sd2" and file.prediction_type == "v_prediction"
    return _SIDE_OF_V if v_of_sd2 else _SIDES[file.family]


def unet(file: SingleFile) -> dict[str, Any]:
    """What differs from the defaults of diffusers' `UNet2DConditionModel`.

    Raises:
        UserError: the file's UNet is built in another way.
    """
    try:
        widths, depths, layers = _levels(file)
        cross = _cross(file)
        label = file.shape("unet", "label_emb.0.0.weight")
        linear = len(_shape(file, "unet", "middle_block.1.proj_in.weight")) == 2
    except KeyError as error:
        raise UserError(_other_build(file, "UNet", str(error))) from error
    shares = [depth or 1 for depth in depths[:-1]] + [_depth(file, "middle_block.1")]
    made: dict[str, Any] = {
        "sample_size": native_side(file),
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": cross,
        "down_block_types": [f"{'CrossAttn' * bool(depth)}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' * bool(depth)}UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": 1 if set(shares) == {1} else shares,
        "attention_head_dim": 8 if file.family == "sd1" else [max(1, w // _HEAD) for w in widths],
        "use_linear_projection": linear,
    }
    if file.family == "sd2":
        made["upcast_attention"] = True  # its queries overflow half precision
    if label is not None:
        made |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (label[1] - _pooled(file)) // 6,
            "projection_class_embeddings_input_dim": label[1],
        }
    return made


def vae(file: SingleFile) -> dict[str, Any]:
    """What differs from the defaults of diffusers' `AutoencoderKL`."""
    sides = native_side(file)
    made: dict[str, Any] = {
        "sample_size": 8 * sides,
        "scaling_factor": 0.13025 if file.family == "sdxl" else 0.18215,
        **published.VAE_SIZES,
        "latent_channels": 4,
    }
    if "vae" in file:
        names = _behind(file, "vae")
        levels = 1 + _last(names, r"encoder\.down\.(\d+)\.")
        try:
            first = (f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels))
            made["block_out_channels"] = [_shape(file, "vae", name)[0] for name in first]
        except KeyError as error:
            raise UserError(_other_build(file, "autoencoder", str(error))) from error
        made["layers_per_block"] = 1 + _last(names, r"encoder\.down\.0\.block\.(\d+)\.")
    blocks = len(made["block_out_channels"])
    made["down_block_types"] = ["DownEncoderBlock2D"] * blocks
    made["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    return made


def text_encoder(file: SingleFile, part: str) -> dict[str, Any]:
    """The configuration of a CLIP, for transformers' `CLIPTextConfig`.

    Raises:
        UserError: its vocabulary or its width is not that of a public CLIP.
    """
    clip = TEXTS[file.family][part]
    hidden, layers, projection = clip.hidden, clip.layers, clip.projection
    rows, places, inner = TOKENS, published.CLIP_TOKENS, 4 * hidden
    if part in file:
        open_clip = clip.activation == "gelu"
        try:
            rows, hidden = _shape(file, part, *_TABLE)
            places = _shape(file, part, *_POSITIONS)[0]
            inner = _shape(file, part, *_INNER)[0]
        except KeyError as error:
            raise UserError(_other_build(file, part, str(error))) from error
        layers = 1 + _last(_behind(file, part), r".*(?:layers|resblocks)\.(\d+)\.")
        if file.family == "sd2" and layers == _OPEN_CLIP_H_LAYERS:
            layers -= 1
        if part == "text_encoder_2":
            projection = (file.shape(part, "text_projection") or (0, projection))[1]
        elif not open_clip:
            projection = hidden
    if rows != TOKENS:
        raise UserError(
            f"{FLAG}: {part} of {file.path} knows {rows} tokens, where CLIP's vocabulary has "
            f"{TOKENS}: name a folder with its tokenizers and configurations as {CONFIG_FLAG} "
            "(the pocket models' are folders below models/)"
        )
    sizes = replace(clip, hidden=hidden, layers=layers, projection=projection)
    return sizes.config(vocab_size=rows, intermediate_size=inner, max_position_embeddings=places)


def scheduler(file: SingleFile) -> tuple[str, dict[str, Any]]:
    """The scheduler's class and its configuration."""
    made: dict[str, Any] = {**published.BETAS, "prediction_type": file.prediction_type}
    kind = "EulerDiscreteScheduler"
    if file.family != "sdxl":
        plain = file.prediction_type == "epsilon" and not file.zero_snr
        kind = "PNDMScheduler" if plain else "DDIMScheduler"
        made |= {"set_alpha_to_one": False}
        made |= {"skip_prk_steps": True} if plain else {"clip_sample": False}
    return kind, marked(file, made)


def marked(file: SingleFile, scheduler: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with what a file's marks say of it, which outweighs a folder."""
    made = dict(scheduler)
    if file.prediction_known:
        made["prediction_type"] = file.prediction_type
    if file.zero_snr:
        made |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return made


# ---- reading sizes ----

_LAYER = "encoder.layers.0.mlp.fc1.weight"
_TABLE = (
    "text_model.embeddings.token_embedding.weight",
    "embeddings.token_embedding.weight",
    "token_embedding.weight",
)
_POSITIONS = (
    "text_model.embeddings.position_embedding.weight",
    "embeddings.position_embedding.weight",
    "positional_embedding",
)
_INNER = (f"text_model.{_LAYER}", _LAYER, "transformer.resblocks.0.mlp.c_fc.weight")


def _shape(file: SingleFile, part: str, *names: str) -> tuple[int, ...]:
    """The size of the first of these tensors that is there; KeyError if none is."""
    for name in names:
        shape = file.shape(part, name)
        if shape is not None:
            return shape
    raise KeyError(names[0])


def _behind(file: SingleFile, part: str) -> list[str]:
    """The names of a part without its prefix."""
    prefix = file.prefix(part)
    return [name.removeprefix(prefix) for name in file.names(part)]


def _last(names: Iterable[str], pattern: str) -> int:
    """The largest number that a pattern finds; -1 if it finds none."""
    return max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def _levels(file: SingleFile) -> tuple[list[int], list[int], int]:
    """Widths and transformer blocks of each level of the UNet, and ResNets per level."""
    names = _behind(file, "unet")
    found = (re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name) for name in names)
    downs = sorted(int(match[1]) for match in found if match)
    layers = downs[0] - 1 if downs else _last(names, r"input_blocks\.(\d+)\.")
    firsts = [1 + (layers + 1) * i for i in range(len(downs) + 1)]
    widths = [_shape(file, "unet", f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in firsts]
    return widths, [_depth(file, f"input_blocks.{i}.1") for i in firsts], layers


def _depth(file: SingleFile, block: str) -> int:
    """Transformer blocks of one attention."""
    return 1 + _last(_behind(file, "unet"), re.escape(block) + r"\.transformer_blocks\.(\d+)\.")


def _cross(file: SingleFile) -> int:
    """Numbers per token that the UNet reads."""
    return _shape(file, "unet", "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]


def _pooled(file: SingleFile) -> int:
    """Numbers of the pooled text that the UNet of SDXL reads."""
    return (file.shape("text_encoder_2", "text_projection") or (0, published.CLIP_G.projection))[1]


def _other_build(file: SingleFile, what: str, name: str) -> str:
    return (
        f"{FLAG}: the {what} of {file.path} is built in another way than the public ones (it has "
        f"no {name}): name a folder with its configurations as {CONFIG_FLAG}"
    )
