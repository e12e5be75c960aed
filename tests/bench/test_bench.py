"""dojo.bench: models of the published sizes, the arithmetic of a run's numbers, a real run."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import train_ddpo_sd3
import train_ddpo_sd15
import train_ddpo_sdxl
import train_dpo_sd3
import train_grpo_sd3
import train_nft_sd3
import train_refl_sd3
import train_refl_sd15
from dojo import cli, finetune
from dojo.bench import __main__ as command_line
from dojo.bench import caches, limits, models, rl, sharded, supervised
from dojo.bench import processes as bench_processes
from dojo.bench.rl import RlArgs
from dojo.bench.supervised import SupervisedArgs, Trace
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError
from dojo.data import PairArgs, open_pairs
from dojo.finetune import whole as full
from dojo.methods import rl as learning
from dojo.models import family, opening, sd3
from dojo.run import folders
from dojo.run.cost import Cost
from tests.processes import Forked


def count(config: dict[str, Any]) -> float:
    """Parameters in millions."""
    return sum(param.numel() for param in models.on_meta(config).parameters()) / 1e6


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sizes with every width and depth cut down, so that they are made in no time."""
    medium = {
        **models.TRANSFORMERS["sd35-medium"],
        "num_layers": 3,
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 96,
        "pos_embed_max_size": 8,
        "dual_attention_layers": [0],
    }
    monkeypatch.setitem(models.TRANSFORMERS, "sd35-medium", medium)
    unet: dict[str, Any] = {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    unet |= {"down_block_types": down, "up_block_types": up, "attention_head_dim": 4}
    own: dict[str, Any] = {"sd15": {"cross_attention_dim": 32}, "sdxl": {"cross_attention_dim": 96}}
    own["sdxl"] |= {"transformer_layers_per_block": [1, 2], "addition_time_embed_dim": 8}
    own["sdxl"]["projection_class_embeddings_input_dim"] = 64 + 6 * 8
    for name, sizes in own.items():
        monkeypatch.setitem(models.UNETS, name, {**models.UNETS[name], **unet, **sizes})
    vae = {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8}
    monkeypatch.setattr(models, "_VAE_SIZES", vae)
    original = models._clip
    widths = {768: 32, 1280: 64}
    monkeypatch.setattr(models, "_clip", lambda width, heads: original(widths[width], 2))
    t5 = {"d_model": 96, "d_kv": 16, "num_heads": 2, "d_ff": 128, "num_layers": 1}
    monkeypatch.setattr(models, "_T5", t5)
    monkeypatch.setattr(models, "_NUM_DRAWS", 65_521)


# -- the models -------------------------------------------------------------------------------


def test_the_models_have_the_published_numbers_of_parameters() -> None:
    medium, large = models.settings("sd35-medium"), models.settings("sd35-large")
    assert count(medium["transformer"]) == pytest.approx(2243.2, abs=0.1)
    assert count(large["transformer"]) == pytest.approx(8056.6, abs=0.1)
    assert count(medium["vae"]) == pytest.approx(83.82, abs=0.01)
    buffer: Any = models.on_meta(medium["transformer"])
    assert buffer.pos_embed.pos_embed.numel() == 384**2 * 1536  # the rest of the card's 2.5 B
    old, xl = models.settings("sd15"), models.settings("sdxl")
    assert count(old["unet"]) == pytest.approx(859.52, abs=0.01)
    assert count(xl["unet"]) == pytest.approx(2567.46, abs=0.01)
    for parts in (old, xl):
        assert count(parts["vae"]) == pytest.approx(83.65, abs=0.01)


def test_the_text_encoders_are_shallow_but_as_wide_as_the_real_ones(tmp_path: Path) -> None:
    models.write_settings(tmp_path / "model", "sd35-medium")
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(tmp_path / "model"))
    config = sd3.open_model(args)
    assert config.clip_tokens + args.max_sequence_length == 77 + 256
    assert config.text_numbers == 333 * 4096 + 2048
    layout = sd3.Layout.of(config)
    assert (layout.clip_l_width, layout.clip_g_width) == (768, 1280)
    assert (config.shift(None, 1024, 1024), config.pixel_step) == (3.0, 16)
    for part in sd3.TEXT_ENCODERS:
        assert count(models.settings("sd35-medium")[part]) < 200


