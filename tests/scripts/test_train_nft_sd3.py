"""Claims about `train_nft_sd3.py`: what its loop tells the objective, and who is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train_nft_sd3
from dojo import rng
from dojo.cli import UserError
from dojo.finetune import Lagged
from dojo.maths import flow, forward, rollout
from dojo.methods import rl
from tests.conftest import rl_flags
from tests.scripts.runs import in_process, metrics, one_thread, steps, with_reward

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

NO_EVALUATION = ("--num_eval_prompts", "0")


def train(folder: Path, model: Path, *more: str) -> Path:
    """A small run in this process."""
    flags = rl_flags(folder, model)
    place = flags.index("--window_size")
    del flags[place : place + 2]
    short = ("--num_train_timesteps", "2", "--logging_steps", "1", "--clip_range", "0.5")
    in_process(train_nft_sd3, [*flags, *short, *more])
    return folder / "run"


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective", "nft", "--guidance_scale", "3", "--time_sampling_strategy", "discrete"),
        ("--objective", "ram", "--reward_multiplier", "2", "--train_batch_size", "2"),
        ("--objective", "awm", "--num_inner_epochs", "2", "--norm_guard", "1"),
        ("--objective", "nft", "--finetune", "full", "--learning_rate", "1e-4", "--kl_beta", "0"),
    ],
    ids=["nft-guided", "ram", "awm", "nft-full"],
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
    plan = rollout.ode_plan(args.sample_steps, 3.0)
    sigma = args.levels(run, batch(200), plan.sigmas, 3.0)
    assert sigma.shape == (4, 200)
    edges = torch.tensor([1.0, 0.875, 0.75, 0.625, 0.5])
    if strategy == "uniform":
        bounds = flow.shift_sigma(edges, 3.0)
    else:
        bounds = flow.draw_sigma(edges.clamp(max=1 - 1e-7), "logit_normal", shift=3.0)
    for k in range(4):
        assert (sigma[k] <= bounds[k] + 1e-6).all() or k == 0
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
    plan = rollout.ode_plan(10, 3.0)
    sigma = args.levels(run, batch(50), plan.sigmas, 3.0)
    first = torch.tensor(plan.sigmas[:9])
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
        (lambda: train_nft_sd3.NftArgs(objective="awm", ema_kl_beta=0.0), "--ema_kl_beta"),
        (lambda: train_nft_sd3.NftArgs(old_decay_max=1.0), "--old_decay_max"),
        (lambda: train_nft_sd3.NftArgs(nft_beta=0.0), "--nft_beta"),
    ],
)
def test_settings_that_teach_nothing_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_shards_cannot_lag_yet(tmp_path: Path, tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="--shard does not work with an old policy"):
        train(tmp_path, tiny_sd3, "--shard", "--dry_run")


def test_a_policy_in_bfloat16_cannot_lag() -> None:
    with pytest.raises(UserError, match="--train_dtype bf16"):
        Lagged([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
