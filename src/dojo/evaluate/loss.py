"""The eval loss: fixed pictures, noises and sigmas, so that only the weights move it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dojo import rng
from dojo.bars import Bar
from dojo.data.samples import collate
from dojo.evaluate.args import ValidationArgs
from dojo.inputs.pictures import EvalSet, Inputs
from dojo.lazy import no_grad, torch
from dojo.maths import flow
from dojo.models.family import NoiseArgs
from dojo.run.run import Run

if TYPE_CHECKING:
    from torch import Tensor, nn


def eval_losses(
    run: Run,
    network: nn.Module,
    inputs: Inputs,
    noise_args: NoiseArgs,
    args: ValidationArgs,
) -> dict[str, float]:
    """Mean squared errors of the prediction, equal on all processes and for any number of them.

    Each picture meets `eval_sigmas` noise levels, one in each stratum of the training density (of
    equal probability), and counts whole: masks and the weights of samples are for training.

    Returns:
        `eval_loss` on the held-out pictures; `eval_loss_sigma_1` (least noise) up to
        `eval_loss_sigma_<eval_sigmas>` (most), its strata, whose mean it is; `train_eval_loss` on
        as many training pictures, measured alike; `eval_gap`, the former less the latter, which
        grows when the model learns its pictures by heart.
    """
    row: dict[str, float] = {}
    for part in inputs.evaluation:
        errors = _errors(run, network, inputs, noise_args, args, part)
        if part.name == "eval":
            row["eval_loss"] = errors.mean().item()
            strata = errors.mean(0).tolist()
            row |= {f"eval_loss_sigma_{k}": value for k, value in enumerate(strata, 1)}
        else:
            row[f"{part.name}_eval_loss"] = errors.mean().item()
    if {"eval_loss", "train_eval_loss"} <= row.keys():
        row["eval_gap"] = row["eval_loss"] - row["train_eval_loss"]
    return row


@no_grad
def _errors(
    run: Run,
    network: nn.Module,
    inputs: Inputs,
    noise_args: NoiseArgs,
    args: ValidationArgs,
    part: EvalSet,
) -> Tensor:
    """Squared error of every picture at every level, least noise first: float64 [N, levels].

    Picture i of every set meets the same levels, so that the sets' difference is that of their
    pictures.
    """
    model = inputs.model
    levels, seed = args.eval_sigmas, args.validation_seed
    process, num_processes = run.share["process"], run.share["num_processes"]
    table = torch.zeros(len(part.draws), levels)
    mine = range(process, len(part.draws), num_processes)
    share = run.stopping.paused(mine, len(part.draws))
    for (i,) in Bar(share, f"{part.name} loss", len(mine), disable=not run.main, leave=False):
        batch = collate([part.dataset[part.draws[i]]])
        mean, std = inputs.posterior(batch)
        clean = model.scaled(mean, std, torch.zeros_like(mean)).expand(levels, -1, -1, -1)
        noise_keys = [(seed, "eval noise", i, k) for k in range(levels)]
        noise = rng.normal(clean.shape[1:], noise_keys, run.device)
        offset = rng.uniform([(seed, "eval sigma", i, k) for k in range(levels)])
        objective = model.objective(part.draws[i].size, noise_args)  # as in training
        level = objective.level((torch.arange(levels) + offset) / levels)
        level = level.sort().values.to(run.device)  # `mode` falls with the uniform number
        told = model.conditions(inputs.text(batch["caption"]), inputs.geometry(batch))
        conditions = {name: value.expand(levels, *value.shape[1:]) for name, value in told.items()}
        noisy = objective.noisy(clean, noise, level)
        predicted = model.predict(network, noisy, level, conditions, run.dtype)
        target = objective.target(clean, noise, level)
        table[i] = flow.squared_error(predicted, target).cpu()
    # Each row is one process's and zero elsewhere: the sum is exact, whatever its order.
    if num_processes > 1:
        table = run.accelerator.reduce(table.to(run.device), "sum").cpu()  # pyright: ignore
    return table.double()
