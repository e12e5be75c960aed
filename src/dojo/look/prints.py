"""What tells equal and nearly equal pictures: two digests and a perceptual hash of each.

The hash is that of the cosine transform (DCT): the picture in grey at 64 x 64, of its transform the
16 x 16 lowest frequencies, and of each whether it is above their median. Of photographs that show
other things about half of the 256 bits differ; scaling, compression, brightness and a thin cut at
the borders move few. 256 bits in place of the usual 64: on 183 photographs (17,000 pairs) pictures
of different things began at 90 bits of 256 and a cut of 2 % at each side moved 56 at most, while of
64 bits they met, 12 and 14. Libraries have the 64-bit form; this one is the product of two
matrices. Grey alone would take an icon in two colours for one picture: the colours of 4 x 4 fields
have to agree too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = 256
_GREY, _KEPT = 64, 16  # sides: of the grey picture, and of its lowest frequencies
_FIELDS = 4  # of the colours, along a side
_COLOURS = 80.0  # levels of 255 that a field's colour may be away; of grey photographs 73 at most
_AT_ONCE = 2048  # pictures that are compared with as many at a time

_COSINES = np.cos(np.pi * np.outer(np.arange(_KEPT), np.arange(_GREY) + 0.5) / _GREY)


@dataclass(frozen=True)
class Print:
    """A picture's fingerprint: about a hundred bytes, whatever its size."""

    content: bytes
    """Digest of the file."""
    pixels: bytes
    """Digest of what is read from it, the size included."""
    bits: bytes
    """The perceptual hash, 256 bits."""
    colours: bytes
    """Mean colours of 4 x 4 fields, RGB."""


def print_of(content: bytes, picture: Image.Image) -> Print:
    """The fingerprint of a picture.

    Args:
        content: of its file.
        picture: what is read from it, in mode RGB.
    """
    pixels = hashlib.blake2b(f"{picture.size}".encode(), digest_size=16)
    pixels.update(picture.tobytes())
    small = picture.resize((_GREY, _GREY), Image.Resampling.LANCZOS, reducing_gap=3.0)
    colours = small.resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
    return Print(
        content=hashlib.blake2b(content, digest_size=16).digest(),
        pixels=pixels.digest(),
        bits=perceptual_hash(small),
        colours=colours.tobytes(),
    )


def perceptual_hash(small: Image.Image) -> bytes:
    """256 bits of a picture of 64 x 64 pixels; see the module."""
    grey = np.asarray(small.convert("L"), dtype=np.float64)
    lowest = (_COSINES @ grey @ _COSINES.T).ravel()
    # Rounding must not decide the bits of a picture of one colour. Its mean is no pattern.
    lowest = lowest.round(3)
    return np.packbits(lowest > np.median(lowest[1:])).tobytes()


def same(keys: Sequence[bytes]) -> list[list[int]]:
    """Groups of two or more places with equal keys, each in order."""
    places: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [some for some in places.values() if len(some) > 1]


def near(prints: Sequence[Print], bits: int) -> list[list[int]]:
    """Groups of places whose pictures are nearly the same, each in order.

    A group is joined by pairs: its first and its last may be further apart. Every picture is
    compared with every other, in blocks, so memory does not grow with their square.

    Args:
        bits: of 256 that may differ between two of them.
    """
    first = list(range(len(prints)))  # the first place of each one's group, or one before it

    def root(place: int) -> int:
        while first[place] != place:
            first[place] = first[first[place]]
            place = first[place]
        return place

    for one, other in pairs(prints, bits):
        low, high = sorted((root(one), root(other)))
        first[high] = low
    groups: dict[int, list[int]] = {}
    for place in range(len(prints)):
        groups.setdefault(root(place), []).append(place)
    return [some for some in groups.values() if len(some) > 1]


def pairs(prints: Sequence[Print], bits: int) -> Iterator[tuple[int, int]]:
    """Places of two pictures, the earlier first, that differ in so many bits at most."""
    blocks = range(0, len(prints), _AT_ONCE)
    for start in blocks:
        some = prints[start : start + _AT_ONCE]
        signs, colours = _signs(some), _colours(some)
        for begin in range(start, len(prints), _AT_ONCE):
            others = prints[begin : begin + _AT_ONCE]
            # Of two rows of 1 and -1 the product is the equal bits less the others.
            distances = (BITS - signs @ _signs(others).T) / 2
            lows, highs = np.nonzero(distances <= bits)
            away = np.abs(colours[lows] - _colours(others)[highs]).mean(2).max(1, initial=0)
            for low, high, colour in zip(lows.tolist(), highs.tolist(), away.tolist(), strict=True):
                if start + low < begin + high and colour <= _COLOURS:
                    yield start + low, begin + high


def _signs(prints: Sequence[Print]) -> NDArray[np.float32]:
    bits = np.frombuffer(b"".join(one.bits for one in prints), np.uint8).reshape(-1, BITS // 8)
    return np.unpackbits(bits, axis=1).astype(np.float32) * 2 - 1


def _colours(prints: Sequence[Print]) -> NDArray[Any]:
    joined = b"".join(one.colours for one in prints)
    return np.frombuffer(joined, np.uint8).reshape(len(prints), -1, 3).astype(np.int16)