@pytest.mark.parametrize(
    ("size", "native", "step", "numbers"),
    [("sd15", 512, 64, 77 * 768), ("sdxl", 1024, 32, 77 * 2048 + 1280)],
)
def test_the_models_with_a_unet_have_the_published_widths_and_sizes(
    size: Any, native: int, step: int, numbers: int, tmp_path: Path
) -> None:
    models.write_settings(tmp_path / "model", size)
    args = family.ModelArgs(pretrained_model_name_or_path=str(tmp_path / "model"))
    model = opening.open_model(args)  # what does not fit together is refused there
    assert (model.native_size, model.pixel_step) == (native, step)
    assert SupervisedArgs(model=size).size == models.native_size(size) == native
    assert model.text_numbers == numbers
    assert type(model) is models.FAMILIES[size].Model
    for part in model.text_encoders:
        assert count(models.settings(size)[part]) < 200


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_a_made_model_with_a_unet_draws(size: Any, tmp_path: Path) -> None:
    folder = models.make_model(size, "bf16", tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    kinds = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
    assert type(pipeline).__name__ == kinds[size]
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a caption", height=64, width=64, num_inference_steps=2, output_type="pt"
    ).images
    assert picture.isfinite().all()
    assert picture.std() > 0.01


@pytest.mark.usefixtures("narrow")
def test_a_made_model_is_a_whole_pipeline_that_computes_finite_numbers(tmp_path: Path) -> None:
    folder = models.make_model("sd35-medium", "bf16", tmp_path / "model")
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a caption", height=64, width=64, num_inference_steps=2, output_type="pt"
    ).images
    assert picture.isfinite().all()
    assert picture.std() > 0.01
    weights = pipeline.transformer.state_dict()
    assert all((value == 0).all() for name, value in weights.items() if name.endswith("bias"))
    assert (weights["transformer_blocks.0.attn.norm_q.weight"] == 1).all()
    assert weights["proj_out.weight"].std() == pytest.approx(0.02, rel=0.1)
    norm = pipeline.vae.encoder.conv_norm_out.weight
    assert (norm == 1).all()


@pytest.mark.usefixtures("narrow")
def test_a_model_is_made_once(tmp_path: Path) -> None:
    folder = models.make_model("sd35-medium", "bf16", tmp_path / "model")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    models.make_model("sd35-medium", "bf16", folder)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("narrow")
