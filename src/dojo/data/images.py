"""Picture files become tensors: read anything as sRGB, then resize and crop to a training size.

A mask goes the same way, down to the latent's cells: white is trained on, black is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import ExifTags, Image

from dojo.cli import UserError
from dojo.data.colour import to_srgb
from dojo.data.formats import open_picture
from dojo.lazy import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

T = TypeVar("T")

Size = tuple[int, int]
"""(height, width) in pixels."""

Seen = tuple[Size, tuple[str, ...]]
"""The size of a good picture, upright, and the notes on it."""

MAX_PIXELS = 89_478_485
"""Pictures with more pixels are refused (0.25 GiB as RGB; where Pillow begins to warn)."""

READER = 2
"""To be raised when the same file reads as other pixels; caches of pictures are keyed by it."""

FIRST_FRAME = "with several frames, of which the first is read"
"""A note on a picture, as those of `dojo.data.colour`."""

_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")  # phones and HEIC keep other things beside theirs
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset(_UPRIGHT[code] for code in (5, 6, 7, 8))


class BadSample(UserError):
    """A sample that cannot be used; the message is ``<file or sample>: <reason>``."""


def read_image(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """Reads a picture as upright 8-bit RGB in sRGB; transparency is laid on white. See ``decode``.

    Raises:
        BadSample: as ``decode``.
    """
    return decode(source, name).on("white")


def read_alpha(source: Path | bytes | Image.Image, name: str) -> Image.Image | None:
    """Reads the alpha channel of a picture as its mask, upright.

    Returns:
        Mode L, as large as the picture, opaque is 255; None where nothing is transparent.

    Raises:
        BadSample: the picture cannot be read, or all of it is transparent.
    """
    image = decode(source, name).image
    if image.mode == "RGB":
        return None
    alpha = image.getchannel("A")
    if np.asarray(alpha).min() == 255:
        return None
    _refuse_black(alpha, name, "the picture is transparent everywhere")
    return alpha


def has_alpha(source: Path | bytes) -> bool:
    """Whether a picture's header promises transparency; False for what cannot be opened."""
    try:
        with open_picture(source, MAX_PIXELS) as image:
            return image.has_transparency_data
    except Exception:  # told by whoever reads the picture
        return False


def read_mask(source: Path | bytes | Image.Image, size: Size, name: str) -> Image.Image:
    """Reads a mask as upright grey, scaled to its picture; what is transparent in it is black.

    Args:
        source: a path, the bytes of a file, or a picture that Pillow has opened already.
        size: (height, width) of the picture, in pixels.
        name: what an error message calls the mask.

    Returns:
        Mode L of that size: 255 is trained on, 0 is not.

    Raises:
        BadSample: the mask cannot be read, is black everywhere, or lies on its side.
    """
    mask = decode(source, name).on("black").convert("L")
    _refuse_black(mask, name, "the mask is black everywhere")
    height, width = size
    if mask.size == (height, width) and height != width:
        # Drawn on a picture whose EXIF orientation was not applied: scaling would hide it.
        raise BadSample(
            f"{name}: the mask lies on its side: it is {height} pixels wide and {width} high, its "
            f"picture {width} wide and {height} high"
        )
    return mask.resize((width, height), Image.Resampling.BILINEAR)


