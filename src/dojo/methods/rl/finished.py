"""Learning from finished pictures: at which levels they are noised anew, and who is asked there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from dojo import rng
from dojo.lazy import nn, no_grad, torch
from dojo.maths import flow
from dojo.maths.denoising import FlowWay, Solver
from dojo.methods.rl.episodes import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.inputs.steering import Steering
    from dojo.maths.objective import Flow
    from dojo.run.run import Run

Strategy = Literal["uniform", "logit_normal", "discrete"]


@dataclass(frozen=True, kw_only=True)
class LevelArgs:
    """The pictures that are learned from: how they are sampled, and at which levels noised anew."""

    sample_steps: int = 14
    """denoising steps of a picture that is learned from, along the ODE, without noise"""
    solver: Solver = "euler"
    """how a step is taken: euler; heun, which asks the network twice but for the last step; ab2 or
    dpm2m (DPM-Solver++ 2M), which go on from the step before and ask once"""
    sigma_grid: flow.Grid = "pipeline"
    """where the steps begin: pipeline is diffusers' table, whose last step, from a sigma of 0.009
    or less, moves next to nothing; even is 1, 1 - 1/T, .., 1/T, shifted: as good with one step
    less"""
    num_train_timesteps: int = 4
    """levels at which each picture is noised anew and learned from, a backward pass each"""
    time_sampling_strategy: Strategy = "uniform"
    """where these lie: uniform and logit_normal draw one in each of as many equal shares of their
    density, discrete takes different ones of the picture's own --sample_steps"""
    timestep_range: float = 0.5
    """share of the levels, from the noisiest on, that they are drawn from"""

    def __post_init__(self) -> None:
        if self.sample_steps < 1 or self.num_train_timesteps < 1:
            raise ValueError("--sample_steps and --num_train_timesteps must be at least 1")
        if not 0 < self.timestep_range <= 1:
            raise ValueError("--timestep_range must lie in (0, 1]")
        if self.time_sampling_strategy == "discrete" and self._own < self.num_train_timesteps:
            raise ValueError(
                f"--num_train_timesteps {self.num_train_timesteps}: --timestep_range leaves "
                f"{self._own} of {self.sample_steps} steps"
            )

    def way(self, shift: float) -> FlowWay:
        """The sampling on a schedule with this shift."""
        return FlowWay.of(self.sample_steps, shift, self.sigma_grid, self.solver)

    @property
    def _own(self) -> int:
        """Steps of the schedule that levels are taken from."""
        return max(1, round(self.timestep_range * self.sample_steps))

    def levels(
        self, run: Run, batch: Batch, sigmas: Sequence[float], shift: float, shared: int = 1
    ) -> Tensor:
        """Sigmas for the pictures of a batch: float32 [K, B]; they hang on seed, epoch and place.

        Args:
            sigmas: of the sampling, from 1 to 0.
            shift: that of the schedule.
            shared: pictures, side by side, that have the same.
        """
        if self.time_sampling_strategy == "discrete":
            own = torch.tensor(sigmas[: self._own])
            orders = [
                torch.randperm(len(own), generator=rng.generator(*key))
                for key in batch.keys(run, "levels", shared)
            ]
            return torch.stack([own[order[: self.num_train_timesteps]] for order in orders], 1)
        uniform = torch.stack([rng.uniform(keys) for keys in self._keys(run, batch, shared)])
        number = torch.arange(self.num_train_timesteps)[:, None]
        # From the noisiest share down; a uniform number of 1 would be the end of its share.
        place = 1 - self.timestep_range * (number + 1 - uniform) / self.num_train_timesteps
        if self.time_sampling_strategy == "logit_normal":
            return flow.draw_sigma(place, "logit_normal", shift=shift)
        return flow.shift_sigma(place, shift).clamp(flow.MIN_SIGMA, 1.0)

    def _keys(self, run: Run, batch: Batch, shared: int) -> Iterator[list[tuple[int | str, ...]]]:
        for k in range(self.num_train_timesteps):
            yield [(*key, k) for key in batch.keys(run, "levels", shared)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A training batch: its pictures, and what the frozen policies say of them noised anew."""

    batch: Batch
    clean: Tensor
    """float32 [B, ...]"""
    sigma: Tensor
    """float32 [K, B]"""
    asked: dict[str, Tensor]
    """by policy: velocities float32 [K, B, ...], or of the first levels only"""
    shared: int = 1
    """pictures, side by side, that are noised by the same noise"""

    def noised(self, run: Run, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sigma [B], the noised latents, and the velocity of the path that leads there."""
        keys = [(*key, k) for key in self.batch.keys(run, "forward noise", self.shared)]
        noise = rng.normal(self.clean.shape[1:], keys, self.clean.device)
        sigma = self.sigma[k]
        noisy = flow.interpolate(self.clean, noise, sigma)
        return sigma, noisy, flow.velocity(self.clean, noise)

    def at(self, k: int) -> dict[str, Tensor]:
        """What the policies say that were asked at a level: [B, ...] by name."""
        return {name: said[k] for name, said in self.asked.items() if k < len(said)}


Policy: TypeAlias = "Callable[[], AbstractContextManager[nn.Module]]"
"""the network as it then is, for a while"""


def noised(
    run: Run,
    args: LevelArgs,
    made: Sequence[tuple[Batch, Tensor]],
    size: int,
    sigmas: Sequence[float],
    objective: Flow,
    shared: int = 1,
) -> list[Finished]:
    """The epoch's pictures as training batches of `size`, with the levels of each.

    Args:
        made: batches and their latents, float32 [B, ...].
        sigmas: of the sampling, from 1 to 0.
        shared: pictures, side by side, that are noised alike.
    """
    found: list[Finished] = []
    for batch, latents in made:
        for start in range(0, len(batch.places), size):
            own = batch.part(start, size)
            sigma = args.levels(run, own, sigmas, objective.shift, shared).to(latents.device)
            clean = latents[start : start + size]
            found.append(Finished(batch=own, clean=clean, sigma=sigma, asked={}, shared=shared))
    return found


@no_grad
def ask(
    run: Run,
    chunks: Sequence[Finished],
    steering: Steering,
    policies: Mapping[str, Policy],
    counts: Mapping[str, int],
) -> None:
    """Lets frozen policies say of the epoch's pictures what they predict at their levels.

    Each policy's weights are put into the network once for the whole epoch.

    Args:
        steering: that of training.
        policies: by name.
        counts: at how many of the levels each is asked.
    """
    for name, count in counts.items():
        with policies[name]() as frozen:
            for chunk in chunks:
                velocity = steering(frozen, chunk.batch.texts)
                levels = [chunk.noised(run, k)[:2] for k in range(count)]
                chunk.asked[name] = torch.stack([velocity(noisy, s) for s, noisy in levels])
