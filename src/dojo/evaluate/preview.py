"""What a picture looks like while it is drawn: one small file in the run's folder, written anew.

Latents become colours in one of two ways. A tiny autoencoder (`--preview_vae`, such as TAESD and
its relatives) gives a picture of full size. Without one a linear map gives a colour per latent: it
is fitted by least squares when it is first needed, to what the model's own autoencoder makes of
charts of smooth colours, so it fits every autoencoder, and no table of numbers is kept.

What is shown is where the drawing is heading and not the noise it still has. Two latents of one
path, x = a x0 + s eps and x' = a' x0 + s' eps, give x0: exactly where the network says the same at
both, else about. Nothing here touches what is drawn or a generator that a drawing uses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from dojo import rng
from dojo.cli import UserError, ranges
from dojo.files.outputs import own
from dojo.lazy import F, diffusers, no_grad, torch
from dojo.models import attention, folders, loaded
from dojo.models.family import Model

FILE = "preview.png"
_LEAST, _MOST = 256, 512  # pixels of the longer side
_CHARTS, _CHART_PIXELS = 8, 128


@dataclass(frozen=True, kw_only=True)
class DrawnArgs:
    """Pictures that the model in training draws: how, and how they are shown meanwhile."""

    validation_attention_backend: attention.Backend | None = None
    """what computes attention while such pictures are drawn, sage too; unset is
    --attention_backend"""
    preview_steps: int | None = None
    """show the picture that is being drawn, as preview.png in the run's folder, every so many
    sampling steps"""
    preview_vae: str | None = None
    """folder or hub id of a tiny autoencoder for that, such as madebyollin/taesd, of the model's
    own family; unset is a colour per latent"""

    def __post_init__(self) -> None:
        ranges.check(self, "preview_steps", least=1)
        if self.preview_vae is not None and self.preview_steps is None:
            raise ValueError("--preview_vae needs --preview_steps")


Colours: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""latents [C, h, w], as the network sees them -> [3, H, W] in [0, 1], float32 on the CPU"""


class Preview:
    """Shows one process's drawing.

    Args:
        path: of the file.
        every: sampling steps between two looks.
        colours: what makes a picture of latents.
    """

    def __init__(self, path: Path, every: int, colours: Colours) -> None:
        self.path, self.every, self.colours = path, every, colours
        self._before: torch.Tensor | None = None

    @no_grad
    def __call__(self, scheduler: Any, step: int, latents: torch.Tensor) -> None:
        """Looks at the latents after a step of a scheduler; of a batch at the first ones.

        Args:
            step: number of the step, from 0 on.
            latents: [B, C, h, w]; left as they are.
        """
        done = step + 1
        if done % self.every == 0:
            before, after = self._before, latents[0].detach().float().cpu()
            if before is not None and done > 1 and not draws_noise(scheduler):
                pair = level(scheduler, step), level(scheduler, done)
                after = heading(before, after, *pair)
            with suppress(OSError):  # a full disk ends the run where something is lost by it
                write(self.path, self.colours(after))
        if (done + 1) % self.every == 0:
            self._before = latents[0].detach().float().cpu()

    def callback(
        self, pipeline: Any, step: int, timestep: Any, tensors: Any
    ) -> dict[str, torch.Tensor]:
        """The same as a diffusers pipeline calls it (`callback_on_step_end`); changes nothing."""
        self(pipeline.scheduler, step, tensors["latents"])
        return {}


def of_run(
    args: DrawnArgs, folder: Path, model: Model, vae: diffusers.AutoencoderKL, *, main: bool
) -> Preview | None:
    """The preview of a run; None where none is wanted, or another process has it.

    Args:
        folder: of the run.
        vae: the model's own.
        main: whether this is the process that shows.
    Raises:
        UserError: `--preview_vae` is none for this model.
    """
    if args.preview_steps is None or not main:
        return None
    colours: Colours = Linear(model, vae)
    if args.preview_vae is not None:
        colours = Tiny(args.preview_vae, model, vae.device)
    return Preview(folder / FILE, args.preview_steps, colours)


# -- where a drawing is heading -----------------------------------------------------------------


def level(scheduler: Any, step: int) -> tuple[float, float]:
    """What latents before a step are made of: the shares (a, s) of picture and noise.

    Of flows a = 1 - s; of Euler's and its relatives' latents a = 1; of others' a^2 + s^2 = 1.
    """
    timesteps = scheduler.timesteps
    if scheduler.config.get("prediction_type") in (None, "flow_prediction"):
        sigma = float(scheduler.sigmas[step])
        return 1 - sigma, sigma
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1:
        return 1.0, float(scheduler.sigmas[step])
    if step >= len(timesteps):
        return 1.0, 0.0
    abar = float(scheduler.alphas_cumprod[int(timesteps[step])])
    return abar**0.5, (1 - abar) ** 0.5


