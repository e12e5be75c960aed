"""train_ddpo_sd3.py from end to end: its ratio, its prompt buffer, how it resumes and stops."""

import json
import math
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train_ddpo_sd3
from dojo.cli import TrainingStopped, UserError
from dojo.evaluate import held_out as evaluation
from dojo.files import outputs
from dojo.finetune import lora
from dojo.maths import advantages as policy
from dojo.maths import surrogate
from dojo.methods import rl
from tests.processes import Death, launch, spawn
from tests.scripts.runs import (
    SCRIPTS,
    adapter_bytes,
    agree,
    metrics,
    mine,
    scores,
    steps,
    timeless,
    with_reward,
)
from tests.scripts.test_train_grpo_sd3 import NO_EVALUATION, flags_of, learned
from tests.scripts.test_train_grpo_sd3 import train as train_script

SCRIPT = "train_ddpo_sd3.py"
# Eight pictures an epoch of six prompts, so that some come twice.
DRAWN = ("--num_prompts_per_epoch", "8", "--group_size", "1")
SMALL = ("--num_prompts_per_epoch", "4", "--train_batch_size", "2")
BUFFER = ("--buffer_size", "4", "--buffer_min_count", "2")


def train(folder: Path, model: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    return train_script(folder, model, *DRAWN, *BUFFER, *flags, script=train_ddpo_sd3)


def buffer_of(folder: Path) -> dict[int, list[float]]:
    """The scores of every prompt in a checkpoint."""
    state = load_file(folder / rl.BUFFER)
    parts = state["scores"].split(state["counts"].tolist())
    ids = state["prompt_ids"].tolist()
    return {prompt: part.tolist() for prompt, part in zip(ids, parts, strict=True)}


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampler", "cps", "--num_inner_epochs", "2", "--guidance_scale", "3"),
        (
            *("--sampler", "sde", "--finetune", "full", "--learning_rate", "1e-4"),
            *("--mixed_precision", "bf16", "--gradient_checkpointing"),
            *("--sample_batch_size", "4"),
        ),
    ],
    ids=("cps-guided", "sde-full-bf16"),
)
def test_before_the_first_update_the_ratio_is_exactly_one(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...]
) -> None:
    size = (*SMALL, *NO_EVALUATION)
    epochs = ("--max_train_steps", "None", "--num_train_epochs", "2")
    rows = steps(train(tmp_path, tiny_sd3, *size, *epochs, *flags))
    per_epoch = len(rows) // 2
    assert per_epoch > 1
    for i, row in enumerate(rows):
        assert all(math.isfinite(value) for value in row.values()), row
        if i % per_epoch == 0:
            assert row["ratio_max_deviation"] == row["approx_kl"] == 0
            assert row["grad_norm"] > 0
        else:
            assert row["ratio_max_deviation_later"] > 0


