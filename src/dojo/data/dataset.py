"""torch's Dataset, of which a loader asks a length and items and not that anything derives from it.

Type checkers see the class itself; nothing waits here for torch to be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch.utils.data import Dataset as Dataset
else:
    T = TypeVar("T")

    class Dataset(Generic[T]):
        """Samples by their places."""
