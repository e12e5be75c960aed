"""Claims about `train_nft_sd3.py`: what its loop tells the objective, and who is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import train_nft_sd3
from dojo import rng
from dojo.cli import UserError
from dojo.finetune import Lagged
from dojo.maths import denoising, flow, forward
from dojo.methods import rl
from dojo.methods.rl import nft
from tests.conftest import rl_flags
from tests.scripts.runs import (
    counted_rows,
    in_process,
    metrics,
    mine,
    one_thread,
    steps,
    with_reward,
    without,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

RESULT = "pytorch_lora_weights.safetensors"
NO_EVALUATION = ("--num_eval_prompts", "0")


def train(folder: Path, model: Path, *more: str) -> Path:
    """A small run in this process."""
    flags = without(rl_flags(folder, model), "--window_size", "--clip_range")
    short = ("--num_train_timesteps", "2", "--logging_steps", "1")
    in_process(train_nft_sd3, [*flags, *short, *more])
    return folder / "run"


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective", "nft", "--guidance_scale", "3", "--time_sampling_strategy", "discrete"),
        ("--objective", "ram", "--reward_multiplier", "2", "--train_batch_size", "2"),
        (
            *("--objective", "awm", "--clip_range", "0.5"),
            *("--num_inner_epochs", "2", "--norm_guard", "1"),
        ),
        ("--objective", "dgpo", "--dgpo_beta", "20", "--clip_dsm", "0.1"),
        ("--objective", "nft", "--finetune", "full", "--learning_rate", "1e-4", "--kl_beta", "0"),
    ],
    ids=["nft-guided", "ram", "awm", "dgpo", "nft-full"],
)
def test_before_the_first_update_all_policies_are_the_base(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...]
) -> None:
    rows = steps(train(tmp_path, tiny_sd3, *NO_EVALUATION, *flags))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first, *later = rows
    assert first["old_deviate"] == first["kl"] == 0
    assert first["norm_ratio"] == 1
    assert first["grad_norm"] > 0  # it learns, though nothing has moved
    assert later[-1]["kl"] > 0
    assert later[-1]["norm_ratio"] != 1
    assert later[-1]["old_deviate"] > 0
    assert all(row["x0_norm"] > 0 for row in rows)


def test_the_old_policy_draws_and_is_asked_and_follows_at_the_epochs_end(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[float] = []
    seen: list[tuple[Tensor, Tensor]] = []
    follow, loss = Lagged.follow, forward.nft

    def followed(self: Lagged, decay: float) -> None:
        before = [value.clone() for value in self.values]
        follow(self, decay)
        decays.append(decay)
        for kept, value, param in zip(before, self.values, self.params, strict=True):
            expected = decay * kept + (1 - decay) * param.detach()
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)

    def nft(velocity: Tensor, old: Tensor, *rest: Tensor, **settings: Any) -> Tensor:
        seen.append((velocity.detach().clone(), old.clone()))
        return loss(velocity, old, *rest, **settings)

    monkeypatch.setattr(Lagged, "follow", followed)
    monkeypatch.setattr(forward, "nft", nft)
    folder = train(
        *(tmp_path, tiny_sd3, *NO_EVALUATION, "--old_decay_ramp", "0.4", "--old_decay_max", "0.6"),
        *("--train_batch_size", "8", "--max_train_steps", "3", "--checkpointing_steps", "3"),
    )
    assert decays == [pytest.approx(0.4), pytest.approx(0.6), pytest.approx(0.6)]
    apart = [(new - old).abs().max().item() for new, old in seen]
    # Two levels an epoch, one step: in the first epoch policy and old policy are one, later the
    # old one is behind.
    assert apart[:2] == [0, 0]
    assert all(distance > 0 for distance in apart[2:])
    kept = load_file(folder / "checkpoint-3" / train_nft_sd3.LAGGED)
    assert len(kept) == len(load_file(folder / "pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize("objective", ["nft", "ram", "awm", "dgpo"])
def test_the_old_policy_draws_for_all_but_awm_and_the_current_one_for_awm(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    policies: list[Lagged] = []
    kept: list[dict[str, list[Tensor]]] = []  # what both are at an epoch's end
    drew: list[list[Tensor]] = []  # the network's weights as it draws
    init, follow, sample = Lagged.__init__, Lagged.follow, denoising.sample

    def made(self: Lagged, *given: Any) -> None:
        init(self, *given)
        policies.append(self)

    def followed(self: Lagged, decay: float) -> None:
        follow(self, decay)
        kept.append({"old": copied(self.values), "current": copied(self.params)})

    def sampled(*given: Any, **more: Any) -> Tensor:
        drew.append(copied(policies[0].params))
        return sample(*given, **more)

    monkeypatch.setattr(Lagged, "__init__", made)
    monkeypatch.setattr(Lagged, "follow", followed)
    monkeypatch.setattr(denoising, "sample", sampled)
    late = ("--old_decay_ramp", "0.5", "--old_decay_max", "0.9", "--train_batch_size", "8")
    train(tmp_path, tiny_sd3, *NO_EVALUATION, *late, "--objective", objective)
    assert len(drew) == len(kept) == 4  # a batch an epoch
    draws, other = ("current", "old") if objective == "awm" else ("old", "current")
    for weights, both in zip(drew[1:], kept, strict=False):
        assert equal(weights, both[draws])
        assert not equal(weights, both[other])


def copied(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in values]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("flags", [("--kl_beta", "1"), ("--norm_guard", "1000")])
def test_the_tie_to_the_base_and_the_guard_of_the_norm_are_learned_from(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...]
) -> None:
    plain = ("--kl_beta", "0", "--norm_guard", "0")
    assert not same_result(tmp_path, tiny_sd3, plain, (*plain, *flags))


def test_several_rewards_can_be_normalised_one_by_one(tmp_path: Path, tiny_sd3: Path) -> None:
    bright = mine(tmp_path, "brightness")
    both = ("--reward", f"{bright}=2,jpeg_incompressibility=0.5")
    one_by_one = ("--reward_aggregation", "gdpo")
    assert not same_result(tmp_path, tiny_sd3, both, (*both, *one_by_one))


def same_result(folder: Path, model: Path, one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two runs that differ in their flags end in the same weights."""
    found = [
        load_file(train(folder / name, model, *NO_EVALUATION, *flags) / RESULT)
        for name, flags in (("one", one), ("other", other))
    ]
    return equal([*found[0].values()], [*found[1].values()])