def test_a_picture_is_judged_by_what_its_prompt_has_scored(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    judged: list[Tensor] = []
    own, loss = policy.PromptBuffer.advantages, surrogate.clipped_surrogate

    def advantages(
        self: policy.PromptBuffer, scores: Tensor, ids: Tensor, valid: Tensor
    ) -> policy.Advantages:
        found = own(self, scores, ids, valid)
        seen.append((scores, ids, found.values))
        return found

    def clipped_surrogate(moved: Tensor, given: Tensor, clip: float) -> surrogate.Surrogate:
        judged.append(given)
        return loss(moved, given, clip)

    monkeypatch.setattr(policy.PromptBuffer, "advantages", advantages)
    monkeypatch.setattr("dojo.methods.rl.args.clipped_surrogate", clipped_surrogate)
    flags = ("--max_prompts", "2", *NO_EVALUATION)
    flags += ("--train_batch_size", "8", "--max_train_steps", "3", "--buffer_size", "20")
    folder = train(tmp_path, tiny_sd3, *flags, "--buffer_min_count", "5", "--adv_clip_max", "1.5")
    past: dict[int, list[float]] = {0: [], 1: []}
    for epoch, (given, ids, values) in enumerate(seen):
        for prompt, score in zip(ids.tolist(), given.tolist(), strict=True):
            past[prompt].append(score)
        for prompt, score, value in zip(ids.tolist(), given.tolist(), values.tolist(), strict=True):
            enough = len(past[prompt]) >= 5
            peers = torch.tensor(past[prompt] if enough else given.tolist(), dtype=torch.float64)
            expected = (score - peers.mean()) / peers.std(correction=0)
            assert value == pytest.approx(expected.item(), rel=2e-2), (epoch, prompt)
        for micro in judged[2 * epoch : 2 * epoch + 2]:  # the trained steps
            assert torch.equal(micro, values.clamp(-1.5, 1.5))
    assert len(seen) == 3
    for prompt, held in buffer_of(folder / "checkpoint-3").items():
        assert held == pytest.approx(past[prompt])


def test_a_run_leaves_everything_that_was_promised(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = ("--eval_reward", mine(tiny_sd3.parent, "redness"), "--eval_every", "1")
    folder = train(tmp_path, tiny_sd3, *flags, "--use_ema", "--learning_rate", "1e-2")
    rows = steps(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows[::2]:
        for key in ("reward", "reward_std", "reward/brightness", "invalid_share"):
            assert math.isfinite(row[key]), key
    checks = with_reward(folder)
    assert [row["step"] for row in checks] == [0, 2, 4]
    assert all(math.isfinite(row["eval_reward/redness"]) for row in checks)
    table = scores(folder, 4)
    parts = ["brightness", "redness"]
    assert list(table[0]) == ["file", "prompt", "seed", "reward", *parts]
    for name in ("args.json", "README.md", "report.html", "contact_sheet.png", lora.WEIGHTS):
        assert (folder / name).is_file(), name
    end = folder / "checkpoint-4"
    assert adapter_bytes(folder) == adapter_bytes(end / "ema") != adapter_bytes(end)
    assert set(buffer_of(end)) <= set(range(6))
    assert sum(len(held) for held in buffer_of(end).values()) <= 16


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_pictures_become_what_is_rewarded(tmp_path: Path, tiny_sd3: Path, sign: int) -> None:
    flags = ("--num_prompts_per_epoch", "32", "--group_size", "1", "--max_train_steps", "32")
    first, *_, last = learned(train_ddpo_sd3, tmp_path, tiny_sd3, sign, *flags)
    assert sign * (last - first) > 0.05


# -- what it refuses, and what it only prints ---------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_prompts_per_epoch", "6"), "--num_prompts_per_epoch 6 .* take 4 or 8 prompts"),
        (("--gradient_accumulation_steps", "4"), "--gradient_accumulation_steps 4 .*one of 1, 2"),
        (("--max_train_steps", "3"), "--max_train_steps 3.* take 2 or 4"),
        (("--steps_per_epoch", "2"), "--steps_per_epoch"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_what_would_not_work_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, tiny_sd3, *flags)
    outputs.release(tmp_path / "run")  # as the end of the process does
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_that_cannot_fill_is_refused() -> None:
    rl.DdpoArgs()
    for size, least in ((4, 5), (4, 1)):
        with pytest.raises(ValueError, match="--buffer_min_count"):
            rl.DdpoArgs(buffer_size=size, buffer_min_count=least)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, tiny_sd3, "--dry_run", "--gradient_accumulation_steps", "2")
    shown = capsys.readouterr().out
    assert '"buffer_size": 4' in shown
    assert "effective batch size: 8\n" in shown
    assert "optimizer steps: 4\n" in shown
    assert "steps per epoch: 1.00\n" in shown
    assert list(tmp_path.iterdir()) == []


# -- stopping and resuming ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_buffer_and_ends_with_the_same_bytes(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    own = (*DRAWN, *BUFFER, *SMALL, "--max_train_steps", "6", "--checkpointing_steps", "1")
    own += (
        "--seed",
        "5",
        "--window_size",
        "1",
        "--resume_from_checkpoint",
        "latest",
        "--eval_every",
        "2",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, [*flags_of(whole, tiny_sd3), *own], whole)
    assert code == 0, said
    death = Death(place="step", count=random.randint(3, 6))  # of two an epoch
    flags = [*flags_of(broken, tiny_sd3), *own]
    code, said = spawn(SCRIPT, flags, broken, death)
    assert code == -signal.SIGKILL, (death, said)

    # Without its past a prompt would be judged otherwise.
    (*_, latest) = sorted((broken / "run").glob("checkpoint-*"))
    shutil.move(latest / rl.BUFFER, tmp_path / "kept")
    code, said = spawn(SCRIPT, flags, broken)
    assert code == 2
    assert f"error: {latest} is no complete checkpoint: {rl.BUFFER} is missing" in said
    assert "Traceback" not in said
    shutil.move(tmp_path / "kept", latest / rl.BUFFER)

    code, said = spawn(SCRIPT, flags, broken)
    assert code == 0, (death, said)
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run"), death
    assert timeless(broken / "run") == timeless(whole / "run"), death
    ends = [buffer_of(folder / "run" / "checkpoint-6") for folder in (whole, broken)]
    assert ends[0] == ends[1] != {}


@pytest.mark.parametrize("start", ["fork", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(tmp_path: Path, tiny_sd3: Path, start: str) -> None:
    # Adam would blow the rounding of gradients near zero up to whole steps.
    own = (*DRAWN, *BUFFER, "--seed", "5", "--adam_epsilon", "1e-3", "--num_eval_prompts", "3")
    two = tmp_path / "two"
    flags = [*flags_of(two, tiny_sd3), *own, "--train_batch_size", "2"]
    if start == "fork":
        code, said = spawn(SCRIPT, flags, two, processes=2)
    else:
        ended = launch(SCRIPT, flags, two, 2)
        code, said = ended.returncode, ended.stdout + ended.stderr
    assert code == 0, said
    assert json.loads((two / "run" / "args.json").read_text())["num_processes"] == 2
    assert said.count("prompts of pocket") == 1  # one process speaks
    alone = train(tmp_path / "alone", tiny_sd3, *own, "--train_batch_size", "4")
    agree(SCRIPTS["ddpo_sd3"], alone, two / "run")
    held = [buffer_of(folder / "checkpoint-4") for folder in (alone, two / "run")]
    assert held[0].keys() == held[1].keys()
    for prompt, kept in held[0].items():
        assert held[1][prompt] == pytest.approx(kept, rel=1e-3)


def test_a_reward_that_gives_up_in_an_evaluation_loses_neither_weights_nor_evaluation(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*SMALL, "--seed", "1", "--use_ema", "--eval_every", "1", "--max_train_steps", "4")
    own += ("--resume_from_checkpoint", "latest", "--learning_rate", "1e-2")
    whole = train(tmp_path / "whole", tiny_sd3, *own)
    calls, score = iter(range(9)), evaluation.Evaluator._score

    def silent(self: evaluation.Evaluator, images: Tensor, some: list[int]) -> Tensor:
        if next(calls) == 1:
            raise TrainingStopped("no answer")
        return score(self, images, some)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.Evaluator, "_score", silent)
        with pytest.raises(TrainingStopped, match="no answer"):
            train(tmp_path / "broken", tiny_sd3, *own)
    broken = tmp_path / "broken" / "run"
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-2"]
    train(tmp_path / "broken", tiny_sd3, *own)
    assert adapter_bytes(broken) == adapter_bytes(whole)
    assert [row["step"] for row in metrics(broken) if "eval_reward" in row] == [0, 2, 4]
    assert with_reward(broken) == with_reward(whole)
