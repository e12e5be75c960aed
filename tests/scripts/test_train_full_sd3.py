"""train_full_sd3.py from end to end: whole pipelines, averages, frozen parts, exact resume."""

import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor

import train_full_sd3
from dojo import cli
from dojo.cli import UserError
from dojo.models.sd3.folder import SINGLE_FILE
from tests.conftest import reset_accelerate, run_flags
from tests.processes import launch
from tests.scripts.runs import equal, metrics

SCRIPT = "train_full_sd3.py"
LAST = re.compile(r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)\.")


@pytest.fixture
def train(tiny_sd3: Path, scene_data: Path) -> Any:
    """`train(folder, *flags)`: a run of three small steps; returns its output folder."""

    def run(folder: Path, *flags: str, data: Path | None = scene_data) -> Path:
        words = [*run_flags(folder, tiny_sd3, data), *flags]
        args = cli.parse(train_full_sd3.Args, None, words)
        train_full_sd3.main(args)
        return args.run.output_dir

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    model: Any = SD3Transformer2DModel.from_pretrained(folder)
    return model.state_dict()


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors as they lie in the file."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_the_result_is_a_pipeline_that_one_plain_call_loads(
    train: Any, tmp_path: Path, tiny_sd3: Path
) -> None:
    folder = train(tmp_path, "--flow_shift", "2", "--checkpointing_steps", "2")
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.shift == 2
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a star", num_inference_steps=1, max_sequence_length=24).images
    base = weights(tiny_sd3 / "transformer")
    tuned = weights(folder / "transformer")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    still = {name for name in base if LAST.match(name) or name == "pos_embed.pos_embed"}
    assert moved.isdisjoint(still), "what nothing reads is not eaten by weight decay"
    assert {name for name in base if not base[name].any()} <= set(base)
    assert len(moved) > 0.9 * (len(base) - len(still))
    for part in ("vae", "text_encoder", "text_encoder_3", "tokenizer_2"):
        assert (folder / part).is_dir()
    # A checkpoint's transformer loads in the same way, and the last one is the result.
    assert equal(weights(folder / "checkpoint-3" / "transformer"), tuned)
    assert not equal(weights(folder / "checkpoint-2" / "transformer"), tuned)


def test_other_users_may_read_what_a_run_writes(train: Any, tmp_path: Path) -> None:
    folder = train(tmp_path)
    mine = tmp_path / "mine"
    mine.touch()
    files = [
        path for place in (folder, tmp_path / "cache") for path in place.rglob("*.safetensors")
    ]
    assert len(files) > 4
    assert {path.stat().st_mode for path in files} == {mine.stat().st_mode}


def test_the_average_is_validated_saved_and_is_the_result(train: Any, tmp_path: Path) -> None:
    flags = ("--use_ema", "--ema_decay", "0.5", "--learning_rate", "1e-2", "--seed", "1")
    flags += ("--eval_fraction", "0.2", "--validation_steps", "3")
    folder = train(tmp_path, *flags)
    average = weights(folder / "checkpoint-3" / "transformer_ema")
    assert equal(weights(folder / "transformer"), average)
    raw = weights(folder / "checkpoint-3" / "transformer")
    assert not equal(raw, average)
    plain = train(tmp_path / "plain", "--learning_rate", "1e-2", "--seed", "1", *flags[-4:])
    assert equal(raw, weights(plain / "transformer")), "the average leaves the training alone"
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    others = [row["eval_loss"] for row in metrics(plain) if "eval_loss" in row]
    assert losses[0] == others[0]
    assert losses[-1] != others[-1]