def test_two_equal_runs_end_in_the_same_weights(tmp_path: Path, tiny_sd3: Path) -> None:
    assert same_result(tmp_path, tiny_sd3, (), ())


def test_pictures_are_drawn_with_guidance_and_learned_from_without(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, set[int]] = {"drawn": set(), "asked": set(), "trained": set()}
    drawing: list[bool] = []
    forward_of, sample = SD3Transformer2DModel.forward, denoising.sample

    def seen(self: Any, hidden_states: Tensor, *given: Any, **more: Any) -> Any:
        if hidden_states.device.type != "meta":  # where the cost is counted
            learning = "trained" if torch.is_grad_enabled() else "asked"
            rows["drawn" if drawing else learning].add(len(hidden_states))
        return forward_of(self, hidden_states, *given, **more)

    def sampled(*given: Any, **more: Any) -> Tensor:
        drawing.append(True)
        try:
            return sample(*given, **more)
        finally:
            drawing.clear()

    monkeypatch.setattr(SD3Transformer2DModel, "forward", seen)
    monkeypatch.setattr(denoising, "sample", sampled)
    train(tmp_path, tiny_sd3, *NO_EVALUATION, "--guidance_scale", "3", "--max_train_steps", "2")
    # Four pictures a batch; guidance asks for each of them twice.
    assert rows == {"drawn": {8}, "asked": {4}, "trained": {4}}


