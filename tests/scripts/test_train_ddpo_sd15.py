"""train_ddpo_sd15.py and train_ddpo_sdxl.py from end to end: what is theirs beside SD3's.

Their ratio, what the UNet is asked, groups, and the names that users of TRL know.
"""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import train_ddpo_sd15
import train_ddpo_sdxl
from dojo import cli, finetune
from dojo.cli import UserError, foreign
from dojo.maths.advantages import PromptBuffer, group_advantages
from dojo.methods import rl
from dojo.models import sd15, sdxl
from tests.conftest import ROOT
from tests.scripts.runs import policy_flags, steps
from tests.scripts.test_readme import options
from tests.scripts.test_train_grpo_sd3 import NO_EVALUATION, learned
from tests.scripts.test_train_grpo_sd3 import train as train_script

BUFFER = ("--buffer_size", "4", "--buffer_min_count", "2")
DRAWN = ("--num_prompts_per_epoch", "4", "--group_size", "1", "--train_batch_size", "2")


def train(folder: Path, model: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    script = train_ddpo_sdxl if "xl" in model.name else train_ddpo_sd15
    return train_script(folder, model, *DRAWN, *NO_EVALUATION, *flags, script=script)


# -- the ratio ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("sd15", (*BUFFER, "--negative_prompt", "a star", "--num_inner_epochs", "2")),
        (
            "sd15",
            (
                *(*BUFFER, "--finetune", "full", "--mixed_precision", "bf16", "--eta", "0.5"),
                *("--sample_batch_size", "4", "--gradient_checkpointing", "--guidance_scale", "1"),
                *("--trust_region", "divergence", "--clip_range", "1e-4"),
            ),
        ),
        (
            "sdxl",
            (
                *("--baseline", "group", "--num_prompts_per_epoch", "2", "--group_size", "2"),
                *("--train_timesteps", "window", "--window_size", "1", "--branch"),
                *("--step_weighting", "velocity"),
            ),
        ),
    ],
    ids=("guided", "full-bf16-divergence", "sdxl-groups-branch"),
)
def test_before_the_first_update_the_ratio_is_exactly_one(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, flags: tuple[str, ...]
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    epochs = ("--max_train_steps", "None", "--num_train_epochs", "2")
    rows = steps(train(tmp_path, model, *epochs, *flags))
    per_epoch = len(rows) // 2
    assert per_epoch > 1
    for i, row in enumerate(rows):
        assert all(math.isfinite(value) for value in row.values()), row
        if i % per_epoch == 0:
            assert row["ratio_max_deviation"] == row["approx_kl"] == 0
            assert row["grad_norm"] > 0
        else:
            assert row["ratio_max_deviation_later"] > 0
        if "divergence" in flags:
            assert (row["divergence"] == 0) == (i % per_epoch == 0)


def test_the_unet_is_asked_for_both_branches_of_whole_pictures_in_sampling_and_training(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, int]] = []
    ask = sdxl.Model.predict

    def predict(
        self: sdxl.Model, network: Any, noisy: Tensor, level: Tensor, conditions: Any, dtype: Any
    ) -> Tensor:
        told = conditions["time_ids"]
        whole = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand_as(told)  # size, no crop, target
        assert torch.equal(told.cpu(), whole)
        assert level.dtype == torch.int64
        asked.append((torch.is_grad_enabled(), len(noisy)))
        return ask(self, network, noisy, level, conditions, dtype)

    monkeypatch.setattr(sdxl.Model, "predict", predict)
    train(tmp_path, tiny_sdxl, *BUFFER, "--max_train_steps", "2")
    # Two batches of two pictures, twice as many rows with guidance; the last step is not trained.
    assert asked == [(False, 4)] * 2 * 4 + [(True, 4)] * 2 * 3


# -- what a picture is compared with --------------------------------------------------------------


def test_a_group_is_judged_by_itself_and_leaves_the_buffer_alone() -> None:
    scores: Any = SimpleNamespace(
        scores=torch.tensor([1.0, 3.0, 10.0, 20.0]),
        prompt_ids=torch.tensor([5, 5, 2, 2]),
        valid=torch.tensor([True, True, True, True]),
    )
    given = (scores.scores, scores.prompt_ids, scores.valid)
    buffer = PromptBuffer(4, 2)
    found = rl.DdpoArgs(baseline="group").judge(buffer, scores)
    assert torch.equal(found.values, group_advantages(*given).values)
    torch.testing.assert_close(found.values, torch.tensor([-1.0, 1, -1, 1]), rtol=1e-3, atol=0)
    assert not len(buffer.state_dict()["scores"])
    own = rl.DdpoArgs(buffer_size=4, buffer_min_count=2)
    assert torch.equal(
        own.judge(buffer, scores).values, PromptBuffer(4, 2).advantages(*given).values
    )
    assert len(buffer.state_dict()["scores"]) == 4