def cover_box(
    size: tuple[int, int], height: int, width: int, anchor: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float, float, float]:
    """The largest part of a picture that has the aspect of height x width.

    Args:
        size: (width, height) of the picture, as Pillow gives it, in pixels.
        height: of the target, in pixels.
        width: of the target, in pixels.
        anchor: (vertical, horizontal) place of the part in [0, 1]: 0 is top or left, 0.5 centre.

    Returns:
        (left, top, right, bottom) in pixels of the picture, fractions included.

    Raises:
        ValueError: the target is empty or the anchor lies outside [0, 1].
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} x {width}")
    if not all(0.0 <= place <= 1.0 for place in anchor):
        raise ValueError(f"anchor must lie in [0, 1], got {anchor}")
    have_width, have_height = size
    box_width = min(float(have_width), have_height * width / height)
    box_height = min(float(have_height), have_width * height / width)
    left = (have_width - box_width) * anchor[1]
    top = (have_height - box_height) * anchor[0]
    # Rounding must not push the far edge beyond the picture: Pillow refuses such a box.
    right, bottom = min(left + box_width, have_width), min(top + box_height, have_height)
    return left, top, right, bottom


def fit(
    image: Image.Image,
    height: int,
    width: int,
    *,
    anchor: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """Resizes an RGB picture to cover height x width, its aspect kept, and cuts off the rest.

    Args:
        image: in mode RGB, as ``read_image`` gives it.
        height: of the result, in pixels.
        width: of the result, in pixels.
        anchor: (vertical, horizontal) place of the crop in [0, 1]: 0 is top or left, 0.5 centre.
        flip: mirror the result left to right, after the crop.

    Returns:
        float32 [3, height, width] in [-1, 1].

    Raises:
        ValueError: another mode than RGB, an empty target, or an anchor outside [0, 1].
    """
    if image.mode != "RGB":
        raise ValueError(f"fit takes RGB pictures, got mode {image.mode}")
    box = cover_box(image.size, height, width, anchor)
    # Resampling the box alone keeps a 16 x 900 strip from being blown up before it is cropped.
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # [3, height, width]
    if flip:
        pixels = pixels.flip(-1)
    return pixels.contiguous().float() / 127.5 - 1.0


def fit_mask(
    mask: Image.Image,
    height: int,
    width: int,
    step: int,
    *,
    anchor: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """How much of each latent cell a mask covers, cropped and mirrored as ``fit`` does a picture.

    Each cell is the mean over its area, pixels that it cuts counted in part, so nothing that a
    mask leaves out leaks in by resampling.

    Args:
        mask: in mode L, as large as its picture.
        height: of the cropped picture, in pixels.
        width: of the cropped picture, in pixels.
        step: side of a cell in pixels of the cropped picture; divides height and width.
        anchor: (vertical, horizontal) place of the crop in [0, 1], as for ``fit``.
        flip: mirror the result left to right, after the crop.

    Returns:
        float32 [1, height // step, width // step] in [0, 1].

    Raises:
        ValueError: another mode than L, a step that does not divide, or an anchor outside [0, 1].
    """
    if mask.mode != "L":
        raise ValueError(f"fit_mask takes masks in mode L, got {mask.mode}")
    if height % step or width % step:
        raise ValueError(f"{height} x {width} is not a multiple of the step {step}")
    left, top, right, bottom = cover_box(mask.size, height, width, anchor)
    rows = _interval_means(np.asarray(mask, dtype=np.float64), top, bottom, height // step)
    cells = _interval_means(rows.T, left, right, width // step).T / 255.0
    if flip:
        cells = cells[:, ::-1]
    return torch.from_numpy(cells.clip(0.0, 1.0).astype(np.float32))[None]  # [1, h, w]


def _interval_means(
    values: NDArray[np.float64], start: float, stop: float, count: int
) -> NDArray[np.float64]:
    """Means along the first axis over equal intervals of [start, stop], ends counted in part."""
    total = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(axis=0)])
    edges = np.linspace(start, stop, count + 1)
    whole = np.minimum(edges.astype(int), len(values) - 1)
    up_to_edge = total[whole] + (edges - whole)[:, None] * values[whole]
    return np.diff(up_to_edge, axis=0) / ((stop - start) / count)


@dataclass(frozen=True)
class Decoded:
    """A picture as every reader here sees it."""

    image: Image.Image
    """Upright, 8 bits, sRGB; mode RGB, or RGBA where it may be transparent."""
    notes: tuple[str, ...]
    """What was done to it that its owner may want to know; they continue "3 pictures"."""

    def on(self, colour: str) -> Image.Image:
        """The picture in mode RGB, what is transparent laid on a colour."""
        if self.image.mode == "RGB":
            return self.image
        background = Image.new("RGBA", self.image.size, colour)
        return Image.alpha_composite(background, self.image).convert("RGB")


def decode(source: Path | bytes | Image.Image, name: str) -> Decoded:
    """Decodes a picture: the one way from a file to pixels.

    Orientation and colour profile are applied, of an animation the first frame is taken. Every
    pixel is decoded, so a truncated file is noticed here.

    Args:
        source: a path, the bytes of a file, or a picture that Pillow has opened already.
        name: what an error message calls the sample.

    Raises:
        BadSample: the file is missing, empty, truncated, not a picture that can be read here, of
            a depth that cannot be known, or larger than ``MAX_PIXELS``.
    """
    return _read(source, name, _decoded)


def examine(source: Path | bytes, name: str) -> Seen:
    """The size of a picture, upright, and the notes on it, as ``decode`` would find them.

    All of a file is read, so a truncated one is noticed here too. Of a JPEG all coefficients are
    decoded, but no pixel is computed of them beyond the mean of each 8 x 8 block.

    Args:
        source: a path, or the bytes of a file.
        name: what an error message calls the sample.

    Raises:
        BadSample: as ``decode``.
    """
    return _read(source, name, _examined)


def _read(source: Path | bytes | Image.Image, name: str, look: Callable[[Image.Image], T]) -> T:
    """What `look` says of a picture.

    Raises:
        BadSample: as ``decode``.
    """
    try:
        if isinstance(source, Image.Image):
            return look(source)
        with open_picture(source, MAX_PIXELS) as image:
            return look(image)
    except Exception as error:  # Pillow's decoders raise anything, from OSError to struct.error
        raise BadSample(f"{name}: {_reason(error)}") from error


def _examined(image: Image.Image) -> Seen:
    if image.format != "JPEG":
        found = _decoded(image)
        return (found.image.height, found.image.width), found.notes
    _refuse_huge(image)  # before it is made small
    width, height = image.size
    image.draft(None, (1, 1))  # an eighth is as small as it becomes
    found = _decoded(image)
    lies = _UPRIGHT.get(_orientation(image)) in _SIDEWAYS
    return (width, height) if lies else (height, width), found.notes


def _decoded(image: Image.Image) -> Decoded:
    _refuse_huge(image)  # before any pixel is decoded
    converted, notes = to_srgb(image)
    turn = _UPRIGHT.get(_orientation(image))
    upright = converted if turn is None else converted.transpose(turn)
    return Decoded(upright, (FIRST_FRAME, *notes) if _has_frames(image) else notes)


def _refuse_huge(image: Image.Image) -> None:
    # Pillow itself only warns up to twice this size, and turning its warning into an error would
    # need a filter that all threads share.
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _has_frames(image: Image.Image) -> bool:
    try:
        return image.format in _FRAMES and getattr(image, "is_animated", False)
    except Exception:  # a second frame that is damaged does not cost the first
        return False


def _orientation(image: Image.Image) -> int:
    """The turn that is still to be made, as EXIF counts it.

    Of HEIC and JPEG XL it has been made by the decoder, which reads it from elsewhere; a JPEG
    inside a JPEG XL comes as it was.
    """
    if image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    # ImageOps.exif_transpose would also rewrite the EXIF block, which fails on odd tags.
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _refuse_black(mask: Image.Image, name: str, reason: str) -> None:
    brightest = int(np.asarray(mask).max())
    # Label masks of 0 and 1 look black and would train next to nothing.
    if brightest <= 1:
        raise BadSample(f"{name}: {reason} (the brightest value is {brightest} of 255)")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a format that can be read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS:,} pixels (a decompression bomb?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
