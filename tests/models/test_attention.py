"""Attention backends: one way into every network's attention; without a name nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from diffusers.models import attention_dispatch
from safetensors.torch import load_file
from torch import Tensor, nn

import demo
import train_lora_sd3
from dojo import cli
from dojo.cli import UserError
from dojo.evaluate import ValidationArgs
from dojo.models import attention, opening
from dojo.models.family import ModelArgs
from dojo.rng import normal
from tests.conftest import make_scenes, run_flags
from tests.scripts.runs import in_process

CPU = torch.device("cpu")
DRAWN_WITH = ("--validation_attention_backend", "_native_math")


@pytest.fixture(params=["sd3", "sd15", "sdxl", "hunyuandit"])
def asked(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A tiny network of a family, and a pass through it."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    model = opening.open_model(ModelArgs(pretrained_model_name_or_path=str(folder)))
    network = model.load_network(torch.float32, CPU)
    shape = model.latent_shape(64, 64)
    noisy, level, conditions = model.meta_inputs(2, shape, torch.float32)
    filled = {k: normal(one.shape[1:], [(k, 0), (k, 1)]) for k, one in conditions.items()}
    level = torch.full(level.shape, 0.5).to(level.dtype) + (level.dtype == torch.int64) * 500
    latents = normal(noisy.shape[1:], [("noisy", 0), ("noisy", 1)])

    def predict(network: nn.Module) -> Tensor:
        return model.predict(network, latents, level, filled, torch.float32)

    return network, predict


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the dispatcher is asked for, one by one."""
    found: list[str] = []
    original = attention_dispatch.dispatch_attention_fn

    def told(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        found.append(backend.value)
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", told)
    return found


def attending(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "set_processor")]


def test_the_names_are_those_of_diffusers() -> None:
    theirs = {one.value for one in attention_dispatch.AttentionBackendName}
    assert set(get_args(attention.Backend)) == theirs - {"_native_npu", "_native_xla", "flex"}


def test_without_a_name_no_processor_is_touched(asked: Any, calls: list[str]) -> None:
    network, predict = asked
    before = [module.processor for module in attending(network)]
    attention.install(network, None)
    with attention.while_drawing(network, None):
        predict(network)
    assert all(a.processor is b for a, b in zip(attending(network), before, strict=True))
    assert not calls


def test_every_attention_of_a_network_goes_through_the_dispatcher(
    asked: Any, calls: list[str]
) -> None:
    network, predict = asked
    with torch.no_grad():
        plain = predict(network)
        attention.install(network, "native")
        assert torch.equal(predict(network), plain), "torch's own choice, through another door"
        layers = len(calls)
        assert layers == len(attending(network))
        with attention.while_drawing(network, "_native_math"):
            torch.testing.assert_close(predict(network), plain, rtol=1e-3, atol=1e-4)
        assert calls[layers:] == ["_native_math"] * layers
        assert torch.equal(predict(network), plain)
    assert calls[2 * layers :] == ["native"] * layers


def test_gradients_come_back_also_through_recomputed_blocks(asked: Any, calls: list[str]) -> None:
    network, predict = asked
    found: list[list[Tensor]] = []
    for name, again in ((None, False), ("native", False), ("native", True)):
        attention.install(network, name)
        if again:
            network.enable_gradient_checkpointing()
        network.train().requires_grad_(True)
        calls.clear()
        predict(network).square().mean().backward()
        found.append([param.grad for param in network.parameters() if param.grad is not None])
        network.zero_grad()
    layers = len(attending(network))
    assert layers < len(calls) <= 2 * layers, "blocks were not recomputed with the backend"
    assert found[0]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_autocast_reaches_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    original = attention_dispatch.dispatch_attention_fn

    def told(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return original(query, *args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", told)
    one = normal((2, 8, 16), [(0,)])
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.dispatch("native", one, one, one)
    assert seen == [torch.bfloat16]
    assert found.dtype == torch.bfloat16


# -- what is refused ----------------------------------------------------------------------------


def check(name: str | None, **more: Any) -> None:
    options: dict[str, Any] = {"trains": True, **more}
    attention.check(name, attention.FLAG, CPU, torch.float32, **options)


@pytest.mark.parametrize("name", [None, "native", "_native_math"])
def test_what_computes_here_passes(name: str | None) -> None:
    check(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xformers", "missing package"),
        ("flash_hub", "kernels"),
        ("_native_cudnn", "cpu, float32"),
    ],
)
def test_what_does_not_is_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"--attention_backend {name} does not compute.*{words}"):
        check(name)