def draws_noise(scheduler: Any) -> bool:
    """Whether steps add noise of their own: then two latents have no path in common."""
    kind, settings = type(scheduler).__name__, scheduler.config
    stochastic = settings.get("stochastic_sampling") or "sde" in settings.get("algorithm_type", "")
    return bool(stochastic) or any(word in kind for word in ("DDPM", "Ancestral", "SDE", "LCM"))


def heading(
    before: torch.Tensor, after: torch.Tensor, was: tuple[float, float], now: tuple[float, float]
) -> torch.Tensor:
    """The picture that two latents of one path have in common, x0; `after` where they say nothing.

    Args:
        was: shares (a, s) of picture and noise in `before`.
        now: the same of `after`.
    """
    (a, s), (a_now, s_now) = was, now
    common = s * a_now - s_now * a
    if abs(common) < 1e-4:
        return after
    return (s * after - s_now * before) / common


# -- latents to colours -------------------------------------------------------------------------


class Linear:
    """A colour for every latent: r, g, b as sums of its channels."""

    def __init__(self, model: Model, vae: diffusers.AutoencoderKL) -> None:
        self.model, self.vae = model, vae

    @cached_property
    def factors(self) -> torch.Tensor:
        """[C + 1, 3], the constant last; fitted when it is first asked for."""
        return fitted(*seen(self.model, self.vae, charts()))

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Colours`."""
        return torch.einsum("chw,cr->rhw", _with_constant(latents), self.factors).clamp(0, 1)


class Tiny:
    """A tiny autoencoder that was distilled from the model's own.

    Raises:
        UserError: there is none, or it is for latents of another kind.
    """

    def __init__(self, name: str, model: Model, device: torch.device) -> None:
        flag = "--preview_vae"
        self.vae: Any = loaded.network(diffusers.AutoencoderTiny, name, flag=flag)
        channels, wanted = self.vae.config["latent_channels"], model.vae["latent_channels"]
        if channels != wanted:
            raise UserError(
                f"{flag}: {name} is for latents of {channels} channels; {model.title} has {wanted}"
            )
        self.vae.requires_grad_(False).eval().to(device)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Colours`."""
        vae = self.vae
        # It may have moved with nothing: the device is asked each time.
        unscaled = latents[None].to(vae.device) / vae.config["scaling_factor"]
        with torch.autocast(vae.device.type, enabled=False):
            decoded = vae.decode(unscaled, return_dict=False)[0][0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()


def charts(count: int = _CHARTS, pixels: int = _CHART_PIXELS) -> torch.Tensor:
    """Pictures of smooth colours, coarse to fine: float32 [N, 3, H, W] in [0, 1], ever the same."""
    drawn: list[torch.Tensor] = []
    for i in range(count):
        cells = 2 ** (1 + i % 4)
        noise = rng.normal((3, cells, cells), [("charts", i)])
        smooth = F.interpolate(noise, (pixels, pixels), mode="bilinear", align_corners=False)
        drawn.append(torch.sigmoid(2 * smooth)[0])
    return torch.stack(drawn)


@no_grad
def seen(
    model: Model, vae: diffusers.AutoencoderKL, pictures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees of pictures, and the colour of every place of it.

    Args:
        pictures: float32 [N, 3, H, W] in [0, 1].
    Returns:
        Latents [N, C, h, w] and colours [N, 3, h, w], float32 on the CPU.
    """
    with torch.autocast(vae.device.type, enabled=False):
        means = [folders.posterior(vae, 2 * one[None] - 1)[0].float().cpu() for one in pictures]
    mean = torch.cat(means)
    latents = model.scaled(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    return latents, F.adaptive_avg_pool2d(pictures, (latents.shape[-2], latents.shape[-1]))


def fitted(latents: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """The linear map from latents to colours with the least squared error: [C + 1, 3].

    Args:
        latents: [N, C, h, w].
        colours: [N, 3, h, w].
    """
    rows = torch.cat([_with_constant(one).flatten(1).T for one in latents])
    return torch.linalg.lstsq(rows, colours.transpose(0, 1).flatten(1).T).solution


def explained(factors: torch.Tensor, latents: torch.Tensor, colours: torch.Tensor) -> float:
    """The share of the colours' variance that a map explains: 1 is all of it."""
    rows = torch.cat([_with_constant(one).flatten(1).T for one in latents])
    wanted = colours.transpose(0, 1).flatten(1).T
    left = (wanted - rows @ factors).square().sum()
    return 1 - (left / (wanted - wanted.mean(0)).square().sum()).item()


def _with_constant(latents: torch.Tensor) -> torch.Tensor:
    """[C, h, w] -> [C + 1, h, w] with ones."""
    return torch.cat([latents, torch.ones_like(latents[:1])])


# -- the file -----------------------------------------------------------------------------------


def write(path: Path, colours: torch.Tensor) -> None:
    """Replaces the picture as a whole: whoever looks sees the old one or the new one."""
    pixels = (colours * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    longer = max(picture.size)
    if longer < _LEAST:
        times = _LEAST // longer
        picture = picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    picture.thumbnail((_MOST, _MOST))
    own(path)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, "png", compress_level=1)
    partial.replace(path)
