"""SD1, SD2 and SDXL in one file, as CompVis', Stability's and most other programs keep them.

`inspect` reads the header and says what a file is, `configurations` makes the folder that goes
with it (no download), `load` reads a part, `save` writes a file back.
"""

from pathlib import Path

from dojo.models.unet.ldm import PREFIXES as PARTS
from dojo.models.unet.single_file.constants import CONFIG_FLAG, marked
from dojo.models.unet.single_file.folder import configurations
from dojo.models.unet.single_file.header import FAMILIES, SingleFile, identify, inspect
from dojo.models.unet.single_file.loading import check, lacking, load, origins
from dojo.models.unet.single_file.reading import PICKLES, read
from dojo.models.unet.single_file.saving import save

__all__ = [
    "CONFIG_FLAG",
    "FAMILIES",
    "PARTS",
    "PICKLES",
    "SingleFile",
    "check",
    "configurations",
    "identify",
    "inspect",
    "is_named_like_one",
    "lacking",
    "load",
    "marked",
    "origins",
    "read",
    "save",
]


def is_named_like_one(name: str) -> bool:
    """Whether a model's name is that of one file."""
    return Path(name).suffix in (".safetensors", *PICKLES)
