"""ImageReward v1 (Xu et al. 2023, arXiv:2304.05977): BLIP's text encoder reads the prompt while it
looks at the picture, and a small head gives the score.

Its own package does not import with transformers 5. Its network is the BLIP of transformers under
other names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dojo.cli import UserError
from dojo.models import loaded
from dojo.rewards import preprocess, weights
from dojo.rewards.scorer import Metadata, Place, Scorer

# Mean and standard deviation of the head's output over the authors' validation set.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
HEAD_WIDTH = 64  # of one attention head, in ViT-L and in BERT

_RENAMED = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj", "vision.embeddings.patch_embedding"),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*\.)norm(\d)\.", r"\1layer_norm\2."),
    (r"^(vision\..*\.)attn\.qkv\.", r"\1self_attn.qkv."),
    (r"^(vision\..*\.)attn\.proj\.", r"\1self_attn.projection."),
    (r"^text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
_UNUSED = ("vision_proj.", "text_proj.", "text.embeddings.position_ids")


class _Network(nn.Module):
    """Picture encoder, text encoder and head, of the sizes that the weights have."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()

        def layers(pattern: str) -> int:
            return len({m[1] for name in shapes if (m := re.match(pattern, name))})

        _, tokens, width = shapes["vision.embeddings.position_embedding"]
        patch = shapes["vision.embeddings.patch_embedding.weight"][-1]
        vision: Any = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=shapes["vision.encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=layers(r"vision\.encoder\.layers\.(\d+)\."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * round((tokens - 1) ** 0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,  # timm's; transformers' default is another
        )
        vocabulary, text_width = shapes["text.embeddings.word_embeddings.weight"]
        text: Any = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
            num_hidden_layers=layers(r"text\.encoder\.layer\.(\d+)\."),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=shapes["text.embeddings.position_embeddings.weight"][0],
            is_decoder=True,  # makes the cross-attention; no causal mask at the call
        )
        self.size = int(vision.image_size)
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        # Without activations in between: numbers 0, 2, 4, 6 and 7, dropout at the others.
        self.head = nn.ModuleDict()
        for name in shapes:
            if match := re.match(r"head\.(\d+)\.weight", name):
                self.head[match[1]] = nn.Linear(shapes[name][1], shapes[name][0])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, size, size], [B, T] and [B, T] to [B]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        x = read.last_hidden_state[:, 0].float()
        for number in sorted(self.head, key=int):
            x = self.head[number](x)
        return (x.squeeze(-1) - MEAN) / STD


class ImageReward(Scorer):
    """Options: `model` is the file with the weights, `tokenizer` BERT's folder or hub id."""

    differentiable = True
    range = "-2.3 to 2"
    good_enough = 2.0  # the margin of ReFL (arXiv:2304.05977)
    checkpoint = "THUDM/ImageReward/ImageReward.pt"
    places = ("model", "tokenizer")
    size = "1.8 GB"
    licence = "Apache-2.0"

    def __init__(
        self, place: Place, *, model: str = checkpoint, tokenizer: str = "bert-base-uncased"
    ) -> None:
        super().__init__(place)
        tensors = renamed(weights.read(weights.file(model)))
        try:
            network = _Network({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        except Exception as error:  # whatever the classes say to sizes that they cannot have
            raise UserError(f"--reward: {model} is no ImageReward ({error})") from error
        weights.fill(network, tensors, model)
        self.tokenizer: Any = loaded.tokenizer(
            AutoTokenizer, weights.locate(tokenizer), flag="--reward", encoder=network.text
        )
        self.network = network.requires_grad_(False).eval().to(place.device, place.dtype)
        self.network.head.float()

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        pixels = preprocess.resize_and_crop(images, self.network.size, "torchvision")
        text = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.place.device)
        normalized = preprocess.normalize(pixels).to(self.place.dtype)
        return self.network(normalized, text.input_ids, text.attention_mask)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official names as those of transformers; what scoring does not use is left out."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(_UNUSED):
            found[name] = tensor
    return found
