"""Claims about what is trained of either family: its start, its reference, its checkpoints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from dojo import finetune
from dojo.cli import UserError
from dojo.finetune import Adapters, AllWeights, Trained, lora, whole
from dojo.maths.objective import Flow, Objective
from dojo.models import sd3, sd15
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model
from dojo.run import averaging, optim
from dojo.run import run as training
from tests.conftest import reset_accelerate

CPU = torch.device("cpu")


OPTIM = optim.OptimArgs(max_train_steps=2)
EMA = averaging.EmaArgs(use_ema=True)
LORA = lora.LoraArgs(rank=2, lora_alpha=4.0)
KINDS = ("lora", "full")


def make(run: training.Run, kind: str) -> Trained:
    """What is trained, of either kind, not loaded yet."""
    return Adapters(run, LORA) if kind == "lora" else AllWeights(run, finetune.FullArgs())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def predict_sd15(network: Any) -> Tensor:
    return sd15.prediction(
        *(network, draw(2, 4, 8, 8), torch.tensor([3, 900]), draw(2, 20, 64), torch.float32)
    )


def predict_sd3(network: Any) -> Tensor:
    text = (draw(2, 44, 192), draw(2, 160))
    return sd3.velocity(network, draw(2, 16, 8, 8), torch.tensor([0.1, 0.9]), *text, torch.float32)


def objective(model: Model) -> Objective:
    """What is trained; of a flow not what the folder says."""
    return Flow(shift=2.0) if model.part == "transformer" else model.objective((64, 64))


Case = tuple[Model, Callable[[Any], Tensor]]


@pytest.fixture(params=["sd3", "sd15"])
def case(request: pytest.FixtureRequest) -> Case:
    """A family, and a prediction of its network."""
    folder = str(request.getfixturevalue(f"tiny_{request.param}"))
    if request.param == "sd3":
        return sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=folder)), predict_sd3
    return sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=folder)), predict_sd15


def start(folder: Path, precision: Any = "no") -> training.Run:
    reset_accelerate()
    args = training.RunArgs(
        output_dir=folder / "run", report_to=("none",), seed=0, mixed_precision=precision
    )
    return training.start(args, OPTIM)


def shake(made: Trained, seed: int) -> None:
    """What steps do to the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in made.params:
            param.add_(0.05 * torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base_model_now_and_later(
    tmp_path: Path, case: Case, kind: str
) -> None:
    model, predict = case
    base = model.load_network(torch.float32, CPU).eval()
    with torch.no_grad():
        expected = predict(base)
    made = make(start(tmp_path), kind)
    made.load(model, objective(model), with_reference=True)
    assert made.has_reference
    assert torch.equal(predict(made.network), expected)
    shake(made, 0)
    assert not torch.equal(predict(made.network), expected)
    with torch.no_grad(), made.reference() as before:
        assert torch.equal(predict(before), expected)
    loss = predict(made.network).square().mean()
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in made.params)


