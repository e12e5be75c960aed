"""The policy, and what the model as it was would have done in its place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dojo.finetune import weights as trained
from dojo.finetune import whole as full
from dojo.maths import rollout
from dojo.maths.gaussian import Gaussian
from dojo.methods.rl.args import FinetuneArgs
from dojo.methods.rl.episodes import Steering
from dojo.models import sd3
from dojo.run.run import Run


class Options(trained.Options, Protocol):
    """The groups of a script's options that say what is trained."""

    @property
    def model(self) -> sd3.ModelArgs: ...
    @property
    def finetune(self) -> FinetuneArgs: ...
    @property
    def full(self) -> full.FullArgs: ...


class Trained(trained.Trained):
    """A transformer of which some is trained; its arguments are those of `weights.Trained`."""

    def __init__(
        self, run: Run, config: sd3.Config, args: Options, shift: float, *, with_reference: bool
    ) -> None:
        family = trained.Sd3Family(config, args.model, shift)
        is_lora = args.finetune.is_lora
        super().__init__(run, family, args, is_lora=is_lora, with_reference=with_reference)

    @torch.no_grad()
    def before(
        self,
        steering: Steering,
        embeds: sd3.Embeds,
        step: rollout.Step,
        number: int,
        plan: rollout.Plan,
    ) -> tuple[Gaussian, Tensor]:
        """What the reference would do in a step: `rollout.predict` of the model as it was."""
        with self.run.phase("reference", wait=True), self.reference() as network:
            velocity = steering.velocity(network, embeds)
            return rollout.predict(velocity, step.latents, number, plan, step.copies)
