"""What groups' gradients have in common: the estimate against known gradients, a small run."""

import json
from pathlib import Path

import pytest
import torch

from dojo import cli
from dojo.bench import common_share
from dojo.bench.common_share import MeasureArgs, Share
from dojo.cli import UserError


def gradients(groups: int, common: float, seed: int = 0) -> torch.Tensor:
    """Of unit noise in 400 dimensions, and a common part of that squared length."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(groups, 400, generator=source) / 20
    way = torch.ones(400) / 20
    return noise + way * common**0.5


def test_the_share_of_equal_gradients_is_one_and_of_orthogonal_ones_nothing() -> None:
    same = common_share.share_of(torch.ones(5, 7))
    assert (same.value, same.error) == (pytest.approx(1), pytest.approx(0))
    assert common_share.share_of(torch.eye(6)).value == 0


def test_the_share_is_estimated_without_bias_and_its_error_is_the_real_one() -> None:
    found = [common_share.share_of(gradients(24, 0.05, seed)) for seed in range(200)]
    values = torch.tensor([one.value for one in found])
    true = 0.05 / 1.05
    assert values.mean().item() == pytest.approx(true, abs=4 * values.std().item() / 200**0.5)
    errors = torch.tensor([one.error for one in found]).square().mean().sqrt().item()
    assert errors == pytest.approx(values.std().item(), rel=0.3)
    nothing = [common_share.share_of(gradients(24, 0.0, seed)).value for seed in range(200)]
    assert abs(torch.tensor(nothing).mean().item()) < 0.001


def test_the_work_until_the_signal_is_as_large_as_the_noise_follows_from_the_share() -> None:
    args = MeasureArgs(sample_steps=4, num_train_timesteps=2)
    row = common_share.row(args, "grpo", Share(value=0.2, error=0.01, groups=96))
    # Four groups of eight pictures, 2.625 forward passes each.
    assert row["pictures until signal = noise"] == "32"
    assert row["forward passes until then"] == "84"
    unknown = common_share.row(args, "nft", Share(value=0.2, error=0.11, groups=96))
    assert unknown["forward passes until then"] == "not known"


def test_the_even_grid_trains_a_step_more() -> None:
    even = MeasureArgs(sigma_grid="even", sample_steps=3, trained_step=1)
    assert even.passes("grpo") == 1.625
    with pytest.raises(ValueError, match=r"--trained_step 1 must lie in 0 \.\. 0"):
        MeasureArgs(sample_steps=3, trained_step=1)


def test_groups_without_a_gradient_or_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three"):
        common_share.share_of(torch.ones(2, 3))
    with pytest.raises(ValueError, match="score alike"):
        common_share.share_of(torch.zeros(4, 3))


@pytest.mark.slow
def test_the_command_measures_every_objective(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = [
        *("--pretrained_model_name_or_path", str(tiny_sd3), "--output_dir", str(tmp_path / "out")),
        *("--prompt_set", "pocket", "--max_prompts", "8", "--num_eval_prompts", "0"),
        *("--reward", "jpeg_incompressibility", "--num_groups", "4", "--groups_at_once", "2"),
        *("--group_size", "4", "--rank", "2", "--latent_cache_dir", str(tmp_path / "cache")),
    ]
    common_share.main(cli.parse(common_share.CommonShareArgs, None, flags))
    found = json.loads((tmp_path / "out" / "share.json").read_text())["shares"]
    assert list(found) == list(common_share.KINDS)
    assert all(one["groups"] == 4 and one["error"] > 0 for one in found.values())
    assert (tmp_path / "out" / "share.md").read_text().count("\n") == 2 + len(found)


def test_what_says_nothing_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="--num_groups 2 must be at least 3"):
        MeasureArgs(num_groups=2, groups_at_once=2)
    with pytest.raises(UserError, match="--reward: no group has a gradient"):
        common_share.share_of(torch.zeros(4, 7))
