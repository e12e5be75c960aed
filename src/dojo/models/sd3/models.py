"""The transformer and the autoencoder: loading, a velocity, latents to pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import diffusers, transformers
from dojo.models import compiling, folders, loaded, precisions
from dojo.models.folders import FLAG
from dojo.models.loaded import Prepare
from dojo.models.sd3.config import Config
from dojo.models.sd3.single_file import load_encoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_transformer(
    config: Config, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None
) -> diffusers.SD3Transformer2DModel:
    """The frozen MMDiT in `dtype`.

    Args:
        prepare: see `family.Model.load_network`.
    """
    args = config.args
    whole = partial(load_part, diffusers.SD3Transformer2DModel, "transformer", config, dtype)
    if prepare is None:
        transformer: Any = whole()
    else:
        single = config.checkpoint is not None and "transformer" in config.checkpoint
        transformer = loaded.prepared(
            *(diffusers.SD3Transformer2DModel, None if single else config.folder, "transformer"),
            *(whole, prepare),
            dtype=dtype,
            device=device,
            variant=args.variant,
            flag=config.flag,
        )
    transformer.requires_grad_(False)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.torch_compile:
        compiling.compile_blocks(transformer, config.network_facts)
    return transformer.to(device)


def load_vae(
    config: Config, device: torch.device, *, checkpointing: bool = False
) -> diffusers.AutoencoderKL:
    """The frozen autoencoder in `--vae_dtype`.

    Args:
        checkpointing: recompute the decoder's activations when a gradient goes back through it.
    """
    vae = load_part(
        diffusers.AutoencoderKL, "vae", config, precisions.dtype_of(config.args.vae_dtype)
    )
    if checkpointing:
        vae.enable_gradient_checkpointing()
    return folders.frugal(vae, config.args).requires_grad_(False).eval().to(device)


def load_part(kind: Any, part: str, config: Config, dtype: torch.dtype) -> Any:
    """A part in diffusers' own class, from the single file if it has it, else from the folder.

    Raises:
        UserError: it is damaged, incomplete, or other than its configuration.
    """
    if config.checkpoint is not None and part in config.checkpoint:
        where = f"{FLAG}: {part} of {config.checkpoint.path}"
        level = diffusers.utils.logging.get_verbosity()
        # It warns of an empty list of float32 modules.
        diffusers.utils.logging.set_verbosity_error()
        try:
            # Names and sizes were compared when the model was opened.
            made = kind.from_single_file(
                str(config.checkpoint.path),
                config=str(config.folder),
                subfolder=part,
                local_files_only=True,
                dtype=dtype,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{where} cannot be read ({error})") from error
        finally:
            diffusers.utils.logging.set_verbosity(level)
        loaded.check_finite(made.state_dict(), where)
        return made
    return loaded.network(
        kind, config.folder, part, flag=config.flag, dtype=dtype, variant=config.args.variant
    )


def load_text_pipeline(
    config: Config, dtype: torch.dtype, *, with_t5: bool = True, only: str | None = None
) -> diffusers.StableDiffusion3Pipeline:
    """Tokenizers and text encoders in `dtype`, without transformer and autoencoder.

    Without T5's weights, in the single file and in the folder, `text_encoder_3` is None and
    says so once.

    Args:
        with_t5: False leaves the largest of the three unread.
        only: the one encoder that is read, with its tokenizer.
    Raises:
        UserError: a CLIP's weights are neither in the single file nor in the folder, or a part is
            damaged, incomplete, or does not fit another.
    """
    index = loaded.read_index(config.folder, config.flag)
    parts: dict[str, Any] = {"transformer": None, "vae": None}
    for part, kind in _kinds().items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        if only not in (None, part):
            parts[part] = parts[tokenizer] = None
            continue
        if part == "text_encoder_3" and _lacks_t5(config, index):
            parts[part] = None
            if os.environ.get("RANK", "0") == "0":
                print("this model has no T5: zeros take its place")
        elif part == "text_encoder_3" and not with_t5:
            parts[part] = None
        else:
            parts[part] = _load_encoder(kind, part, config, dtype)
        if parts[part] is None and not (config.folder / tokenizer).is_dir():
            parts[tokenizer] = None
        else:
            parts[tokenizer] = loaded.tokenizer(
                loaded.class_of(index, tokenizer, config.folder, config.flag),
                *(config.folder, tokenizer),
                flag=config.flag,
                encoder=parts[part],
            )
    scheduler = config.with_shift(config.scheduler.get("shift", 1.0))
    return diffusers.StableDiffusion3Pipeline(**parts, scheduler=scheduler)


def _kinds() -> dict[str, Any]:
    clip = transformers.CLIPTextModelWithProjection
    encoders = {"text_encoder": clip, "text_encoder_2": clip}
    return {**encoders, "text_encoder_3": transformers.T5EncoderModel}


def _lacks_t5(config: Config, index: Mapping[str, Any]) -> bool:
    """Whether a model says that it has no T5, or a single file comes without it."""
    part = "text_encoder_3"
    if config.checkpoint is not None and part in config.checkpoint:
        return False
    if any((config.folder / part).glob("*.safetensors")):
        return False
    return config.checkpoint is not None or index.get(part, [None])[0] is None


def _load_encoder(kind: Any, part: str, config: Config, dtype: torch.dtype) -> Any:
    """One text encoder, from the single file if it has it, else from the folder."""
    if config.checkpoint is not None:
        if part in config.checkpoint:
            return load_encoder(config.checkpoint, part, config.folder, dtype)
        if not any((config.folder / part).glob("*.safetensors")):
            raise UserError(
                f"--single_file_config: neither {config.checkpoint.path.name} nor "
                f"{config.folder / part} has the weights of CLIP"
            )
    return loaded.network(
        kind, config.folder, part, flag=config.flag, dtype=dtype, variant=config.args.variant
    ).eval()


def velocity(
    transformer: torch.nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The network's velocity at `noisy` [B, C, h, w]: float32, whatever the network computes in.

    The timestep stays float32: in bfloat16 only 353 of 1000 values would differ.
    """
    return transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_prompt_embeds.to(dtype),
        timestep=1000 * sigma,
        return_dict=False,
    )[0].float()


def decode(vae: diffusers.AutoencoderKL, config: Config, latents: Tensor) -> Tensor:
    """Latents as the transformer sees them to pictures: float32 [B, 3, H, W] in [0, 1]."""
    shift, scale = config.vae["shift_factor"], config.vae["scaling_factor"]
    return folders.decode(vae, latents, scale=scale, shift=shift)
