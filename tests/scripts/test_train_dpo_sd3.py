"""Claims about `train_dpo_sd3.py`: the flow's errors under the loss, and what its options change.

What all scripts of pairs share is claimed of `train_dpo_sd15.py` and of every script.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_dpo_sd3
from dojo.inputs import pairs as paired
from dojo.maths import flow, preference
from dojo.models.sd3 import models
from tests.scripts.runs import (
    adapter,
    equal,
    family_flags,
    in_process,
    one_thread,
    steps,
    with_loss,
    with_reward,
    write_pairs,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
LOG_TWO = torch.tensor(math.log(2)).item()  # in float32
ONE_STEP = ("--max_train_steps", "1")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs."""
    return write_pairs(tmp_path_factory.mktemp("datas") / "pairs", 6)


def train(folder: Path, model: Path, data: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder; all runs share their caches."""
    cache = ["--latent_cache_dir", str(model.parent / "cache"), "--seed", "0", "--rank", "2"]
    in_process(train_dpo_sd3, [*family_flags(folder, model, data), *cache, *flags])
    return folder / "run"


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--finetune", "full", "--weighting_scheme", "cosmap"),
        ("--mixed_precision", "bf16", "--winner_preserving_mu", "0.9"),
        ("--weighting_scheme", "sigma_sqrt", "--precondition_outputs"),
    ],
    ids=("lora", "full-cosmap", "bf16-guarded", "clean"),
)
def test_before_the_first_update_the_loss_is_log_two_exactly(
    tmp_path: Path, tiny_sd3: Path, pairs: Path, flags: tuple[str, ...]
) -> None:
    more = ("--max_train_steps", "2", "--learning_rate", "1e-3", "--eval_fraction", "0.3")
    folder = train(tmp_path, tiny_sd3, pairs, *more, *flags)
    first, second = steps(folder)
    before, after = with_loss(folder)
    assert first["loss"] == before["eval_loss"] == LOG_TWO
    assert first["accuracy"] == before["eval_accuracy"] == 0.5
    assert first["margin"] == first["winner_drift"] == first["loser_drift"] == 0
    assert first["grad_norm"] > 0  # it learns, though nothing has moved
    assert second["margin"] != 0
    assert after["eval_winner_drift"] != 0
    assert ("loser_pull" in first) == ("--winner_preserving_mu" in flags)
    assert 0 <= first.get("loser_pull", 0.5) < 1


def test_a_pair_has_one_noise_and_one_sigma_of_the_density_that_was_asked_for(
    tmp_path: Path, tiny_sd3: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised: list[tuple[Tensor, ...]] = []
    asked: list[tuple[Any, ...]] = []
    measured: list[tuple[Tensor, ...]] = []
    mix, ask, judge = flow.interpolate, models.velocity, preference.dpo

    def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        noised.append((clean, noise, sigma, mix(clean, noise, sigma)))
        return noised[-1][-1]

    def velocity(network: Any, noisy: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        asked.append(
            (noisy, sigma, more["prompt_embeds"], ask(network, noisy, sigma, *rest, **more))
        )
        return asked[-1][-1]

    def dpo(*errors: Tensor, beta: float) -> preference.Preference:
        measured.append(errors)
        assert beta == 2000
        return judge(*errors, beta=beta)

    monkeypatch.setattr(flow, "interpolate", interpolate)
    monkeypatch.setattr(models, "velocity", velocity)
    monkeypatch.setattr(preference, "dpo", dpo)
    density = ("--weighting_scheme", "cosmap", "--flow_shift", "1.5", "--learning_rate", "1e-3")
    train(tmp_path, tiny_sd3, pairs, "--train_batch_size", "3", "--max_train_steps", "2", *density)
    assert (len(noised), len(asked), len(measured)) == (2, 4, 2)
    for i, (clean, noise, sigma, noisy) in enumerate(noised):
        assert torch.equal(*noise.chunk(2))
        assert torch.equal(*sigma.chunk(2))
        assert len(sigma.unique()) == 3  # each pair has its own
        assert not torch.equal(*clean.chunk(2))
        # The policy, and then the reference, are asked about this and nothing else; both errors
        # have the weight of their sigma.
        weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        for k, (seen, level, words, said) in enumerate(asked[2 * i : 2 * i + 2]):
            assert torch.equal(seen, noisy)
            assert torch.equal(level, sigma)
            assert torch.equal(*words.chunk(2))
            errors = (said - (noise - clean)).square().mean((1, 2, 3)) * weight
            found = torch.cat(measured[i][2 * k : 2 * k + 2])
            torch.testing.assert_close(found, errors.detach())
    assert all((one[2] >= flow.MIN_SIGMA).all() and (one[2] <= 1).all() for one in noised)


def test_held_out_pairs_are_seen_at_the_middles_of_the_density(
    tmp_path: Path, tiny_sd3: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noises: dict[tuple[Any, ...], Tensor] = {}
    levels: list[Tensor] = []
    own, mix = paired.Inputs.noise, flow.interpolate

    def noise(self: paired.Inputs, keys: Any, like: Tensor) -> Tensor:
        found = own(self, keys, like)
        if keys[0][0] == "held-out pairs":
            before = noises.setdefault((*keys[0],), found)
            assert torch.equal(before, found)  # the same at every evaluation
        return found

    def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma)
        return mix(clean, noise, sigma)

    monkeypatch.setattr(paired.Inputs, "noise", noise)
    monkeypatch.setattr(flow, "interpolate", interpolate)
    flags = ("--eval_fraction", "0.3", "--logit_mean", "0.5", "--flow_shift", "3")
    train(tmp_path, tiny_sd3, pairs, *ONE_STEP, *flags)
    middles = torch.tensor([0.875, 0.625, 0.375, 0.125])
    expected = flow.draw_sigma(middles, "logit_normal", shift=3.0, logit_mean=0.5)
    for seen in (levels[:4], levels[-4:]):
        assert torch.equal(torch.stack([one[0] for one in seen]), expected)
        assert all((one == one[0]).all() for one in seen)
    assert [key[-1] for key in noises] == [125, 375, 625, 875]


def test_sft_learns_the_winners_as_supervised_training_would(
    tmp_path: Path, tiny_sd3: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[Tensor] = []
    both: list[Tensor] = []
    learned: list[Tensor] = []
    measure, mix, latents = flow.squared_error, flow.interpolate, paired.Inputs.latents

    def interpolate(clean: Tensor, *given: Tensor) -> Tensor:
        learned.append(clean)
        return mix(clean, *given)

    def of_pairs(*given: Any) -> Tensor:
        both.append(latents(*given))
        return both[-1]

    def squared_error(*given: Any) -> Tensor:
        losses.append(measure(*given))
        return losses[-1]

    monkeypatch.setattr(flow, "squared_error", squared_error)
    monkeypatch.setattr(flow, "interpolate", interpolate)
    monkeypatch.setattr(paired.Inputs, "latents", of_pairs)
    one = train(tmp_path, tiny_sd3, pairs, "--sft", "--learning_rate", "1e-3")
    assert len(learned) == len(both) == 3
    for clean, pair in zip(learned, both, strict=True):
        assert torch.equal(clean, pair.chunk(2)[0])  # the winners
        assert not torch.equal(clean, pair.chunk(2)[1])
    assert [len(some) for some in losses] == [2, 2, 2]
    rows = steps(one)
    assert [row["loss"] for row in rows] == pytest.approx([one.mean().item() for one in losses])
    assert not {"margin", "accuracy", "winner_drift"} & rows[0].keys()


def test_the_density_of_sigma_and_the_tie_change_what_is_learned(
    tmp_path: Path, tiny_sd3: Path, pairs: Path
) -> None:
    found = [
        adapter(train(tmp_path / str(i), tiny_sd3, pairs, "--learning_rate", "1e-3", *flags))
        for i, flags in enumerate([(), ("--logit_mean", "1"), ("--beta_dpo", "20")])
    ]
    assert not equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_evaluation_draws_with_guidance_and_without_a_flag_of_it_with_that_of_sd35() -> None:
    words = ["--pretrained_model_name_or_path", "a", "--dataset_name", "b", "--output_dir", "c"]
    args = train_dpo_sd3.cli.parse(train_dpo_sd3.Args, None, words)
    assert args.evaluation.eval_guidance_scale == 4.5
    assert args.finetune.finetune == "lora"
    assert args.dpo.beta_dpo == 2000


@pytest.mark.slow
def test_what_is_preferred_becomes_likelier_on_captions_that_were_held_out(
    tmp_path: Path, pocket_sd3: Path
) -> None:
    learn = ("--finetune", "full", "--max_train_steps", "30", "--train_batch_size", "4")
    learn += ("--learning_rate", "1e-4", "--eval_fraction", "0.25", "--beta_dpo", "200")
    for name in ("right", "swapped"):
        data = write_pairs(tmp_path / name, 16, swapped=name == "swapped")
        folder = train(tmp_path / f"of-{name}", pocket_sd3, data, *learn)
        before, after = with_loss(folder)
        assert before["eval_loss"] == LOG_TWO > after["eval_loss"]
        assert after["eval_accuracy"] > 0.7
        assert sum(row["accuracy"] for row in steps(folder)[-8:]) / 8 > 0.7
        assert not with_reward(folder)