def test_an_update_lowers_the_error_on_good_pictures_and_raises_it_on_bad_ones(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    loss = forward.nft

    def nft(v: Tensor, old: Tensor, u: Tensor, s: Tensor, a: Tensor, **settings: Any) -> Tensor:
        change = flow.squared_error(v.detach(), u) - flow.squared_error(old, u)
        asked.append((change, a.clone()))
        return loss(v, old, u, s, a, **settings)

    monkeypatch.setattr(forward, "nft", nft)
    # Twice over the same pictures, one step each: the second pass sees what the first has done.
    train(
        *(tmp_path, tiny_sd3, *NO_EVALUATION, "--train_batch_size", "8", "--kl_beta", "0"),
        *("--num_inner_epochs", "2", "--max_train_steps", "2"),
    )
    assert len(asked) == 4
    assert not any(change.any() for change, _ in asked[:2])
    gained = sum((change * a).mean().item() for change, a in asked[2:])
    assert gained < 0


def test_a_run_is_evaluated_without_guidance_and_with_the_users(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    folder = train(tmp_path, tiny_sd3, "--eval_guidance_scale", "3", "--eval_every", "2")
    plain = with_reward(folder)
    guided = [row for row in metrics(folder) if "eval_guided_reward" in row]
    assert [row["step"] for row in guided] == [row["step"] for row in plain] == [0, 4]
    assert all("eval_guided_kl" in row for row in guided)
    assert (folder / "validation-guided" / "step-4" / "scores.csv").is_file()
    assert plain[0]["eval_reward"] != guided[0]["eval_guided_reward"]


# -- levels -------------------------------------------------------------------------------------


class Seeded:
    """What levels want of a run."""

    seed = 0


def batch(count: int) -> rl.Batch:
    return rl.Batch(epoch=0, places=list(range(count)), prompt_ids=[0] * count, prompts=[])


@pytest.mark.parametrize("strategy", ["uniform", "logit_normal"])
def test_levels_are_stratified_over_the_noisier_share(strategy: Any) -> None:
    args = rl.LevelArgs(time_sampling_strategy=strategy, timestep_range=0.5)
    run: Any = Seeded()
    way = args.way(3.0)
    sigma = args.levels(run, batch(200), way.sigmas, 3.0)
    assert sigma.shape == (4, 200)
    edges = torch.tensor([1.0, 0.875, 0.75, 0.625, 0.5])
    if strategy == "uniform":
        bounds = flow.shift_sigma(edges, 3.0)
    else:
        bounds = flow.draw_sigma(edges.clamp(max=1 - 1e-7), "logit_normal", shift=3.0)
    for k in range(4):
        assert (sigma[k] <= (bounds[k] + 1e-6 if k else 1)).all()
        assert (sigma[k] >= bounds[k + 1] - 1e-6).all()
        assert sigma[k].std() > 0
    assert not torch.equal(sigma[:, 0], sigma[:, 1])


def test_discrete_levels_are_different_steps_of_the_pictures_own_way() -> None:
    args = rl.LevelArgs(
        time_sampling_strategy="discrete",
        sample_steps=10,
        timestep_range=0.9,
        num_train_timesteps=4,
    )
    run: Any = Seeded()
    way = args.way(3.0)
    sigma = args.levels(run, batch(50), way.sigmas, 3.0)
    first = torch.tensor(way.sigmas[:9])
    for column in sigma.T:
        assert len(column.unique()) == 4
        assert torch.isin(column, first).all()
    assert torch.equal(sigma.unique(), first.sort().values)  # each is somebody's


def test_the_noise_of_a_level_is_the_same_whenever_it_is_asked() -> None:
    run: Any = Seeded()
    clean = rng.normal((4, 2, 2), [("clean", 0), ("clean", 1)])
    sigma = torch.tensor([[0.5, 0.7], [0.2, 0.9]])
    chunk = rl.Finished(batch=batch(2), clean=clean, sigma=sigma, asked={})
    once, again, other = chunk.noised(run, 0), chunk.noised(run, 0), chunk.noised(run, 1)
    assert all(torch.equal(one, two) for one, two in zip(once, again, strict=True))
    assert not torch.equal(once[2], other[2])
    level, noisy, velocity = once
    torch.testing.assert_close(flow.clean_estimate(noisy, velocity, level), clean)


def test_the_pictures_of_a_group_are_noised_alike_where_they_share() -> None:
    run: Any = Seeded()
    way = rl.LevelArgs(sample_steps=8).way(1.0)
    for strategy in ("uniform", "discrete"):
        args = rl.LevelArgs(time_sampling_strategy=strategy, num_train_timesteps=2)
        sigma = args.levels(run, batch(8), way.sigmas, 1.0, shared=4)
        assert torch.equal(sigma, sigma[:, ::4].repeat_interleave(4, 1))
        assert not torch.equal(sigma[:, 0], sigma[:, 4])
    clean = rng.normal((3, 2, 2), [("clean", i) for i in range(8)])
    chunk = rl.Finished(
        batch=batch(8), clean=clean, sigma=torch.full((1, 8), 0.5), asked={}, shared=4
    )
    _, _, velocity = chunk.noised(run, 0)
    noise = velocity + clean
    assert torch.allclose(noise[0], noise[3])
    assert not torch.allclose(noise[0], noise[4])


# -- what need not be asked ---------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--old_decay_max", "0"), ("--objective", "awm")])
def test_what_the_weights_still_say_is_not_asked_and_the_result_is_the_same(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    one = ("--train_batch_size", "8", "--max_train_steps", "2", *flags)  # a step an epoch
    lean = load_file(train(tmp_path / "lean", tiny_sd3, *NO_EVALUATION, *one) / RESULT)
    asked = rl.NftArgs.asked
    monkeypatch.setattr(rl.NftArgs, "asked", lambda self, levels, steps: asked(self, levels, 2))
    whole = load_file(train(tmp_path / "whole", tiny_sd3, *NO_EVALUATION, *one) / RESULT)
    assert equal([*lean.values()], [*whole.values()])


def test_who_is_asked_follows_from_the_steps_of_an_epoch_and_the_lag() -> None:
    assert rl.NftArgs().asked(4, 1) == {"old": 4, "reference": 4}
    free = rl.NftArgs(kl_beta=0, old_decay_max=0)
    assert free.asked(4, 1) == {"reference": 1}  # for the norms
    assert free.asked(4, 2) == {"old": 4, "reference": 1}
    assert rl.NftArgs(kl_beta=0, old_decay_ramp=0).asked(4, 1) == {"reference": 1}
    awm = rl.NftArgs(objective="awm", kl_beta=0)
    assert awm.asked(4, 1) == {"old": 4, "reference": 1}
    assert awm.asked(4, 2) == {"old": 4, "reference": 1, "sampled": 4}
    assert rl.NftArgs(objective="dgpo", kl_beta=0).asked(2, 1) == {"old": 2, "reference": 2}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--old_decay_max", "0", "--kl_beta", "0", "--train_batch_size", "8"),
        ("--objective", "awm", "--num_inner_epochs", "2", "--guidance_scale", "3"),
        ("--objective", "ram", "--sample_steps", "3"),
    ],
    ids=["nft", "nft-lean", "awm", "ram"],
)
def test_the_forward_passes_that_are_counted_are_those_that_are_made(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    rows = counted_rows(monkeypatch)
    folder = train(tmp_path, tiny_sd3, *NO_EVALUATION, "--max_train_steps", "4", *flags)
    record = json.loads((folder / "args.json").read_text())
    pictures = 8 * max(row.get("epoch", 0) for row in metrics(folder))
    assert sum(rows) == rl.passes_of(record) * pictures


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rl.LevelArgs(timestep_range=0.0), "--timestep_range"),
        (lambda: rl.LevelArgs(sample_steps=0), "--sample_steps"),
        (
            lambda: rl.LevelArgs(time_sampling_strategy="discrete", num_train_timesteps=9),
            "--num_train_timesteps 9",
        ),
        (lambda: rl.NftArgs(objective="awm", ema_kl_beta=0.0), "--ema_kl_beta"),
        (lambda: rl.NftArgs(old_decay_max=1.0), "--old_decay_max"),
        (lambda: rl.NftArgs(nft_beta=0.0), "--nft_beta"),
        (lambda: rl.NftArgs(objective="dgpo", dgpo_beta=0.0), "--dgpo_beta"),
        (lambda: rl.NftArgs(objective="dgpo", clip_dsm=0.0), "--clip_dsm"),
    ],
)
def test_settings_that_teach_nothing_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


