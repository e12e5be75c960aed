"""The objective's options of every family with a UNet, and the objective that they make."""

from __future__ import annotations

from dataclasses import dataclass

from dojo.cli import UserError, ranges
from dojo.maths import objective as objectives
from dojo.maths.ddpm import HuberSchedule, Prediction, Schedule
from dojo.maths.objective import Diffusion
from dojo.models import family


@dataclass(frozen=True, kw_only=True)
class NoiseArgs(family.NoiseArgs):
    """What the network learns to predict, at which timesteps, and how errors count."""

    prediction_type: Prediction | None = None
    """epsilon (the noise) or v_prediction (the velocity); unset is what the model predicts. Another
    one than that is a conversion, which takes thousands of steps; the result's scheduler says it"""
    rescale_betas_zero_snr: bool = False
    """train with zero terminal SNR: no signal is left at the last timestep, so that pictures may
    become as dark and as bright as they should. Needs v_prediction; saved with the result"""
    snr_gamma: float | None = None
    """min-SNR weights with this gamma, usually 5: easy timesteps count less; unset counts all
    alike"""
    debiased_estimation: bool = False
    """weigh by 1 / sqrt(SNR) (v_prediction: 1 / (SNR + 1)): noisy timesteps count more"""
    noise_offset: float = 0.0
    """strength of noise that moves whole channels, about 0.05 to 0.1: pictures may become darker
    and brighter"""
    input_perturbation: float = 0.0
    """strength of further noise in what the network sees and not in what it predicts, about 0.1"""
    min_timestep: int = 0
    """first timestep that is trained (0 is the cleanest)"""
    max_timestep: int | None = None
    """first timestep behind those that are trained; unset trains to the end (1000)"""
    loss_type: objectives.Loss = "l2"
    """l2 is the squared error; huber and smooth_l1 count large errors less (the eval loss stays the
    squared error)"""
    huber_c: float = 0.1
    """where huber and smooth_l1 turn from squares to sizes, above 0 and up to 1"""
    huber_schedule: HuberSchedule = "snr"
    """constant: at huber_c; exponential and snr: at 1 for clean pictures, and less and less with
    the noise, down to huber_c"""

    def __post_init__(self) -> None:
        ranges.check(self, "snr_gamma", above=0)
        ranges.check(self, "noise_offset input_perturbation min_timestep", least=0)
        ranges.check(self, "max_timestep", above=self.min_timestep)
        ranges.check(self, "huber_c", above=0, most=1)
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "--rescale_betas_zero_snr: without signal predicted noise says nothing of the "
                "picture; it needs --prediction_type v_prediction"
            )
        if self.snr_gamma is not None and self.debiased_estimation:
            raise ValueError("--snr_gamma and --debiased_estimation are two weights: give one")
        for name in ("huber_c", "huber_schedule"):
            if self.loss_type == "l2" and getattr(self, name) != getattr(NoiseArgs, name):
                raise ValueError(f"--{name} needs --loss_type huber or smooth_l1")


def objective(schedule: Schedule, own_prediction: Prediction, args: NoiseArgs | None) -> Diffusion:
    """What a model learns under the options.

    Args:
        schedule: the model's own.
        own_prediction: what the model predicts.
        args: None is the model's own objective, without weights.
    Raises:
        UserError: the model cannot be trained so.
    """
    args = args or NoiseArgs()
    prediction = args.prediction_type or own_prediction
    if args.rescale_betas_zero_snr:
        schedule = schedule.without_signal_at_its_end()
    if schedule.ends_without_signal and prediction == "epsilon":
        flag = "--rescale_betas_zero_snr" if args.rescale_betas_zero_snr else "--prediction_type"
        raise UserError(
            f"{flag}: predicted noise says nothing of the picture where the schedule ends without "
            "signal, as it would here; take --prediction_type v_prediction"
        )
    last = args.min_timestep if args.max_timestep is None else args.max_timestep - 1
    if last >= schedule.num_timesteps:
        name = "min_timestep" if args.max_timestep is None else "max_timestep"
        raise UserError(f"--{name}: the model has {schedule.num_timesteps} timesteps only")
    return Diffusion(
        schedule=schedule,
        prediction_type=prediction,
        snr_gamma=args.snr_gamma,
        debiased_estimation=args.debiased_estimation,
        min_timestep=args.min_timestep,
        max_timestep=args.max_timestep,
        loss_type=args.loss_type,
        huber_c=args.huber_c,
        huber_schedule=args.huber_schedule,
    )
