"""train_lora_sd3.py from end to end: what it writes, how it resumes, what it refuses."""

import json
import random
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import train_lora_sd3
from dojo.cli import TrainingStopped, UserError
from dojo.finetune import lora
from dojo.maths import flow
from dojo.models import sd3
from tests.conftest import ROOT, MakeArgs, lora_flags, run_flags
from tests.processes import Death, launch, spawn
from tests.scripts.runs import adapter, adapter_bytes, draw, metrics

SCRIPT = "train_lora_sd3.py"
PROMPTS = (
    "--validation_prompt",
    "a star",
    "a/b: *weird* prompt?",
    "--validation_inference_steps",
    "2",
)


def run(args: train_lora_sd3.Args) -> Path:
    """Trains and returns the output folder."""
    train_lora_sd3.main(args)
    return args.run.output_dir


# -- what it writes -----------------------------------------------------------------------------


def test_a_run_leaves_everything_that_was_promised(lora_args: MakeArgs, tmp_path: Path) -> None:
    args = lora_args(tmp_path, "--eval_fraction", "0.2", "--validation_steps", "2", *PROMPTS)
    folder = run(args)
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["lora"]["rank"] == 2
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert isinstance(record["seed"], int)
    rows = metrics(folder)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    for key in ("epoch", "loss", "lr", "grad_norm", "images_per_s", "seconds_train", "memory_gib"):
        assert all(row[key] >= 0 for row in trained), key
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]
    for step in (0, 2, 3):
        names = sorted(path.name for path in (folder / "validation" / f"step-{step}").iterdir())
        assert names == ["00-a_star-seed0.png", "01-a_b_weird_prompt-seed0.png"]
    assert (folder / "checkpoint-3" / lora.WEIGHTS).is_file()
    assert json.loads((folder / "data_report.json").read_text())["train"] == 8
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" in card
    assert str(ROOT) not in card
    assert all(value.dtype == torch.float32 for value in adapter(folder).values())


def test_result_and_checkpoints_load_in_plain_diffusers(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path
) -> None:
    flags = ("--lora_alpha", "4", "--learning_rate", "0.05", "--checkpointing_steps", "2")
    folder = run(lora_args(tmp_path, *flags))
    plain = draw(StableDiffusion3Pipeline.from_pretrained(tiny_sd3))
    pictures = {}
    for place in (folder, folder / "checkpoint-2", folder / "checkpoint-3"):
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
        pipeline.load_lora_weights(str(place))
        pictures[place.name] = draw(pipeline)
        assert not torch.equal(pictures[place.name], plain)
    assert torch.equal(pictures[folder.name], pictures["checkpoint-3"])
    assert not torch.equal(pictures[folder.name], pictures["checkpoint-2"])


def test_training_lowers_the_eval_loss(lora_args: MakeArgs, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "40", "--learning_rate", "1e-2", "--train_batch_size", "4")
    folder = run(
        lora_args(tmp_path, *flags, "--eval_fraction", "0.2", "--lora_layers", "all-linear")
    )
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_the_eval_loss_depends_on_the_weights_alone(lora_args: MakeArgs, tmp_path: Path) -> None:
    flags = ("--eval_fraction", "0.2", "--learning_rate", "1e-30", "--seed")
    rows = [metrics(run(lora_args(tmp_path / seed, *flags, seed))) for seed in ("1", "2")]
    first, second = ([row["eval_loss"] for row in part if "eval_loss" in row] for part in rows)
    assert first == second == [first[0]] * len(first)


def test_the_shift_is_saved_with_the_result(lora_args: MakeArgs, tmp_path: Path) -> None:
    for flag, shift in (("5", 5.0), ("auto", 3.0 * 0.5)):  # 32 px: a quarter of the tokens
        folder = run(lora_args(tmp_path / flag, "--flow_shift", flag, "--resolution", "32"))
        saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert saved["shift"] == pytest.approx(shift)


