"""train_refl_sd15.py from end to end: where its gradient goes, what it learns, how it resumes."""

import json
import math
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import train_refl_sd15
from dojo.cli import TrainingStopped, UserError
from dojo.finetune import lora
from dojo.inputs.steering import Steering
from dojo.maths import denoising, preference
from dojo.maths.gaussian import Gaussian
from dojo.maths.objective import Diffusion
from dojo.methods.refl import ReflArgs
from dojo.models.unet import networks
from dojo.rewards import loading
from dojo.rewards.imagereward import ImageReward
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import Place, Scorer
from tests.conftest import ROOT
from tests.processes import Death, launch, spawn
from tests.scripts.runs import (
    PROMPTS,
    SCRIPTS,
    agree,
    breaking,
    draw,
    equal,
    metrics,
    mine,
    one_thread,
    scores,
    steps,
    timeless,
    with_reward,
)
from tests.scripts.test_train_dpo_sd15 import LORA, ONE_STEP, flags_of, same_unet, unet_of
from tests.scripts.test_train_dpo_sd15 import train as train_script

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
SCRIPT = "train_refl_sd15.py"
NO_EVALUATION = ("--num_eval_prompts", "0")


def refl_flags(folder: Path, model: Path) -> list[str]:
    """The command line of a small run on four prompts, with two held out."""
    file = model.parent / "refl_data.json"  # as ImageReward's
    rows = [{"id": f"{i:03d}", "text": text} for i, text in enumerate(PROMPTS)]
    file.write_text(json.dumps(rows, indent=4))
    flags = {
        "prompt_file": file,
        "num_eval_prompts": 2,
        "reward": mine(model.parent, "brightness"),
        "sample_steps": 8,
        "eval_sample_steps": 2,
        "eval_guidance_scale": 1,
        "grad_scale": 1e3,  # or the gradient through an untrained model drowns in --adam_epsilon
        "learning_rate": 1e-3,
    }
    own = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*flags_of(folder, model, None), *own]


