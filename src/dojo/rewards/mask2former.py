"""What is where in a picture: Mask2Former with a Swin transformer (Cheng et al. 2022,
arXiv:2112.01527), the weights of mmdetection in the network of transformers.

mmdetection needs mmcv, which is built for old versions of Python and torch only. The two networks
have the same layers; what differs is

- the names, and that transformers keeps query, key and value apart where mmdetection stacks them;
- the order of the numbers where Swin merges 2 x 2 patches: mmdetection has channel, row, column
  (that of `torch.nn.Unfold`), transformers column, row, channel.

Pictures are prepared and results read as mmdetection does it in its test of the instance
segmentation of COCO.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

from dojo.cli import UserError
from dojo.rewards import preprocess, weights
from dojo.rewards.scorer import Place

SHORT, LONG = 800, 1333  # pixels: no side of a picture is longer than these
MULTIPLE = 32  # of which both sides are made one, by padding
GREY = 128.0  # of 255: the padding
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 255, red first
MOST = 100  # objects of a picture, classes of one object counted apart
LEVELS, POINTS = 3, 4  # of the deformable attention; its other sizes are in the weights

_RENAMED = (
    (r"^backbone\.patch_embed\.projection\.", "SWIN.embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", "SWIN.embeddings.norm."),
    (r"^backbone\.stages\.", "SWIN.encoder.layers."),
    (r"^(SWIN\..*\.)norm1\.", r"\1layernorm_before."),
    (r"^(SWIN\..*\.)norm2\.", r"\1layernorm_after."),
    (r"^(SWIN\..*\.)attn\.w_msa\.relative", r"\1attention.relative_position_bias.relative"),
    (r"^(SWIN\..*\.)attn\.w_msa\.proj\.", r"\1attention.o_proj."),
    (r"^(SWIN\..*\.)attn\.w_msa\.", r"\1attention."),
    (r"^(SWIN\..*\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"^(SWIN\..*\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    (r"^SWIN\.", "model.pixel_level_module.encoder.swin."),
    # mmdetection 2 and 3 name the parts of a transformer's layer differently.
    (r"\.ffns\.0\.", ".ffn."),
    (r"(transformer_decoder\.layers\.\d+\.)attentions\.0\.", r"\1cross_attn."),
    (r"(transformer_decoder\.layers\.\d+\.)attentions\.1\.", r"\1self_attn."),
    (r"(pixel_decoder\.encoder\.layers\.\d+\.)attentions\.0\.", r"\1self_attn."),
    (r"^panoptic_head\.pixel_decoder\.", "PIXEL."),
    (r"^PIXEL\.input_convs\.(\d)\.conv\.", r"PIXEL.input_projections.\1.0."),
    (r"^PIXEL\.input_convs\.(\d)\.gn\.", r"PIXEL.input_projections.\1.1."),
    (r"^PIXEL\.lateral_convs\.0\.conv\.", "PIXEL.adapter_1.0."),
    (r"^PIXEL\.lateral_convs\.0\.gn\.", "PIXEL.adapter_1.1."),
    (r"^PIXEL\.output_convs\.0\.conv\.", "PIXEL.layer_1.0."),
    (r"^PIXEL\.output_convs\.0\.gn\.", "PIXEL.layer_1.1."),
    (r"^PIXEL\.mask_feature\.", "PIXEL.mask_projection."),
    (r"^PIXEL\.level_encoding\.weight", "PIXEL.level_embed"),
    (r"^(PIXEL\..*\.)norms\.0\.", r"\1self_attn_layer_norm."),
    (r"^(PIXEL\..*\.)norms\.1\.", r"\1final_layer_norm."),
    (r"^PIXEL\.", "model.pixel_level_module.decoder."),
    (r"^panoptic_head\.transformer_decoder\.", "DECODER."),
    (r"^DECODER\.post_norm\.", "DECODER.layernorm."),
    (r"^(DECODER\..*_attn\.)attn\.", r"\1"),
    (r"^(DECODER\..*\.)norms\.0\.", r"\1cross_attn_layer_norm."),
    (r"^(DECODER\..*\.)norms\.1\.", r"\1self_attn_layer_norm."),
    (r"^(DECODER\..*\.)norms\.2\.", r"\1final_layer_norm."),
    (r"^panoptic_head\.mask_embed\.0\.", "DECODER.mask_predictor.mask_embedder.0.0."),
    (r"^panoptic_head\.mask_embed\.2\.", "DECODER.mask_predictor.mask_embedder.1.0."),
    (r"^panoptic_head\.mask_embed\.4\.", "DECODER.mask_predictor.mask_embedder.2.0."),
    (r"^DECODER\.", "model.transformer_module.decoder."),
    (r"^panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
    (r"^panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
    (r"^panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^backbone\.norm0\.", "model.pixel_level_module.encoder.hidden_states_norms.stage1."),
    (r"^backbone\.norm1\.", "model.pixel_level_module.encoder.hidden_states_norms.stage2."),
    (r"^backbone\.norm2\.", "model.pixel_level_module.encoder.hidden_states_norms.stage3."),
    (r"^backbone\.norm3\.", "model.pixel_level_module.encoder.hidden_states_norms.stage4."),
    (r"\.ffn\.layers\.0\.0\.", ".fc1."),
    (r"\.ffn\.layers\.1\.", ".fc2."),
)
_STACKED = re.compile(r"(.*\.)(?:attention\.qkv\.|self_attn\.in_proj_)(weight|bias)")
_MERGED = re.compile(r".*\.downsample\.(reduction|norm)\.(weight|bias)")
_UNUSED = "relative_position_index"


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """An object in a picture."""

    label: int
    """number of its class"""
    score: float
    """in [0, 1]"""
    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels; right and bottom lie outside"""
    mask: Tensor
    """bool [H, W]: the pixels that it covers"""