def test_dry_run_prints_the_plan_and_writes_nothing(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_sd3: Path
) -> None:
    flags = ("--dry_run", "--gradient_accumulation_steps", "3", "--num_train_epochs", "2")
    args = lora_args(tmp_path, *flags)
    train_lora_sd3.main(args)
    text = capsys.readouterr().out
    assert '"rank": 2' in text
    assert "effective batch size: 6" in text
    assert "optimizer steps: 3" in text
    total = sum(
        p.numel()
        for p in SD3Transformer2DModel.from_pretrained(
            tiny_sd3, subfolder="transformer"
        ).parameters()
    )
    trainable = int(text.split("trainable parameters: ")[1].split("\n")[0].replace(",", ""))
    assert f"total parameters: {total + trainable:,}" in text
    assert trainable > 0
    assert list(tmp_path.iterdir()) == []


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--weighting_scheme", "mode", "--mode_scale", "0.8"),
        ("--weighting_scheme", "cosmap"),
        ("--weighting_scheme", "sigma_sqrt", "--precondition_outputs"),
        ("--weighting_scheme", "none", "--use_dora"),
        ("--gradient_checkpointing", "--lora_dropout", "0.2"),
        ("--no_cache_latents", "--random_crop", "--random_flip", "--dataloader_num_workers", "2"),
        ("--no_cache_text_embeddings", "--caption_dropout", "0.5", "--lr_scheduler", "polynomial"),
        ("--height", "32", "--width", "64", "--lora_layers", "attn+ff", "--max_train_samples", "3"),
        ("--mixed_precision", "bf16", "--vae_dtype", "bf16", "--scale_lr"),
    ],
    ids=lambda flags: flags[0].lstrip("-") + "-" + flags[1].lstrip("-"),
)
def test_options_train_to_finite_float32_adapters(
    lora_args: MakeArgs, tmp_path: Path, flags: Sequence[str]
) -> None:
    folder = run(lora_args(tmp_path, "--max_train_steps", "2", *flags))
    values = adapter(folder)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values.values())
    assert any(value.any() for name, value in values.items() if "lora_B" in name)


def test_cached_and_uncached_training_agree(lora_args: MakeArgs, tmp_path: Path) -> None:
    common = ("--seed", "3", "--random_flip", "--caption_dropout", "0.3")
    cached = adapter(run(lora_args(tmp_path / "a", *common)))
    fresh = adapter(
        run(lora_args(tmp_path / "b", *common, "--no_cache_latents", "--no_cache_text_embeddings"))
    )
    for name, value in cached.items():
        torch.testing.assert_close(value, fresh[name], atol=1e-5, rtol=1e-3)