def test_sage_is_refused_for_training_by_name_whatever_is_installed() -> None:
    for name in get_args(attention.Backend):
        if "sage" in name:
            with pytest.raises(ValueError, match="--validation_attention_backend takes it"):
                ModelArgs(pretrained_model_name_or_path="x", attention_backend=name)
            with pytest.raises(UserError, match="computes no gradients"):
                check(name)
            ValidationArgs(validation_attention_backend=name)


def test_a_kernel_that_answers_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(query: Tensor, *_: Any, **__: Any) -> Tensor:
        return query * torch.nan

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", nonsense)
    with pytest.raises(UserError, match="gives no numbers"):
        check("native", trains=False)


@pytest.mark.parametrize("flag", ["attention_backend", "validation_attention_backend"])
def test_a_compiled_network_chooses_for_itself(flag: str) -> None:
    model = SimpleNamespace(attention_backend=None, torch_compile=True)
    validation = SimpleNamespace(validation_attention_backend=None)
    args = SimpleNamespace(model=model, validation=validation)
    attention.check_run(args, CPU, torch.float32)
    group = model if flag == "attention_backend" else validation
    setattr(group, flag, "native")
    with pytest.raises(UserError, match=f"--{flag} does not go with --torch_compile"):
        attention.check_run(args, CPU, torch.float32)


# -- scripts ------------------------------------------------------------------------------------


def test_a_run_says_what_computed_and_trains_the_same(
    tmp_path: Path, tiny_sd3: Path, calls: list[str]
) -> None:
    make_scenes(tmp_path / "scenes")
    for name, more in (
        ("plain", []),
        (
            "named",
            ["--attention_backend", "native", "--validation_attention_backend", "_native_math"],
        ),
    ):
        flags = run_flags(tmp_path / name, tiny_sd3, tmp_path / "scenes")
        flags += ["--seed", "0", "--max_train_steps", "1", "--validation_prompt", "a star"]
        flags += ["--validation_inference_steps", "1", "--latent_cache_dir", str(tmp_path / "c")]
        in_process(train_lora_sd3, [*flags, *more])
        assert bool(calls) == (name == "named")
    runs = [tmp_path / name / "run" for name in ("plain", "named")]
    weights = [load_file(run / "pytorch_lora_weights.safetensors") for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    # Trials first, then pictures by the one and steps by the other.
    assert [calls[0], calls[1]] == ["native", "_native_math"]
    assert {*calls} == {"native", "_native_math"}
    record = json.loads((runs[1] / "args.json").read_text())["args"]
    assert record["model"]["attention_backend"] == "native"
    assert record["validation"]["validation_attention_backend"] == "_native_math"


def test_demo_draws_with_it(tmp_path: Path, tiny_sd15: Path, calls: list[str]) -> None:
    flags = ["--pretrained_model_name_or_path", str(tiny_sd15), "--prompt", "a star"]
    flags += ["--num_inference_steps", "2", "--seed", "1", "--device", "cpu"]
    for name, more in (("plain", []), ("named", ["--attention_backend", "native"])):
        folder = ["--output_dir", str(tmp_path / name)]
        demo.main(cli.parse(demo.Args, None, [*flags, *folder, *more]))
    files = [next((tmp_path / name).glob("*.png")) for name in ("plain", "named")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(calls) == {"native"}
    options = json.loads((tmp_path / "named" / "prompts.json").read_text())["options"]
    assert options["attention_backend"] == "native"