def test_groups_hold_no_prompt_twice_and_refuse_what_only_a_buffer_reads(
    tmp_path: Path, tiny_sd15: Path
) -> None:
    usual, groups = rl.DdpoArgs(), rl.DdpoArgs(baseline="group")
    assert (usual.min_group, usual.repeats_prompts) == (1, True)
    assert (groups.min_group, groups.repeats_prompts) == (2, False)
    with pytest.raises(ValueError, match="--buffer_size does nothing with --baseline group"):
        rl.DdpoArgs(baseline="group", buffer_size=64)
    with pytest.raises(UserError, match="--group_size must be at least 2"):
        train(tmp_path, tiny_sd15, "--baseline", "group")


# -- what an epoch costs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sampled", "trained"),
    [
        (("--train_timesteps", "window", "--window_size", "3", "--sample_steps", "20"), 20, 3),
        (("--sample_steps", "50", "--num_inner_epochs", "2"), 25, 49),
    ],
)
def test_a_dry_run_counts_all_steps_of_sampling_and_the_trained_ones_with_guidance(
    tmp_path: Path, tiny_sd15: Path, flags: tuple[str, ...], sampled: int, trained: int
) -> None:
    words = [*policy_flags(tmp_path, tiny_sd15), *flags]
    args = cli.parse(train_ddpo_sd15.Args, None, words)
    run: Any = SimpleNamespace(dtype=torch.float32)
    model = sd15.open_model(args.model)
    chosen = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    passes = args.ddpo.num_inner_epochs
    _, cost = rl.episode_cost(run, chosen, model, args, passes, checkpointing=False)
    # Both branches of guidance: twice the rows of a training batch.
    rows, shape = 2 * args.optim.train_batch_size, model.latent_shape(64, 64)
    _, one = finetune.cost_of(run, chosen, model, rows, shape, checkpointing=False)
    assert cost.flops == round(trained * one.flops + sampled * one.forward_flops)


# -- users of TRL and ddpo-pytorch ----------------------------------------------------------------

# TRL's DDPOConfig, and what the script's options mean the same.
TRL = {
    "sample_num_steps": "sample_steps",
    "sample_eta": "eta",
    "sample_guidance_scale": "guidance_scale",
    "train_learning_rate": "learning_rate",
    "train_adv_clip_max": "adv_clip_max",
    "train_clip_range": "clip_range",
    "train_num_inner_epochs": "num_inner_epochs",
    "per_prompt_stat_tracking_buffer_size": "buffer_size",
    "per_prompt_stat_tracking_min_count": "buffer_min_count",
    "sample.eta": "eta",
    "sample.num_steps": "sample_steps",
    "per_prompt_stat_tracking.buffer_size": "buffer_size",
    "train.clip_range": "clip_range",
}


@pytest.mark.parametrize("script", [train_ddpo_sd15, train_ddpo_sdxl], ids=lambda one: one.__name__)
def test_the_names_of_trl_and_ddpo_pytorch_are_answered_with_ours(
    script: ModuleType, tmp_path: Path, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {flag.removeprefix("--") for flag in options(script.Args)}
    for theirs, ours in TRL.items():
        assert foreign.answer(theirs, known) == f"here it is --{ours}", theirs
    said = str(foreign.answer("train_timestep_fraction", known))  # takes two of ours
    assert said.startswith("--train_timesteps fraction --timestep_fraction")
    with pytest.raises(SystemExit):
        cli.parse(script.Args, None, [*policy_flags(tmp_path, tiny_sd15), "--sample_eta", "1"])
    assert "here it is --eta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_fraction": 0.3}, "--timestep_fraction does nothing with --train_timesteps all"),
        ({"window_size": 2}, "--window_size does nothing .*: it is for window"),
        ({"train_timesteps": "fraction", "window_first": 3}, "--window_first does nothing"),
        ({"train_timesteps": "window", "timestep_fraction": 0.3}, "it is for fraction"),
    ],
    ids=str,
)
def test_an_option_of_other_trained_steps_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rl.DiffusionRolloutArgs(**options)


def test_a_step_without_noise_is_refused_by_its_flag(
    tmp_path: Path, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*policy_flags(tmp_path, tiny_sd15), "--eta", "0"]
    with pytest.raises(SystemExit) as ended:
        cli.parse(train_ddpo_sd15.Args, None, words)
    assert ended.value.code == 2
    assert "--eta 0 must lie in (0, 1]" in " ".join(capsys.readouterr().err.split())


# -- and it learns --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["buffer", "group"])
def test_pictures_become_what_is_rewarded(tmp_path: Path, tiny_sd15: Path, baseline: str) -> None:
    flags = ("--pretrained_model_name_or_path", str(ROOT / "models" / "pocket-sd15"))
    flags += ("--guidance_scale", "1", "--sample_steps", "6", "--train_timesteps", "fraction")
    flags += ("--learning_rate", "4e-3", "--max_train_steps", "32", "--baseline", baseline)
    size = ("32", "1") if baseline == "buffer" else ("2", "16")
    flags += ("--num_prompts_per_epoch", size[0], "--group_size", size[1])
    # Prompts say nothing of the background, so the brightness of an epoch's pictures varies.
    bright, dark = (
        sum(learned(train_ddpo_sd15, tmp_path, tiny_sd15, sign, *flags)[4:]) / 4 for sign in (1, -1)
    )
    assert bright - dark > 0.1
