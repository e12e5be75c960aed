"""HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): cosines of a ViT-H/14 tuned on preferences.

The two are not comparable, and either only within one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip

from dojo.cli import UserError
from dojo.rewards import preprocess, weights
from dojo.rewards.clip import Backbone, HubClip
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "ViT-H-14"


class OpenClip(Backbone):
    """A CLIP as a single file in open_clip's layout."""

    def __init__(self, path: Path, place: Place) -> None:
        config: Any = open_clip.get_model_config(ARCHITECTURE)
        network: Any = open_clip.CLIP(**config)  # create_model would warn of random weights
        tensors = {key.removeprefix("model."): value for key, value in weights.read(path).items()}
        weights.fill(network, tensors, str(path))
        self.tokenizer: Any = open_clip.get_tokenizer(ARCHITECTURE)
        self.size = int(network.visual.image_size[0])
        self.scale = float(network.logit_scale.detach().exp())
        super().__init__(network, place)

    def _encode_pictures(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(pixels)

    def _encode_text(self, prompt: str) -> Tensor:
        return self.network.encode_text(self.tokenizer(prompt).to(self.place.device))


class HpsV2(Scorer):
    """HPS v2: the cosine, without the factor 100 of its tables.

    Options: `model` is a file, or a folder in transformers' layout; `antialias=false` resizes as
    torchvision did in 2023, when the published numbers were made.
    """

    differentiable = True
    range = "0.23 to 0.28"
    checkpoint = "xswu/HPSv2/HPS_v2_compressed.pt"
    places = ("model",)
    size = "986 M weights"
    licence = "Apache-2.0"

    def __init__(self, place: Place, *, model: str | None = None, antialias: str = "true") -> None:
        super().__init__(place)
        if antialias not in ("true", "false"):
            raise UserError(f"--reward: antialias is true or false, not {antialias}")
        self.antialias = antialias == "true"
        name = model or self.checkpoint
        is_file = Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors")
        self.backbone: Backbone = (
            OpenClip(weights.file(name), place) if is_file else HubClip(name, place)
        )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        boxed = preprocess.letterbox(images, self.backbone.size, antialias=self.antialias)
        pictures = self.backbone.embed(preprocess.normalize(boxed))
        return (pictures * self.backbone.texts(prompts)).sum(dim=-1)


class HpsV21(HpsV2):
    """HPS v2.1, trained on better data."""

    range = "0.15 to 0.31"
    checkpoint = "xswu/HPSv2/HPS_v2.1_compressed.pt"
