"""The options of reinforcement learning: what is sampled, learned from, and evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dojo.cli import UserError, option, ranges
from dojo.evaluate import held_out
from dojo.finetune import lora
from dojo.inputs.steering import Steering
from dojo.maths import flow
from dojo.maths.advantages import check_sizes
from dojo.maths.surrogate import Ratio, clipped_surrogate, masked_surrogate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dojo.inputs.texts import Texts
    from dojo.maths.surrogate import Surrogate
    from dojo.models.family import Model
    from dojo.run.optim import OptimArgs


@dataclass(frozen=True, kw_only=True)
class EpochArgs:
    """The pictures of an epoch: all are sampled by one policy, and then it learns from them."""

    resolution: int = option(512, common=True)
    """height and width in pixels"""
    height: int | None = None
    """height in pixels, instead of --resolution"""
    width: int | None = None
    """width in pixels, instead of --resolution"""
    num_prompts_per_epoch: int = option(8, common=True)
    """prompts of an epoch, over all processes"""
    group_size: int = option(8, common=True)
    """pictures of each of them"""
    sample_batch_size: int | None = option(None, incidental=True)
    """pictures per process that are sampled at a time, a multiple of --train_batch_size and by
    default the same"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the pictures that are learned from; 1 is none, which costs half
    and is what the policy then learns to do without"""
    negative_prompt: str = ""
    """what guidance leads away from"""
    max_invalid: float = option(0.5, incidental=True)
    """share of an epoch's pictures that may be without a valid score; more stop the run"""

    def __post_init__(self) -> None:
        ranges.check(self, "resolution height width num_prompts_per_epoch", least=1)
        ranges.check(self, "group_size sample_batch_size", least=1)
        if self.guidance_scale < 1:
            raise ValueError("--guidance_scale must be at least 1, which is no guidance")
        if not 0 <= self.max_invalid < 1:
            raise ValueError("--max_invalid must lie in [0, 1)")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height or self.resolution, self.width or self.resolution

    @property
    def samples(self) -> int:
        """Pictures of an epoch, over all processes."""
        return self.num_prompts_per_epoch * self.group_size

    def steering(self, model: Model, texts: Texts, dtype: torch.dtype) -> Steering:
        """How prompts steer the policy, in sampling and in training."""
        return Steering(
            model=model,
            texts=texts,
            size=self.size,
            dtype=dtype,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
        )

    def batch_size(self, optim: OptimArgs) -> int:
        """Pictures that a process samples at a time."""
        return self.sample_batch_size or optim.train_batch_size

    def check(self, optim: OptimArgs, num_processes: int, *, min_group: int) -> int:
        """Refuses sizes that do not divide, and returns the batches of a process in an epoch.

        Raises:
            UserError: naming sizes that do.
        """
        if optim.steps_per_epoch is not None:
            raise UserError("--steps_per_epoch: an epoch ends when its pictures are used up")
        try:
            batches = check_sizes(
                *(self.num_prompts_per_epoch, self.group_size, self.batch_size(optim)),
                *(num_processes, min_group),
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        train = optim.train_batch_size
        if self.batch_size(optim) % train:
            raise UserError(
                f"--sample_batch_size {self.batch_size(optim)} is no multiple of "
                f"--train_batch_size {train}"
            )
        micro = batches * self.batch_size(optim) // train
        accumulated = optim.gradient_accumulation_steps
        if micro % accumulated:
            fitting = ", ".join(str(n) for n in range(1, micro + 1) if micro % n == 0)
            raise UserError(
                f"--gradient_accumulation_steps {accumulated} does not divide the {micro} training "
                f"batches of an epoch: take one of {fitting}"
            )
        return batches


@dataclass(frozen=True, kw_only=True)
class SampleArgs(flow.ShiftArgs, EpochArgs):
    """The same of a rectified flow."""

    def __post_init__(self) -> None:
        flow.ShiftArgs.__post_init__(self)
        EpochArgs.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class WayArgs(EpochArgs):
    """The same where steps of a picture's way are trained."""

    sample_batch_size: int | None = option(None, incidental=True)
    """pictures per process that are sampled at a time, a multiple of --train_batch_size and by
    default the same; with more the likelihoods are computed anew in training's batches, so that
    both sides round alike"""
    guidance_scale: float = 1.0
    """classifier-free guidance while sampling and in training; 1 is none, which costs half and is
    what the policy then learns to do without"""
    branch: bool = False
    """let the pictures of a prompt share their way up to the first trained step and part there: it
    is computed once for them, and they differ by what is trained alone; a batch holds whole groups
    then"""

    @property
    def copies(self) -> int:
        """Pictures that share their way up to the first trained step."""
        return self.group_size if self.branch else 1

    def check(self, optim: OptimArgs, num_processes: int, *, min_group: int) -> int:
        """Refuses sizes that do not divide: see `EpochArgs`."""
        batches = super().check(optim, num_processes, min_group=min_group)
        train = optim.train_batch_size
        if self.branch and self.group_size == 1:
            raise UserError("--branch: with --group_size 1 nobody shares a picture's way")
        if self.branch and train % self.group_size:
            raise UserError(
                f"--branch: --train_batch_size {train} is no multiple of --group_size "
                f"{self.group_size}"
            )
        return batches


@dataclass(frozen=True, kw_only=True)
class WaySampleArgs(WayArgs, SampleArgs):
    """The same of a rectified flow whose way is trained."""


@dataclass(frozen=True, kw_only=True)
class PolicyArgs:
    """The surrogate, its trust region, and how often the pictures of an epoch are learned from."""

    num_inner_epochs: int = 1
    """passes over the pictures of an epoch"""
    trust_region: Literal["clip", "divergence"] = "clip"
    """what keeps the policy near the one that sampled: PPO's clip of the ratio (--clip_range), that
    hangs on the size, or a bound on the transitions' divergence (--kl_mask_threshold), that does
    not: beyond it, samples that lead further away are left out"""
    kl_mask_threshold: float = 1e-5
    """divergence of a transition, as a mean over the latent's dimensions, from which on divergence
    leaves out; 1e-5 is a shift of the mean by 0.0045 of its noise, at every size"""
    clip_range: float = 1e-4
    """how far a transition's likelihood ratio (of means over the latent's dimensions) may leave 1;
    its spread shrinks with their root: 1e-4 to 1e-5 is usual at 512 px, 1e-3 in the pocket world"""
    adv_clip_max: float = 5.0
    """advantages are clamped to this"""
    ratio: Ratio = "exact"
    """how a policy's move is measured: by the likelihood, by the unscaled one of CPS's authors, or
    as GRPO-Guard does"""

    def __post_init__(self) -> None:
        if self.num_inner_epochs < 1:
            raise ValueError("--num_inner_epochs must be at least 1")
        for name in ("clip_range", "adv_clip_max", "kl_mask_threshold"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive")
        ranges.check_choice(
            self, "trust_region", {"clip": "clip_range", "divergence": "kl_mask_threshold"}
        )
        if self.trust_region == "divergence" and self.ratio != "exact":
            raise ValueError(
                f"--ratio {self.ratio} is made for the clip: leave it out with --trust_region "
                "divergence"
            )

    def surrogate(self, moved: Tensor, advantages: Tensor, divergence: Tensor) -> Surrogate:
        """The surrogate of a batch of transitions within the trust region.

        Args:
            moved: [B], the logarithm of the ratio, with gradient.
            advantages: [B].
            divergence: [B], of the policy from the one that sampled.
        """
        if self.trust_region == "divergence":
            return masked_surrogate(moved, advantages, divergence, self.kl_mask_threshold)
        return clipped_surrogate(moved, advantages, self.clip_range)


@dataclass(frozen=True, kw_only=True)
class PolicyLoraArgs(lora.LoraArgs):
    """The adapter; Flow-GRPO's rank and alpha."""

    rank: int = option(32, common=True)
    """rank of the two factors"""
    lora_alpha: float | None = 64
    """the update is scaled by alpha / rank"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout:
            raise ValueError("--lora_dropout: sampling and training would not be the same policy")


@dataclass(frozen=True, kw_only=True)
class EvalArgs(held_out.EvalArgs):
    """Held-out prompts, drawn as a user would: averaged weights, the ODE, more steps."""

    eval_every: int = 10
    """epochs between two evaluations; there is one before the first and one at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every < 1:
            raise ValueError("--eval_every must be at least 1")

    def steered(self, steering: Steering) -> Steering:
        """The same with the evaluation's guidance."""
        scale = self.eval_guidance_scale or steering.guidance_scale
        return replace(steering, guidance_scale=scale)

    def due(self, epoch: int) -> bool:
        """Whether an evaluation belongs after so many epochs."""
        return epoch % self.eval_every == 0
