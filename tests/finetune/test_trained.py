"""Claims about what is trained of either family: its start, its reference, its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune import weights as trained
from dojo.finetune import whole as full
from dojo.finetune.weights import Trained
from dojo.models import sd3, sd15
from dojo.run import averaging, optim
from dojo.run import run as training

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A script's options."""

    lora: lora.LoraArgs = field(default_factory=lambda: lora.LoraArgs(rank=2, lora_alpha=4.0))
    full: full.WholeArgs = field(default_factory=full.FullArgs)
    optim: optim.OptimArgs = field(default_factory=lambda: optim.OptimArgs(max_train_steps=2))
    ema: averaging.EmaArgs = field(default_factory=lambda: averaging.EmaArgs(use_ema=True))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def predict_sd15(network: Any) -> Tensor:
    return sd15.epsilon(
        *(network, draw(2, 4, 8, 8), torch.tensor([3, 900]), draw(2, 20, 64), torch.float32)
    )


def predict_sd3(network: Any) -> Tensor:
    text = (draw(2, 44, 192), draw(2, 160))
    return sd3.velocity(network, draw(2, 16, 8, 8), torch.tensor([0.1, 0.9]), *text, torch.float32)


Case = tuple[trained.Family, Callable[[Any], Tensor]]


@pytest.fixture(params=["sd3", "sd15"])
def case(request: pytest.FixtureRequest) -> Case:
    """A family, and a prediction of its network."""
    folder = str(request.getfixturevalue(f"tiny_{request.param}"))
    if request.param == "sd3":
        model = sd3.ModelArgs(pretrained_model_name_or_path=folder)
        return trained.Sd3Family(sd3.open_model(model), model, 2.0), predict_sd3
    other = sd15.ModelArgs(pretrained_model_name_or_path=folder)
    return trained.Sd15Family(sd15.open_model(other), other), predict_sd15


def start(folder: Path) -> training.Run:
    args = training.RunArgs(
        output_dir=folder / "run", report_to="none", seed=0, mixed_precision="no"
    )
    return training.start(args, optim.OptimArgs(max_train_steps=2))


def shake(made: Trained, seed: int) -> None:
    """What steps do to the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in made.params:
            param.add_(0.05 * torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("is_lora", [True, False])
def test_the_reference_is_the_base_model_now_and_later(
    tmp_path: Path, case: Case, is_lora: bool
) -> None:
    family, predict = case
    base = family.load(torch.float32, CPU).eval()
    with torch.no_grad():
        expected = predict(base)
    made = Trained(start(tmp_path), family, Groups(), is_lora=is_lora, with_reference=True)
    assert made.has_reference
    assert made.card_weights == (lora.WEIGHTS if is_lora else "")
    assert torch.equal(predict(made.network), expected)
    shake(made, 0)
    assert not torch.equal(predict(made.network), expected)
    with torch.no_grad(), made.reference() as before:
        assert torch.equal(predict(before), expected)
    loss = predict(made.network).square().mean()
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in made.params)


@pytest.mark.parametrize("is_lora", [True, False])
def test_a_checkpoint_is_read_back_to_the_bit(tmp_path: Path, case: Case, is_lora: bool) -> None:
    family, predict = case
    run, args = start(tmp_path), Groups()

    def make() -> tuple[Trained, averaging.Averaged]:
        made = Trained(run, family, args, is_lora=is_lora, with_reference=False)
        optimizer = torch.optim.SGD(made.params)
        return made, averaging.Averaged(made.params, args.ema, optimizer)

    made, averaged = make()
    shake(made, 0)
    averaged.update(1)
    shake(made, 1)
    made.save(tmp_path / "checkpoint-2", averaged)
    other, average = make()
    assert not torch.equal(predict(other.network), predict(made.network))
    other.restore(tmp_path / "checkpoint-2", average)
    assert torch.equal(predict(other.network), predict(made.network))
    pairs = zip(other.params, made.params, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with averaged.applied(), average.applied():
        assert torch.equal(predict(other.network), predict(made.network))
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir() if path.is_dir()}
    whole = {family.part, full.average(family.part)}
    scheduler = {"scheduler"} if family.part == "transformer" else set()
    assert names == (scheduler | ({averaging.FOLDER} if is_lora else whole))


def test_a_lora_result_loads_in_plain_diffusers(tmp_path: Path, tiny_sd15: Path) -> None:
    model = sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15))
    family = trained.Sd15Family(sd15.open_model(model), model)
    args = Groups(lora=lora.LoraArgs(rank=2, lora_alpha=4.0, lora_format="kohya"))
    made = Trained(start(tmp_path), family, args, is_lora=True, with_reference=False)
    shake(made, 0)
    assert made.save_result(tmp_path) == tmp_path / trained.result_name(is_lora=True)
    expected = predict_sd15(made.network)
    for path in (tmp_path, tmp_path / "pytorch_lora_weights_kohya.safetensors"):
        pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd15)
        pipeline.load_lora_weights(str(path))
        torch.testing.assert_close(predict_sd15(pipeline.unet), expected)


def test_a_whole_result_is_a_pipeline_of_one_plain_call(tmp_path: Path, tiny_sd15: Path) -> None:
    model = sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15))
    family = trained.Sd15Family(sd15.open_model(model), model)
    args = Groups(full=full.WholeArgs(freeze=("conv_in",), max_shard_size="500KB"))
    made = Trained(start(tmp_path), family, args, is_lora=False, with_reference=False)
    assert not made.network.conv_in.weight.requires_grad
    shake(made, 0)
    result = tmp_path / "result"
    assert made.save_result(result) == result
    assert (result / trained.result_name(is_lora=False)).is_file()
    assert len(list((result / "unet").glob("*.safetensors"))) > 1
    pipeline: Any = StableDiffusionPipeline.from_pretrained(result)
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {
        torch.float32
    }
    assert torch.equal(predict_sd15(pipeline.unet), predict_sd15(made.network))
    index = json.loads((result / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (64, 64)
    # And our own scripts start from it.
    again = sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=str(result)))
    assert again.latent_shape(64, 64) == (4, 8, 8)


def test_what_could_not_be_trained_is_refused(tmp_path: Path) -> None:
    run, args = start(tmp_path), Groups(full=full.WholeArgs(train_dtype="bf16"))
    trained.check(run, args, is_lora=True)
    assert trained.trained_dtype(args, is_lora=True) == torch.float32
    with pytest.raises(UserError, match="--train_dtype bf16 needs --mixed_precision bf16"):
        trained.check(run, args, is_lora=False)


def test_a_reference_costs_its_weights_where_all_are_trained(tmp_path: Path) -> None:
    run, args = start(tmp_path), Groups()

    def size(*, is_lora: bool, with_reference: bool) -> int:
        return trained.bytes_per_weight(run, args, is_lora=is_lora, with_reference=with_reference)

    alone = size(is_lora=False, with_reference=False)
    assert size(is_lora=False, with_reference=True) == alone + 4
    assert size(is_lora=True, with_reference=True) == size(is_lora=True, with_reference=False)


def test_a_single_file_is_an_option_of_sd3_alone() -> None:
    assert full.FullArgs(single_file=True).single_file
    with pytest.raises(TypeError):
        full.WholeArgs(single_file=True)  # pyright: ignore[reportCallIssue]
