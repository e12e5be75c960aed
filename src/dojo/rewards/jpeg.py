"""How small a picture gets as a JPEG: the reward without a network, from DDPO (Black et al. 2023,
arXiv:2305.13301, section 5.1).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dojo.files.pictures import to_pil
from dojo.rewards.scorer import Metadata, Scorer

if TYPE_CHECKING:
    from torch import Tensor

QUALITY = 95


class Incompressibility(Scorer):
    """The size in kilobytes (1000 bytes) of the picture as a JPEG of quality 95."""

    range = "kB, above 0"
    sign = 1

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        sizes = []
        for picture in to_pil(images):
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=QUALITY)
            sizes.append(self.sign * buffer.tell() / 1000)
        return sizes


class Compressibility(Incompressibility):
    """Minus that size."""

    range = "kB, below 0"
    sign = -1
