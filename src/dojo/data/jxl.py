"""The size of a JPEG XL picture from its header, because the plugin decodes a file as it opens it.

The header is that of ISO/IEC 18181-1, SizeHeader; the boxes are those of ISO/IEC 18181-2.
"""

from __future__ import annotations

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
SIGNATURES = (_CODESTREAM, _CONTAINER)
"""What a file begins with."""

_LENGTHS = (9, 13, 18, 30)  # bits of a side, chosen by two bits before it
_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as the header claims them, before any turn.

    Raises:
        ValueError: there is no such header.
    """
    code = data if data.startswith(_CODESTREAM) else _codestream(data)
    if not code.startswith(_CODESTREAM) or len(code) < 12:
        raise ValueError("the JPEG XL has no header, or is cut off")
    bits = _Bits(code[2:12])
    is_small = bits.take(1)
    height = _side(bits, is_small)
    ratio = _RATIOS[bits.take(3)]
    if ratio is None:
        return _side(bits, is_small), height
    return height * ratio[0] // ratio[1], height


def _side(bits: _Bits, is_small: int) -> int:
    if is_small:
        return (bits.take(5) + 1) * 8
    return bits.take(_LENGTHS[bits.take(2)]) + 1


def _codestream(data: bytes) -> bytes:
    """The beginning of the codestream in a container."""
    place = 0
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        start = 8
        if length == 1:  # the length follows in 64 bits
            length, start = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):  # the whole, or a part of it behind the part's number
            first = place + start + (4 if kind == b"jxlp" else 0)
            end = place + length if length else len(data)
            return data[first : min(first + 12, end)]
        if length < start:  # 0 reaches to the end of the file
            break
        place += length
    return b""


class _Bits:
    """Bits of bytes, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.rest = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        """The next `count` bits as a number."""
        taken = self.rest & ((1 << count) - 1)
        self.rest >>= count
        return taken