def test_a_half_made_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, saved = tmp_path / "model", models.tensors.save

    def dies(path: Path, *args: Any) -> None:
        if path.parent.name == "vae":
            raise KeyboardInterrupt
        saved(path, *args)

    monkeypatch.setattr(models.tensors, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        models.make_model("sd35-medium", "bf16", folder)
    assert not folder.exists()
    monkeypatch.setattr(models.tensors, "save", saved)
    models.make_model("sd35-medium", "bf16", folder)
    first = (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    (folder / models.RECIPE).unlink()  # as if somebody had copied half of it
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    models.make_model("sd35-medium", "bf16", folder)
    # Equal bytes: latents that were cached for the first one still fit.
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == first


@pytest.mark.usefixtures("narrow")
def test_other_settings_make_another_model(tmp_path: Path) -> None:
    folder = models.make_model("sd35-medium", "bf16", tmp_path / "model")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_size
    models.make_model("sd35-medium", "fp32", folder)
    assert weights.stat().st_size > 1.9 * before
    models.TRANSFORMERS["sd35-medium"]["num_layers"] = 2
    models.make_model("sd35-medium", "fp32", folder)
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] == 2


# -- limits -----------------------------------------------------------------------------------


def test_the_counted_operations_follow_the_rule(tmp_path: Path) -> None:
    models.write_settings(tmp_path / "model", "sd35-medium")
    model = sd3.ModelArgs(
        pretrained_model_name_or_path=str(tmp_path / "model"),
        max_sequence_length=77,
        gradient_checkpointing=True,
    )
    args = full.FullArgs()
    cost = limits.cost_per_image(sd3.open_model(model), model, args, 512, 512)
    assert cost.flops / 1e12 == pytest.approx(8.55, rel=0.005)
    assert limits.by_rule("sd35-medium", "full", True, 512, 77) == 8.55
    assert limits.by_rule("sd35-medium", "lora", False, 1024, 256) == 26.7
    assert limits.by_rule("sd35-large", "lora", False, 1024, 256) is None


@pytest.mark.parametrize(("size", "method"), [("sd15", "lora"), ("sd15", "full"), ("sdxl", "lora")])
def test_the_counted_operations_of_a_unet_follow_the_rule(
    size: Any, method: Any, tmp_path: Path
) -> None:
    models.write_settings(tmp_path / "model", size)
    args = family.ModelArgs(
        pretrained_model_name_or_path=str(tmp_path / "model"), gradient_checkpointing=True
    )
    model, pixels = opening.open_model(args), models.native_size(size)
    adapter = finetune.LoraArgs(rank=16) if method == "lora" else full.FullArgs()
    cost = limits.cost_per_image(model, model.args, adapter, pixels, pixels)
    by_rule = limits.by_rule(size, method, True, pixels, None)
    assert by_rule is not None
    assert cost.flops / 1e12 == pytest.approx(by_rule, rel=0.01)


def test_a_model_without_t5_has_no_length_of_it() -> None:
    with pytest.raises(SystemExit):
        cli.parse(SupervisedArgs, None, ["--model", "sdxl", "--max_sequence_length", "77"])
    with pytest.raises(ValueError, match="--max_sequence_length: sd15 has no T5"):
        limits.LimitArgs(model="sd15", max_sequence_length=(77,))


@pytest.mark.usefixtures("narrow")
def test_the_table_of_limits_divides_the_machine_by_the_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = limits.LimitArgs(resolution=(64,), max_sequence_length=(77,), tflops=855.0)
    limits.main(args)
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert "images/s at 855 TFLOP/s" in head
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [(row[1], row[2], row[4]) for row in cells] == [
        (method, "64", checkpointing)
        for method in ("LoRA r16", "full")
        for checkpointing in ("no", "yes")
    ]
    assert all(float(row[5]) > 0 for row in cells)


# -- the arithmetic of a run --------------------------------------------------------------------


def record() -> dict[str, Any]:
    """What args.json of a pocket run says."""
    return {
        "args": {
            "model": {"pretrained_model_name_or_path": str(models.POCKET)}
            | {"max_sequence_length": 24},
            "lora": {"rank": 4, "lora_layers": ["attn"]},
            "data": {"height": None, "width": None, "resolution": [64]},
        },
        "device": "NVIDIA H200",
        "git_revision": "abc",
        "versions": {},
    }


def traced(speeds: list[float], seconds: float, **more: float) -> Trace:
    rows = [
        {"images_per_s": speed, "seconds_data": 0.1, "memory_gib": 1.0 + i, **more}
        for i, speed in enumerate(speeds)
    ]
    return Trace(rows, [10.0 + i * seconds for i in range(len(rows))])


def test_warm_up_is_left_out_and_the_rest_enters_by_its_median() -> None:
    args = SupervisedArgs(
        model="pocket", batch_size=4, gradient_accumulation_steps=2, num_steps=3, warmup_steps=2
    )
    trace = traced([0.1, 1.0, 8.0, 1000.0, 16.0], seconds=2.0, mfu=0.25)
    result = supervised.summarise(args, trace, record())
    assert result["images_per_s"] == 16.0
    assert result["images_per_s_range"] == [8.0, 1000.0]
    assert result["seconds_per_step"] == 8 / 16.0
    assert result["images_per_s_by_the_clock"] == 8 / 2.0  # whatever the rows say
    assert result["seconds_to_first_step"] == 10.0
    assert result["memory_gib"] == 5.0
    assert result["mfu"] == 0.25
    assert result["tflops"] == pytest.approx(16.0 * result["tflop_per_image"])
    row = supervised.table_row(result)
    assert (row["images/s"], row["MFU"], row["batch"]) == ("16.00", "25.0%", "4 x 2")
    assert row["device"] == "1 x NVIDIA H200"
    assert markdown([row]).count("\n") == 2


def test_operations_are_counted_for_what_the_run_did_not_for_what_was_asked() -> None:
    args = SupervisedArgs(model="pocket", num_steps=1, warmup_steps=1)
    trace = traced([1.0, 1.0], seconds=1.0)
    said = record()
    plain = supervised.summarise(args, trace, said)["tflop_per_image"]
    said["args"]["model"]["gradient_checkpointing"] = True  # by an extra flag
    assert supervised.summarise(args, trace, said)["tflop_per_image"] > 1.2 * plain
    said["args"]["data"]["resolution"] = [128]
    assert supervised.summarise(args, trace, said)["tflop_per_image"] > 2 * plain


def test_extra_flags_come_last_and_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    args = SupervisedArgs(model="pocket", method="full", num_processes=2, torch_compile=True)
    words = supervised.command(args, tmp_path, tmp_path, tmp_path / "runs" / "x", ["--rank", "3"])
    assert Path(words[words.index("--nproc_per_node") + 2]).name == "train_full_sd3.py"
    assert words[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert words[words.index("--nproc_per_node") + 1] == "2"
    assert words[-2:] == ["--rank", "3"]
    assert words.count("--rank") == 1  # full fine-tuning has none of its own
    assert "--torch_compile" in words
    assert "--gradient_checkpointing" not in words


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("model", "family"),
    [("pocket-sd15", "sd15"), ("sd15", "sd15"), ("pocket-sdxl", "sdxl"), ("sdxl", "sdxl")],
)
def test_the_script_of_the_family_gets_options_that_it_knows(
    model: Any, family: str, method: Any, tmp_path: Path
) -> None:
    args = SupervisedArgs(model=model, method=method, gradient_checkpointing=True)
    words = supervised.command(args, tmp_path, tmp_path, tmp_path / "runs" / "x", [])
    script = importlib.import_module(f"train_{method}_{family}")
    assert words[1] == str(models.ROOT / f"train_{method}_{family}.py")
    options = cli.parse(script.Args, None, words[2:])
    assert options.model.gradient_checkpointing
    assert options.data.resolution == (args.size,)


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts are forked from a process that has imported all: one test starts the real command."""

    @contextmanager
    def started(words: list[str], *, env: dict[str, str], **_: object) -> Iterator[Forked]:
        process = Forked(words, tmp_path, env)
        try:
            yield process
        finally:
            process.end()

    monkeypatch.setattr(bench_processes, "started", started)


@pytest.mark.usefixtures("narrow", "forked")
@pytest.mark.parametrize(("size", "method"), [("sd15", "full"), ("sdxl", "lora")])
def test_a_made_model_is_timed_by_the_script_of_its_family(
    size: str, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    words = f"supervised --model {size} --method {method} --batch_size 2 --resolution 64"
    words += f" --num_steps 1 --warmup_steps 1 --mixed_precision no --allow_cpu --output {out}"
    command_line.main([*words.split(), "--work_dir", str(tmp_path)])
    result = json.loads(out.read_text())
    assert [row["step"] for row in result["rows"]] == [1, 2]
    assert result["tflop_per_image"] > 0
    assert result["t5_tokens"] is None
    assert capfd.readouterr().out.startswith("| model |")


def test_the_pocket_model_is_timed_by_the_real_script(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers" / "pocket.json"
    words = "supervised --model pocket --batch_size 2 --num_steps 2 --warmup_steps 1"
    words += f" --mixed_precision no --rank 2 --work_dir {tmp_path} --output {out}"
    command_line.main([*words.split(), "--", "--lora_layers", "attn.to_q"])
    result = json.loads(out.read_text())
    assert [row["step"] for row in result["rows"]] == [1, 2, 3]
    assert result["images_per_s"] > 0
    assert result["extra"] == ["--lora_layers", "attn.to_q"]
    assert result["versions"]["torch"]
    run = tmp_path / "runs" / "pocket-lora"
    assert json.loads((run / "args.json").read_text())["args"]["lora"]["lora_layers"] == [
        "attn.to_q"
    ]
    assert not list(run.glob("checkpoint-*"))
    head, _, row = capfd.readouterr().out.strip().splitlines()
    assert "images/s" in head
    assert "attn.to_q" in row


def test_a_training_that_fails_is_said_to_have_failed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' * 9)  # of an earlier run
    with pytest.raises(TrainingStopped, match=r"exit code 3 after 0 of 2 steps"):
        supervised.follow([sys.executable, str(broken)], tmp_path / "metrics.jsonl", 2)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A program that writes two and a half rows of metrics and never ends.

    Its child has a session of its own, as torchrun's workers have.
    """
    program = tmp_path / "endless.py"
    program.write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'child').write_text(str(child.pid))\n"
        "with (here / 'metrics.jsonl').open('w') as file:\n"
        '    file.write(\'{"step": 1}\\n{"step": 2}\\n{"step"\')\n'
        "    file.flush()\n"
        "    time.sleep(600)\n"
    )
    return program