CHANGED: dict[forward.Objective, dict[str, Any]] = {
    "nft": {"nft_beta": 0.5, "no_adaptive_weight": True},
    "ram": {"reward_multiplier": 5.0},
    "awm": {"ghuber_power": 0.5, "clip_range": 0.1, "ema_kl_beta": 0.5},
    "dgpo": {"dgpo_beta": 10.0, "clip_dsm": 0.1},
}


@pytest.mark.parametrize("objective", CHANGED)
def test_another_objectives_options_are_refused(objective: forward.Objective) -> None:
    assert {name: " ".join(own) for name, own in CHANGED.items()} == nft.OWN
    rl.NftArgs(objective=objective, **CHANGED[objective])
    for other, values in CHANGED.items():
        for name, value in values.items() if other != objective else ():
            with pytest.raises(ValueError, match=f"--{name} does nothing .* it is for {other}"):
                rl.NftArgs(objective=objective, **{name: value})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--shard",), "--shard does not work with an old policy"),
        (
            ("--finetune", "full", "--train_dtype", "bf16", "--mixed_precision", "bf16"),
            "--train_dtype bf16: the policy that lags",
        ),
    ],
    ids=["shard", "bf16"],
)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_an_old_policy_is_refused_before_any_work_where_it_cannot_lag(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...], said: str, dry: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path, tiny_sd3, *flags, *dry)
    assert not (tmp_path / "run" / "args.json").exists()


def test_dgpo_refuses_batches_that_do_not_hold_whole_groups(tmp_path: Path, tiny_sd3: Path) -> None:
    said = "--objective dgpo: --train_batch_size 2 is no multiple of --group_size 4"
    with pytest.raises(UserError, match=said):
        train(tmp_path, tiny_sd3, "--objective", "dgpo", "--train_batch_size", "2")
