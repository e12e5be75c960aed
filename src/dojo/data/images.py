"""Picture files become tensors: read anything as RGB, then resize and crop to a training size."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from dojo.cli import UserError

MAX_PIXELS = 89_478_485
"""Pictures with more pixels are refused (0.25 GiB as RGB; where Pillow begins to warn)."""

PICTURE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Files with these endings, in lower case, are taken for pictures."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(UserError):
    """A sample that cannot be used; the message is ``<file or sample>: <reason>``."""


def read_image(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """Reads a picture as upright 8-bit RGB, the first frame of an animation.

    The EXIF orientation is applied, transparency is laid on white, and 16-bit grey keeps its high
    byte. Every pixel is decoded, so a truncated file is noticed here.

    Args:
        source: a path, the bytes of a file, or a picture that Pillow has opened already.
        name: what an error message calls the sample.

    Raises:
        BadSample: the file is missing, empty, truncated, not a picture, or larger than
            ``MAX_PIXELS``.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with _open(source) as image:
            return _upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise anything, from OSError to struct.error
        raise BadSample(f"{name}: {_reason(error)}") from error


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


@cache
def _readable_formats() -> list[str]:
    # A short list, because opening an .eps would start Ghostscript; AVIF came with Pillow 11.3.
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open(source: Path | bytes) -> Image.Image:
    empty = not source if isinstance(source, bytes) else source.stat().st_size == 0
    if empty:
        raise ValueError("the file is empty")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    return Image.open(file, formats=_readable_formats())


def _upright_rgb(image: Image.Image) -> Image.Image:
    # Checked before any pixel is decoded. Pillow itself only warns up to twice this size, and
    # turning its warning into an error would need a filter that all threads share.
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    image.load()
    # ImageOps.exif_transpose would also rewrite the EXIF block, which fails on odd tags.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        high_byte = np.asarray(image).clip(0, 65535) // 256
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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
