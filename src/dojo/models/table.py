"""A text encoder's table of embeddings with rows for new words behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NewRows(nn.Module):
    """A table that stays as it is, and vectors of new tokens, in float32.

    What is looked up is what a longer table would give; there is none, so that nothing but the new
    rows has a gradient or a place in the optimizer.
    """

    def __init__(self, table: nn.Module, rows: Tensor, first: int, *, keep_norm: bool) -> None:
        """Takes the frozen table and the first values of the rows.

        Args:
            rows: [n, D].
            first: number of the first new token; smaller ones are the table's.
            keep_norm: each vector keeps its length, and its direction alone is learned.
        """
        super().__init__()
        self.table, self.first = table, first
        self.rows = nn.Parameter(rows.detach().clone(), requires_grad=False)
        norms = rows.detach().norm(dim=-1, keepdim=True) if keep_norm else None
        self.register_buffer("norms", norms, persistent=False)
        self.norms: Tensor | None

    @property
    def weight(self) -> Tensor:
        """That of the table."""
        weight = self.table.weight
        assert isinstance(weight, Tensor)
        return weight

    def vectors(self) -> Tensor:
        """What stands for the new tokens: float32 [n, D]."""
        if self.norms is None:
            return self.rows
        return self.rows * (self.norms / self.rows.norm(dim=-1, keepdim=True))

    def forward(self, ids: Tensor) -> Tensor:
        """Numbers of tokens to vectors, in the table's precision: [B, T] -> [B, T, D]."""
        known = self.table(ids.clamp(max=self.first - 1))
        new = F.embedding((ids - self.first).clamp(min=0), self.vectors()).to(known.dtype)
        return torch.where((ids >= self.first)[..., None], new, known)
