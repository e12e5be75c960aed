"""CLIP, and the scores that are similarities of its embeddings.

A network is loaded once for all scorers that use it, and a batch of pictures is embedded once for
all of them. Prompts come again and again in reinforcement learning: their embeddings are kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dojo.lazy import F, torch, transformers
from dojo.models import loaded
from dojo.rewards import preprocess, weights
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from torch import Tensor

CLIP_L = "openai/clip-vit-large-patch14"

KEPT_TEXTS = 4096  # embeddings of prompts that a backbone keeps


class Backbone:
    """A network that embeds pictures and prompts in one space; a subclass says how."""

    size: int
    """pixels on a side"""
    width: int
    """numbers of an embedding"""
    scale: float
    """what the network was trained to multiply its cosines with"""

    def __init__(self, network: torch.nn.Module, place: Place) -> None:
        self.network: Any = network.requires_grad_(False).eval().to(place.device, place.dtype)
        self.place = place
        self._texts: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # a reward is used by its own thread and by the caller's
        self._last: tuple[weakref.ref[Tensor], object, Tensor] | None = None

    def _encode_pictures(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _encode_text(self, prompt: str) -> Tensor:
        raise NotImplementedError

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, size, size] to float32 [B, D] of unit length."""
        return F.normalize(self._encode_pictures(pixels.to(self.place.dtype)).float(), dim=-1)

    def pictures(self, images: Tensor, crop: preprocess.Crop) -> Tensor:
        """float32 [B, D] of unit length for pictures of any size; the last ones are kept."""
        sides = preprocess.shortest_edge(images.shape[-2], images.shape[-1], self.size)
        key = preprocess.corner(*sides, self.size, crop), torch.is_grad_enabled()
        last = self._last
        if last is not None and last[0]() is images and last[1] == key:
            return last[2]
        pixels = preprocess.resize_and_crop(images, self.size, crop)
        embeds = self.embed(preprocess.normalize(pixels))
        # With the pictures goes their embedding, and with it the graph that led to it.
        self._last = (weakref.ref(images, self._forget), key, embeds)
        return embeds

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._last = None

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """float32 [B, D] of unit length; no gradient."""
        # Normal tensors even under inference_mode: they may meet a gradient later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for prompt in prompts:
                if prompt not in self._texts:
                    # One by one: its bits must not hang on which prompts were new along with it,
                    # or a resumed run would differ.
                    embed = self._encode_text(prompt).float()
                    self._texts[prompt] = F.normalize(embed, dim=-1)[0]
            rows = torch.stack([self._texts[prompt] for prompt in prompts])
            for prompt in list(self._texts)[: max(0, len(self._texts) - KEPT_TEXTS)]:
                del self._texts[prompt]
        return rows


class HubClip(Backbone):
    """A CLIP in transformers' layout, from a folder or the hub."""

    def __init__(self, model: str, place: Place) -> None:
        where = weights.locate(model)
        network = loaded.network(
            transformers.CLIPModel, where, flag="--reward", dtype=torch.float32
        )
        self.tokenizer: Any = loaded.tokenizer(
            transformers.AutoTokenizer, where, flag="--reward", encoder=network
        )
        self.size = int(network.config.vision_config.image_size)
        self.width = int(network.config.projection_dim)
        self.scale = float(network.logit_scale.detach().exp())
        self.tokens = int(network.config.text_config.max_position_embeddings)
        super().__init__(network, place)

    def _encode_pictures(self, pixels: Tensor) -> Tensor:
        # transformers 5 returns an output here, whose `pooler_output` is already projected.
        return self.network.get_image_features(pixel_values=pixels).pooler_output

    def _encode_text(self, prompt: str) -> Tensor:
        # Truncation by the tokenizer keeps the end token, which the embedding is read from.
        inputs = self.tokenizer(
            prompt, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.place.device)
        return self.network.get_text_features(input_ids=inputs.input_ids).pooler_output


def backbone(model: str, place: Place) -> HubClip:
    """The CLIP of this name, shared by all scorers of a reward."""
    return place.share(("clip", weights.locate(model)), lambda: HubClip(model, place))


class Clip(Scorer):
    """CLIP score: the cosine of picture and prompt (Hessel et al. 2021, arXiv:2104.08718)."""

    differentiable = True
    range = "0.2 to 0.35"
    checkpoint = CLIP_L
    places = ("model",)
    size = "1.7 GB"
    licence = "MIT (code; the card says research)"
    crop: preprocess.Crop = "transformers"

    def __init__(self, place: Place, *, model: str = CLIP_L) -> None:
        super().__init__(place)
        self.backbone = backbone(model, place)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return (self.backbone.pictures(images, self.crop) * self.backbone.texts(prompts)).sum(-1)


class PickScore(Clip):
    """PickScore v1 (Kirstain et al. 2023, arXiv:2305.01569): the scaled cosine of its own CLIP."""

    range = "18 to 24"
    checkpoint = "yuvalkirstain/PickScore_v1"
    size = "3.9 GB"
    licence = "MIT (code; the card names none)"

    def __init__(self, place: Place, *, model: str = checkpoint) -> None:
        super().__init__(place, model=model)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return self.backbone.scale * super().score(images, prompts, metadata)


class ClipIqa(Clip):
    """Quality without a reference (Wang et al. 2022, arXiv:2207.12396): is it "Good photo." rather
    than "Bad photo."? On CLIP-L/14, not on the paper's ResNet without position embeddings, so its
    numbers are not the paper's.
    """

    range = "0 to 1"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        words = self.backbone.texts(["Good photo.", "Bad photo."])
        cosines = self.backbone.pictures(images, self.crop) @ words.T
        return (100 * cosines).softmax(dim=-1)[:, 0]
