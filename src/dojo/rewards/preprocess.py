"""Pictures as the scorers' networks want them, in torch alone, so that gradients pass.

The official scorers resize with PIL, which works on 8-bit numbers: first the width, then the
height, rounded and clipped after each. Bicubic weights overshoot, so leaving the rounding out
changes pixels by up to 47/255 at hard edges. `resize` does as PIL does and hands gradients
through the rounding as if it were not there. (Since 13, Pillow shrinks pictures that are more
than twice as tall as wide in the other order. The scorers are older, so theirs is kept.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dojo.lazy import F

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ELONGATED = 8  # of a picture with sides of a greater ratio, only the middle is resized

Crop = Literal["torchvision", "transformers"]
"""whose rule for half a pixel at the crop: one rounds it to even, the other down"""


def quantize(x: Tensor) -> Tensor:
    """To the 256 levels of a saved picture in [0, 1]; the gradient passes unchanged."""
    return x + ((x.detach().clamp(0, 1) * 255).round() / 255 - x.detach())


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] to [B, 3, height, width] as PIL's bicubic filter does it."""
    x = quantize(images.float())
    for size in ((x.shape[-2], width), (height, width)):
        if size != tuple(x.shape[-2:]):
            x = quantize(_bicubic(x, size))
    return x


def resize_and_crop(images: Tensor, size: int, crop: Crop) -> Tensor:
    """CLIP's way: the shorter side to `size`, then the middle square: [B, 3, size, size].

    Of a very long picture the ends, which nothing of the square is made of, are left out before:
    one of 1 x 512 pixels would become one of 224 x 114,688. Where its longer side does not scale
    to whole pixels, that moves the square by a pixel at most.
    """
    images = _middle(images)
    height, width = shortest_edge(images.shape[-2], images.shape[-1], size)
    top, left = corner(height, width, size, crop)
    return resize(images, height, width)[..., top : top + size, left : left + size]


def _middle(images: Tensor) -> Tensor:
    """The middle of a picture, [B, 3, H, W], whose sides have a greater ratio than ELONGATED."""
    most = ELONGATED * min(images.shape[-2:])
    # As much at either end, so that the middle stays where it is.
    top, left = (max(0, side - most) // 2 for side in images.shape[-2:])
    return images[..., top : images.shape[-2] - top, left : images.shape[-1] - left]


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """The sizes with the shorter side at `size`; the longer one is cut to whole pixels."""
    if height <= width:
        return size, size * width // height
    return size * height // width, size


def corner(height: int, width: int, size: int, crop: Crop) -> tuple[int, int]:
    """Where the middle square begins: top and left."""
    over = height - size, width - size
    if crop == "torchvision":
        return round(over[0] / 2), round(over[1] / 2)
    return over[0] // 2, over[1] // 2


def letterbox(images: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """HPSv2's way: the longer side to `size`, black around it: [B, 3, size, size].

    HPSv2 resizes after it has made floats of the picture, so nothing is rounded in between. The
    values may leave [0, 1].
    """
    x = quantize(images.float())
    scale = size / max(x.shape[-2:])
    height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
    if (height, width) != tuple(x.shape[-2:]):
        x = _bicubic(x, (height, width), antialias=antialias)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(x, (left, size - width - left, top, size - height - top))


def normalize(
    x: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """(x - mean) / std for each of the three colours."""
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def _bicubic(x: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    return F.interpolate(x, size, mode="bicubic", antialias=antialias, align_corners=False)
