"""The options of learning from finished pictures, and the two ways in which it is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dojo.cli import UserError, ranges
from dojo.maths import forward
from dojo.maths.advantages import Spread
from dojo.methods.drawing import evaluator
from dojo.methods.rl.args import EvalArgs

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from dojo.evaluate.held_out import Evaluator
    from dojo.finetune import Trained
    from dojo.inputs.prompts import Prompt
    from dojo.inputs.steering import Steering
    from dojo.methods.rl.args import SampleArgs
    from dojo.rewards import Reward
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Run

# By objective: how fast the share that the old policy keeps grows with the epochs, and its most.
RAMPS = {"nft": (0.001, 0.5), "ram": (0.01, 0.9), "awm": (0.001, 0.3), "dgpo": (0.001, 0.3)}
# By objective: options that no other one reads.
OWN = {
    "nft": "nft_beta no_adaptive_weight",
    "ram": "reward_multiplier",
    "awm": "ghuber_power clip_range ema_kl_beta",
    "dgpo": "dgpo_beta clip_dsm",
}


@dataclass(frozen=True, kw_only=True)
class NftArgs:
    """The objective, the old policy, and the tie to the model as it was."""

    objective: forward.Objective = "nft"
    """nft (DiffusionNFT), ram (tied to the base model), awm, or dgpo (a group as one preference)"""
    num_inner_epochs: int = 1
    """passes over the pictures of an epoch"""
    advantage_std: Spread = "global"
    """what a picture's distance from its group's mean reward is divided by: the std of all pictures
    of the epoch, or of the group"""
    reward_aggregation: Literal["sum", "gdpo"] = "sum"
    """several rewards: their weighted sum, or each normalised within its groups first (GDPO)"""
    adv_clip_max: float = 5.0
    """advantages are clamped to this"""
    nft_beta: float = 1.0
    """nft: how strongly the old policy holds; 1, or 0.1 where the reward is hard to move"""
    no_adaptive_weight: bool = False
    """nft: do not divide each branch by its own mean absolute error"""
    reward_multiplier: float = 100.0
    """ram: the inverse temperature, where training stops by itself; 100 to 1000 is usual"""
    ghuber_power: float = 0.25
    """awm: power of the error in what stands for the likelihood"""
    clip_range: float = 1.0
    """awm: how far that likelihood's ratio may leave 1; with one optimizer step an epoch it is 1"""
    ema_kl_beta: float = 1.0
    """awm: weight of the squared distance from the old policy, without which bad pictures push
    without bound"""
    dgpo_beta: float = 100.0
    """dgpo: how soon a group whose pictures are told apart pulls no further; 10 is usual too"""
    clip_dsm: float = 1e-2
    """dgpo: how far a picture's error may leave that of the policy that drew it"""
    kl_beta: float = 1e-4
    """weight of the squared distance from the base model (ram is tied to it anyway)"""
    norm_guard: float = 0.0
    """weight of a hinge that holds the velocity's norm at the base model's"""
    old_decay_flat: int = 0
    """epochs at whose end the old policy takes over the weights as they are"""
    old_decay_ramp: float | None = None
    """by how much an epoch raises the share that it keeps; unset: 0.001, with ram 0.01"""
    old_decay_max: float | None = None
    """the largest such share; unset: 0.5 for nft, 0.9 for ram, 0.3 for awm and dgpo"""

    def __post_init__(self) -> None:
        positive = "adv_clip_max nft_beta reward_multiplier ghuber_power clip_range"
        positive += " dgpo_beta clip_dsm"
        ranges.check(self, positive, above=0)
        ranges.check(self, "num_inner_epochs", least=1)
        ranges.check(self, "ema_kl_beta kl_beta norm_guard old_decay_flat", least=0)
        ranges.check_choice(self, "objective", OWN)
        if self.objective == "awm" and not self.ema_kl_beta:
            raise ValueError("--ema_kl_beta 0: awm's bad pictures would push without bound")
        for name in ("old_decay_ramp", "old_decay_max"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"--{name} must lie in [0, 1)")
        if not self.lags:
            zero, other = "old_decay_max", "old_decay_ramp"
            if self.old_decay_max != 0:
                zero, other = other, zero
            why = f"with --{zero} 0: the old policy does not lag"
            ranges.check_unread(self, f"old_decay_flat {other}", why)

    @property
    def name(self) -> str:
        """The objective's, for people."""
        names = {"nft": "DiffusionNFT", "ram": "Reinforce Adjoint Matching"}
        return names.get(self.objective, self.objective.upper())

    def old_decay(self, epoch: int) -> float:
        """The share of itself that the old policy keeps at the end of an epoch, from 0 on."""
        ramp, most = RAMPS[self.objective]
        ramp = ramp if self.old_decay_ramp is None else self.old_decay_ramp
        most = most if self.old_decay_max is None else self.old_decay_max
        return min(max(0, epoch + 1 - self.old_decay_flat) * ramp, most)

    @property
    def draws_old(self) -> bool:
        """Whether the old policy draws the pictures."""
        return self.objective != "awm"

    @property
    def lags(self) -> bool:
        """Whether the old policy is ever another than the one that the last epoch left."""
        return self.old_decay_max != 0 and self.old_decay_ramp != 0

    def asked(self, levels: int, steps: float) -> dict[str, int]:
        """At how many of a picture's levels each frozen policy is asked.

        The base model says how far norms have grown, at one level at least. With one optimizer step
        an epoch the weights are those that the epoch began with: what they say need not be asked.

        Args:
            steps: optimizer steps of an epoch.
        """
        tied = self.objective in ("ram", "dgpo") or self.kl_beta > 0 or self.norm_guard > 0
        found = {"old": levels} if steps > 1 or self.lags else {}
        found |= {"reference": levels if tied else 1}
        return found | ({"sampled": levels} if self.objective == "awm" and steps > 1 else {})

    @property
    def loss(self) -> forward.Loss:
        """The objective's loss, with its numbers."""
        return forward.Loss(
            objective=self.objective,
            limit=self.adv_clip_max,
            beta=self.nft_beta,
            adaptive=not self.no_adaptive_weight,
            multiplier=self.reward_multiplier,
            power=self.ghuber_power,
            clip_range=self.clip_range,
            tie=self.ema_kl_beta,
            group_beta=self.dgpo_beta,
            group_clip=self.clip_dsm,
        )

    def shared(self, sample: SampleArgs, optim: OptimArgs) -> int:
        """How many pictures, side by side, are noised alike: with dgpo those of a prompt.

        Raises:
            UserError: a training batch that does not hold whole groups.
        """
        if self.objective != "dgpo":
            return 1
        if optim.train_batch_size % sample.group_size:
            raise UserError(
                f"--objective dgpo: --train_batch_size {optim.train_batch_size} is no multiple of "
                f"--group_size {sample.group_size}"
            )
        return sample.group_size


@dataclass(frozen=True, kw_only=True)
class NftEvalArgs(EvalArgs):
    """Held-out prompts, drawn as in training, and as a user would."""

    eval_guidance_scale: float | None = 4.5
    """guidance of a second evaluation (eval_guided_reward): learning without guidance makes
    pictures without guidance good, and users draw with it; 1 leaves it out"""


def evaluators(
    run: Run,
    args: NftEvalArgs,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    steering: Steering,
    trained: Trained,
    vae: AutoencoderKL,
    batch_size: int,
) -> list[Evaluator]:
    """The evaluation without guidance, and the one with the user's, if he has any; see
    `drawing.evaluator`."""
    ways = {"": replace(steering, guidance_scale=1.0)}
    if (args.eval_guidance_scale or 1) > 1:
        ways["guided"] = args.steered(steering)
    return [
        evaluator(run, args, prompts, rewards, way, trained, vae, batch_size, name)
        for name, way in ways.items()
    ]