def assert_ended(child: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_a_training_is_ended_with_all_its_children_once_the_rows_are_there(endless: Path) -> None:
    metrics = endless.with_name("metrics.jsonl")
    trace = supervised.follow([sys.executable, str(endless)], metrics, 2)
    assert [row["step"] for row in trace.rows] == [1, 2]  # a row in the making is left alone
    assert_ended(int(endless.with_name("child").read_text()))


def test_a_benchmark_that_is_told_to_end_leaves_no_training_behind(endless: Path) -> None:
    metrics = endless.with_name("metrics.jsonl")

    def terminate() -> None:
        while not metrics.is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit):
        supervised.follow([sys.executable, str(endless)], metrics, 3)
    thread.join()
    assert_ended(int(endless.with_name("child").read_text()))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_goal_may_be_epochs_and_the_trace_ends_with_the_last(tmp_path: Path) -> None:
    program = tmp_path / "epochs.py"
    lines = [{"step": i, "epoch": i / 2} for i in range(1, 8)]
    lines.insert(2, {"step": 2, "eval_reward": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    program.write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'metrics.jsonl')!r}).write_text({text!r})\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, str(program)]
    trace = supervised.follow(words, tmp_path / "metrics.jsonl", 3, rl.epochs_done, "epochs")
    assert [row["step"] for row in trace.rows] == [1, 2, 2, 3, 4, 5, 6]
    assert len(trace.arrivals) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sd35_is_refused_without_cuda(tmp_path: Path) -> None:
    args = SupervisedArgs(model="sd35-medium", work_dir=tmp_path)
    with pytest.raises(UserError, match=r"needs CUDA.*--allow_cpu"):
        supervised.main(args)
    assert not list(tmp_path.iterdir())  # nothing of 5 GB was made first