def test_only_adapters_have_a_reference_for_nothing(tmp_path: Path, case: Case) -> None:
    for kind in KINDS:
        made = make(start(tmp_path), kind)
        made.load(case[0], objective(case[0]))
        assert made.has_reference == made.reference_is_free == (kind == "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_back_to_the_bit(tmp_path: Path, case: Case, kind: str) -> None:
    model, predict = case
    run, folder = start(tmp_path), tmp_path / "checkpoint-2"

    def loaded() -> tuple[Trained, averaging.Averaged]:
        made = make(run, kind)
        made.load(model, objective(model))
        optimizer, _ = optim.make(made.groups, OPTIM, run)
        return made, averaging.Averaged(made.params, EMA, optimizer)

    run.num_steps, run.samples_per_step = 2, 1
    made, averaged = loaded()
    shake(made, 0)
    averaged.update(1)
    shake(made, 1)
    made.save(folder)
    averaged.save(folder, partial(made.save_average, folder))
    other, average = loaded()
    assert not torch.equal(predict(other.network), predict(made.network))
    average.restore(folder, partial(other.restore_average, folder))
    other.restore(folder)
    assert torch.equal(predict(other.network), predict(made.network))
    pairs = zip(other.params, made.params, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with averaged.applied(), average.applied():
        assert torch.equal(predict(other.network), predict(made.network))
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    weights = {model.part, whole.average(model.part)} if kind == "full" else {averaging.FOLDER}
    scheduler = {"scheduler"} if model.part == "transformer" else set()
    assert names == scheduler | weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_on_the_meta_device_has_the_weights_of_a_loaded_one(
    tmp_path: Path, case: Case, kind: str
) -> None:
    """What a dry run counts is what will be trained."""
    model, _ = case
    run, rows = start(tmp_path), (16 if model.part == "transformer" else 4, 8, 8)
    made = make(run, kind)
    planned, cost = finetune.cost_of(run, made, model, 2, rows, checkpointing=False)
    made.load(model, objective(model))

    def sizes(network: Any) -> dict[str, Any]:
        params = network.named_parameters()
        return {name: (param.shape, param.dtype, param.requires_grad) for name, param in params}

    assert sizes(planned) == sizes(made.network)
    assert {param.device.type for param in planned.parameters()} == {"meta"}
    assert cost.flops > cost.forward_flops > 0


def test_the_result_of_adapters_loads_in_plain_diffusers(
    tmp_path: Path, case: Case, request: pytest.FixtureRequest
) -> None:
    model, predict = case
    made = Adapters(start(tmp_path), replace(LORA, lora_format="kohya"))
    made.load(model, objective(model))
    shake(made, 0)
    assert made.save_result(tmp_path) == tmp_path / made.result_name
    assert made.card_weights == made.result_name
    expected = predict(made.network)
    base = request.getfixturevalue("tiny_sd3" if model.part == "transformer" else "tiny_sd15")
    paths = [tmp_path, tmp_path / "pytorch_lora_weights_kohya.safetensors"]
    for path in paths[: 1 if model.part == "transformer" else 2]:
        pipeline: Any = DiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(str(path))
        torch.testing.assert_close(predict(getattr(pipeline, model.part)), expected)


def test_a_run_from_a_loha_trains_that_and_goes_on_from_its_checkpoint(
    tmp_path: Path, tiny_sd15: Path
) -> None:
    model = sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15)))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    sizes = {"w1_a": (80, 2), "w1_b": (2, 80), "w2_a": (80, 2), "w2_b": (2, 80)}
    state = {f"{name}.hada_{kind}": draw(*size) for kind, size in sizes.items()}
    path = tmp_path / "loha.safetensors"
    save_file({**state, f"{name}.alpha": torch.tensor(1.0)}, path)
    args = replace(LORA, init_lora_weights_path=str(path))

    def loaded() -> Adapters:
        found = Adapters(start(tmp_path), args)
        found.load(model, objective(model))
        return found

    made = loaded()
    assert sum(param.numel() for param in made.params) == 4 * 160
    with made.reference() as base:
        plain = predict_sd15(base)
    assert torch.equal(plain, predict_sd15(model.load_network(torch.float32, CPU)))
    shake(made, 0)
    expected = predict_sd15(made.network)
    assert not torch.equal(expected, plain)
    assert made.save_result(tmp_path / "result") == tmp_path / "result" / made.result_name
    again = loaded()
    again.restore(tmp_path / "result")
    assert torch.equal(predict_sd15(again.network), expected)
    # What a dry run counts has the same adapters.
    meta, _ = model.training_cost(torch.float32, made.adapt, 1, (4, 8, 8), checkpointing=False)
    trained = [param for param in meta.parameters() if param.requires_grad]
    assert sum(param.numel() for param in trained) == 4 * 160