class Mask2Former:
    """Finds objects; `place.dtype` is that of the network's weights."""

    def __init__(self, model: str, place: Place) -> None:
        """Loads the network.

        Args:
            model: the file with mmdetection's weights, .pth or .safetensors.
        Raises:
            UserError: it is not there, or something else.
        """
        tensors = renamed(weights.read_checkpoint(weights.file(model)))
        try:
            network = _Network({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        except Exception as error:  # whatever the classes say to sizes that they cannot have
            raise UserError(f"--reward: {model} is no Mask2Former of mmdet ({error})") from error
        weights.fill(network, {**network.untold(), **tensors}, model)
        self.network = network.requires_grad_(False).eval().to(place.device, place.dtype)
        self.place = place

    @torch.no_grad()
    def __call__(self, image: Tensor, least: float = 0.0) -> list[Found]:
        """The objects of one picture, the most certain first.

        Args:
            image: [3, H, W] in [0, 1].
            least: leaves out those whose score is not above it.
        """
        pixels, inner = prepared(image.to(self.place.device))
        classes, masks = self.network(pixels.to(self.place.dtype))
        size = image.shape[-2], image.shape[-1]
        return read(classes[0].float(), masks[0].float(), pixels.shape[-2:], inner, size, least)


class _Network(nn.Module):
    """transformers' network, of the sizes that the weights have, without what training needs."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        config = _config(shapes)
        self.model: Any = Mask2FormerModel(config)
        classes, width = shapes["class_predictor.weight"]
        self.class_predictor = nn.Linear(width, classes)

    def untold(self) -> dict[str, Tensor]:
        """Weights that mmdetection does not have: a norm of Swin whose output nothing reads."""
        state = self.state_dict()
        return {name: state[name] for name in state if ".swin.layernorm." in name}

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] to logits of classes [B, Q, C + 1] and masks [B, Q, H / 4, W / 4]."""
        out = self.model(pixel_values=pixels, output_hidden_states=True)
        last = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(last), out.masks_queries_logits[-1]


def _config(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The sizes of a network by those of its weights."""

    def count(pattern: str) -> int:
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    encoder, pixel = "model.pixel_level_module.encoder.swin", "model.pixel_level_module.decoder"
    layers, decoder = f"{encoder}.encoder.layers", "model.transformer_module.decoder.layers"
    stages = range(count(rf"{layers}\.(\d+)\."))
    tables = [
        shapes[
            f"{layers}.{i}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
        ]
        for i in stages
    ]
    width, _, patch, _ = shapes[f"{encoder}.embeddings.patch_embeddings.projection.weight"]
    swin_config: Any = SwinConfig  # its fields come from decorators
    config: Any = Mask2FormerConfig
    swin = swin_config(
        patch_size=patch,
        embed_dim=width,
        depths=[count(rf"{layers}\.{i}\.blocks\.(\d+)\.") for i in stages],
        num_heads=[table[1] for table in tables],
        window_size=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shapes[f"{layers}.0.blocks.0.mlp.fc1.weight"][0] / width,
        out_features=[f"stage{i + 1}" for i in stages],
    )
    queries, hidden = shapes["model.transformer_module.queries_features.weight"]
    attention = shapes[f"{pixel}.encoder.layers.0.self_attn.attention_weights.weight"]
    return config(
        backbone_config=swin,
        num_labels=shapes["class_predictor.weight"][0] - 1,
        feature_size=shapes[f"{pixel}.input_projections.0.0.weight"][0],
        mask_feature_size=shapes[f"{pixel}.mask_projection.weight"][0],
        hidden_dim=hidden,
        num_queries=queries,
        num_attention_heads=attention[0] // (LEVELS * POINTS),
        encoder_layers=count(rf"{pixel}\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=shapes[f"{pixel}.encoder.layers.0.fc1.weight"][0],
        decoder_layers=1 + count(rf"{decoder}\.(\d+)\."),  # the first prediction counts as one
        dim_feedforward=shapes[f"{decoder}.0.fc1.weight"][0],
    )


# -- weights ----------------------------------------------------------------------------------


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's names and layouts (of its versions 2 and 3) as those of transformers."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if stacked := _STACKED.fullmatch(name):
            part = "attention." if ".attention.qkv." in name else "self_attn."
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stacked[1]}{part}{letter}_proj.{stacked[2]}"] = third.clone()
        elif not name.endswith(_UNUSED):
            found[name] = merge_order(tensor) if _MERGED.fullmatch(name) else tensor
    return found


def merge_order(tensor: Tensor) -> Tensor:
    """From channel, row, column of 2 x 2 patches (in the last dimension) to column, row, channel.

    The reduction's output, its first dimension, stays as it is.
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3).contiguous()


# -- before and after the network -------------------------------------------------------------


def fitted(height: int, width: int) -> tuple[int, int]:
    """The size of a picture for the network: as large as SHORT and LONG let it, of its shape."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepared(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """[3, H, W] in [0, 1] to what the network sees [1, 3, h, w], and the size without padding.

    Resized as OpenCV does it to 8 bits: linear, and without a filter where it shrinks.
    """
    size = fitted(image.shape[-2], image.shape[-1])
    x = preprocess.quantize(image[None].float())
    if size != (image.shape[-2], image.shape[-1]):
        x = preprocess.quantize(F.interpolate(x, size, mode="bilinear", align_corners=False))
    below, right = (-size[0] % MULTIPLE, -size[1] % MULTIPLE)
    x = F.pad(x * 255, (0, right, 0, below), value=GREY)
    return preprocess.normalize(x, MEAN, STD), size


def read(
    classes: Tensor,
    masks: Tensor,
    padded: torch.Size,
    inner: tuple[int, int],
    size: tuple[int, int],
    least: float,
) -> list[Found]:
    """The objects that the network's output for one picture tells of, the most certain first.

    Args:
        classes: logits [Q, C + 1]; the last class is "nothing".
        masks: logits [Q, h, w].
        padded: pixels that the network saw.
        inner: those of the picture among them, at the top left.
        size: height and width of the original picture.
        least: leaves out objects whose score is not above it.
    """
    shares = classes.softmax(dim=-1)[:, :-1]
    best, index = shares.flatten().topk(min(MOST, shares.numel()))
    # A score is a share times a mean of probabilities: what is not above `least` now never is.
    best, index = best[best > least], index[best > least]
    found: list[Found] = []
    for share, place in zip(best.tolist(), index.tolist(), strict=True):
        query, label = divmod(place, shares.shape[1])
        logits = _enlarged(_enlarged(masks[query], padded)[: inner[0], : inner[1]], size)
        mask = logits > 0
        inside = mask.sum().item()
        score = share * (logits.sigmoid() * mask).sum().item() / (inside + 1e-6)
        if score > least and inside:
            found.append(Found(label=label, score=score, box=box_of(mask), mask=mask))
    return sorted(found, key=lambda one: -one.score)


def _enlarged(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what a mask [H, W] covers; right and bottom lie outside."""
    columns, rows = mask.any(dim=0).nonzero()[:, 0], mask.any(dim=1).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
