"""Random numbers that depend on names and places, not on what was drawn before.

Every draw of a run (order, noise, sigma, crop, dropout) takes its own generator, seeded from the
run's seed, the name of the stream and the position. Nothing has to be saved to resume, and two
processes draw for their samples what one process would have drawn for the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Key = int | str


def seed_for(*keys: Key) -> int:
    """A seed of 63 bits for a tuple of keys; the same on every machine and in every process."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `keys`. Streams of CPU and CUDA differ, as everywhere in torch."""
    return torch.Generator(device).manual_seed(seed_for(*keys))


def normal(
    shape: Sequence[int], keys: Sequence[tuple[Key, ...]], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise, one generator per sample: float32 [len(keys), *shape]."""
    return torch.stack(
        [
            torch.randn(*shape, generator=generator(*key, device=device), device=device)
            for key in keys
        ]
    )


def uniform(keys: Sequence[tuple[Key, ...]], device: torch.device | str = "cpu") -> Tensor:
    """One uniform number in (0, 1] per key: float32 [len(keys)]."""
    draws = [1 - torch.rand((), generator=generator(*key)) for key in keys]
    return torch.stack(draws).to(device)


def seed_global(*keys: Key) -> None:
    """Seeds torch's own generators, for what draws from them inside a network: dropout."""
    seed = seed_for(*keys)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    else:  # torch would note down at every step who seeds the devices that are not there
        torch.default_generator.manual_seed(seed)
