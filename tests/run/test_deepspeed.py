"""Claims about runs that DeepSpeed takes part in: by its own engine in two processes on the CPU."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dojo.cli import UserError
from dojo.run import deepspeed
from dojo.run import run as training
from dojo.run.optim import OptimArgs
from tests.conftest import MakeArgs, run_flags
from tests.processes import spawn, together
from tests.run import zero
from tests.scripts.runs import metrics

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


@pytest.fixture
def run(tiny_sd3: Path, scene_data: Path, tmp_path: Path) -> Any:
    """`run(name, script, *flags, stage=2)`: four steps in two processes; exit code and words."""

    def act(name: str, script: str, *flags: str, stage: int = 2, processes: int = 2) -> Any:
        own = {"max_train_steps": 4, "seed": 1, "learning_rate": 1e-3, "train_batch_size": 1}
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        given = [*run_flags(tmp_path / name, tiny_sd3, scene_data), *words, *flags]
        if not stage:
            return spawn(script, given, tmp_path / name, processes=processes)
        return together(zero.run, (script, given, stage), tmp_path / name, processes=processes)

    return act


FULL, LORA = "train_full_sd3.py", "train_lora_sd3.py"
RESULT = {
    FULL: "checkpoint-4/transformer/diffusion_pytorch_model.safetensors",
    LORA: "checkpoint-4/pytorch_lora_weights.safetensors",
}
EMA = ("--use_ema", "--gradient_accumulation_steps", "2")
LOW = ("--mixed_precision", "bf16", "--rank", "2", "--optimizer", "lion")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "stage", "flags"), [(FULL, 1, EMA), (FULL, 2, EMA), (LORA, 2, LOW)]
)
def test_a_run_is_that_of_plain_processes_and_goes_on_exactly(
    run: Any, tmp_path: Path, script: str, stage: int, flags: tuple[str, ...]
) -> None:
    for name, plain in (("plain", 0), ("whole", stage)):
        code, said = run(name, script, *flags, stage=plain)
        assert code == 0, said
    plain, whole = (tmp_path / name / "run" for name in ("plain", "whole"))
    for key, near in (("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 0)):
        mine, his = ([row[key] for row in metrics(folder)] for folder in (plain, whole))
        assert mine == pytest.approx(his, rel=near), key
    weights = load_file(whole / RESULT[script])
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    made = json.loads((whole / "checkpoint-4" / "deepspeed" / "made_by.json").read_text())
    assert made == {"stage": stage, "processes": 2}
    again = (*flags, "--resume_from_checkpoint", "latest")
    code, said = run("half", script, *again, "--max_train_steps", "2", stage=stage)
    assert code == 0, said
    code, said = run("half", script, *again, stage=stage)
    assert code == 0, said
    half = tmp_path / "half" / "run"
    assert (half / RESULT[script]).read_bytes() == (whole / RESULT[script]).read_bytes()
    assert not list(half.glob(".checkpoint-*"))


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
        ("ZERO_STAGE", "3", "zero_stage 3 is not supported.*--shard"),
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


class Fake:
    """As much of accelerate as is asked."""

    def __init__(self, stage: int, processes: int) -> None:
        self.state = self.deepspeed_plugin = self
        self.zero_stage, self.num_processes = stage, processes
        self.distributed_type = "DEEPSPEED" if stage else "NO"


def test_a_run_goes_on_with_the_same_processes_only(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / "deepspeed").mkdir(parents=True)
    made = {"stage": 2, "processes": 2}
    (folder / "deepspeed" / "made_by.json").write_text(json.dumps(made))
    deepspeed.check_resume(folder, Fake(2, 2))
    for now, words in ((Fake(2, 4), "ZeRO-2 on 4"), (Fake(1, 2), "ZeRO-1 on 2"), (Fake(0, 2), "")):
        with pytest.raises(UserError, match=f"by DeepSpeed ZeRO-2 on 2 processes.*{words}"):
            deepspeed.check_resume(folder, now)
    plain = tmp_path / "checkpoint-3"
    deepspeed.check_resume(plain, Fake(0, 1))
    with pytest.raises(UserError, match=r"made without DeepSpeed.*ZeRO-2 on 2 processes"):
        deepspeed.check_resume(plain, Fake(2, 2))


def test_one_network_of_float32_weights_is_trained() -> None:
    accelerator = Fake(2, 2)
    with pytest.raises(UserError, match="supervised training, DPO and ReFL"):
        deepspeed.Zero(accelerator, OptimArgs(), passes=2)
    zero = deepspeed.Zero(accelerator, OptimArgs())
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(UserError, match="--train_text_encoder"):
        zero.prepare([network, network], optimizer)
    with pytest.raises(UserError, match="--train_dtype bf16"):
        zero.prepare([network.bfloat16()], optimizer)
