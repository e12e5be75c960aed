"""Denoising diffusion as Stable Diffusion 1 trains it (Ho et al. 2020, arXiv:2006.11239).

Pure functions of tensors. B is the batch; `clean`, `noise`, `noisy` and `predicted` are [B, ...],
`timestep` is int64 [B] in 0 .. 999, with 999 the noisiest. The schedule is the table of abar_t, the
share of the signal's variance that is left at t:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, I)

The network predicts eps, or the velocity of Salimans and Ho (2022, arXiv:2202.00512, Appendix D):

    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

which says as much of x_0 where no signal is left (abar = 0), and eps nothing: a schedule may end
there (Lin et al. 2023, arXiv:2305.08891), but only v can be trained and sampled with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dojo.lazy import torch
from dojo.maths.gaussian import Gaussian, require_full_precision

if TYPE_CHECKING:
    from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
"""what the network says, by diffusers' names: the noise, or the velocity"""

Spacing = Literal["leading", "trailing", "linspace"]
"""how a sampler's timesteps lie, by diffusers' names"""

HuberSchedule = Literal["constant", "exponential", "snr"]
"""how the limit of a Huber loss hangs on the timestep, by sd-scripts' names"""


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much signal is left at every timestep.

    Raises:
        ValueError: numbers that do not fall from below 1 to 0 or above.
    """

    alphas_cumprod: Tensor
    """abar, float64 [T] on the CPU"""

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if not (abar[0] < 1 and abar[-1] >= 0 and bool((abar.diff() < 0).all())):
            raise ValueError("the signal's share has to fall from below 1 to 0 or above")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of a diffusers scheduler's configuration.

        The betas are float32 as diffusers', so that both have the same numbers; the products are
        not rounded. `rescale_betas_zero_snr` is followed.

        Raises:
            ValueError: an unknown `beta_schedule`, or `trained_betas`.
        """
        kind = config.get("beta_schedule", "linear")
        first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        count = int(config.get("num_train_timesteps", 1000))
        if config.get("trained_betas") is not None:
            raise ValueError("a scheduler with trained_betas is not known here")
        if kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float32)
        else:
            raise ValueError(f"unknown beta_schedule {kind!r}")
        abar = (1 - betas.double()).cumprod(0)
        return cls(_to_zero(abar) if config.get("rescale_betas_zero_snr") else abar)

    def without_signal_at_its_end(self) -> Schedule:
        """The same with zero terminal SNR; itself where it has that already."""
        return self if self.ends_without_signal else Schedule(_to_zero(self.alphas_cumprod))

    @property
    def ends_without_signal(self) -> bool:
        """Whether the last timestep is pure noise (zero terminal SNR): v has to be predicted."""
        return bool(self.alphas_cumprod[-1] == 0)

    @property
    def num_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    def at(self, timestep: int) -> float:
        """abar of one timestep; before the first, 1: the picture itself."""
        return float(self.alphas_cumprod[timestep]) if timestep >= 0 else 1.0

    def sampling_timesteps(
        self, steps: int, offset: int = 1, spacing: Spacing = "leading"
    ) -> tuple[int, ...]:
        """The timesteps of a sampler, the noisiest first, by diffusers' `timestep_spacing`.

        leading: every (T / steps)-th from `offset` on, which is 1 for Stable Diffusion 1; never
        reaches the last. trailing: every (T / steps)-th, the last among them, which a schedule
        that ends without signal needs. linspace: from 0 to the last.

        Raises:
            ValueError: no steps, or more than there are timesteps.
        """
        count = self.num_timesteps
        if not 1 <= steps <= count:
            raise ValueError(f"{steps} steps of {count} timesteps")
        if spacing == "trailing":
            stride = (count - count / steps) - count  # rounded as numpy's ranges: theirs to the bit
            return tuple(round(count + i * stride) - 1 for i in range(steps))
        if spacing == "linspace":
            stride = (count - 1) / max(steps - 1, 1)
            return tuple(round(i * stride) for i in range(steps))[::-1]
        whole = count // steps
        return tuple(min(i * whole + offset, count - 1) for i in range(steps))[::-1]

    def roots(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t): two float32 [B, 1, ..., 1]."""
        abar = self.alphas_cumprod[timestep.cpu()]
        shape = (-1, *[1] * (like.dim() - 1))
        pair = (abar.sqrt(), (1 - abar).sqrt())
        signal, noise = (root.float().to(like.device).view(shape) for root in pair)
        return signal, noise

    def snr(self, timestep: Tensor) -> Tensor:
        """The signal-to-noise ratio abar / (1 - abar): float32 [B]."""
        abar = self.alphas_cumprod[timestep.cpu()]
        return (abar / (1 - abar)).float().to(timestep.device)


def _to_zero(abar: Tensor) -> Tensor:
    """Zero terminal SNR (Lin et al. 2023, arXiv:2305.08891, Algorithm 1): [T] -> [T].

    sqrt(abar) is shifted so that its last is 0, exactly, and scaled so that its first stays.
    """
    root = abar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """A draw of x_t given x_0 (Equation 4)."""
    signal, spread = schedule.roots(timestep, clean)
    return signal * clean + spread * noise


def offset_noise(noise: Tensor, drawn: Tensor, strength: float) -> Tensor:
    """Noise [B, C, h, w] with further standard normal numbers on top.

    Drawn as [B, C, 1, 1] they move whole channels, so that a network learns to change a picture's
    mean (offset noise; what it then predicts is this noise, moved). Drawn as [B, C, h, w] they are
    the input perturbation of Ning et al. (2023, arXiv:2301.11706): x_t is made with the result, and
    what is predicted stays `noise`.
    """
    return noise + strength * drawn


def velocity(clean: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """v of arXiv:2202.00512, Appendix D: what the network predicts if not the noise."""
    signal, spread = schedule.roots(timestep, clean)
    return signal * noise - spread * clean


def clean_estimate(
    noisy: Tensor,
    predicted: Tensor,
    timestep: Tensor,
    schedule: Schedule,
    prediction: Prediction = "epsilon",
) -> Tensor:
    """The x_0 that a prediction points to (Equation 15); exact for the true one.

    Raises:
        ValueError: predicted noise, and a schedule that ends without signal.
    """
    signal, spread = schedule.roots(timestep, noisy)
    if prediction == "v_prediction":
        return signal * noisy - spread * predicted.float()
    require_signal(schedule)
    return (noisy - spread * predicted.float()) / signal


def noise_estimate(
    noisy: Tensor,
    predicted: Tensor,
    timestep: Tensor,
    schedule: Schedule,
    prediction: Prediction = "epsilon",
) -> Tensor:
    """The noise that a prediction points to, float32; exact for the true one."""
    if prediction == "epsilon":
        return predicted.float()
    signal, spread = schedule.roots(timestep, noisy)
    return signal * predicted.float() + spread * noisy


def require_signal(schedule: Schedule) -> None:
    """Refuses a schedule that predicted noise cannot be used with.

    Raises:
        ValueError: it ends without signal.
    """
    if schedule.ends_without_signal:
        raise ValueError(
            "the schedule ends without signal, where predicted noise says nothing of the picture: "
            "the network has to predict v (v_prediction)"
        )


def squared_error(epsilon: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of every sample, in float32 (Equation 14): [B, ...] -> [B]."""
    return (epsilon.float() - noise.float()).square().flatten(1).mean(1)