@pytest.mark.parametrize("flag", ["batch_size", "num_steps", "warmup_steps", "num_processes"])
def test_a_number_that_is_too_small_is_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(SupervisedArgs, None, ["--model", "pocket", f"--{flag}", "0"])
    words = capsys.readouterr().err.replace("│", " ").split()  # broken into lines of a box
    said = " ".join(words)
    assert f"--{flag} must be at least 1" in said.replace(f"--{flag} 0", f"--{flag}")


def test_sharded_steps_are_timed_beside_whole_ones_by_turns() -> None:
    took: list[str] = []
    args = sharded.ShardArgs(num_rounds=2, num_steps=3)
    steps = {name: lambda name=name: took.append(name) for name in ("whole", "sharded")}
    result = sharded.alternate(steps, args, lambda: took.append("|"))
    turn = ["|", *["whole"] * 3, "|", "|", *["sharded"] * 3, "|"]
    assert took == ["whole", "sharded", *turn, *turn]
    result |= {"whole_seconds": [2.0, 1.0], "sharded_seconds": [2.0, 3.0], "ratio": 2.0}
    assert "| 1.000, 1.500 | 2.000, 2.500 | 2.00 |" in sharded.table(result)


def test_the_processes_are_started_by_a_command_that_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[list[str]] = []

    def begin(words: list[str], **_: Any) -> Any:
        begun.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sharded.subprocess, "run", begin)
    command_line.main(["sharded", "--num_processes", "3"])
    [words] = begun
    place = words.index("dojo.bench")
    assert words[place + 1] in command_line.COMMANDS
    assert words[place + 1 :] == ["sharded", "--num_processes", "3"]


@pytest.mark.slow
def test_the_two_ways_are_timed_in_processes_of_their_own(tmp_path: Path) -> None:
    flags = ["--batch_size", "2", "--num_rounds", "1", "--num_steps", "1", "--output"]
    command_line.main(["sharded", *flags, str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["whole_seconds"]) == len(found["sharded_seconds"]) == 1


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["supervise"])
    said = f"there are {', '.join(command_line.COMMANDS)}"
    assert said in capsys.readouterr().err


# -- reinforcement learning ---------------------------------------------------------------------


def said(words: list[str]) -> dict[str, Any]:
    """args.json of the run that a command line starts, as the script itself reads it."""
    place = next(i for i, word in enumerate(words) if Path(word).name.startswith("train_"))
    scripts = (train_grpo_sd3, train_ddpo_sd3, train_ddpo_sd15, train_ddpo_sdxl)
    scripts += (train_nft_sd3, train_refl_sd3, train_refl_sd15, train_dpo_sd3)
    script: Any = {one.__name__: one for one in scripts}[Path(words[place]).stem]
    options = cli.parse(script.Args, None, words[place + 1 :])
    return {
        "args": folders.options(options),
        "num_processes": 1,
        "mixed_precision": "bf16",
        "device": "NVIDIA H200",
        "git_revision": "abc",
        "versions": {},
    }


