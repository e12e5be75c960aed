"""ReFL beside its loop: its options, the gradient of a reward, the pre-training loss, the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dojo import data, rewards, rng
from dojo.cli import UserError, option, ranges
from dojo.finetune import cost_of
from dojo.inputs import texts
from dojo.inputs.pictures import posterior_of
from dojo.lazy import late, torch
from dojo.maths import flow
from dojo.maths.denoising import FlowWay
from dojo.models import folders
from dojo.models.precisions import dtype_of
from dojo.run import phases

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor, nn

    from dojo.finetune import Trained
    from dojo.inputs.steering import Steering
    from dojo.maths.objective import Objective
    from dojo.models.family import Model
    from dojo.rewards import RewardOutput
    from dojo.run import Key, Run, cost
    from dojo.run.cost import Cost
    from dojo.run.phases import Needs
else:
    cost = late("dojo.run.cost")

LEAST_SIGMA = 0.02
"""of a flow's step that may be scored: what its velocity teaches is as small as its sigma"""


@dataclass(frozen=True, kw_only=True)
class EstimateArgs:
    """How pictures are made for the reward, and how much it counts."""

    resolution: int = option(512, common=True)
    """height and width in pixels"""
    sample_steps: int = 40
    """denoising steps of a whole way to the picture"""
    first_step: int | None = None
    """earliest step whose prediction is scored, from 0; unset is three quarters of the way, 30 of
    40"""
    last_step: int | None = None
    """latest one; unset is the last, 39 of 40"""
    grad_steps: int = 1
    """last network calls that are learned through; the ones before have no gradient"""
    guidance_scale: float = 1.0
    """classifier-free guidance while sampling; 1 is none, as in the paper"""
    negative_prompt: str = ""
    """what guidance leads away from"""
    margin: float | None = None
    """score from which on a picture is left alone; unset is 2 for imagereward (times its weight),
    the paper's, and none for rewards of other scales: then the score itself is maximised"""
    grad_scale: float = 1e-3
    """weight of the reward; it matters against the pre-training loss and the clipped gradient"""

    def __post_init__(self) -> None:
        for name in ("resolution", "sample_steps", "grad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.guidance_scale < 1:
            raise ValueError("--guidance_scale must be at least 1, which is no guidance")
        if self.guidance_scale == 1:
            ranges.check_unread(self, "negative_prompt", "without --guidance_scale above 1")
        if self.grad_scale <= 0:
            raise ValueError("--grad_scale must be positive")
        first, last = self.steps
        if not 0 <= first <= last < self.sample_steps:
            raise ValueError(
                f"--first_step {first} and --last_step {last} have to lie in 0 .. "
                f"{self.sample_steps - 1} (--sample_steps), in this order"
            )
        if self.grad_steps > first + 1:
            raise ValueError(
                f"--grad_steps {self.grad_steps}: there are {first + 1} calls at least"
            )

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step whose prediction may be scored."""
        first, last = self.first_step, self.last_step
        quarter = min(3 * self.sample_steps // 4, self.final)
        return quarter if first is None else first, self.final if last is None else last

    @property
    def final(self) -> int:
        """The last step, where none is given."""
        return self.sample_steps - 1

    def draw(self, seed: int, batch: int) -> int:
        """The step of a batch, the same in all processes."""
        first, last = self.steps
        return first + rng.seed_for(seed, "scored step", batch) % (last - first + 1)


@dataclass(frozen=True, kw_only=True)
class ReflArgs(EstimateArgs):
    """The same with a sampler of diffusion."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm draws fresh noise at every step, ddim none"""


@dataclass(frozen=True, kw_only=True)
class FlowReflArgs(flow.ShiftArgs, EstimateArgs):
    """The same along the ODE of a rectified flow."""

    sample_steps: int = 20
    """denoising steps of a whole way to the picture, along the ODE"""
    first_step: int | None = None
    """earliest step whose prediction is scored, from 0; unset is three quarters of the way, 15 of
    20"""
    last_step: int | None = None
    """latest one; unset is the last, 19 of 20, or with --sigma_grid pipeline the one before"""
    sigma_grid: flow.Grid = "even"
    """where the steps begin: even is 1, 1 - 1/T, .., 1/T, shifted; pipeline is diffusers' table,
    whose last step, from a sigma of 0.009, teaches nothing and is never scored"""

    def __post_init__(self) -> None:
        flow.ShiftArgs.__post_init__(self)
        if self.sigma_grid == "pipeline" and self.sample_steps == 1:
            raise ValueError("--sigma_grid pipeline needs --sample_steps of at least 2")
        EstimateArgs.__post_init__(self)

    @property
    def final(self) -> int:
        """The last step, where none is given: one that teaches."""
        return super().final - (self.sigma_grid == "pipeline")

    def way(self, shift: float) -> FlowWay:
        """The steps on a schedule with this shift.

        Raises:
            UserError: the last one to be scored begins where its velocity teaches nothing.
        """
        way = FlowWay.of(self.sample_steps, shift, self.sigma_grid)
        _, last = self.steps
        if way.sigmas[last] < LEAST_SIGMA:
            found = sum(sigma >= LEAST_SIGMA for sigma in way.sigmas) - 1
            raise UserError(
                f"--last_step {last} (counted from 0) begins at sigma {way.sigmas[last]:.4f}, and "
                "a change of the velocity there moves the picture by as little: --last_step "
                f"{found} is the last one with {LEAST_SIGMA:g} or more"
            )
        return way


def pull_only(images: Tensor, valid: Tensor) -> None:
    """Keeps the gradient of a reward out of the pictures that it has no score for.

    Theirs may be NaN, which stays NaN when the loss counts it with 0.

    Args:
        images: [B, ...], on their way to a loss.
        valid: bool [B].
    """

    def cut(gradient: Tensor) -> Tensor:
        return gradient.where(valid.view(-1, *[1] * (gradient.dim() - 1)), 0)

    images.register_hook(cut)  # pyright: ignore[reportUnknownMemberType]


def record(run: Run, output: RewardOutput, missing: Tensor, margin: float | None) -> None:
    """What metrics.jsonl says of the scores that a network learned from: a collective."""
    columns = {"reward": output.scores}
    columns |= {f"reward/{name}": values for name, values in output.components.items()}
    if margin is not None:  # a picture that has reached it teaches nothing
        columns["at_margin_share"] = (missing == 0).float()
    table = torch.stack([output.valid.float(), *columns.values()], dim=1).detach()
    # Of all processes: one without a valid score would have other numbers to log than the rest.
    everywhere: Any = run.accelerator.gather(table)
    there = everywhere[:, 0] > 0
    run.average(invalid_share=~there)
    if bool(there.any()):
        run.average(**dict(zip(columns, everywhere[there, 1:].T, strict=True)))


def pretraining_errors(
    run: Run,
    model: Model,
    objective: Objective,
    vae: AutoencoderKL,
    network: nn.Module,
    steering: Steering,
    rows: data.Batch,
) -> Tensor:
    """The loss that the model was trained with before, of captioned pictures: [B].

    Args:
        steering: without guidance.
    """
    keys = run.keys("pretraining", rows["place"])
    mean, std = posterior_of(rows, vae, run.device)
    clean = model.scaled(mean, std, _normal(mean, keys, "posterior", run))
    noise = _normal(mean, keys, "noise", run)
    uniform = rng.uniform([(*key, "timestep") for key in keys])
    level = objective.level(uniform).to(run.device)
    noisy = objective.noisy(clean, noise, level)
    geometry = data.Geometry.of(rows) if model.sized else None
    predicted = steering(network, rows["caption"], geometry)(noisy, level)
    return objective.errors(predicted, noisy, level, clean=clean, noise=noise)


def _normal(like: Tensor, keys: Sequence[Key], stream: str, run: Run) -> Tensor:
    """Standard normal noise of one stream for each key, [B, ...] as `like`."""
    return rng.normal(like.shape[1:], [(*key, stream) for key in keys], run.device)


def reward_cost(
    run: Run,
    trained: Trained,
    model: Model,
    args: EstimateArgs,
    batch_size: int,
    shape: tuple[int, int, int],
    *,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The cost of a batch of pictures that a reward is back-propagated into.

    The memory is that of network and autoencoder, the operations are the network's. The reward and
    the pre-training loss are not counted.
    """
    rows = batch_size * (2 if args.guidance_scale > 1 else 1)
    network, step = cost_of(run, trained, model, rows, shape, checkpointing=checkpointing)
    others = sum(args.steps) / 2 + 1 - args.grad_steps  # on average, without a gradient
    flops = args.grad_steps * step.flops + others * step.forward_flops
    kept = args.grad_steps * step.saved_bytes
    decoder = _decoding(model, batch_size, shape, checkpointing=checkpointing)
    # What the network kept waits until the gradient has come through the decoder.
    peak = kept + max(step.held_bytes - step.saved_bytes, decoder.held_bytes)
    return network, replace(step, flops=round(flops), saved_bytes=kept, peak_bytes=peak)


def _decoding(
    model: Model, count: int, shape: tuple[int, int, int], *, checkpointing: bool
) -> Cost:
    """The cost of decoding so many latents of a shape with a gradient, and of its way back."""
    vae = phases.meta_autoencoder(model.vae, dtype_of(model.args.vae_dtype)).requires_grad_(False)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    folders.frugal(vae, model.args)
    latents = torch.empty(count, *shape, device="meta", requires_grad=True)
    return cost.count_cost(lambda: model.decode(vae, latents).mean(), vae)


def needs(run: Run, model: Model, args: Any, size: tuple[int, int]) -> Needs:
    """What a run holds beside its network, for the dry run.

    The rewards are loaded, so that what they lack is said.

    Args:
        args: the script's options.
    Raises:
        UserError: weights are not there, a reward cannot be loaded, or no gradient passes it.
    """
    loaded = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    loaded[0].require_differentiable()
    at_use = args.optim.train_batch_size * args.cache.no_cache_latents * args.pretrain.used
    return model.needs(
        run.dtype,
        size,
        encoded=at_use or data.encoded_at_a_time(size) * args.pretrain.used,
        encoded_in_training=at_use,
        live_text=texts.live(model, args.cache),
        decoded=args.evaluation.eval_batch_size or args.optim.train_batch_size,
        before_texts=["autoencoder", "rewards"],
        scored=True,
        scorers=rewards.networks(loaded),
    )