def test_training_starts_from_one_file_without_t5(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    file, folder = tmp_path / "model.safetensors", tmp_path / "config"
    sd3.save_single_file(file, pipeline, with_t5=False)
    # A machine that has the configurations and tokenizers, and no weights of its own.
    shutil.copytree(tiny_sd3, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ("--pretrained_model_name_or_path", str(file), "--single_file_config", str(folder))
    trained = run(lora_args(tmp_path, *flags, *PROMPTS, "--max_train_steps", "1"))
    assert any(value.any() for name, value in adapter(trained).items() if "lora_B" in name)
    assert "T5" in capsys.readouterr().out


def test_a_start_from_an_adapter_goes_on_with_it(lora_args: MakeArgs, tmp_path: Path) -> None:
    first = run(lora_args(tmp_path / "a", "--lora_format", "kohya", "--learning_rate", "1e-2"))
    kohya = first / "pytorch_lora_weights_kohya.safetensors"
    nothing = ("--learning_rate", "1e-30", "--adam_weight_decay", "0", "--max_train_steps", "1")
    flags = ("--init_lora_weights_path", str(kohya), *nothing)
    second = run(lora_args(tmp_path / "b", *flags))
    one, two = adapter(first), adapter(second)
    for name in one:
        if "lora_A" in name:
            down, up = one[name], one[name.replace("lora_A", "lora_B")]
            again = two[name.replace("lora_A", "lora_B")] @ two[name]
            torch.testing.assert_close(up @ down, again, atol=1e-6, rtol=1e-4)


def test_a_second_run_loads_no_text_encoder(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(lora_args(tmp_path, *PROMPTS))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the text encoders were loaded again")

    monkeypatch.setattr(sd3.Model, "load_text", refuse)
    run(lora_args(tmp_path, *PROMPTS, "--output_dir", str(tmp_path / "second")))


def test_random_crops_are_refused_with_the_latent_cache(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--no_cache_latents"):
        run(lora_args(tmp_path, "--random_crop"))


# -- bad data -----------------------------------------------------------------------------------


def test_bad_pictures_stop_the_run_or_are_left_out_and_reported(
    lora_args: MakeArgs, tmp_path: Path, scene_data: Path
) -> None:
    data = tmp_path / "bad"
    data.mkdir()
    good = [json.loads(row) for row in (scene_data / "metadata.jsonl").read_text().splitlines()]
    for row in good[:4]:
        (data / row["file_name"]).write_bytes((scene_data / row["file_name"]).read_bytes())
    (data / "zero.png").write_bytes(b"")
    (data / "text.jpg").write_text("this is no picture")
    whole = (scene_data / good[0]["file_name"]).read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = good[:4] + [{"file_name": n, "text": "x"} for n in ("zero.png", "text.jpg", "cut.png")]
    rows.append({"file_name": "missing.png", "text": "x"})
    rows.append({"file_name": "../outside.png", "text": "x"})
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = ("--dataset_name", str(data))
    with pytest.raises(UserError, match=r"zero\.png"):
        run(lora_args(tmp_path, *flags))
    folder = run(lora_args(tmp_path, *flags, "--on_bad_sample", "skip"))
    report = json.loads((folder / "data_report.json").read_text())
    assert report["train"] == 4
    assert len(report["left_out"]) == 5


# -- stopping and resuming ----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_harms_nothing(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path, "--checkpointing_steps", "1")
    original, calls = flow.squared_error, iter(range(100))

    def poisoned(predicted: torch.Tensor, target: torch.Tensor, *area: Any) -> torch.Tensor:
        errors = original(predicted, target, *area)
        return errors * float("nan") if next(calls) == 2 else errors

    monkeypatch.setattr(flow, "squared_error", poisoned)
    with pytest.raises(TrainingStopped, match=r"step 3 .*checkpoint-2"):
        run(args)
    assert not (args.run.output_dir / lora.WEIGHTS).exists()
    saved = adapter(args.run.output_dir / "checkpoint-2")
    assert all(value.isfinite().all() for value in saved.values())


def test_a_finished_run_is_left_alone(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(lora_args(tmp_path, "--seed", "0"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    unchanged = {path for path in before if path.name != "data_report.json"}
    for extra in ((), ("--resume_from_checkpoint", "latest")):
        capsys.readouterr()
        run(lora_args(tmp_path, "--seed", "0", *extra))
        assert "finished" in capsys.readouterr().out
        assert all(path.stat().st_mtime_ns == before[path] for path in unchanged)


def test_another_run_in_the_same_folder_is_refused(lora_args: MakeArgs, tmp_path: Path) -> None:
    run(lora_args(tmp_path))
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        run(lora_args(tmp_path, "--rank", "3"))
    folder = run(lora_args(tmp_path, "--rank", "3", "--overwrite_output_dir"))
    assert min(min(value.shape) for value in adapter(folder).values()) == 3


def test_a_run_is_not_continued_with_other_options(lora_args: MakeArgs, tmp_path: Path) -> None:
    folder = run(lora_args(tmp_path, "--learning_rate", "1e-3"))
    before = (folder / "args.json").read_bytes()
    for other in (("--learning_rate", "1e-2"), ("--learning_rate", "1e-3", "--flow_shift", "5")):
        resume = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
        with pytest.raises(UserError, match=f"{other[-2]} was "):
            run(lora_args(tmp_path, *resume, *other))
    assert (folder / "args.json").read_bytes() == before


def test_a_checkpoint_of_another_folder_brings_its_options(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    folder = run(lora_args(tmp_path / "a", "--learning_rate", "1e-3"))
    resume = ("--resume_from_checkpoint", str(folder / "checkpoint-3"), "--max_train_steps", "4")
    with pytest.raises(UserError, match=r"--learning_rate was 0\.001"):
        run(lora_args(tmp_path / "b", *resume, "--learning_rate", "1e-2"))
    again = run(lora_args(tmp_path / "b", *resume, "--learning_rate", "1e-3"))
    assert (again / lora.WEIGHTS).is_file()


def test_the_use_of_the_data_may_not_change_on_the_way(
    tiny_sd3: Path, scene_data: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "data.json"
    words = [*run_flags(tmp_path, tiny_sd3, None), "--data_config", str(listed), "--rank", "2"]

    def train(weight: float, *more: str) -> None:
        listed.write_text(json.dumps([{"path": str(scene_data), "weight": weight}]))
        run(train_lora_sd3.cli.parse(train_lora_sd3.Args, None, [*words, *more]))

    train(1.0)
    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    with pytest.raises(UserError, match="training data"):
        train(0.1, *resume)
    train(1.0, *resume)


def test_results_inside_the_data_are_refused(
    lora_args: MakeArgs, tmp_path: Path, scene_data: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scene_data, data)
    flags = ("--dataset_name", str(data), "--output_dir", str(data / "run"))
    with pytest.raises(UserError, match="--output_dir"):
        run(lora_args(tmp_path, *flags))


def test_overwriting_wins_over_resuming(lora_args: MakeArgs, tmp_path: Path) -> None:
    run(lora_args(tmp_path, "--seed", "1"))
    both = ("--overwrite_output_dir", "--resume_from_checkpoint", "latest", "--rank", "3")
    folder = run(lora_args(tmp_path, "--seed", "1", *both))
    fresh = run(lora_args(tmp_path / "fresh", "--seed", "1", "--rank", "3"))
    assert (folder / lora.WEIGHTS).read_bytes() == (fresh / lora.WEIGHTS).read_bytes()


def test_going_back_to_an_earlier_checkpoint_leaves_no_later_ones(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    folder = run(lora_args(tmp_path, "--seed", "1", "--checkpointing_steps", "1"))
    back = ("--resume_from_checkpoint", "checkpoint-1", "--max_train_steps", "4")
    run(lora_args(tmp_path, "--seed", "1", "--checkpointing_steps", "9", *back))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-4",
    ]
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


def test_an_unset_seed_is_drawn_once_and_resumed(lora_args: MakeArgs, tmp_path: Path) -> None:
    folder = run(lora_args(tmp_path))
    seed = json.loads((folder / "args.json").read_text())["seed"]
    longer = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    run(lora_args(tmp_path, *longer))
    assert json.loads((folder / "args.json").read_text())["seed"] == seed
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [1, 2, 3, 4]
    other = run(lora_args(tmp_path / "other", "--max_train_steps", "4", "--seed", str(seed)))
    assert (other / lora.WEIGHTS).read_bytes() == (folder / lora.WEIGHTS).read_bytes()


def test_latest_in_an_empty_folder_starts_from_zero_and_says_so(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(lora_args(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", "1"))
    assert "starting from zero" in capsys.readouterr().out
    with pytest.raises(UserError, match="checkpoint-7"):
        run(lora_args(tmp_path, "--resume_from_checkpoint", "checkpoint-7"))


LONG = ("--max_train_steps", "8", "--checkpointing_steps", "3", "--seed", "5", "--random_flip")
LONG += ("--caption_dropout", "0.2", "--lora_dropout", "0.1", "--lr_scheduler", "cosine")
LONG += ("--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "latest")


@pytest.mark.slow
def test_a_run_killed_in_caching_in_a_step_and_in_a_checkpoint_ends_with_the_same_bytes(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = launch(
        SCRIPT, [*lora_flags(whole, tiny_sd3, scene_data), *LONG], whole, SHARD_SIZE="2"
    )
    assert reference.returncode == 0, reference.stderr
    flags = [*lora_flags(broken, tiny_sd3, scene_data), *LONG]
    step = random.randint(3, 15)  # micro-steps of 16
    for place, count in (("cache", 3), ("step", step), ("checkpoint", 2)):
        death = {"DIE_AT": place, "DIE_COUNT": str(count), "SHARD_SIZE": "2"}
        killed = launch(SCRIPT, flags, broken, 1, **death)
        assert killed.returncode == -signal.SIGKILL, (place, count, killed.stderr)
        assert not (broken / "run" / lora.WEIGHTS).exists()
    resumed = launch(SCRIPT, flags, broken, SHARD_SIZE="2")
    assert resumed.returncode == 0, resumed.stderr
    assert (broken / "run" / lora.WEIGHTS).read_bytes() == (
        whole / "run" / lora.WEIGHTS
    ).read_bytes()
    rows, expected = metrics(broken / "run"), metrics(whole / "run")
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in expected
    ], f"killed at micro-step {step}"
    assert not list((broken / "run").glob(".*")), "leftovers of the kill"


@pytest.mark.slow
def test_two_runs_at_once_share_a_cache_and_end_as_each_alone(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    def start(name: str) -> int:
        flags = lora_flags(tmp_path, tiny_sd3, scene_data)
        own = ("--seed", "5", "--output_dir", str(tmp_path / name))
        return launch(SCRIPT, [*flags, *own], tmp_path / f"of-{name}").returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, ("a", "b"))) == [0, 0]
    alone = run(lora_args(tmp_path / "alone", "--seed", "5"))
    for name in ("a", "b"):
        assert (tmp_path / name / lora.WEIGHTS).read_bytes() == (alone / lora.WEIGHTS).read_bytes()
    assert not list((tmp_path / "cache").rglob(".*"))


def test_two_processes_share_the_batch_and_resume_after_a_kill(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    short = ("--max_train_steps", "5", "--checkpointing_steps", "2", "--seed", "5")
    # One held-out picture: the second process has none to evaluate.
    short += ("--eval_fraction", "0.1", "--resume_from_checkpoint", "latest")
    half = ("--train_batch_size", "1")
    flags = [*lora_flags(whole, tiny_sd3, scene_data), *short, *half]
    done = launch(SCRIPT, flags, whole, 2)  # by torchrun, as a user does
    assert done.returncode == 0, done.stderr
    record = json.loads((whole / "run" / "args.json").read_text())
    assert record["num_processes"] == 2
    assert done.stdout.count("pictures: 9 to train on") == 1  # one process speaks

    flags = [*lora_flags(broken, tiny_sd3, scene_data), *short, *half]
    code, said = spawn(SCRIPT, flags, broken, Death(place="step", count=4), processes=2)
    assert code != 0, said
    assert (broken / "run" / "checkpoint-2").is_dir()
    code, said = spawn(SCRIPT, flags, broken, processes=2)
    assert code == 0, said
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run")

    alone = run(lora_args(tmp_path / "alone", *short, "--train_batch_size", "2"))
    for one, two in zip(metrics(alone), metrics(whole / "run"), strict=True):
        assert one["step"] == two["step"]
        for name in ("loss", "eval_loss", "grad_norm", "lr", "epoch"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4), name