@pytest.mark.parametrize(
    "parts", [("adaln",), ("transformer_blocks.0", "pos_embed"), ("re:.*bias",)]
)
def test_frozen_weights_stay(
    train: Any, tmp_path: Path, tiny_sd3: Path, parts: tuple[str, ...]
) -> None:
    folder = train(tmp_path, "--learning_rate", "1e-2", "--freeze", *parts)
    base, tuned = weights(tiny_sd3 / "transformer"), weights(folder / "transformer")
    patterns = {"adaln": r".*(norm1|norm1_context|norm_out)\.linear\..*", "re:.*bias": r".*bias"}
    for name in base:
        frozen = any(re.fullmatch(patterns.get(p, rf"{re.escape(p)}\..*"), name) for p in parts)
        if frozen:
            assert torch.equal(base[name], tuned[name]), name
    moved = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert len(moved) > 20


@pytest.mark.parametrize("part", ["no_such_layer", "re:("])
def test_a_pattern_that_freezes_nothing_is_refused(train: Any, tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match="--freeze"):
        train(tmp_path, "--freeze", part)


def test_freezing_everything_is_refused(train: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        train(tmp_path, "--freeze", "re:.*")


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "adafactor"),
        ("--optimizer", "lion", "--learning_rate", "1e-5"),
        ("--optimizer", "prodigy", "--learning_rate", "1"),
        ("--optimizer", "schedulefree", "--lr_warmup_steps", "2"),
        ("--mixed_precision", "bf16", "--train_dtype", "bf16", "--use_ema", "--offload_ema"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "--save_dtype", "bf16"),
    ],
    ids=lambda flags: flags[1] if flags[0] == "--optimizer" else flags[2].lstrip("-"),
)
def test_a_run_of_any_optimizer_resumes_exactly(
    train: Any, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    common = (*flags, "--seed", "3", "--checkpointing_steps", "2", "--max_train_steps")
    whole = train(tmp_path / "whole", *common, "4", "--eval_fraction", "0.2")
    part = (*common, "2", "--eval_fraction", "0.2")
    train(tmp_path / "part", *part)
    resume = ("--eval_fraction", "0.2", "--resume_from_checkpoint", "latest")
    resumed = train(tmp_path / "part", *common, "4", *resume)
    for place in ("transformer", "checkpoint-4/transformer"):
        assert equal(weights(whole / place), weights(resumed / place)), place
    losses = [row["loss"] for row in metrics(resumed) if "loss" in row]
    assert losses == [row["loss"] for row in metrics(whole) if "loss" in row]


def test_bfloat16_weights_are_stored_as_such_and_need_bfloat16_arithmetic(
    train: Any, tmp_path: Path
) -> None:
    flags = ("--mixed_precision", "bf16", "--train_dtype", "bf16", "--save_dtype", "bf16")
    folder = train(tmp_path, *flags)
    for place in (folder / "transformer", folder / "checkpoint-3" / "transformer"):
        assert {value.dtype for value in stored(place).values()} == {torch.bfloat16}
    reset_accelerate()
    with pytest.raises(UserError, match="--mixed_precision bf16"):
        train(tmp_path / "other", "--train_dtype", "bf16")


def test_masters_are_float32_under_autocast(train: Any, tmp_path: Path) -> None:
    folder = train(tmp_path, "--mixed_precision", "bf16")
    saved = stored(folder / "checkpoint-3" / "transformer")
    values = torch.cat([value.flatten() for value in saved.values()])
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_a_run_does_not_write_into_the_folder_of_its_model(
    train: Any, tmp_path: Path, tiny_sd3: Path
) -> None:
    model = tmp_path / "run"
    shutil.copytree(tiny_sd3, model)
    before = sorted(path.name for path in model.rglob("*"))

    def refused(reason: str) -> None:
        for more in ((), ("--overwrite_output_dir",)):
            with pytest.raises(UserError, match=reason):
                train(tmp_path, "--pretrained_model_name_or_path", str(model), *more)
        assert sorted(path.name for path in model.rglob("*")) == before

    refused(r"is not empty.*model_index\.json")
    (model / "manifest.jsonl").write_text('{"sd_dojo": "run"}\n')  # of the run that made it
    before.append("manifest.jsonl")
    before.sort()
    refused("--pretrained_model_name_or_path")


def test_a_longer_run_leaves_no_shards_of_the_shorter_one(train: Any, tmp_path: Path) -> None:
    common = ("--seed", "1", "--checkpointing_steps", "1")
    train(tmp_path, *common, "--max_shard_size", "100KB", "--max_train_steps", "1")
    more = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--max_shard_size")
    folder = train(tmp_path, *common, *more, "5GB")
    assert equal(weights(folder / "transformer"), weights(folder / "checkpoint-2" / "transformer"))


def test_a_large_transformer_is_saved_in_shards(train: Any, tmp_path: Path) -> None:
    folder = train(tmp_path, "--max_shard_size", "100KB")
    shards = list((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert equal(weights(folder / "transformer"), weights(folder / "checkpoint-3" / "transformer"))


def test_one_file_holds_what_the_folder_holds(train: Any, tmp_path: Path, tiny_sd3: Path) -> None:
    folder = train(tmp_path, "--single_file")
    pipeline: Any = StableDiffusion3Pipeline.from_single_file(
        str(folder / SINGLE_FILE), config=str(folder), local_files_only=True
    )
    there: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        one, two = getattr(pipeline, name).state_dict(), getattr(there, name).state_dict()
        assert equal({k: v.float() for k, v in one.items()}, two), name
    # And training starts from it: with a learning rate of nothing it ends where it began.
    flags = ("--pretrained_model_name_or_path", str(folder / SINGLE_FILE))
    flags += ("--single_file_config", str(tiny_sd3), "--learning_rate", "1e-30")
    again = train(tmp_path / "again", *flags, "--adam_weight_decay", "0")
    assert equal(weights(again / "transformer"), weights(folder / "transformer"))


def test_training_lowers_the_eval_loss(train: Any, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "30", "--learning_rate", "1e-3", "--train_batch_size", "4")
    folder = train(tmp_path, *flags, "--eval_fraction", "0.2")
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_dry_run_counts_every_trained_weight(
    train: Any, tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "--dry_run", "--freeze", "adaln")
    text = capsys.readouterr().out
    model: Any = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    adaln = re.compile(r".*(norm1|norm1_context|norm_out)\.linear\..*")
    counted = sum(
        param.numel()
        for name, param in model.named_parameters()
        if not adaln.match(name) and not LAST.match(name)
    )
    assert f"trainable parameters: {counted:,}" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    more = ("--max_train_steps", "6", "--checkpointing_steps", "2", "--seed", "5", "--use_ema")
    more += ("--ema_update_every", "2", "--resume_from_checkpoint", "latest", "--random_flip")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = launch(SCRIPT, [*run_flags(whole, tiny_sd3, scene_data), *more], whole)
    assert reference.returncode == 0, reference.stderr
    flags = [*run_flags(broken, tiny_sd3, scene_data), *more]
    # A checkpoint holds about a dozen files to flush: the second one is cut while it is written.
    for place, count in (("step", random.randint(3, 6)), ("checkpoint", 3)):
        killed = launch(SCRIPT, flags, broken, DIE_AT=place, DIE_COUNT=str(count))
        assert killed.returncode == -signal.SIGKILL, (place, count, killed.stderr)
        assert not (broken / "run" / "finished.json").exists()
    resumed = launch(SCRIPT, flags, broken)
    assert resumed.returncode == 0, resumed.stderr
    for place in ("transformer", "checkpoint-6/transformer", "checkpoint-6/transformer_ema"):
        assert equal(weights(whole / "run" / place), weights(broken / "run" / place)), place


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(
    train: Any, tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    more = ("--max_train_steps", "4", "--seed", "5", "--eval_fraction", "0.2", "--use_ema")
    half = [*run_flags(tmp_path, tiny_sd3, scene_data), *more, "--train_batch_size", "1"]
    two = launch(SCRIPT, half, tmp_path, 2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["num_processes"] == 2
    alone = train(tmp_path / "alone", *more)
    for row, other in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "lr", "epoch"):
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-4), name
