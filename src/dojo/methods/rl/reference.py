"""What the model as it was would have done in the policy's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dojo.lazy import no_grad
from dojo.maths import rollout

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.finetune import Trained
    from dojo.inputs.steering import Steering
    from dojo.maths.gaussian import Gaussian
    from dojo.models.folders import Embeds
    from dojo.run.run import Run


@no_grad
def reference(
    run: Run,
    trained: Trained,
    steering: Steering,
    embeds: Embeds,
    step: rollout.Step,
    number: int,
    plan: rollout.Plan,
) -> tuple[Gaussian, Tensor]:
    """What the reference would do in a step: `rollout.predict` of the model as it was."""
    with run.phase("reference", wait=True), trained.reference() as network:
        velocity = steering.predictor(network, embeds)
        return rollout.predict(velocity, step.latents, number, plan, step.copies)
