"""A reward: the weighted sum of scorers, scored now or in the background.

    reward = load("aesthetic=0.5,pickscore=1", device=torch.device("cuda"))
    output = reward(images, prompts)            # images [B, 3, H, W] in [0, 1]
    future = reward.submit(images, prompts)     # the same without gradients, in a thread

`dojo.rewards.spec` tells what the text may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.lazy import no_grad, torch
from dojo.rewards.scorer import Metadata, RewardOutput, Scorer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Component", "Reward", "RewardOutput"]


@dataclass(frozen=True, kw_only=True)
class Component:
    """A scorer with its name and weight."""

    name: str
    scorer: Scorer
    weight: float = 1.0


class Reward:
    """Scores pictures by a weighted sum of components."""

    def __init__(self, components: Sequence[Component], *, batch_size: int = 16) -> None:
        self.components = tuple(components)
        self.batch_size = batch_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each component in the sum, by name."""
        return {one.name: one.weight for one in self.components}

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from every score that counts to the pixels."""
        return all(one.scorer.differentiable for one in self.components if one.weight)

    @property
    def good_enough(self) -> float | None:
        """The weighted sum from which on a picture is left alone (ReFL's margin); None where not
        every counted scorer knows such a score."""
        known = [(one.weight, one.scorer.good_enough) for one in self.components if one.weight]
        marks = [weight * mark for weight, mark in known if mark is not None]
        return sum(marks) if marks and len(marks) == len(known) else None

    def require_differentiable(self) -> None:
        """Refuses scorers that gradients do not pass.

        Raises:
            UserError: naming them.
        """
        counted = [one for one in self.components if one.weight]  # the others only record
        names = [one.name for one in counted if not one.scorer.differentiable]
        if names:
            raise UserError(
                f"--reward: no gradient reaches the picture through {', '.join(names)}; "
                "see --list_rewards for those that are differentiable"
            )

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> RewardOutput:
        """Scores pictures; gradients flow where they are on and the scorers let them.

        Args:
            images: [B, 3, H, W] in [0, 1], of any floating type.
            prompts: B texts.
            metadata: B mappings, for scorers that need more than the prompt.
        """
        count = len(images)
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != count or count == 0:
            raise ValueError(
                f"a reward takes images [B, 3, H, W] and B prompts, not {list(images.shape)} "
                f"and {len(prompts)}"
            )
        if metadata is not None and len(metadata) != count:
            raise ValueError(f"{count} pictures, but metadata for {len(metadata)}")
        columns: dict[str, list[Tensor]] = {one.name: [] for one in self.components}
        for start in range(0, count, self.batch_size):
            part = slice(start, start + self.batch_size)
            # By device, so that scorers on the same one see the same tensor and share its
            # embedding.
            moved: dict[torch.device, Tensor] = {}
            for one in self.components:
                device = one.scorer.place.device
                if device not in moved:
                    moved[device] = images[part].to(device, torch.float32)
                rows = None if metadata is None else metadata[part]
                scores = _column(one, moved[device], prompts[part], rows)
                columns[one.name].append(scores.to(images.device))
        components = {name: torch.cat(parts) for name, parts in columns.items()}
        valid = torch.stack([column.isfinite() for column in components.values()]).all(dim=0)
        total = sum(
            (one.weight * components[one.name] for one in self.components),
            start=torch.zeros(count, device=images.device),
        )
        return RewardOutput(
            scores=torch.where(valid, total, 0.0), valid=valid, components=components
        )

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Future[RewardOutput]:
        """Scores without gradients in a thread of its own, one batch after the other.

        The pictures must not be changed meanwhile. `result()` raises what the scoring raised.
        """
        on_gpu = images.device.type == "cuda"
        # The pictures may still be in the making: the thread's stream waits for this moment.
        ready = torch.cuda.current_stream(images.device).record_event() if on_gpu else None

        @no_grad
        def work() -> RewardOutput:
            if ready is None:
                return self(images, prompts, metadata)
            stream = torch.cuda.Stream(images.device)
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                output = self(images, prompts, metadata)
            stream.synchronize()
            return output

        return self._thread.submit(work)


def _column(
    one: Component, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
) -> Tensor:
    """A component's scores as float32 [B]; what is not finite becomes NaN."""
    # Half precision is the scorer's own choice, not that of the training around it.
    with torch.autocast(images.device.type, enabled=False):
        values = one.scorer.score(images, prompts, metadata)
    scores = torch.as_tensor(values, device=images.device).float()
    if scores.shape != (len(images),):
        raise ValueError(f"{one.name} gave {list(scores.shape)} scores for {len(images)} pictures")
    return torch.where(scores.isfinite(), scores, torch.nan)
