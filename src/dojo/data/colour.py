"""Pictures of any mode, depth and colour profile become 8-bit sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONVERTED = "converted to sRGB from a wider or other colour profile"
BAD_PROFILE = "with a colour profile that is damaged or not theirs, which is ignored"
GAMMA = "converted to sRGB from the gamma that the PNG names"
"""Notes on what was done to a picture; they continue "3 pictures"."""

_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_GREY_MODES = frozenset({"1", "L", "LA", "La", *_SIXTEEN_BIT_MODES})
_BLACK = 15  # of 255: as bright as 12 bits become when they are taken for 16
_SRGB_GAMMA = 1 / 2.2
_SAME_GAMMA = 0.05  # gammas that differ by less count as one, as they do to libpng


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Decodes a picture to mode RGB, or RGBA where it may be transparent; with notes on it.

    Its colour profile counts, or else the gamma of a PNG that has not the mark of sRGB. Of 16 bits
    the high byte is kept. Alpha is no colour, and stays as it is.

    Raises:
        ValueError: floating-point pixels, or 16 and 32 bits of a range that is not known: what
            would come out black, and what lies above 65,535.
        Exception: Pillow's decoders raise anything.
    """
    # Pillow keeps the high byte of 16-bit RGB, and tells so only before the pixels are decoded.
    is_deep = image.mode in _SIXTEEN_BIT_MODES or ";16" in repr(getattr(image, "tile", ""))
    image.load()
    alpha = None
    gamma = _gamma(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        flat = _eight_bits(image, gamma)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    elif image.mode in ("L", "CMYK"):
        flat = image
    else:
        flat = image.convert("L" if image.mode == "1" else "RGB")
    flat, notes = _managed(image, flat)
    if gamma is not None:
        if image.mode not in _SIXTEEN_BIT_MODES:
            flat = flat.point(_curve(gamma, 256).tolist() * 3)
        notes = (GAMMA,)
    if is_deep:
        _refuse_black(image, flat)
    flat.info.clear()  # its profile is applied, and must not be once more
    if alpha is not None:
        flat.putalpha(alpha)
    return flat, notes


def _eight_bits(image: Image.Image, gamma: float | None) -> Image.Image:
    """Grey of 16 or 32 bits in mode L."""
    values = np.asarray(image)
    if values.max() > 65535:
        raise ValueError(
            f"grey of 32 bits, up to {values.max():,}, has no known range; save it with 8 or 16"
        )
    values = values.clip(0, 65535)
    levels = values // 256 if gamma is None else _curve(gamma, 65536)[values]
    return Image.fromarray(levels.astype(np.uint8))


def _refuse_black(image: Image.Image, flat: Image.Image) -> None:
    """Refuses what has more bits than it fills: as good as black, unless it is black indeed."""
    level = int(np.asarray(flat).max())
    if level > _BLACK:
        return
    brightest = f"{level} of 255"
    if image.mode in _SIXTEEN_BIT_MODES:
        value = int(np.asarray(image).max())
        if value <= 0:
            return
        brightest = f"{value:,} of 65,535"
    raise ValueError(
        f"it would come out black, its brightest value being {brightest}: perhaps it has 12 bits "
        "in 16, or 32 bits and a range of its own; scale it, or save it with 8 bits"
    )


# Profiles


class _Conversion(NamedTuple):
    """How pictures with a profile become sRGB."""

    mode: str
    """What the transform takes; empty where the profile cannot be used."""
    transform: ImageCms.ImageCmsTransform | None
    """None: they are sRGB already."""


def _managed(image: Image.Image, flat: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The colours of a picture in mode RGB, its profile applied; `flat` if it has them already."""
    if "icc_profile" not in image.info or image.mode == "LAB":
        return _in_rgb(flat), ()
    profile = image.info["icc_profile"]  # None where Pillow found it damaged
    kind = "GRAY" if image.mode in _GREY_MODES else flat.mode
    mode, transform = _conversion(bytes(profile or b""), kind)
    if transform is None:
        return _in_rgb(flat), () if mode else (BAD_PROFILE,)
    return transform.apply(flat.convert(mode)), (CONVERTED,)


def _in_rgb(flat: Image.Image) -> Image.Image:
    # Pillow's convert copies what is in the mode already.
    return flat if flat.mode == "RGB" else flat.convert("RGB")


@lru_cache(maxsize=32)
def _conversion(profile: bytes, kind: str) -> _Conversion:
    """The conversion of pictures of a kind: GRAY, RGB or CMYK."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(getattr(source.profile, "xcolor_space", "")).strip()
        # Grey pictures often carry the profile of the colour pictures they were made from.
        if space != kind and (kind, space) != ("GRAY", "RGB"):
            return _Conversion("", None)
        mode = "L" if space == "GRAY" else space
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(target), mode, "RGB"
        )
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return _Conversion("", None)
    return _Conversion(mode, None if _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no colour moves by more than rounding: the many profiles of sRGB."""
    if mode == "CMYK":
        return False
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        steps = np.arange(0, 256, 15, dtype=np.uint8)  # 18 levels, black and white among them
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
        probe = Image.fromarray(colours.reshape(len(steps), -1, 3))
    before = np.asarray(probe.convert("RGB"), dtype=int)
    after = np.asarray(transform.apply(probe), dtype=int)
    return int(np.abs(after - before).max()) <= 1


# Gamma


def _gamma(image: Image.Image) -> float | None:
    """The gamma of a PNG's pixels, where it says one that counts and differs from sRGB's."""
    gamma = image.info.get("gamma")
    if not isinstance(gamma, float) or not gamma > 0:
        return None
    is_told = image.info.get("icc_profile") or "srgb" in image.info
    same = abs(gamma / _SRGB_GAMMA - 1) < _SAME_GAMMA
    return None if is_told or same else gamma


@lru_cache(maxsize=8)
def _curve(gamma: float, levels: int) -> NDArray[np.uint8]:
    """The sRGB level, 0 to 255, of each level of a PNG: it holds light ** gamma."""
    light = np.linspace(0.0, 1.0, levels) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (srgb * 255).round().astype(np.uint8)
