"""Claims about runs that DeepSpeed takes part in: by its own engine in two processes on the CPU."""

import importlib
import json
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.run import checkpoint, deepspeed
from dojo.run import run as training
from dojo.run.optim import OptimArgs
from dojo.run.replicas import Replicas
from dojo.run.sharding import Shards
from tests.conftest import MakeArgs, run_flags
from tests.processes import Death, spawn, together
from tests.run import zero
from tests.scripts import runs
from tests.scripts.runs import metrics

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


@pytest.fixture
def run(tiny_sd3: Path, scene_data: Path, tmp_path: Path) -> Any:
    """`run(name, script, *flags, stage=2, death=None)`: four steps in two processes; exit code and
    words."""

    def act(
        name: str, script: str, *flags: str, stage: int = 2, death: Death | None = None
    ) -> tuple[int, str]:
        own = {"max_train_steps": 4, "seed": 1, "learning_rate": 1e-3, "train_batch_size": 1}
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        given = [*run_flags(tmp_path / name, tiny_sd3, scene_data), *words, *flags]
        if not stage:
            return spawn(script, given, tmp_path / name, processes=2)
        return together(zero.run, (script, given, stage), tmp_path / name, death, processes=2)

    return act


FULL, LORA = "train_full_sd3.py", "train_lora_sd3.py"
RESULT = {
    FULL: "transformer/diffusion_pytorch_model.safetensors",
    LORA: "pytorch_lora_weights.safetensors",
}
EMA = ("--use_ema", "--gradient_accumulation_steps", "2")
# Adam's step grows with the gradient where that is small beside epsilon: clipped ones show.
CLIPPED = (*EMA, "--max_grad_norm", "0.01", "--adam_epsilon", "1e-2", "--adam_weight_decay", "0")
CLIPPED += ("--learning_rate", "0.1", "--validation_prompt", "a star", "a ring", "a cross")
CLIPPED += ("--validation_steps", "2", "--validation_inference_steps", "2")
LOW = ("--mixed_precision", "bf16", "--rank", "2", "--optimizer", "lion")
THRIFTY = ("--rank", "2", "--gradient_checkpointing", *EMA)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "stage", "flags"),
    [
        (FULL, 1, EMA),
        (FULL, 2, CLIPPED),
        (LORA, 2, LOW),
        (FULL, 3, CLIPPED),
        (LORA, 3, LOW),
        (LORA, 3, THRIFTY),
    ],
)
def test_a_run_is_that_of_plain_processes_and_goes_on_exactly(
    run: Any, tiny_sd3: Path, tmp_path: Path, script: str, stage: int, flags: tuple[str, ...]
) -> None:
    for name, plain in (("plain", 0), ("whole", stage)):
        code, said = run(name, script, *flags, stage=plain)
        assert code == 0, said
    plain, whole = (tmp_path / name / "run" for name in ("plain", "whole"))
    # A checkpoint of ZeRO-3 has each process's parts.
    result = f"checkpoint-4/{RESULT[script]}" if stage < 3 else RESULT[script]
    # ZeRO-3 has a linear layer of its own, which under autocast adds the bias to what is rounded.
    off = 100 if stage == 3 and flags is LOW else 1
    for key, near in (("loss", 1e-5 * off), ("grad_norm", 1e-4 * off), ("lr", 0)):
        mine, his = (
            [row[key] for row in metrics(folder) if key in row] for folder in (plain, whole)
        )
        assert mine == pytest.approx(his, rel=near), key
    weights = load_file(whole / result)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    made = json.loads((whole / "checkpoint-4" / "deepspeed" / "made_by.json").read_text())
    assert made == {"stage": stage, "processes": 2}
    again = (*flags, "--resume_from_checkpoint", "latest")
    if flags is CLIPPED:
        start = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
        assert distance(weights, load_file(plain / result)) < 1e-2 * distance(weights, start)
        for step in (0, 2, 4):
            assert len(list((whole / "validation" / f"step-{step}").glob("*.png"))) == 3
    code, said = run("half", script, *again, "--max_train_steps", "2", stage=stage)
    assert code == 0, said
    half = tmp_path / "half" / "run"
    if flags is LOW:  # one process dies while it writes its part
        death = Death(place="checkpoint", count=1)
        code, said = run("half", script, *again, stage=stage, death=death)
        assert code == -signal.SIGKILL, said
        assert [step for step, _ in checkpoint.existing(half)] == [2]
        assert list(half.glob(".checkpoint-4.partial/deepspeed/zero/*zero_pp_rank_1_*"))
    code, said = run("half", script, *again, stage=stage)
    assert code == 0, said
    assert (half / result).read_bytes() == (whole / result).read_bytes()
    assert not list(half.glob(".checkpoint-*"))
    assert not list(half.glob("checkpoint-4/optimizer.pt"))
    assert checkpoint.check_whole(half / "checkpoint-4")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_sdxl", "lora_kolors"])
