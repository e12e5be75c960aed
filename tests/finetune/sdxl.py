"""Tiny UNets and text encoders of SDXL's form for the tests of LoRA files."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 24
POOLED = 16


def unet(layers: int = 2, **options: Any) -> UNet2DConditionModel:
    """SDXL's blocks at a few channels; with one layer a block, as the pocket models have."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": layers,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 24,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        **options,
    }
    model = UNet2DConditionModel(**config).eval()
    model.requires_grad_(False)
    return model


def parts(layers: int = 2, **options: Any) -> dict[str, nn.Module]:
    """A UNet and both text encoders."""
    made: dict[str, nn.Module] = {"unet": unet(layers, **options)}
    kinds: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for (name, kind), width in zip(kinds.items(), (WIDTH - POOLED, POOLED), strict=True):
        config = CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            projection_dim=POOLED,
        )
        made[name] = kind(config).eval().requires_grad_(False)
    return made


@torch.no_grad()
def outputs(models: Any) -> dict[str, Tensor]:
    """What each part computes."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    added = {"text_embeds": draw(2, POOLED), "time_ids": 9 * draw(2, 6).abs()}
    found = {
        "unet": models.unet(
            draw(2, 4, 8, 8),
            torch.tensor([100, 900]),
            encoder_hidden_states=draw(2, 5, WIDTH),
            added_cond_kwargs=added,
        )[0]
    }
    for part in ("text_encoder", "text_encoder_2"):
        if hasattr(models, part):
            output = getattr(models, part)(torch.arange(20)[None] % 7, output_hidden_states=True)
            found[part] = torch.cat([output.hidden_states[-1].flatten(), output[0].flatten()])
    return found


def namespace(made: dict[str, nn.Module]) -> Any:
    """The parts as attributes, as a pipeline has them."""
    return SimpleNamespace(**made)
