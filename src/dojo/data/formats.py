"""Which picture formats this installation reads, how files of them end, and what else would help.

HEIC and JPEG XL come with plugins of Pillow's (``pip install -e ".[photos]"``); AVIF came with
Pillow 11.3 and is a plugin before.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image, PngImagePlugin

from dojo.data import jxl

_ENDINGS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".jp2",),
    "JXL": (".jxl",),
    "PNG": (".apng", ".png"),
    "PPM": (".pgm", ".ppm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
_PHOTOS = 'pip install -e ".[photos]" reads them'
_PLUGINS = {
    "HEIF": ("pillow_heif", _PHOTOS),
    "JXL": ("pillow_jxl", _PHOTOS),
    "AVIF": ("pillow_avif", "Pillow 11.3 or pip install pillow-avif-plugin reads them"),
}
_EXPORT = "export them as PNG or JPEG"
_REMEDIES = {
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dng"), _EXPORT),
    **dict.fromkeys((".psd", ".svg", ".eps", ".ai", ".xcf", ".exr", ".hdr", ".ico"), _EXPORT),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"), "save their frames as pictures"),
    ".tar": "a webdataset is read where no pictures lie beside it, or by a pattern: FOLDER/*.tar",
    **dict.fromkeys((".zip", ".tgz", ".gz", ".7z", ".rar"), "unpack them"),
    ".json": "captions of other trainers go into metadata.jsonl (file_name, text)",
    ".npz": "another trainer's cache",
}
_TEXT_BYTES = 64 * 2**20  # of a PNG's text and colour profile, unpacked


@cache
def readable() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here."""
    Image.init()
    for name, (module, _) in _PLUGINS.items():
        if name not in Image.OPEN:
            _register(module)
    # A ComfyUI workflow passes Pillow's 1 MiB for one text; its bound for all of them stays.
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, _TEXT_BYTES)
    PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, _TEXT_BYTES)
    # A short list, because opening an .eps would start Ghostscript.
    return tuple(name for name in _ENDINGS if name in Image.OPEN)


def _register(module: str) -> None:
    """Lets a plugin add its format to Pillow's, if it is installed and works."""
    try:
        plugin = importlib.import_module(module)
    except (ImportError, OSError):  # OSError: a library of the plugin's is missing
        return
    register: Callable[[], None] | None = getattr(plugin, "register_heif_opener", None)
    if register is not None:  # the other plugins do so by being imported
        register()


@cache
def picture_suffixes() -> frozenset[str]:
    """Files with these endings, in lower case, are taken for pictures."""
    return frozenset(ending for name in readable() for ending in _ENDINGS[name])


def remedy(suffix: str) -> str:
    """What would make files with this ending, in lower case, of use; empty where nothing is known.

    It continues "4 .heic files: ".
    """
    for name, (_, words) in _PLUGINS.items():
        if suffix in _ENDINGS[name] and name not in readable():
            return words
    return _REMEDIES.get(suffix, "")


def open_picture(source: Path | bytes, max_pixels: int) -> Image.Image:
    """Opens a picture file, in the formats that are known, without decoding its pixels.

    Raises:
        OSError, ValueError: it cannot be opened.
        Image.DecompressionBombError: a JPEG XL claims more than ``max_pixels``; the others are
            judged by whoever decodes them, but the plugin decodes these as it opens them.
    """
    empty = not source if isinstance(source, bytes) else source.stat().st_size == 0
    if empty:
        raise ValueError("the file is empty")
    head = source[:32] if isinstance(source, bytes) else _head(source)
    kind = _kind(head)
    if kind and kind not in readable():
        raise ValueError(f"{kind} is not read here: {_PLUGINS[kind][1]}")
    if kind == "JXL":
        source = source if isinstance(source, bytes) else source.read_bytes()
        width, height = jxl.size(source)
        if width * height > max_pixels:
            raise Image.DecompressionBombError
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    return Image.open(file, formats=readable())


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _kind(head: bytes) -> str:
    """The format of a file of those that need a plugin; empty for any other."""
    if head.startswith(jxl.SIGNATURES):
        return "JXL"
    if head[4:8] != b"ftyp":
        return ""
    brand = head[8:12]
    if brand in (b"avif", b"avis"):
        return "AVIF"
    # The brand of HEIF's structure stands before that of what it holds, which may be AV1.
    if brand == b"mif1" and b"avif" in head[16:]:
        return "AVIF"
    known = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "HEIF" if brand in known else ""
