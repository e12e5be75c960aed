"""What reinforcement learning costs, counted in forward passes of one picture.

A step that is trained counts three, for its backward pass is two; without gradient checkpointing.
The autoencoder, the rewards and the text encoders are not counted.
"""

from __future__ import annotations

TRAINED = 3


def of_steps(sample_steps: int, trained: range, copies: int = 1) -> tuple[float, float]:
    """How often the network is asked on a picture's way, and of these at trained steps.

    Args:
        trained: the steps that are.
        copies: pictures that share their way up to the first trained step (`--branch`), which
            begins where all still are one.
    """
    each = [1 / copies if step <= trained.start else 1.0 for step in range(sample_steps)]
    return sum(each), sum(each[step] for step in trained)


def of_way(
    sample_steps: int,
    trained: range,
    *,
    copies: int = 1,
    branches: int = 1,
    again: bool = False,
    tied: bool = False,
    uses: int = 1,
) -> float:
    """Where steps of a picture's way are trained (GRPO, DDPO).

    Args:
        trained: the steps that are.
        copies: pictures that share their way up to the first trained step (`--branch`).
        branches: 2 with guidance.
        again: the policy is asked once more in training's batches (`--sample_batch_size`).
        tied: the base is asked at every trained step.
        uses: passes over the pictures of an epoch.
    """
    drawn, at_trained = of_steps(sample_steps, trained, copies)
    asked = again + uses * (TRAINED + tied)
    return branches * (drawn + asked * at_trained)


def of_finished(drawn: int, levels: int, asked: int, *, branches: int = 1, uses: int = 1) -> float:
    """Where finished pictures are noised anew and learned from (NFT and its siblings).

    Args:
        drawn: times that the network is asked on a picture's way.
        levels: at which each is.
        asked: times that a frozen policy is asked about a picture.
        branches: 2 with guidance, which the sampling alone has.
        uses: passes over the pictures of an epoch.
    """
    return branches * drawn + asked + uses * TRAINED * levels