def test_the_result_of_all_weights_is_a_pipeline_of_one_plain_call(
    tmp_path: Path, case: Case
) -> None:
    model, predict = case
    frozen = "conv_in" if model.part == "unet" else "pos_embed"
    args = finetune.FullArgs(freeze=(frozen,), max_shard_size="500KB")
    made = AllWeights(start(tmp_path), args)
    made.load(model, objective(model))
    still = [name for name, param in made.network.named_parameters() if not param.requires_grad]
    assert any(name.startswith(frozen) for name in still)
    shake(made, 0)
    result = tmp_path / "result"
    assert made.save_result(result) == result
    assert made.card_weights == ""
    assert (result / made.result_name).is_file()
    assert len(list((result / model.part).glob("*.safetensors"))) > 1
    pipeline: Any = DiffusionPipeline.from_pretrained(result)
    pipeline.set_progress_bar_config(disable=True)
    network = getattr(pipeline, model.part)
    assert {part.dtype for part in (network, pipeline.vae, pipeline.text_encoder)} == {
        torch.float32
    }
    assert torch.equal(predict(network), predict(made.network))
    index = json.loads((result / "model_index.json").read_text())
    assert index[model.part] == ["diffusers", type(made.network).__name__]
    drawn = pipeline("a red circle", num_inference_steps=1, height=64, width=64).images[0]
    assert drawn.size == (64, 64)
    # And our own scripts start from it.
    again = open_model(ModelArgs(pretrained_model_name_or_path=str(result)))
    assert type(again) is type(model)
    assert again.latent_shape(64, 64)[1:] == (8, 8)


def test_what_could_not_be_trained_is_refused(tmp_path: Path) -> None:
    run, low = start(tmp_path), finetune.WholeArgs(train_dtype="bf16")

    def chosen(kind: Any, full: finetune.WholeArgs, **options: Any) -> Trained:
        return finetune.choose(
            finetune.FinetuneArgs(finetune=kind), run, lora=replace(LORA, **options), full=full
        )

    plain = finetune.WholeArgs()
    chosen("lora", plain).check(OPTIM)
    assert chosen("lora", plain).dtype == torch.float32
    with pytest.raises(UserError, match="--train_dtype bf16 goes with --finetune full: adapters"):
        chosen("lora", low)
    with pytest.raises(UserError, match="--train_dtype bf16 needs --mixed_precision bf16"):
        chosen("full", low).check(OPTIM)
    with pytest.raises(UserError, match="--lora_dropout: the network and its reference would not"):
        chosen("lora", plain, lora_dropout=0.1)


def test_an_optimizer_that_cannot_train_bfloat16_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path, "bf16")
    made = AllWeights(run, finetune.WholeArgs(train_dtype="bf16"))
    made.check(OPTIM)
    with pytest.raises(UserError, match="--optimizer prodigy cannot train bfloat16 weights"):
        made.check(optim.OptimArgs(max_train_steps=2, optimizer="prodigy"))


def test_a_reference_costs_its_weights_where_all_are_trained(tmp_path: Path) -> None:
    run = start(tmp_path)

    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False))
    network[0].weight.requires_grad_(False)  # frozen ones are in the copy too
    buffers = sum(one.nbytes for one in network.buffers())
    assert make(run, "full").reference_bytes(network) == 4 * (3 * 5 + 5) + buffers
    assert make(run, "lora").reference_bytes(network) == 0


def test_autocast_costs_a_copy_of_the_weights_where_all_are_trained(tmp_path: Path) -> None:
    sizes = {
        (kind, precision): make(start(tmp_path, precision), kind).bytes_per_weight(OPTIM, EMA)
        for kind in KINDS
        for precision in ("no", "bf16")
    }
    assert sizes["full", "bf16"] == sizes["full", "no"] + 2
    assert sizes["lora", "bf16"] == sizes["lora", "no"]


def test_a_single_file_is_an_option_of_sd3_alone() -> None:
    assert finetune.FullArgs(single_file=True).single_file
    with pytest.raises(TypeError):
        finetune.WholeArgs(single_file=True)  # pyright: ignore[reportCallIssue]


def test_every_script_has_one_option_for_what_is_trained() -> None:
    for name, usual in {
        **{"train_ddpo_sd3": "lora", "train_grpo_sd3": "lora", "train_refl_sd3": "lora"},
        **{"train_ddpo_sd15": "lora", "train_ddpo_sdxl": "lora"},
        **{"train_dpo_sd15": "full", "train_refl_sd15": "full"},
    }.items():
        (group,) = (
            hint
            for hint in get_type_hints(importlib.import_module(name).Args).values()
            if issubclass(hint, finetune.FinetuneArgs)
        )
        assert group().finetune == usual
