"""train_grpo_sd3.py from end to end: its ratio, its tie to the base, how it resumes and stops."""

import json
import math
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

import train_grpo_sd3
from dojo.cli import TrainingStopped, UserError
from dojo.finetune import lora
from dojo.maths import rollout, surrogate
from dojo.maths.gaussian import Gaussian
from dojo.methods import rl
from tests.conftest import ROOT
from tests.processes import Death, free_port, served, spawn
from tests.scripts.runs import (
    SCRIPTS,
    adapter_bytes,
    agree,
    breaking,
    counted_rows,
    in_process,
    mine,
    policy_flags,
    scores,
    steps,
    timeless,
    with_reward,
)

SCRIPT = "train_grpo_sd3.py"
NO_EVALUATION = ("--num_eval_prompts", "0")
SMALL = ("--group_size", "2", "--train_batch_size", "2")


def flags_of(folder: Path, model: Path) -> list[str]:
    """The command line of a small run; all runs on this model share their embeddings."""
    texts = ["--latent_cache_dir", str(model.parent / "texts")]
    return [*policy_flags(folder, model), *texts, "--reward", mine(model.parent, "brightness")]


def train(folder: Path, model: Path, *flags: str, script: ModuleType = train_grpo_sd3) -> Path:
    """Trains in this process and returns the output folder."""
    in_process(script, [*flags_of(folder, model), *flags])
    return folder / "run"


# -- the ratio, and the tie to the base ---------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (
            *("--sampler", "cps", "--beta", "0.001", "--num_inner_epochs", "2"),
            *("--branch", "--window_size", "1", "--step_weighting", "velocity"),
        ),
        # Guidance, and likelihoods that are computed anew in training's batches.
        (
            *("--sampler", "sde", "--guidance_scale", "3", "--negative_prompt", "a star"),
            *("--gradient_checkpointing", "--train_timesteps", "all", "--ratio", "guard"),
            *("--window_size", "3"),  # as if not given
            *("--sample_batch_size", "4", "--beta", "0.01", "--kl", "transition", "--branch"),
        ),
        (
            *("--sampler", "dance", "--finetune", "full", "--mixed_precision", "bf16"),
            *("--guidance_scale", "3", "--beta", "0.001", "--learning_rate", "1e-4"),
            *("--sample_batch_size", "4"),
        ),
        (
            *("--sampler", "sde", "--mixed_precision", "bf16", "--gradient_checkpointing"),
            *("--ratio", "unscaled", "--sample_batch_size", "4", "--train_batch_size", "1"),
            *("--gradient_accumulation_steps", "2", "--beta", "0.001"),
        ),
        (
            *("--sampler", "cps", "--finetune", "full", "--gradient_checkpointing"),
            *("--beta", "0.01", "--kl", "transition", "--learning_rate", "1e-4"),
            *("--train_timesteps", "fraction", "--timestep_fraction", "0.25", "--window_size", "3"),
        ),
        (
            *("--sampler", "dance", "--lora_layers", "all-linear", "--beta", "0.001"),
            *(
                "--trust_region",
                "divergence",
                "--kl_mask_threshold",
                "1e-12",
                "--clip_range",
                "1e-4",
            ),
        ),
    ],
    ids=("cps", "sde-guided", "dance-full-bf16", "sde-bf16", "cps-full", "dance"),
)
def test_before_the_first_update_ratio_and_divergence_are_exactly_those_of_the_base(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...]
) -> None:
    size = (*SMALL, *NO_EVALUATION)
    epochs = ("--max_train_steps", "None", "--num_train_epochs", "2")
    rows = steps(train(tmp_path, tiny_sd3, *size, *epochs, *flags))
    per_epoch = len(rows) // 2
    assert per_epoch > 1
    assert [row["epoch"] for row in rows][per_epoch - 1 :: per_epoch] == [1, 2]
    for i, row in enumerate(rows):
        assert all(math.isfinite(value) for value in row.values()), row
        if i % per_epoch == 0:
            assert row["ratio_max_deviation"] == 0
            assert row["approx_kl"] == row["clip_fraction"] == 0
            assert "ratio_max_deviation_later" not in row
            assert row["grad_norm"] > 0  # it learns, though every ratio is 1
        else:
            assert "ratio_max_deviation" not in row
            assert row["ratio_max_deviation_later"] > 0
        if "divergence" in flags:
            assert (row["divergence"] == 0) == (i % per_epoch == 0)
            assert row["divergence_max"] >= row["divergence"]
            assert row["clip_fraction"] < 1  # what leads back is learned from
        assert (row["kl"] == 0) == (i == 0)  # the reference does not move with the policy