def test_weights_of_other_families_are_dealt_out_too(tmp_path: Path, name: str) -> None:
    script, inputs = runs.SCRIPTS[name], tmp_path / "inputs"
    runs.make_inputs(inputs)
    losses: list[list[float]] = []
    for stage in (0, 3):
        place = tmp_path / f"stage-{stage}"
        flags = [*script.flags(inputs, place), "--max_train_steps", "4"]
        if stage:
            code, said = together(zero.run, (script.file, flags, stage), place, processes=2)
        else:
            code, said = spawn(script.file, flags, place, processes=2)
        assert code == 0, said
        losses.append([row["loss"] for row in metrics(place / "run") if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_keeps_its_best_whole_weights(run: Any, tmp_path: Path) -> None:
    watched = ("--eval_fraction", "0.2", "--eval_sigmas", "2", "--validation_steps", "2")
    best = ("--rank", "2", "--keep_best", "eval_loss", *watched, *EMA)
    code, said = run("best", LORA, *best, stage=3)
    assert code == 0, said
    folder = tmp_path / "best" / "run"
    weights = load_file(folder / "best" / lora.WEIGHTS)
    assert weights.keys() == load_file(folder / lora.WEIGHTS).keys()
    assert all(value.numel() and value.isfinite().all() for value in weights.values())


@needs_deepspeed
@pytest.mark.slow
def test_a_rate_that_begins_anew_does_so_with_the_first_step(run: Any, tmp_path: Path) -> None:
    flags = ("--rank", "2", "--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest")
    longer = ("--lr_when_length_changes", "restart", "--max_train_steps", "3")
    for words in (("--max_train_steps", "2"), longer):
        code, said = run("longer", LORA, *flags, *words)
        assert code == 0, said
    before, after = (
        load_file(tmp_path / "longer" / "run" / f"checkpoint-{step}" / lora.WEIGHTS)
        for step in (2, 3)
    )
    # By lion or adamw a number moves by about the rate; where the shorter run ended it was 0.
    assert max((after[name] - value).abs().max() for name, value in before.items()) > 5e-4


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Between two networks, as rows of numbers."""
    squares = [(value - other[name]).double().square().sum() for name, value in one.items()]
    return torch.stack(squares).sum().sqrt().item()


# What is refused


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with GPUs, DeepSpeed, and a configuration that asks for it."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: name)
    return monkeypatch


def test_a_cpu_is_refused_whatever_accelerate_would_make_of_it(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for cpu in ("true", "false"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", cpu)
        with pytest.raises(UserError, match=r"DeepSpeed needs GPUs.*torchrun"):
            training.start(args.run, args.optim)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ZERO_STAGE", "0", "zero_stage 0 is not supported, 1, 2 and 3 are"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device cpu"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device nvme"),
        ("CONFIG_FILE", "mine.json", "config_file mine.json"),
    ],
)
def test_settings_that_are_not_ours_are_refused(
    gpus: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    deepspeed.check("bf16", OptimArgs())
    gpus.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=words):
        deepspeed.check("bf16", OptimArgs())


def test_what_does_not_go_with_it_is_named(gpus: pytest.MonkeyPatch) -> None:
    for kind in ("adafactor", "prodigy", "stableadamw", "lion8bit"):
        options: Any = {"optimizer": kind}
        with pytest.raises(UserError, match=f"--optimizer {kind}.*adamw or lion"):
            deepspeed.check(None, OptimArgs(**options))
    with pytest.raises(UserError, match="--fused_backward"):
        deepspeed.check(None, OptimArgs(fused_backward=True))
    with pytest.raises(UserError, match="--mixed_precision fp16"):
        deepspeed.check("fp16", OptimArgs())
    gpus.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        deepspeed.check(None, OptimArgs())
    gpus.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    deepspeed.check("fp16", OptimArgs())


def test_the_two_ways_to_shard_are_not_mixed(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path, "--shard", "--dry_run")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"--shard does not go with DeepSpeed.*multi_gpu\.yaml"):
        training.start(args.run, args.optim)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "torch_compile", True),
        ("model", "activations_on_cpu", True),
        ("lora", "base_precision", "int8"),
        ("lora", "blocks_on_cpu", 2),
        ("lora", "train_text_encoder", True),
        ("lora", "train_dtype", "bf16"),
    ],
)
def test_options_that_were_not_tried_are_refused_before_the_data(
    lora_args: MakeArgs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    name: str,
    value: object,
) -> None:
    monkeypatch.setattr(deepspeed, "of", lambda accelerator: True)
    monkeypatch.setattr(deepspeed, "_stage", lambda accelerator: 2)
    args = lora_args(tmp_path, "--dry_run")
    run = training.start(args.run, args.optim)
    assert isinstance(run.replicas, deepspeed.Zero)
    run.check_folder(args)
    object.__setattr__(getattr(args, group), name, value)
    with pytest.raises(UserError, match=f"--{name} does not work with DeepSpeed"):
        run.check_folder(args)


@pytest.mark.parametrize(
    "name", ["train_grpo_sd3", "train_ddpo_sd3", "train_nft_sd3", "train_ddpo_sd15"]
)
def test_policies_are_refused_before_the_data(name: str) -> None:
    groups = get_type_hints(importlib.import_module(name).Args)
    args = SimpleNamespace(**{key: kind for key, kind in groups.items() if key != "run"})
    deepspeed.check_script(args, Fake(0, 2))
    with pytest.raises(UserError, match="supervised training, DPO and ReFL"):
        deepspeed.check_script(args, Fake(2, 2))


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("train_lora_sdxl", True),
        ("train_full_sd15", True),
        ("train_dpo_sd3", False),
        ("train_refl_sd15", False),
    ],
)
def test_weights_are_dealt_out_for_captioned_pictures_alone(name: str, taken: bool) -> None:
    groups = get_type_hints(importlib.import_module(name).Args)
    args = SimpleNamespace(**{key: kind for key, kind in groups.items() if key != "run"})
    deepspeed.check_script(args, Fake(2, 2))
    if taken:
        deepspeed.check_script(args, Fake(3, 2))
    else:
        with pytest.raises(UserError, match=r"ZeRO-3 is for training on captioned.*zero2\.yaml"):
            deepspeed.check_script(args, Fake(3, 2))


class Fake:
    """As much of accelerate as is asked."""

    def __init__(self, stage: int, processes: int) -> None:
        self.state = self.deepspeed_plugin = self
        self.zero_stage, self.num_processes = stage, processes
        self.distributed_type = "DEEPSPEED" if stage else "NO"


def test_a_run_goes_on_with_the_same_processes_only(tmp_path: Path) -> None:
    def zero(stage: int, processes: int) -> Replicas:
        return deepspeed.Zero(Fake(stage, processes), OptimArgs())

    fake: Any = Fake(0, 2)
    plain, shards = Replicas(fake), Shards(fake, torch.float32, summing=False)
    folder = tmp_path / "checkpoint-2"
    (folder / "deepspeed").mkdir(parents=True)
    made = {"stage": 2, "processes": 2}
    (folder / "deepspeed" / "made_by.json").write_text(json.dumps(made))
    zero(2, 2).check_resume(folder)
    for now, words in (
        (zero(2, 4), "this run is by DeepSpeed ZeRO-2 on 4"),
        (zero(1, 2), "this run is by DeepSpeed ZeRO-1 on 2"),
        (plain, "this run is without"),
    ):
        with pytest.raises(UserError, match=f"by DeepSpeed ZeRO-2 on 2 processes.*{words}"):
            now.check_resume(folder)
    with pytest.raises(UserError, match="made without --shard"):
        shards.check_resume(folder)
    whole = tmp_path / "checkpoint-3"
    plain.check_resume(whole)
    with pytest.raises(UserError, match=r"made without DeepSpeed.*ZeRO-2 on 2 processes"):
        zero(2, 2).check_resume(whole)
    sharded = tmp_path / "checkpoint-4"
    (sharded / "shards").mkdir(parents=True)
    shards.check_resume(sharded)
    for other in (plain, zero(2, 2)):
        with pytest.raises(UserError, match="made with --shard"):
            other.check_resume(sharded)


def test_one_network_of_float32_weights_is_trained() -> None:
    accelerator = Fake(2, 2)
    zero = deepspeed.Zero(accelerator, OptimArgs())
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(UserError, match="supervised training, DPO and ReFL"):
        zero.prepare([network], optimizer, passes=2)
    with pytest.raises(UserError, match="--train_text_encoder"):
        zero.prepare([network, network], optimizer)
    with pytest.raises(UserError, match="--train_dtype bf16"):
        zero.prepare([network.bfloat16()], optimizer)
