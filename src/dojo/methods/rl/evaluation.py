"""The evaluation of a flow's policy: its pipeline's own sampling, averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dojo.evaluate import drawing
from dojo.evaluate.held_out import Evaluator
from dojo.inputs.prompts import Prompt
from dojo.inputs.texts import Texts
from dojo.maths import advantages as policy
from dojo.methods.rl.args import EvalArgs, SampleArgs
from dojo.methods.rl.episodes import Steering
from dojo.methods.rl.trained import Trained
from dojo.models import sd3
from dojo.rewards import Reward
from dojo.run.optim import OptimArgs
from dojo.run.run import Run


class Options(Protocol):
    """The groups of a script's options that an evaluation goes by."""

    @property
    def sample(self) -> SampleArgs: ...
    @property
    def optim(self) -> OptimArgs: ...
    @property
    def evaluation(self) -> EvalArgs: ...


def evaluator(
    run: Run,
    config: sd3.Config,
    vae: AutoencoderKL,
    options: Options,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    texts: Texts,
    trained: Trained,
    shift: float,
) -> Evaluator:
    """The evaluations of one run; made once on every process.

    Args:
        prompts: those that are held out.
        rewards: the reward that is trained on, and those that are not.
        texts: knows the prompts' embeddings.
        trained: the policy; how far it has gone from its reference is measured, if it has one.
        shift: of the schedule.
    """
    args, sample = options.evaluation, options.sample
    steering = Steering.of(sample, texts, run.dtype, args.eval_guidance_scale)
    shape = config.latent_shape(*sample.size)
    scheduler = config.make_scheduler(shift)

    def draw(words: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        embeds = steering.embeds(words)
        own = steering.velocity(trained.network, embeds)
        moved: list[Tensor] = []

        def watched(latents: Tensor, timestep: Tensor) -> Tensor:
            sigma = timestep.double() / 1000  # the network is asked at 1000 times that: to the bit
            predicted = own(latents, sigma)
            if trained.has_reference:
                with trained.reference() as before:
                    other = steering.velocity(before, embeds)(latents, sigma)
                moved.append(policy.velocity_kl(predicted, other))
            return predicted

        final = drawing.sample(
            watched,
            shape,
            seeds,
            scheduler,
            args.eval_sample_steps,
            dtype=run.dtype,
            device=run.device,
        )
        far = torch.stack(moved).mean(0) if moved else None
        return sd3.decode(vae, config, final), far

    batch_size = sample.batch_size(options.optim)
    return Evaluator(run, args, prompts, rewards, draw, batch_size)