def test_what_is_trained_is_the_likelihood_of_the_noise_that_was_drawn(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []
    asked: list[tuple[Gaussian, Tensor]] = []
    draw, measure = Gaussian.sample, surrogate.log_ratio

    def sample(self: Gaussian, noise: Tensor) -> Tensor:
        reached = draw(self, noise)
        drawn.extend(zip(reached, noise, strict=True))
        return reached

    def log_ratio(new: Gaussian, old: Gaussian, x: Tensor, *kind: Any) -> Tensor:
        asked.append((old, x))
        return measure(new, old, x, *kind)

    monkeypatch.setattr(Gaussian, "sample", sample)
    monkeypatch.setattr(train_grpo_sd3, "log_ratio", log_ratio)
    batch = ("--train_batch_size", "2", "--sample_batch_size", "4", "--max_train_steps", "4")
    train(tmp_path, tiny_sd3, *batch, *NO_EVALUATION, "--sampler", "sde")
    assert len(drawn) == 8 * 2  # pictures x trained steps
    matched: set[int] = set()
    for old, reached in asked:
        for mean, x in zip(old.mean, reached, strict=True):
            (place,) = [i for i, (there, _) in enumerate(drawn) if torch.equal(there, x)]
            matched.add(place)
            noise = (x - mean) / old.std
            torch.testing.assert_close(noise, drawn[place][1], atol=1e-4, rtol=1e-4)
    assert len(matched) == len(drawn)  # every transition is learned from


@dataclass(frozen=True)
class Seen:
    """What the loss was asked."""

    moved: Tensor
    advantages: Tensor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Log ratios and advantages of every micro-batch of the runs of a test."""
    calls: list[Seen] = []
    own = surrogate.clipped_surrogate

    def clipped_surrogate(moved: Tensor, advantages: Tensor, clip: float) -> surrogate.Surrogate:
        calls.append(Seen(moved.detach().clone(), advantages.clone()))
        return own(moved, advantages, clip)

    monkeypatch.setattr("dojo.methods.rl.args.clipped_surrogate", clipped_surrogate)
    return calls


def test_an_update_makes_the_better_picture_likelier_and_the_worse_one_less_likely(
    tmp_path: Path, tiny_sd3: Path, seen: list[Seen]
) -> None:
    pair = ("--num_prompts_per_epoch", "1", "--group_size", "2", "--train_batch_size", "2")
    twice = ("--num_inner_epochs", "2", "--max_train_steps", "2", "--learning_rate", "1e-4")
    far = ("--reward", mine(tiny_sd3.parent, "brightness") + "=1000")  # scores that differ enough
    train(tmp_path, tiny_sd3, *pair, *twice, *far, *NO_EVALUATION)
    before, after = (torch.stack([one.moved for one in seen[i : i + 2]]) for i in (0, 2))
    advantages = seen[0].advantages
    assert advantages.sort().values.tolist() == pytest.approx([-1, 1], abs=1e-2)
    assert not before.any()
    moved = after.sum(0)  # over the trained steps
    assert moved[advantages > 0] > 0
    assert moved[advantages < 0] < 0


def learned(script: ModuleType, folder: Path, model: Path, sign: int, *flags: str) -> list[float]:
    """Mean brightness of the pocket model's pictures, epoch by epoch, where it is rewarded."""
    own = ("--pretrained_model_name_or_path", str(ROOT / "models" / "pocket-sd3"))
    own += ("--latent_cache_dir", str(folder / "texts"), "--max_prompts", "2", *NO_EVALUATION)
    own += ("--train_batch_size", "8", "--rank", "4", "--learning_rate", "2e-3", "--seed", "0")
    own += ("--reward", f"{mine(model.parent, 'brightness')}={sign}", *flags)
    rows = steps(train(folder / str(sign), model, *own, script=script))
    return [row["reward/brightness"] for row in rows if "reward" in row]


@pytest.mark.parametrize(
    "flags",
    [
        ("--branch", "--window_size", "1", "--window_first", "1"),
        ("--guidance_scale", "3", "--beta", "0.01", "--sample_batch_size", "8"),
    ],
    ids=["branch", "guided"],
)
def test_the_forward_passes_that_are_counted_are_those_that_are_made(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    rows = counted_rows(monkeypatch)
    folder = train(tmp_path, tiny_sd3, "--num_eval_prompts", "0", *flags)
    record = json.loads((folder / "args.json").read_text())
    pictures = 8 * max(row.get("epoch", 0) for row in steps(folder))
    assert sum(rows) == rl.passes_of(record) * pictures


def test_pictures_become_what_is_rewarded(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = ("--group_size", "16", "--max_train_steps", "12")
    first, *_, last = learned(train_grpo_sd3, tmp_path, tiny_sd3, 1, *flags)
    assert last > first + 0.02  # their std is 0.006 at first


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_pictures_go_either_way(tmp_path: Path, tiny_sd3: Path, sign: int) -> None:
    flags = ("--group_size", "16", "--max_train_steps", "32")
    first, *_, last = learned(train_grpo_sd3, tmp_path, tiny_sd3, sign, *flags)
    assert sign * (last - first) > 0.1


def test_a_tie_to_the_base_keeps_the_policy_near_it(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = (*SMALL, "--num_inner_epochs", "4", "--max_train_steps", "8", "--seed", "1")
    far = {}
    for beta in ("0", "10"):
        rows = with_reward(train(tmp_path / beta, tiny_sd3, *flags, "--beta", beta))
        assert rows[0]["eval_kl"] == 0
        far[beta] = rows[-1]["eval_kl"]
    assert 0 < far["10"] < 0.5 * far["0"]


# -- what it writes -----------------------------------------------------------------------------


def test_a_run_leaves_everything_that_was_promised(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    submit = rl.Scoring.submit

    def listen(self: rl.Scoring, batch: rl.Batch, images: Tensor) -> None:
        asked.extend(batch.texts)
        submit(self, batch, images)

    monkeypatch.setattr(rl.Scoring, "submit", listen)
    bright, red = mine(tiny_sd3.parent, "brightness"), mine(tiny_sd3.parent, "redness")
    flags = ("--reward", f"{bright}=2,jpeg_incompressibility=0.5", "--reward_aggregation", "gdpo")
    flags += ("--eval_reward", red, "--eval_every", "1", "--num_eval_images", "2")
    flags += ("--num_saved_images", "3", "--num_eval_prompts", "2", "--learning_rate", "1e-3")
    folder = train(tmp_path, tiny_sd3, *flags)
    rows = steps(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [0.5, 1, 1.5, 2]
    for row in (rows[0], rows[2]):  # those after the pictures were made
        parts = [row["reward/brightness"], row["reward/jpeg_incompressibility"]]
        assert row["reward"] == pytest.approx(2 * parts[0] + 0.5 * parts[1], rel=1e-5)
        assert row["invalid_share"] == row["flat_groups_share"] == 0
        assert row["reward_std"] > 0
        assert row["diversity"] > 0
        names = ("sample", "decode", "reward", "train")
        assert all(row[f"seconds_{name}"] >= 0 for name in names)
    for row in (rows[1], rows[3]):
        assert not {"reward", "seconds_sample"} & row.keys()

    checks = with_reward(folder)
    assert [row["step"] for row in checks] == [0, 2, 4]
    assert checks[0]["eval_kl"] == 0
    assert checks[2]["eval_kl"] > checks[1]["eval_kl"] > 0
    parts = ("brightness", "jpeg_incompressibility", "redness")
    for row in checks:
        table = scores(folder, int(row["step"]))
        assert list(table[0]) == ["file", "prompt", "seed", "reward", *parts]
        assert [one["seed"] for one in table] == ["0", "1", "2", "3"]
        for name in parts:
            mean = np.mean([float(one[name]) for one in table])
            assert row[f"eval_reward/{name}"] == pytest.approx(mean, rel=1e-4)
        assert row["eval_reward"] == pytest.approx(
            np.mean([float(one["reward"]) for one in table]), rel=1e-4
        )
        kept = folder / "validation" / f"step-{int(row['step'])}"
        files = sorted(path.name for path in kept.glob("*.png"))
        assert [one["file"] for one in table] == [*files, ""]
        for one in table[:3]:
            picture = np.asarray(Image.open(kept / one["file"])) / 255
            assert float(one["brightness"]) == pytest.approx(picture.mean(), abs=0.5 / 255)
        assert not {one["prompt"] for one in table} & set(asked)
    assert len(set(asked)) == 4  # two prompts an epoch, none of them twice in a pass
    assert len(asked) == 16
    for name in ("args.json", "README.md", "report.html", "contact_sheet.png"):
        assert (folder / name).is_file(), name
    assert str(ROOT) not in (folder / "README.md").read_text()


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_the_result_loads_in_plain_diffusers(tmp_path: Path, tiny_sd3: Path, finetune: str) -> None:
    flags = ("--finetune", finetune, "--flow_shift", "2", "--learning_rate", "1e-2")
    folder = train(tmp_path, tiny_sd3, *flags, *NO_EVALUATION, "--max_train_steps", "2")

    def draw(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "max_sequence_length": 24, "output_type": "pt"}
        return pipeline("a star", generator=seed, **options).images

    plain: Any = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    untrained = draw(plain)
    if finetune == "lora":
        plain.load_lora_weights(str(folder))
        ours = plain
    else:
        ours = StableDiffusion3Pipeline.from_pretrained(folder)
        assert ours.scheduler.config.shift == 2
    assert not torch.equal(draw(ours), untrained)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["shift"] == 2


def test_the_last_evaluation_is_that_of_the_result(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = (*SMALL, "--learning_rate", "3e-3")
    folder = train(tmp_path / "a", tiny_sd3, *flags, "--use_ema", "--max_train_steps", "4")
    start = ("--init_lora_weights_path", str(folder / lora.WEIGHTS), "--max_train_steps", "2")
    again = train(tmp_path / "b", tiny_sd3, *flags, *start)
    first, last = with_reward(folder)[-1]["eval_kl"], with_reward(again)[0]["eval_kl"]
    assert last == pytest.approx(first, rel=1e-3)  # the base is what both are measured against


def test_pictures_of_an_evaluation_hang_on_the_weights_alone(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    still = ("--group_size", "2", "--num_eval_prompts", "3", "--learning_rate", "1e-30")
    still += ("--max_train_steps", "1", "--eval_batch_size")
    one = train(tmp_path / "a", tiny_sd3, *still, "1", "--seed", "1")
    two = train(tmp_path / "b", tiny_sd3, *still, "3", "--seed", "2")
    first = [float(row["reward"]) for row in scores(one, 0)]
    for folder, step in ((one, 1), (two, 0), (two, 1)):
        again = [float(row["reward"]) for row in scores(folder, step)]
        assert again == pytest.approx(first, rel=1e-4)


# -- scores that are not valid ------------------------------------------------------------------


def test_pictures_without_a_score_teach_nothing(
    tmp_path: Path, tiny_sd3: Path, seen: list[Seen]
) -> None:
    half = ("--reward", mine(tiny_sd3.parent, "every_other"), "--train_batch_size", "8")
    folder = train(tmp_path, tiny_sd3, *half, "--max_train_steps", "1")
    (row,) = steps(folder)
    assert row["invalid_share"] == 0.5
    assert math.isfinite(row["reward"])
    assert with_reward(folder)[0]["eval_invalid_share"] == 0.5
    for one in seen:
        assert not one.advantages[::2].any()
        assert one.advantages[1::2].all()
    assert row["grad_norm"] > 0


def test_too_many_pictures_without_a_score_stop_the_run(tmp_path: Path, tiny_sd3: Path) -> None:
    most = (
        "--reward",
        mine(tiny_sd3.parent, "first_only"),
        "--train_batch_size",
        "8",
        *NO_EVALUATION,
    )
    with pytest.raises(TrainingStopped, match=r"7 of 8 pictures .*--max_invalid 0\.5"):
        train(tmp_path / "a", tiny_sd3, *most, "--max_train_steps", "1")
    assert not list((tmp_path / "a" / "run").glob("checkpoint-*"))  # nothing was learned yet
    folder = train(
        tmp_path / "b", tiny_sd3, *most, "--max_train_steps", "1", "--max_invalid", "0.9"
    )
    (row,) = steps(folder)
    assert row["flat_groups_share"] == 1
    assert row["loss"] == row["grad_norm"] == 0


def test_a_reward_of_ones_own_that_breaks_loses_nothing(tmp_path: Path, tiny_sd3: Path) -> None:
    own = (*SMALL, *NO_EVALUATION, "--reward")
    # Two batches of pictures an epoch.
    with pytest.raises(UserError, match=r"score \(breaks.py, line 5\) raised SystemExit"):
        train(tmp_path / "first", tiny_sd3, *own, breaking(tmp_path, 2, "sys.exit(0)"))
    with pytest.raises(TrainingStopped, match=r"score \(breaks.py, line 3\) returned None"):
        train(tmp_path / "later", tiny_sd3, *own, breaking(tmp_path, 3, "return None"))
    kept = [path.name for path in (tmp_path / "later" / "run").glob("checkpoint-*")]
    assert kept == ["checkpoint-2"]  # not due


def files_with(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder that hold one of these words."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def test_a_password_in_an_address_is_written_nowhere_and_may_change(
    tmp_path: Path, tiny_sd3: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a judge: a real server would be asked with the password."""
    from tests.rewards.test_served import fake, logprobs, running

    asked: list[str] = []

    def judge(path: str, request: Any) -> tuple[int, dict[str, str], bytes]:
        asked.append(request["headers"]["Authorization"])
        return 200, {}, json.dumps(logprobs(yes=0.5 + len(asked) % 3 / 10, no=0.2)).encode()

    own = (
        *SMALL,
        "--max_train_steps",
        "2",
        "--report_to",
        "tensorboard",
        "--num_saved_images",
        "1",
    )
    with running(fake(judge)) as url:
        for word in ("first-secret", "other-secret"):
            spec = f"vlm[url={url.replace('://', f'://me-{word}:{word}@')}/v1?key={word},model=m]"
            flags = ("--reward", spec, "--eval_reward", f"{spec}=2".replace("]=", ",name=again]="))
            flags += ("--resume_from_checkpoint", "latest")
            train(tmp_path, tiny_sd3, *own, *flags, "--dry_run")
            folder = train(tmp_path, tiny_sd3, *own, *flags)
    broken = spec.replace("model=m", "model=m,retries=0,timeout=1")
    with pytest.raises(TrainingStopped, match=r"http://\*\*\*@127"):
        train(tmp_path / "broken", tiny_sd3, *own, "--reward", broken, *NO_EVALUATION)
    assert len(set(asked)) == 1  # it was sent; the second run was finished already
    said = "".join(capfd.readouterr())
    assert "nothing to do" in said
    assert "http://***@127" in said
    assert "secret" not in said
    assert files_with(tmp_path, "first-secret", "other-secret") == []
    args = json.loads((folder / "args.json").read_text())["args"]
    assert args["reward"]["reward"].startswith("vlm[url=http://***@127.0.0.1")


def test_prompts_that_the_reward_cannot_score_are_refused_before_anything_is_drawn(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "sample", lambda *_, **__: pytest.fail("drawn"))
    animals = ("--prompt_set", "animals", "--reward", "pocket")
    with pytest.raises(UserError, match="pocket cannot score 6 of 6 prompts, such as 'cat'"):
        train(tmp_path, tiny_sd3, *animals)


# -- what it refuses, and what it only prints ---------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--group_size", "1"), "--group_size must be at least 2"),
        (
            ("--num_prompts_per_epoch", "5", "--group_size", "6"),
            r"--num_prompts_per_epoch 5 x --group_size 6 = 30 .* take 4 or 6 prompts",
        ),
        (("--sample_batch_size", "8", "--train_batch_size", "3"), "--train_batch_size 3"),
        (("--gradient_accumulation_steps", "3"), "--gradient_accumulation_steps 3 .*one of 1, 2"),
        (("--max_train_steps", "5"), "--max_train_steps 5.* take 4 or 6"),
        (("--num_inner_epochs", "2", "--max_train_steps", "2"), "--max_train_steps 2.* take 4"),
        (("--steps_per_epoch", "2"), "--steps_per_epoch"),
        (("--num_prompts_per_epoch", "8", "--max_train_steps", "8"), "only 6 prompts"),
        (("--finetune", "full", "--train_dtype", "bf16"), "--mixed_precision bf16"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_what_would_not_work_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, tiny_sd3, *flags)
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert not (tmp_path / "run" / lora.WEIGHTS).exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = {}
    for name, flags in {
        "plain": (),
        "guided": ("--guidance_scale", "2"),
        "tied": ("--beta", "0.1"),
    }.items():
        size = ("--group_size", "600", "--train_batch_size", "400")
        train(tmp_path, tiny_sd3, "--dry_run", *size, *flags, "--max_train_steps", "6")
        shown = capsys.readouterr().out
        assert "effective batch size: 400\n" in shown
        assert "optimizer steps: 6\n" in shown
        assert "steps per epoch: 3.00\n" in shown
        operations[name] = float(shown.split("process and step: ")[1].split()[0])
    assert operations["guided"] == pytest.approx(2 * operations["plain"], rel=0.01)
    assert operations["plain"] < operations["tied"] < operations["guided"]
    assert list(tmp_path.iterdir()) == []


# -- stopping and resuming ----------------------------------------------------------------------

LONG = (*SMALL, "--max_train_steps", "12", "--num_inner_epochs", "2", "--checkpointing_steps", "3")
LONG += ("--use_ema", "--window_size", "1", "--lr_scheduler", "cosine", "--seed", "5")
LONG += ("--logging_steps", "3", "--eval_every", "2", "--resume_from_checkpoint", "latest")


def test_a_run_killed_in_sampling_in_a_step_and_in_a_checkpoint_ends_with_the_same_bytes(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, [*flags_of(whole, tiny_sd3), *LONG], whole)
    assert code == 0, said
    # Epochs of four steps are not broken off: 3, 6 and 9 are due at their ends.
    kept = sorted(path.name for path in (whole / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    end = whole / "run" / "checkpoint-12"
    assert adapter_bytes(whole / "run") == adapter_bytes(end / "ema") != adapter_bytes(end)
    deaths = [
        Death(place="sample", count=random.randint(1, 6)),  # two are an epoch
        Death(place="step", count=random.randint(1, 4)),  # of four an epoch
        Death(place="checkpoint", count=random.randint(1, 9)),  # of its files
    ]
    for death in deaths:
        code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *LONG], broken, death)
        assert code == -signal.SIGKILL, (death, said)
        assert not (broken / "run" / lora.WEIGHTS).exists()
    assert list((broken / "run").glob(".checkpoint-*.partial")), deaths
    code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *LONG], broken)
    assert code == 0, (deaths, said)
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run"), deaths
    assert timeless(broken / "run") == timeless(whole / "run"), deaths
    for step in (0, 8, 12):
        assert scores(broken / "run", step) == scores(whole / "run", step)
    assert not list((broken / "run").glob(".checkpoint-*")), "leftovers of the kill"


def test_two_processes_do_what_one_does_and_resume_after_a_kill(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    own = ("--seed", "5", "--beta", "0.01", "--num_eval_prompts", "3", "--use_ema")
    own += ("--resume_from_checkpoint", "latest")
    # Adam would blow the rounding of gradients near zero up to whole steps.
    own += ("--adam_epsilon", "1e-3", "--num_inner_epochs", "2", "--max_train_steps", "8")
    own += ("--checkpointing_steps", "1", "--group_size", "2")
    half = (*own, "--train_batch_size", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, [*flags_of(whole, tiny_sd3), *half], whole, processes=2)
    assert code == 0, said
    assert json.loads((whole / "run" / "args.json").read_text())["num_processes"] == 2

    death = Death(place="step", count=8 + random.randint(1, 8))  # in the second epoch
    code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *half], broken, death, processes=2)
    assert code != 0, (death, said)
    assert not (broken / "run" / lora.WEIGHTS).exists()
    code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *half], broken, processes=2)
    assert code == 0, (death, said)
    assert "resuming from" in said
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run"), death
    assert timeless(broken / "run") == timeless(whole / "run"), death

    alone = train(tmp_path / "alone", tiny_sd3, *own, "--train_batch_size", "2")
    agree(SCRIPTS["grpo_sd3"], alone, whole / "run")


def test_a_run_whose_reward_server_dies_stops_and_goes_on_when_it_is_back(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}#jpeg_incompressibility[timeout=5,retries=1]"
    own = (*SMALL, "--reward", address, "--max_train_steps", "4", "--seed", "2")
    own += ("--resume_from_checkpoint", "latest")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with served("jpeg_incompressibility", port, tmp_path) as server:
        code, said = spawn(SCRIPT, [*flags_of(whole, tiny_sd3), *own], whole)
        assert code == 0, said
        # Two are an epoch: before the pictures of the second are scored.
        death = Death(place="sample", count=3, victim=server.pid)
        code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *own], broken, death)
    assert code == 1
    (message,) = [line for line in said.splitlines() if line.startswith("stopped: ")]
    assert f"127.0.0.1:{port}" in message
    assert "no answer in 2 tries" in message
    assert said.rstrip().endswith(message)
    assert "Traceback" not in said
    # None was due: it was written because the run had to stop.
    assert [path.name for path in (broken / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    with served("jpeg_incompressibility", port, tmp_path):
        code, said = spawn(SCRIPT, [*flags_of(broken, tiny_sd3), *own], broken)
    assert code == 0, said
    assert "resuming from" in said
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run")
    assert timeless(broken / "run") == timeless(whole / "run")