def epochs_of(*seconds: dict[str, float]) -> Trace:
    """A row per epoch, one every 10 s."""
    rows = [
        {"epoch": float(i), "memory_gib": i, **{f"seconds_{k}": v for k, v in one.items()}}
        for i, one in enumerate(seconds, 1)
    ]
    return Trace(rows, [100.0 + 10 * i for i in range(len(rows))])


def test_the_seconds_of_an_epoch_are_shared_by_its_pictures() -> None:
    args = RlArgs(model="pocket", num_prompts=2, group_size=5, batch_size=5, beta=0.1)
    usual = {"decode": 0.5, "reward": 0.25, "reference": 0.25}
    trace = epochs_of(
        {"sample": 900.0, "train": 900.0},
        {"sample": 2.0, "train": 1.0, **usual, "validation": 70.0, "cache": 70.0},
        {"sample": 2.0, "train": 1.0, **usual},
        {"sample": 4.0, "train": 3.0, "decode": 1.0, "reward": 1.0, "reference": 1.0},
    )
    # The second epoch has one more row, and an evaluation's row stands among them.
    trace.rows[1:1] = [{"epoch": 1.5, "seconds_train": 1.0}, {"eval_reward": 0.5}]
    trace.arrivals[:] = [90.0, 95.0, 98.0, 100.0, 115.0, 130.0]
    words = rl.command(args, models.POCKET, Path("work/runs/run"), [])
    result = rl.summarise(args, trace, said(words))
    assert result["seconds_per_image"] == pytest.approx(
        {"sample": 0.2, "decode": 0.05, "reward": 0.025, "train": 0.2, "reference": 0.025}
    )
    assert result["images_per_s"] == 2.0  # ten pictures in 5, 4 and 10 seconds
    assert result["images_per_s_range"] == [1.0, 2.5]
    assert result["images_per_s_by_the_clock"] == 30 / (130 - 90)
    assert result["seconds_to_first_epoch"] == 90.0
    assert result["memory_gib"] == 4
    row = rl.table_row(result)
    assert (row["sample s/image"], row["reward s/image"]) == ("0.2000", "0.0250")
    assert row["share of time"] == "47 : 47 : 6 %"
    assert (row["pictures"], row["images/s"], row["device"]) == ("2 x 5", "2.00", "1 x NVIDIA H200")
    assert (row["CFG"], row["KL"], row["trained steps"]) == ("no", "0.1", "3 of 8")


@pytest.mark.parametrize(
    ("flags", "extra", "passes"),
    [
        ({}, "", (10, 9, 0)),
        ({"guidance_scale": 2.0}, "", (20, 18, 0)),
        ({"train_timesteps": "all"}, "", (10, 3 * 8, 0)),  # CPS never trains the last two
        ({"train_timesteps": "all"}, "--sampler sde", (10, 3 * 9, 0)),
        ({"beta": 0.1, "window_size": 2}, "", (10, 6, 2)),
        ({"beta": 0.1, "guidance_scale": 2.0}, "--num_inner_epochs 2", (20, 36, 12)),
        ({"batch_size": 24, "sample_batch_size": 48}, "", (10 + 3, 9, 0)),
        ({"batch_size": 48, "sample_batch_size": 48}, "", (10, 9, 0)),
        ({"method": "ddpo", "guidance_scale": 2.0}, "", (20, 18, 0)),
        (
            {"model": "pocket-sd15", "method": "ddpo", "guidance_scale": 5.0},
            *("--train_timesteps all", (20, 2 * 3 * 9, 0)),
        ),
        ({"model": "pocket-sdxl", "method": "ddpo", "train_timesteps": "all"}, "", (10, 27, 0)),
        ({"method": "nft"}, "--num_train_timesteps 3", (10, 9, 3 + 3)),
        (
            {"method": "nft", "guidance_scale": 2.0},
            *("--solver heun --kl_beta 0 --old_decay_max 0", (2 * 19, 12, 4 + 1)),
        ),
        # ReFL's scored step lies in the last quarter: 7 to 9 of 0 .. 9.
        ({"method": "refl"}, "", (8, 3, 0)),
        ({"method": "refl", "guidance_scale": 3.0}, "--grad_steps 2", (2 * 7, 2 * 2 * 3, 0)),
        ({"model": "pocket-sd15", "method": "refl"}, "", (8, 3, 0)),
    ],
)
def test_the_passes_of_a_picture_are_those_of_the_rule(
    flags: dict[str, Any], extra: str, passes: tuple[int, ...]
) -> None:
    args = RlArgs(**{"model": "pocket", "sample_steps": 10, **flags})  # pyright: ignore[reportArgumentType]
    words = rl.command(args, models.POCKETS[args.model], Path("work/runs/run"), extra.split())
    assert tuple(rl.forward_passes(said(words), 3).values()) == passes