def train(folder: Path, model: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    own = refl_flags(folder, model)
    return train_script(folder, model, None, *own, *flags, script=train_refl_sd15)


# -- where the gradient goes --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [LORA, ()], ids=["lora", "full"])
@pytest.mark.parametrize("grad_steps", [1, 3])
def test_gradients_reach_the_weights_through_the_last_calls_alone(
    tmp_path: Path,
    tiny_sd15: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    grad_steps: int,
) -> None:
    calls: list[tuple[bool, bool]] = []
    ends: list[int] = []
    ask, estimate = networks.prediction, denoising.estimate

    def epsilon(unet: Any, noisy: Tensor, *others: Any, **more: Any) -> Tensor:
        predicted = ask(unet, noisy, *others, **more)
        calls.append((noisy.requires_grad, predicted.requires_grad))
        return predicted

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.clear()
        clean = estimate(*args, **options)
        chain = [(number > 0, True) for number in range(grad_steps)]
        assert calls == [(False, False)] * (options["last"] + 1 - grad_steps) + chain
        ends.append(options["last"])
        return clean

    monkeypatch.setattr(networks, "prediction", epsilon)
    monkeypatch.setattr(denoising, "estimate", counted)
    own = (*flags, *NO_EVALUATION, "--grad_steps", str(grad_steps))
    folder = train(tmp_path, tiny_sd15, *own)
    assert ends == [ReflArgs(sample_steps=8).draw(0, batch) for batch in range(3)]
    assert all(row["grad_norm"] > 0 for row in steps(folder))
    if flags:
        saved = load_file(folder / lora.WEIGHTS)
        assert all(value.any() for name, value in saved.items() if "lora_B" in name)
    else:
        base, tuned = (
            unet_of(tiny_sd15 / "unet").state_dict(),
            unet_of(folder / "unet").state_dict(),
        )
        moved = [name for name in base if not torch.equal(base[name], tuned[name])]
        assert len(moved) > 0.9 * len(base)


def test_the_scored_step_lies_in_the_last_quarter_and_takes_every_value() -> None:
    for args, expected in (
        (ReflArgs(), range(30, 40)),
        (ReflArgs(sample_steps=10), range(7, 10)),
        (ReflArgs(sample_steps=1), range(1)),
        (ReflArgs(sample_steps=20, first_step=3), range(3, 20)),
        (ReflArgs(first_step=5, last_step=8), range(5, 9)),
        (ReflArgs(first_step=39), range(39, 40)),
    ):
        drawn = Counter(args.draw(7, batch) for batch in range(400))
        assert set(drawn) == set(expected)
        assert max(drawn.values()) < 2 * 400 / len(expected)
    own, other = ([ReflArgs().draw(seed, batch) for batch in range(20)] for seed in (0, 1))
    assert own != other


def test_checkpointing_recomputes_and_changes_nothing(tmp_path: Path, tiny_sd15: Path) -> None:
    own = (*NO_EVALUATION, "--grad_steps", "2", "--max_train_steps", "2")
    plain = train(tmp_path / "a", tiny_sd15, *own)
    saving = train(tmp_path / "b", tiny_sd15, *own, "--gradient_checkpointing")
    assert steps(saving)[0]["loss"] == steps(plain)[0]["loss"]
    agree(SCRIPTS["refl_sd15"], plain, saving)


# -- the loss -----------------------------------------------------------------------------------


class Watched:
    """The pictures of every step with their gradients, and their scores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Tensor] = []
        self.scores: list[Tensor] = []
        decode, shortfall = networks.decode, preference.shortfall

        def decoded(*args: Any) -> Tensor:
            images = decode(*args)
            if images.requires_grad:
                images.retain_grad()
                self.images.append(images)
            return images

        def missing(scores: Tensor, margin: float | None) -> Tensor:
            self.scores.append(scores.detach())
            return shortfall(scores, margin)

        monkeypatch.setattr(networks, "decode", decoded)
        monkeypatch.setattr(preference, "shortfall", missing)

    @property
    def pulled(self) -> list[list[bool]]:
        """Which pictures of each step have a gradient."""
        found = []
        for images in self.images:
            assert images.grad is not None
            found.append([bool(one.any()) for one in images.grad])
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_the_loss_is_what_the_scores_are_short_of_the_margin(
    tmp_path: Path, tiny_sd15: Path, watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (*NO_EVALUATION, *ONE_STEP, "--grad_scale", "0.5")
    (row,) = steps(train(tmp_path / "none", tiny_sd15, *own))
    (first,) = watched.scores
    assert "margin: none, the score is maximised" in capsys.readouterr().out
    assert row["reward"] == row["reward/brightness"] == pytest.approx(first.mean().item())
    assert row["reward"] == pytest.approx(watched.images[0].mean().item(), rel=1e-5)
    assert row["loss"] == pytest.approx(-0.5 * row["reward"])
    assert "at_margin_share" not in row
    assert first[0] != first[1]
    middle = first.mean().item()
    shares = {}
    for margin in (0.0, middle, 3.0):
        flags = ("--margin", str(margin))
        (row,) = steps(train(tmp_path / str(margin), tiny_sd15, *own, *flags))
        assert f"margin: {margin:g}" in capsys.readouterr().out
        assert torch.equal(watched.scores[-1], first)
        short = torch.relu(margin - first)
        assert row["loss"] == pytest.approx(0.5 * short.mean().item(), rel=1e-4)
        assert watched.pulled[-1] == (short > 0).tolist()
        assert (row["grad_norm"] > 0) == bool(short.any())
        shares[margin] = row["at_margin_share"]
    assert shares == {0.0: 1, middle: 0.5, 3.0: 0}


def test_pictures_without_a_score_teach_nothing_and_make_the_others_no_heavier(
    tmp_path: Path, tiny_sd15: Path, watched: Watched
) -> None:
    own = (*NO_EVALUATION, *ONE_STEP, "--train_batch_size", "4", "--grad_scale", "1")
    half = ("--reward", mine(tiny_sd15.parent, "every_other"), "--margin", "-5")
    (row,) = steps(train(tmp_path / "margin", tiny_sd15, *own, *half))
    assert row["at_margin_share"] == 1
    (row,) = steps(train(tmp_path / "half", tiny_sd15, *own, *half[:2]))
    brightness = watched.images[-1].detach().mean((1, 2, 3))
    assert row["reward"] == pytest.approx(brightness[1::2].mean().item(), rel=1e-5)
    assert row["loss"] == pytest.approx(-row["reward"] / 2)  # two of the batch's four
    assert row["invalid_share"] == 0.5
    assert watched.pulled[-1] == [False, True, False, True]
    none = ("--reward", mine(tiny_sd15.parent, "never"))
    folder = train(tmp_path / "none", tiny_sd15, *own, *none, "--max_train_steps", "2")
    for row in steps(folder):
        assert row["loss"] == row["grad_norm"] == 0
        assert row["invalid_share"] == 1
        assert "reward" not in row


class _Marked(Scorer):
    differentiable = True
    good_enough = 2.0


class _Unmarked(Scorer):
    differentiable = True


def test_the_usual_margin_is_imagerewards_times_its_weight_and_none_for_others() -> None:
    def margin(*parts: tuple[type[Scorer], float]) -> float | None:
        made = [
            Component(name=str(i), scorer=scorer(Place()), weight=weight)
            for i, (scorer, weight) in enumerate(parts)
        ]
        return Reward(made).good_enough

    assert ImageReward.good_enough == 2  # ReFL's
    assert margin((_Marked, 1)) == 2
    assert margin((_Marked, 0.25)) == 0.5
    assert margin((_Marked, 0.25), (_Marked, 1)) == 2.5
    assert margin((_Unmarked, 1)) is None
    assert margin((_Marked, 1), (_Unmarked, 0.1)) is None
    assert margin((_Marked, 1), (_Unmarked, 0)) == 2  # it only watches
    assert margin((_Marked, 0), (_Unmarked, 1)) is None
    marked = [
        name
        for name in loading.SCORERS
        if loading.scorer_class(name).good_enough is not None  # pyright: ignore
    ]
    assert marked == ["imagereward"]


# -- what it learns -----------------------------------------------------------------------------


def test_held_out_pictures_become_what_is_rewarded(tmp_path: Path, tiny_sd15: Path) -> None:
    change = {}
    learn = ("--max_train_steps", "12", "--validation_steps", "12", "--eval_sample_steps", "8")
    for name in ("brightness", "darkness"):
        flags = ("--reward", mine(tiny_sd15.parent, name), *learn)
        flags += ("--eval_reward", mine(tiny_sd15.parent, "brightness") + "=1")
        if name == "brightness":
            flags = flags[:-2]
        folder = train(tmp_path / name, tiny_sd15, *flags)
        before, after = with_reward(folder)
        change[name] = after["eval_reward/brightness"] - before["eval_reward/brightness"]
        assert after["eval_reward"] > before["eval_reward"]
    assert change["brightness"] > 0.01
    assert change["darkness"] < -0.01


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_pictures_of_the_pocket_model_go_either_way(
    tmp_path: Path, tiny_sd15: Path, sign: int
) -> None:
    model = ROOT / "models" / "pocket-sd15"
    flags = ("--pretrained_model_name_or_path", str(model), "--latent_cache_dir")
    flags += (str(tmp_path / "cache"), "--reward", f"{mine(tiny_sd15.parent, 'brightness')}={sign}")
    flags += ("--max_train_steps", "30", "--validation_steps", "30", "--sample_steps", "20")
    folder = train(tmp_path, tiny_sd15, *flags, *LORA, "--eval_sample_steps", "20")
    before, after = with_reward(folder)
    assert sign * (after["eval_reward/brightness"] - before["eval_reward/brightness"]) > 0.02


# -- the pre-training loss ----------------------------------------------------------------------


def test_the_pre_training_loss_is_added_with_its_weight(
    tmp_path: Path, tiny_sd15: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*NO_EVALUATION, *LORA, "--grad_scale", "2")
    without = train(tmp_path / "without", tiny_sd15, *own)
    assert "pretrain_loss" not in steps(without)[0]
    data = ("--pretrain_data_dir", str(scene_data), "--pretrain_weight")
    nothing = train(tmp_path / "nothing", tiny_sd15, *own, *data, "0")
    assert timeless(nothing) == timeless(without)
    assert equal(*(load_file(folder / lora.WEIGHTS) for folder in (nothing, without)))

    errors: list[Tensor] = []
    measure = Diffusion.errors

    def squared_errors(self: Diffusion, epsilon: Tensor, *others: Any, **more: Any) -> Tensor:
        assert epsilon.requires_grad
        errors.append(measure(self, epsilon, *others, **more))
        return errors[-1]

    monkeypatch.setattr(Diffusion, "errors", squared_errors)
    some = train(tmp_path / "some", tiny_sd15, *own, *data, "3")
    assert len(errors) == 3
    for row, error in zip(steps(some), errors, strict=True):
        assert row["pretrain_loss"] == pytest.approx(error.mean().item())
        assert row["loss"] == pytest.approx(3 * row["pretrain_loss"] - 2 * row["reward"], rel=1e-5)
    assert steps(some)[0]["reward"] == steps(without)[0]["reward"]
    # The untrained network is near 0, so its error near the noise's variance.
    assert errors[0].mean().item() == pytest.approx(1, abs=0.4)


def test_what_is_wrong_with_the_pictures_names_the_flag(
    tmp_path: Path, tiny_sd15: Path, scene_data: Path
) -> None:
    with pytest.raises(UserError, match="--pretrain_data_dir: "):
        train(tmp_path, tiny_sd15, "--pretrain_data_dir", str(tmp_path / "none"))
    shutil.copytree(scene_data, tmp_path / "broken")
    (tmp_path / "broken" / "00.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00\.png"):
        train(tmp_path / "b", tiny_sd15, "--pretrain_data_dir", str(tmp_path / "broken"))


# -- how pictures are made ----------------------------------------------------------------------


def test_guidance_is_that_of_diffusers(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    pipeline.unet.eval()
    looked: list[Tensor] = []
    prompts: list[str] = []
    call, estimate = Steering.__call__, denoising.estimate

    def asked(self: Steering, network: Any, captions: Any) -> Any:
        prompts[:] = captions
        return call(self, network, captions)

    def compared(epsilon: Any, noise: Tensor, way: Any, *others: Any, **options: Any) -> Tensor:
        timestep = torch.full((2,), 501)
        own, none = pipeline.encode_prompt(prompts, "cpu", 1, True, ["a dog"] * 2)
        with torch.no_grad():
            plain = [pipeline.unet(noise, timestep, text).sample for text in (none, own)]
            # As StableDiffusionPipeline.__call__ has it.
            expected = plain[0] + 4.0 * (plain[1] - plain[0])
            torch.testing.assert_close(epsilon(noise, timestep), expected, rtol=1e-4, atol=1e-5)
        looked.append(expected)
        return estimate(epsilon, noise, way, *others, **options)

    monkeypatch.setattr(Steering, "__call__", asked)
    monkeypatch.setattr(denoising, "estimate", compared)
    guided = ("--guidance_scale", "4", "--negative_prompt", "a dog", *ONE_STEP)
    train(tmp_path, tiny_sd15, *NO_EVALUATION, *guided)
    assert len(looked) == 1


def test_ddim_draws_no_fresh_noise_and_ddpm_at_every_step(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    starts: list[Tensor] = []
    sample, estimate = Gaussian.sample, denoising.estimate

    def counted(self: Gaussian, noise: Tensor) -> Tensor:
        drawn.append(noise)
        return sample(self, noise)

    def noted(epsilon: Any, noise: Tensor, *others: Any, **options: Any) -> Tensor:
        starts.append(noise)
        return estimate(epsilon, noise, *others, **options)

    monkeypatch.setattr(Gaussian, "sample", counted)
    monkeypatch.setattr(denoising, "estimate", noted)
    own = (*NO_EVALUATION, "--max_train_steps", "2", "--first_step", "5", "--last_step", "5")
    train(tmp_path / "a", tiny_sd15, *own, "--sampler", "ddim")
    assert not drawn
    train(tmp_path / "b", tiny_sd15, *own)
    assert len(drawn) == 2 * 5
    every = torch.cat([*drawn, *starts[2:]])
    assert len(every.flatten(1).unique(dim=0)) == len(every)
    assert torch.equal(torch.cat(starts[:2]), torch.cat(starts[2:]))


def test_prompts_that_fill_no_whole_batch_come_once_in_a_pass(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    call = Steering.__call__

    def asked(self: Steering, network: Any, captions: Any) -> Any:
        prompts.extend(captions)
        return call(self, network, captions)

    monkeypatch.setattr(Steering, "__call__", asked)
    own = (*NO_EVALUATION, "--train_batch_size", "4", "--num_train_epochs", "2")
    flags = ("--max_train_steps", "None", "--sample_steps", "2")
    folder = train(tmp_path, tiny_sd15, *own, *flags)
    assert [len(steps(folder)), steps(folder)[-1]["epoch"]] == [3, 2]
    assert len(prompts) == 12
    for one in (prompts[:6], prompts[6:]):
        assert sorted(one) == sorted(PROMPTS)


# -- what it refuses, and what it only prints ---------------------------------------------------


@pytest.mark.parametrize("name", ["pocket", "jpeg_compressibility", "jpeg_incompressibility"])
def test_a_reward_without_a_gradient_is_refused_by_its_name(
    tmp_path: Path, tiny_sd15: Path, name: str
) -> None:
    mixed = f"{mine(tiny_sd15.parent, 'brightness')},{name}=0.5"
    for text in (name, mixed):
        with pytest.raises(UserError, match=rf"no gradient .* through {name}; see --list_rewards"):
            train(tmp_path, tiny_sd15, "--reward", text)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reward_of_ones_own_that_breaks_loses_nothing(tmp_path: Path, tiny_sd15: Path) -> None:
    own = (*NO_EVALUATION, *LORA, "--max_train_steps", "3", "--reward")
    with pytest.raises(UserError, match=r"score \(breaks.py, line 5\) raised ZeroDivisionError"):
        train(tmp_path / "first", tiny_sd15, *own, breaking(tmp_path, 1, "1 / 0"))
    with pytest.raises(TrainingStopped, match=r"score \(breaks.py, line 5\) raised SystemExit"):
        train(tmp_path / "later", tiny_sd15, *own, breaking(tmp_path, 3, "sys.exit(0)"))
    kept = [path.name for path in (tmp_path / "later" / "run").glob("checkpoint-*")]
    assert kept == ["checkpoint-2"]  # not due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_steps": 0}, "--sample_steps must be at least 1"),
        ({"grad_steps": 0}, "--grad_steps must be at least 1"),
        ({"grad_steps": 32}, "--grad_steps 32: there are 31 calls at least"),
        ({"first_step": 40}, "--first_step 40 and --last_step 39"),
        ({"first_step": 9, "last_step": 8}, "--first_step 9 and --last_step 8"),
        ({"sample_steps": 10, "last_step": 10}, r"lie in 0 \.\. 9 \(--sample_steps\)"),
        ({"guidance_scale": 0.5}, "--guidance_scale must be at least 1"),
        ({"grad_scale": 0.0}, "--grad_scale must be positive"),
        ({"resolution": 0}, "--resolution must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_by_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReflArgs(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_batch_size", "5"), "only 4 to train on"),
        (("--train_dtype", "bf16"), "--mixed_precision bf16"),
        (("--resolution", "60"), "60"),
        (("--reward", "no_such_reward"), "no_such_reward"),
        (("--prompt_file", "missing.json"), "--prompt_file: missing.json cannot be read"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_what_would_not_work_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_sd15: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, tiny_sd15, *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--train_batch_size", "96", "--gradient_accumulation_steps", "4", "--dry_run")
    operations = {}
    for name, flags in {
        "plain": (),
        "guided": ("--guidance_scale", "2"),
        "chain": ("--grad_steps", "3"),
        "lora": LORA,
    }.items():
        train(tmp_path, tiny_sd15, *size, *flags)
        shown = capsys.readouterr().out
        assert "effective batch size: 384\n" in shown
        assert "steps per epoch: 0.01\n" in shown
        operations[name] = float(shown.split("process and step: ")[1].split()[0])
    # Steps 6 and 7 of 8: 6.5 calls on the way there; backward is two more.
    assert operations["guided"] == pytest.approx(2 * operations["plain"], rel=0.02)
    assert operations["chain"] / operations["plain"] == pytest.approx(13.5 / 9.5, rel=0.02)
    assert operations["lora"] < operations["plain"]
    assert list(tmp_path.iterdir()) == []


# -- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [LORA, ()], ids=["lora", "full"])
def test_result_and_checkpoints_load_in_plain_diffusers(
    tmp_path: Path, tiny_sd15: Path, flags: tuple[str, ...]
) -> None:
    more = ("--use_ema", "--ema_decay", "0.5", "--learning_rate", "1e-2", *flags)
    folder = train(tmp_path, tiny_sd15, *more)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    pictures = [draw(pipeline)]
    if flags:
        for place in (folder, folder / "checkpoint-3" / "ema", folder / "checkpoint-3"):
            pipeline.load_lora_weights(str(place))
            pictures.append(draw(pipeline))
            pipeline.unload_lora_weights()
    else:
        pictures.append(draw(StableDiffusionPipeline.from_pretrained(folder)))
        for name in ("unet_ema", "unet"):
            pipeline.unet = unet_of(folder / "checkpoint-3" / name)
            pictures.append(draw(pipeline))
    assert torch.equal(pictures[1], pictures[2])  # the average
    assert not torch.equal(pictures[1], pictures[0])
    assert not torch.equal(pictures[1], pictures[3])
    first, last = with_reward(folder)
    assert [first["step"], last["step"]] == [0, 3]
    assert (first.get("eval_kl"), "eval_kl" in last) == (0 if flags else None, bool(flags))
    for step in (0, 3):
        assert {row["prompt"] for row in scores(folder, step)} < set(PROMPTS)
    for name in ("args.json", "README.md", "report.html", "contact_sheet.png"):
        assert (folder / name).is_file(), name
    assert str(ROOT) not in (folder / "README.md").read_text()


def test_a_run_in_bfloat16_is_finite(tmp_path: Path, tiny_sd15: Path) -> None:
    half = ("--mixed_precision", "bf16", "--sample_steps", "2", *ONE_STEP, *LORA)
    (row,) = steps(train(tmp_path, tiny_sd15, *NO_EVALUATION, *half))
    assert all(math.isfinite(value) for value in row.values())
    assert row["grad_norm"] > 0


# -- stopping and resuming ----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_sd15: Path) -> None:
    wild = ("--learning_rate", "1e30", "--checkpointing_steps", "1", *NO_EVALUATION)
    with pytest.raises(TrainingStopped, match=r"step 2 is not finite.*checkpoint-1.*--learning"):
        train(tmp_path, tiny_sd15, *wild)
    assert len(steps(tmp_path / "run")) == 1


LONG = ("--max_train_steps", "6", "--checkpointing_steps", "2", "--resume_from_checkpoint")
LONG += ("latest", "--logging_steps", "3", "--use_ema", "--lr_scheduler", "cosine")
LONG += ("--validation_steps", "3", *LORA)


@pytest.mark.slow
def test_a_run_killed_in_a_step_and_in_a_checkpoint_ends_with_the_same_bytes(
    tmp_path: Path, tiny_sd15: Path, scene_data: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    long = (*LONG, "--pretrain_data_dir", str(scene_data))
    code, said = spawn(SCRIPT, [*refl_flags(whole, tiny_sd15), *long], whole)
    assert code == 0, said
    flags = [*refl_flags(broken, tiny_sd15), *long]
    deaths = [
        Death(place="step", count=random.randint(3, 6)),
        Death(place="checkpoint", count=random.randint(1, 6)),  # of its files
    ]
    for death in deaths:
        code, said = spawn(SCRIPT, flags, broken, death)
        assert code == -signal.SIGKILL, (death, said)
        assert not (broken / "run" / lora.WEIGHTS).exists()
    code, said = spawn(SCRIPT, flags, broken)
    assert code == 0, (deaths, said)
    assert "resuming from" in said
    for place in (".", "checkpoint-6", "checkpoint-6/ema"):
        ours, theirs = (folder / "run" / place / lora.WEIGHTS for folder in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes(), (place, deaths)
    assert timeless(broken / "run") == timeless(whole / "run"), deaths
    for step in (0, 3, 6):
        assert scores(broken / "run", step) == scores(whole / "run", step)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume_after_a_kill(
    tmp_path: Path, tiny_sd15: Path, scene_data: Path
) -> None:
    # Adam would blow the rounding of gradients near zero up to whole steps.
    own = ("--adam_epsilon", "1e-3", "--max_train_steps", "4", "--checkpointing_steps", "1")
    own += ("--resume_from_checkpoint", "latest", "--pretrain_data_dir", str(scene_data))
    own += ("--grad_steps", "2", "--grad_scale", "1", "--guidance_scale", "2")
    half = [*own, "--train_batch_size", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, [*refl_flags(whole, tiny_sd15), *half], whole, processes=2)
    assert code == 0, said
    assert json.loads((whole / "run" / "args.json").read_text())["num_processes"] == 2

    death = Death(place="step", count=random.randint(2, 4))
    flags = [*refl_flags(broken, tiny_sd15), *half]
    code, said = spawn(SCRIPT, flags, broken, death, processes=2)
    assert code != 0, (death, said)
    assert not (broken / "run" / "finished.json").exists()
    code, said = spawn(SCRIPT, flags, broken, processes=2)
    assert code == 0, (death, said)
    assert "resuming from" in said
    assert same_unet(broken / "run" / "unet", whole / "run" / "unet"), death
    assert timeless(broken / "run") == timeless(whole / "run"), death

    # Which it could not if the processes drew the same noise.
    alone = train(tmp_path / "alone", tiny_sd15, *own, "--train_batch_size", "2")
    agree(SCRIPTS["refl_sd15"], alone, whole / "run")


def test_a_process_without_a_valid_score_does_not_hang_the_others(
    tmp_path: Path, tiny_sd15: Path
) -> None:
    own = [*refl_flags(tmp_path, tiny_sd15), *NO_EVALUATION, "--train_batch_size", "1"]
    own += ["--reward", mine(tiny_sd15.parent, "only_process_0"), "--margin", "9"]
    code, said = spawn(SCRIPT, own, tmp_path, processes=2)
    assert code == 0, said
    for row in metrics(tmp_path / "run"):
        assert row["invalid_share"] == 0.5
        assert 0 < row["reward"] < 1
        assert row["at_margin_share"] == 0


@pytest.mark.slow
def test_a_run_as_a_user_starts_it_is_killed_and_goes_on(
    tmp_path: Path, tiny_sd15: Path, scene_data: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    own = [*LONG, "--gradient_checkpointing", "--train_batch_size", "1", "--pretrain_data_dir"]
    flags = {
        folder: [
            *(*refl_flags(folder, tiny_sd15), *own, str(scene_data)),
            *("--latent_cache_dir", str(folder / "cache")),
        ]
        for folder in (whole, broken)
    }
    done = launch(SCRIPT, flags[whole], whole, 2, SHARD_SIZE="2")
    assert done.returncode == 0, done.stderr
    for place, count in (("cache", 3), ("step", 5), ("checkpoint", 9)):
        killed = launch(
            SCRIPT, flags[broken], broken, 2, DIE_AT=place, DIE_COUNT=str(count), SHARD_SIZE="2"
        )
        assert killed.returncode != 0, (place, killed.stderr)
        assert not (broken / "run" / "finished.json").exists()
    done = launch(SCRIPT, flags[broken], broken, 2, SHARD_SIZE="2")
    assert done.returncode == 0, done.stderr
    ours, theirs = ((folder / "run" / lora.WEIGHTS).read_bytes() for folder in (broken, whole))
    assert ours == theirs
    # A row that began before the kill has sums that were averaged over the processes already.
    agree(SCRIPTS["refl_sd15"], broken / "run", whole / "run")
