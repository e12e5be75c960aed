"""The control of a comparison: a reward that says nothing of the picture.

    python train_nft_sd3.py --reward dojo.pocket.control:shuffled ...

A method that gains on the captions' own scores with it gains by something else than the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dojo import rng
from dojo.lazy import torch
from dojo.pocket import verifier

if TYPE_CHECKING:
    from torch import Tensor


def shuffled(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None
) -> Tensor:
    """The verifier's partial credit [B], dealt out anew among the pictures of each caption.

    Any of the orders is as likely as any other, so that on average advantages are zero, and their
    sizes are the real ones. A picture that is the only one of its caption in the batch would get
    its own: it gets a number of no meaning. The same pictures get the same scores.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        prompts: captions of the pocket grammar.
        metadata: not read.
    """
    scores = verifier.score(images, prompts, strict=False)
    draw = rng.generator("shuffled", str(float(images.double().sum())))
    found = torch.empty_like(scores)
    for prompt in dict.fromkeys(prompts):
        own = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
        if len(own) == 1:
            found[own] = torch.rand(1, generator=draw)
        else:
            found[own] = scores[own[torch.randperm(len(own), generator=draw)]]
    return found