def test_a_pair_costs_eight_passes_and_its_pictures_are_there(tmp_path: Path) -> None:
    args = RlArgs(model="pocket", method="dpo", batch_size=2, work_dir=tmp_path)
    words = rl.command(args, models.POCKET, tmp_path / "run", [])
    record = said(words)
    assert tuple(rl.forward_passes(record, 3).values()) == (0, 3, 1)
    assert rl.facts(record).pictures == 4
    pairs = open_pairs(PairArgs(dataset_name=record["args"]["data"]["dataset_name"], resolution=64))
    assert len(pairs.pairs) == 4
    result = rl.summarise(args, _steps(record, 5), record)
    assert result["seconds_per_image"]["train"] == 0.5
    assert (result["images_per_s"], result["images_per_hour"]) == (2.0, 7200.0)
    row = rl.table_row(result)
    assert (row["pictures"], row["trained steps"], row["images/hour"]) == ("4", "1", "7,200")


def _steps(record: dict[str, Any], count: int) -> Trace:
    """A row per step of two seconds."""
    rows = [
        {"step": i, "epoch": i / 9, "loss": 0.0, "seconds_train": 2.0, "memory_gib": 1}
        for i in range(1, count)
    ]
    assert rl.steps_done(rows) == count - 1
    return Trace(rows, [2.0 * i for i in range(1, count)])


def test_the_standard_cases_of_a_method_without_trained_steps_are_with_and_without_guidance() -> (
    None
):
    def guided(method: rl.Method) -> list[float]:
        args = RlArgs(model="pocket", cases="standard", method=method)
        return [case.guidance_scale for case in rl.cases(args)]

    assert guided("nft") == guided("refl") == [1.0, rl.GUIDANCE]
    assert guided("dpo") == [1.0]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_counted_operations_are_those_of_the_dry_run(kind: Any) -> None:
    args = RlArgs(
        model="pocket", finetune=kind, guidance_scale=2.0, beta=0.1, gradient_checkpointing=True
    )
    words = rl.command(args, models.POCKET, Path("work/runs/run"), [])
    options = cli.parse(train_grpo_sd3.Args, None, words[2:])
    run: Any = SimpleNamespace(dtype=torch.bfloat16)
    config = sd3.open_model(options.model)
    trained = finetune.choose(options.finetune, run, lora=options.lora, full=options.full)
    larger = replace(options, optim=replace(options.optim, train_batch_size=48))
    _, cost = learning.episode_cost(
        run, trained, config, larger, 1, with_reference=True, checkpointing=True
    )
    trace = epochs_of(*[{"sample": 1.0, "train": 1.0}] * 4)
    result = rl.summarise(args, trace, said(words))
    assert 48 * sum(result["tflop_per_image"].values()) == pytest.approx(cost.flops / 1e12)
    assert result["tflops"] == pytest.approx(192 / 2 * cost.flops / 48 / 1e12)
    assert result["forward_passes_by_rule"] == {"sample": 16, "train": 2 * 3 * 4, "reference": 6}
    backward = result["tflop_per_image"]["train"] / result["tflop_per_image"]["reference"]
    assert (3.8 < backward <= 4) if kind == "full" else (2.9 < backward < 3.4)


def test_the_standard_cases_are_what_the_script_is_told() -> None:
    told = []
    for args in rl.cases(RlArgs(model="sd35-medium", cases="standard", num_processes=2)):
        words = rl.command(args, models.POCKET, Path("work/runs/run"), ["--rank", "3"])
        assert words[words.index("--nproc_per_node") + 1] == "2"
        options = said(words)["args"]
        assert options["lora"]["rank"] == 3
        assert options["sample"]["resolution"] == 512
        assert options["prompts"]["num_eval_prompts"] == 0
        assert (options["reward"]["reward"], options["prompts"]["prompt_set"]) == (
            "jpeg_compressibility",
            "animals",
        )
        assert options["sample"]["num_prompts_per_epoch"] * options["sample"]["group_size"] == 128
        guided = options["sample"]["guidance_scale"] > 1
        told.append((options["rollout"]["train_timesteps"], guided, options["grpo"]["beta"] > 0))
    assert told == [
        ("window", False, False),
        ("window", True, False),
        ("all", False, False),
        ("all", True, False),
        ("window", False, True),
    ]
    assert len(rl.cases(RlArgs(model="pocket", cases="standard", method="ddpo"))) == 4


