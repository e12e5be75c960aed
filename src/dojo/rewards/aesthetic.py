"""LAION's aesthetic predictors: a small head on CLIP's picture embedding of unit length.

`aesthetic` is the improved one (a multi-layer perceptron, three published heads), `aesthetic_v1`
the first (one linear layer). The prompt plays no part. Weights come as a bare head beside a CLIP,
or as one folder with both, in the layout of shunk031/aesthetics-predictor-*, whose remote code is
not needed and not run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import nn, transformers
from dojo.models import loaded
from dojo.rewards import preprocess, weights
from dojo.rewards.clip import CLIP_L, Backbone, backbone
from dojo.rewards.scorer import Metadata, Place, Scorer

if TYPE_CHECKING:
    from torch import Tensor

HEADS = (
    "sac+logos+ava1-l14-linearMSE",
    "ava+logos-l14-linearMSE",
    "ava+logos-l14-reluMSE",
)
_FOLDER = "improved-aesthetic-predictor"
_VISION = ("vision_model.", "visual_projection.")


class _Vision(Backbone):
    """The picture half of a CLIP."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], place: Place) -> None:
        try:
            network: Any = transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**config)
            )
        except Exception as error:  # whatever the classes say to what they cannot have
            raise weights.missing("the predictor's config.json", error) from error
        # Old files hold the position ids, which are no weights.
        tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
        weights.fill(network, tensors, "the predictor's CLIP")
        self.size = network.config.image_size
        self.width = network.config.projection_dim
        super().__init__(network, place)

    def _encode_pictures(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).image_embeds


def make_head(tensors: dict[str, Tensor]) -> nn.Sequential:
    """The head that a file's tensors make, in float32.

    The linear layers' numbers tell what stands between them: with dropout alone the second one has
    number 2 and the whole is one linear map, with a ReLU as well it has number 3.
    """
    loaded.check_finite(tensors, "--reward: the aesthetic head")
    tensors = {name.removeprefix("predictor."): t.double() for name, t in tensors.items()}
    layers = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    try:
        layers.sort(key=lambda layer: int(layer.split(".")[1]) if layer else 0)
        pairs = [(tensors[f"{layer}weight"], tensors[f"{layer}bias"]) for layer in layers]
        if "layers.3." not in layers:
            pairs = [functools.reduce(lambda a, b: (b[0] @ a[0], b[0] @ a[1] + b[1]), pairs)]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--reward: these are no weights of an aesthetic head ({error})") from error
    modules: list[nn.Module] = []
    for weight, bias in pairs:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).requires_grad_(False)


class Aesthetic(Scorer):
    """The improved predictor.

    Options: `head` is the name of a published head (as models/improved-aesthetic-predictor has
    it), a file with one, or the folder or hub id of a predictor that brings its CLIP along; `clip`
    is the CLIP for a bare head.
    """

    differentiable = True
    range = "5 to 6.5"
    checkpoint = "sac+logos+ava1-l14-linearMSE"
    places = ("head", "clip")
    size = "4 MB and CLIP-L"
    licence = "Apache-2.0 (head)"

    def __init__(self, place: Place, *, head: str | None = None, clip: str = CLIP_L) -> None:
        super().__init__(place)
        name = head or self.checkpoint
        if name in HEADS:
            name = str(_head_file(name))
        self.backbone: Backbone
        if Path(name).suffix in (".pth", ".pt", ".bin", ".safetensors"):
            tensors = weights.read(weights.file(name))
            self.crop: preprocess.Crop = "torchvision"  # as OpenAI's own preprocessing
            self.backbone = backbone(clip, place)
        else:
            path = weights.folder(name, "config.json", "model.safetensors", "pytorch_model.bin")
            config, tensors = weights.read_folder(path)
            vision = {k: tensors.pop(k) for k in list(tensors) if k.startswith(_VISION)}
            self.crop = "transformers"
            self.backbone = place.share(
                ("vision", str(path)), lambda: _Vision(config, vision, place)
            )
        self.head = make_head(tensors).to(place.device)
        width = self.head[0].in_features
        if width != self.backbone.width:
            raise UserError(
                f"--reward: the head {name} takes {width} numbers, its CLIP gives "
                f"{self.backbone.width}"
            )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return self.head(self.backbone.pictures(images, self.crop)).squeeze(-1)


class AestheticV1(Aesthetic):
    """The first, linear predictor."""

    range = "4 to 6.5"
    checkpoint = "shunk031/aesthetics-predictor-v1-vit-large-patch14"
    size = "1.2 GB"
    licence = "MIT (head)"


def _head_file(name: str) -> Path:
    path = weights.MODELS / _FOLDER / f"{name}.pth"
    if not path.is_file():
        raise UserError(
            f"--reward: the aesthetic head {path} is not there; fetch it with "
            "`python -m dojo.download improved-aesthetic-heads`"
        )
    return path
