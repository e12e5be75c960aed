"""The transition of a stochastic sampler: a Gaussian with one standard deviation.

Drawing from it, its log-probability and its divergence stand here once, for every sampler, so
that what a rollout draws and what training scores cannot be two different distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2 I) for every sample of a batch.

    The std is a plain number: it depends on the step alone, which a batch takes together, and so
    it can be checked without waiting for the device.

    Raises:
        ValueError: a std that is negative or not finite, or a mean in half precision.
    """

    mean: Tensor
    """float32 [B, ...]"""
    std: float
    """zero for a step without noise"""

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"a standard deviation of {self.std}")
        require_full_precision(self.mean)

    def sample(self, noise: Tensor) -> Tensor:
        """The draw that standard normal `noise` [B, ...] stands for: mean + std noise."""
        return self.mean + self.std * noise

    def noise(self, x: Tensor) -> Tensor:
        """The noise that drew `x`, the inverse of `sample`: [B, ...].

        Raises:
            ValueError: a std of zero.
        """
        self._require_noise()
        return (x - self.mean) / self.std

    def log_prob(self, x: Tensor, *, scaled: bool = True) -> Tensor:
        """The logarithm of the density at `x`, as a mean over dimensions: [B, ...] -> [B].

        A mean and not the sum, as in DDPO (Black et al. 2023, arXiv:2305.13301) and all that
        followed: the sum over D dimensions gives ratios that leave every clip range after one
        update. A ratio of means is the D-th root of the true one. Where the mean has moved by a
        share d of the std per dimension, its logarithm has a spread of d / sqrt(D): the clip range
        that fits shrinks with the root of the latent's size.

        Args:
            scaled: False drops all constants and leaves the negative mean square, as the authors
                of CPS do (arXiv:2509.05952); steps with little noise then count less.
        Raises:
            ValueError: a std of zero, which has no density, or `x` in half precision, whose
                rounding is far above a clip range.
        """
        self._require_noise()
        require_full_precision(x)
        square = _mean_square(x - self.mean)
        if not scaled:
            return -square
        return -square / (2 * self.std**2) - math.log(self.std) - _HALF_LOG_TWO_PI

    def kl(self, other: Gaussian) -> Tensor:
        """The exact divergence KL(self || other), as a mean over dimensions: [B].

        Raises:
            ValueError: a std of zero on either side.
        """
        self._require_noise()
        other._require_noise()
        ratio = self.std / other.std
        square = _mean_square(self.mean - other.mean)
        return square / (2 * other.std**2) + (0.5 * (ratio**2 - 1) - math.log(ratio))

    def _require_noise(self) -> None:
        if self.std == 0:
            raise ValueError("a step without noise has no density: it cannot be trained")


def require_full_precision(tensor: Tensor) -> None:
    """Refuses half precision.

    Raises:
        ValueError: the tensor is float16 or bfloat16.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"a trajectory is kept in float32; this is {tensor.dtype}")


def _mean_square(error: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return error.square().flatten(1).mean(1)