def test_a_case_that_fails_leaves_the_table_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def follow(words: list[str], metrics: Path, *_: Any) -> Trace:
        record = said(words)
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.with_name("args.json").write_text(json.dumps(record))
        metrics.with_name("manifest.jsonl").write_text('{"sd_dojo": "run"}\n')
        if record["args"]["sample"]["guidance_scale"] > 1:
            raise TrainingStopped("out of memory")
        return epochs_of(*[{"sample": 1.0, "train": 1.0}] * 4)

    monkeypatch.setattr(supervised, "follow", follow)
    monkeypatch.setattr(supervised, "cost_per_image", lambda *_: Cost(2, 0, 1))
    out = tmp_path / "numbers.json"
    args = RlArgs(model="pocket", cases="standard", work_dir=tmp_path, output=out)
    with pytest.raises(TrainingStopped, match=r"guidance_scale 4.5: out of memory; .*all"):
        rl.main(args)
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    kl = [cell.strip() for cell in head.split("|")].index("KL")
    assert [row.split("|")[kl].strip() for row in rows] == ["no", "no", "0.001"]
    assert [result["case"]["beta"] for result in json.loads(out.read_text())] == [0, 0, 0.001]


@pytest.mark.usefixtures("forked")
def test_the_phases_are_read_from_the_real_script_which_evaluates_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    words = "rl --model pocket --num_prompts 2 --group_size 2 --batch_size 2 --sample_steps 3"
    words += " --window_size 1 --guidance_scale 2 --beta 0.1 --num_epochs 2 --mixed_precision no"
    words += f" --work_dir {tmp_path} --output {out}"
    command_line.main([*words.split(), "--", "--rank", "2"])
    (result,) = json.loads(out.read_text())
    assert [row.get("epoch") for row in result["rows"]] == [0.5, 1.0, 2.0, 3.0]
    assert all(seconds > 0 for seconds in result["seconds_per_image"].values())
    whole = sum(result["seconds_per_image"].values())  # of an epoch and of the other, about
    assert 0.5 / result["images_per_s"] < whole < 2 / result["images_per_s"]
    assert not any(name.startswith("eval") for row in result["rows"] for name in row)
    assert not any("seconds_validation" in row for row in result["rows"])
    run = tmp_path / "runs" / "pocket-grpo"
    written = {path.name for path in run.iterdir()} - {".lock"}  # it was killed
    assert written == {"args.json", "data_report.json", "metrics.jsonl", "manifest.jsonl"}
    head, _, row = capfd.readouterr().out.strip().splitlines()
    assert "sample s/image" in head
    assert "grpo lora r2 --rank 2" in row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_epochs 0", "--num_epochs must be at least 1"),
        ("--warmup_epochs 0", "--warmup_epochs must be at least 1"),
        ("--group_size 0", "--group_size must be at least 1"),
        ("--num_processes 0", "--num_processes must be at least 1"),
        ("--method ddpo --beta 0.1", "--beta needs --method grpo"),
        ("--model sd15", "--method grpo: there is no such script for sd15"),
        ("--method nft --window_size 2", "--window_size does nothing with --method nft"),
        ("--method dpo --sample_steps 4", "--sample_steps does nothing with --method dpo"),
        ("--method refl --group_size 4", "--group_size does nothing with --method refl"),
        ("--cases standard --guidance_scale 2", "--cases standard chooses --guidance_scale"),
        ("--cases standard --train_timesteps all", "--cases standard chooses --train_timesteps"),
        ("--prompt_set animals", "--reward pocket needs --prompt_set pocket"),
    ],
)
def test_a_case_that_could_not_be_timed_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(RlArgs, None, ["--model", "pocket", *words.split()])
    answer = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in answer


def test_a_cold_cache_is_timed_and_holds_the_same_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "numbers.json"
    args = caches.CacheBenchArgs(
        resolution=64, num_pictures=5, rounds=2, work_dir=tmp_path, output=output
    )
    caches.main(args)
    found = json.loads(output.read_text())
    assert len(found["digests"]) == 1
    assert found["pictures_per_s"] > 0
    assert found["digests"][0] in capsys.readouterr().out
    assert not (tmp_path / "caches").exists()