def huber_limit(timestep: Tensor, schedule: Schedule, limit: float, kind: HuberSchedule) -> Tensor:
    """Up to which errors a Huber loss counts squares: float32 [B].

    Khrapov et al. (2024, arXiv:2403.16728) let it fall with the noise, from 1 at the picture to
    `limit` at the end, so that the loss is robust where a picture's outline is decided and squared
    where its details are: exponential is limit^(t / T), snr is (1 - limit) / (1 + sigma)^2 + limit
    with sigma^2 = 1 / SNR.
    """
    if kind == "constant":
        return torch.full_like(timestep, limit, dtype=torch.float32)
    if kind == "exponential":
        return limit ** (timestep.float() / schedule.num_timesteps)
    abar = schedule.alphas_cumprod[timestep.cpu()]
    share = abar.sqrt() / (abar.sqrt() + (1 - abar).sqrt())  # 1 / (1 + sigma), 0 without signal
    return ((1 - limit) * share.square() + limit).float().to(timestep.device)


def pseudo_huber(predicted: Tensor, target: Tensor, limit: Tensor) -> Tensor:
    """Twice the smooth Huber loss of every number, float32 [B, ...]: 2 c (sqrt(d^2 + c^2) - c).

    d^2 for differences d far below c, 2 c |d| far above. Written without the difference of roots,
    which would lose the small ones' digits.

    Args:
        limit: c, [B].
    """
    c = limit.view(-1, *[1] * (predicted.dim() - 1))
    square = (predicted.float() - target.float()).square()
    return 2 * c * square / ((square + c.square()).sqrt() + c)


def transition(
    latents: Tensor,
    predicted: Tensor,
    timestep: int,
    previous: int,
    schedule: Schedule,
    eta: float,
    prediction: Prediction = "epsilon",
) -> Gaussian:
    """The distribution of the latents at the timestep `previous`, given those at `timestep`.

    DDIM's step (Song et al. 2020, arXiv:2010.02502, Equations 12 and 16): at eta 0 the
    deterministic one; at eta 1 the posterior of DDPM for the same two timesteps.

    Args:
        latents: float32 [B, ...].
        predicted: what the network says there, noise or velocity.
        previous: below `timestep`; negative is the picture itself, which is reached without noise.
    Raises:
        ValueError: timesteps that do not fall, latents in half precision, or predicted noise and a
            schedule that ends without signal.
    """
    if not previous < timestep:
        raise ValueError(f"timesteps have to fall; this step goes {timestep} -> {previous}")
    require_full_precision(latents)
    abar, before = schedule.at(timestep), schedule.at(previous)
    std = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
    signal, spread = math.sqrt(abar), math.sqrt(1 - abar)
    predicted = predicted.to(latents.dtype)
    if prediction == "v_prediction":
        clean = signal * latents - spread * predicted
        epsilon = signal * predicted + spread * latents
    else:
        require_signal(schedule)
        clean, epsilon = (latents - spread * predicted) / signal, predicted
    rest = math.sqrt(max(1 - before - std**2, 0.0))  # what of the noise is kept
    return Gaussian(math.sqrt(before) * clean + rest * epsilon, std)


def pairwise(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """Every timestep of a sampler with the one that its step leads to; the last leads to -1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))
