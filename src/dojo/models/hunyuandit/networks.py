"""The network as it is trained: its prediction, and blocks that are computed anew.

diffusers' class has neither gradient checkpointing nor adapters: the first is here, the second by
peft's own functions (`dojo.finetune.lora.injected`).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dojo.lazy import diffusers, torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

BASE_SIZE = 512  # pixels: positions of every size are scaled onto those of such a picture


def ready(network: Any) -> Any:
    """A network that can be told to recompute its blocks."""
    network.enable_gradient_checkpointing = partial(recompute, network)
    return network


def recompute(network: Any) -> None:
    """From now on the backward pass computes the blocks' activations anew: less memory."""
    for block in network.blocks:
        block.forward = partial(_recomputed, block)


def _recomputed(block: Any, *given: Any, **more: Any) -> Any:
    """What a block says, without keeping what is inside.

    Not reentrant: then the inputs need no gradient of their own, which the first block's have not
    when adapters are all that is trained.
    """
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*given, **more)
    from torch.utils import checkpoint

    return checkpoint.checkpoint(forward, *given, use_reentrant=False, **more)


def prediction(
    network: nn.Module,
    sizes: Mapping[str, Any],
    noisy: Tensor,
    timestep: Tensor,
    dtype: torch.dtype,
    *,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor,
    prompt_embeds_2: Tensor,
    prompt_attention_mask_2: Tensor,
    image_meta_size: Tensor | None = None,
) -> Tensor:
    """The v that the network sees in `noisy` [B, C, h, w] at `timestep` [B].

    float32, whatever the network computes in. The variance that it also tells is let go.

    Args:
        sizes: the network's configuration.
        prompt_embeds: of the BERT, [B, 77, D], with their mask [B, 77].
        prompt_embeds_2: of mT5, [B, 256, D], with their mask [B, 256].
        image_meta_size: [B, 6] in pixels, where the network reads it: width and height in the file
            and trained, left and top of the crop.
    """
    patch = sizes["patch_size"]
    style = None
    if image_meta_size is not None:
        style = torch.zeros(len(noisy), dtype=torch.int64, device=noisy.device)
        image_meta_size = image_meta_size.float().contiguous()
    said: Tensor = network(
        noisy.to(dtype),
        # The class takes this one's precision for all that is told beside the text. bfloat16 has
        # 507 of the 1,000 timesteps, and whole numbers are refused.
        timestep.float(),
        encoder_hidden_states=prompt_embeds.to(dtype),
        text_embedding_mask=prompt_attention_mask,
        # It is flattened by a view, which rows that were repeated by `expand` do not have.
        encoder_hidden_states_t5=prompt_embeds_2.to(dtype).contiguous(),
        text_embedding_mask_t5=prompt_attention_mask_2,
        image_meta_size=image_meta_size,
        style=style,
        image_rotary_emb=rotary(
            int(sizes["attention_head_dim"]),
            noisy.shape[-2] // patch,
            noisy.shape[-1] // patch,
            BASE_SIZE // 8 // patch,
            str(noisy.device),
        ),
        return_dict=False,
    )[0]
    if sizes.get("learn_sigma", True):
        said = said.chunk(2, dim=1)[0]
    return said.float()


@lru_cache(maxsize=64)
def rotary(width: int, height: int, across: int, base: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of a grid of patches, each [height * across, width].

    Args:
        width: numbers of a head.
        height: patches from top to bottom.
        across: patches from left to right.
        base: patches a side of the grid that others are scaled onto.
    """
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    region = get_resize_crop_region_for_grid((height, across), base)
    tables: Any = get_2d_rotary_pos_embed(
        width, region, (height, across), device=torch.device(device), output_type="pt"
    )
    return tables


def empty(config: Mapping[str, Any]) -> Any:
    """A network on the meta device."""
    with torch.device("meta"):
        return ready(diffusers.HunyuanDiT2DModel.from_config(dict(config)))
