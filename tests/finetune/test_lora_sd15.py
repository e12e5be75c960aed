"""Claims about adapters of a UNet: which layers, what plain diffusers reads, kohya's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora import formats, reading
from dojo.finetune.lora.layers import Factors
from dojo.models import sd15

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"


def load(folder: Path) -> UNet2DConditionModel:
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(folder))
    return sd15.open_model(args).load_network(torch.float32, torch.device("cpu"))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def predict(unet: torch.nn.Module) -> Tensor:
    timestep = torch.tensor([100, 900])
    with torch.no_grad():
        return sd15.prediction(unet, draw(2, 4, 8, 8), timestep, draw(2, 20, 64), torch.float32)


def trained(folder: Path, **options: Any) -> UNet2DConditionModel:
    """The model with an adapter that does something."""
    unet = load(folder)
    generator = torch.Generator().manual_seed(3)
    for param in lora.add(unet, lora.LoraArgs(rank=4, **options)):
        param.data = 0.1 * torch.randn(param.shape, generator=generator)
    return unet.eval()


def plainly(folder: Path, weights: Path) -> UNet2DConditionModel:
    """The UNet of a plain pipeline after a plain call."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(weights))
    return pipeline.unet


@pytest.fixture
def saved(tiny_sd15: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder with an adapter of attention and feed-forward layers, and what it predicts."""
    unet = trained(tiny_sd15, lora_alpha=6.0, lora_layers=("attn+ff",))
    lora.save(tmp_path / "lora", unet)
    return tmp_path / "lora", predict(unet)


def fresh(tiny_sd15: Path, path: Path, **options: Any) -> UNet2DConditionModel:
    """A UNet with a new adapter that starts from a file."""
    unet = load(tiny_sd15)
    args = lora.LoraArgs(
        **{"rank": 4, "lora_layers": ("attn+ff",), **options}, init_lora_weights_path=str(path)
    )
    lora.add(unet, args)
    lora.start_from(args, unet)
    return unet.eval()


# Which layers


def test_the_presets_mean_the_transformer_blocks_of_a_unet(tiny_sd15: Path) -> None:
    unet = load(tiny_sd15)
    blocks = [
        name.removesuffix(".attn1") for name, _ in unet.named_modules() if name.endswith(".attn1")
    ]
    assert ATTENTION in blocks
    projections = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v")]
    projections += ["attn1.to_out.0", "attn2.to_out.0"]
    attention = {f"{block}.{name}" for block in blocks for name in projections}
    assert set(lora.target_layers(unet, ["attn"])) == attention
    whole = attention | {f"{block}.ff.net.{n}" for block in blocks for n in ("0.proj", "2")}
    assert set(lora.target_layers(unet, ["attn+ff"])) == whole
    assert set(lora.target_layers(unet, ["all-linear"])) == whole
    assert set(lora.target_layers(unet, ["attn2.to_k"])) == {f"{b}.attn2.to_k" for b in blocks}


def test_a_fresh_adapter_changes_nothing_and_can_be_switched_off(tiny_sd15: Path) -> None:
    unet = load(tiny_sd15)
    before = predict(unet)
    params = lora.add(unet, lora.LoraArgs(rank=2))
    assert torch.equal(predict(unet), before)
    assert {param.dtype for param in params} == {torch.float32}
    for param in params:
        param.data += 0.1
    assert not torch.equal(predict(unet), before)
    with lora.disabled(unet):
        assert torch.equal(predict(unet), before)


# Files


def test_a_plain_pipeline_computes_what_was_trained(
    tiny_sd15: Path, saved: tuple[Path, Tensor]
) -> None:
    folder, expected = saved
    names = set(load_file(folder / lora.WEIGHTS))
    assert all(name.startswith("unet.") for name in names)
    assert f"unet.{ATTENTION}.attn1.to_q.lora_A.weight" in names
    torch.testing.assert_close(predict(plainly(tiny_sd15, folder)), expected)


def test_a_saved_adapter_is_restored_to_the_bit(
    tiny_sd15: Path, saved: tuple[Path, Tensor]
) -> None:
    folder, expected = saved
    unet = load(tiny_sd15)
    lora.add(unet, lora.LoraArgs(rank=4, lora_alpha=6.0, lora_layers=("attn+ff",)))
    lora.restore(folder, unet)
    assert torch.equal(predict(unet.eval()), expected)
    other = load(tiny_sd15)
    lora.add(other, lora.LoraArgs(rank=4))
    with pytest.raises(UserError, match="does not fit"):
        lora.restore(folder, other)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_the_other_programs_form_is_kohyas(
    tiny_sd15: Path, saved: tuple[Path, Tensor], form: formats.Format
) -> None:
    folder, expected = saved
    path = lora.export(folder, form)
    state = load_file(path)
    start = f"lora_unet_{ATTENTION.replace('.', '_')}_attn1_to_q"
    assert f"{start}.lora_down.weight" in state
    assert state[f"{start}.alpha"] == 6
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    torch.testing.assert_close(predict(plainly(tiny_sd15, path)), expected)
    # And through our own reader, to the bit.
    assert torch.equal(predict(fresh(tiny_sd15, path, lora_alpha=6.0)), expected)
    back = path.with_name("back.safetensors")
    formats.write(back, reading.read(path)[0], "diffusers")
    torch.testing.assert_close(predict(plainly(tiny_sd15, back)), expected)


def test_every_name_of_a_unet_survives_kohyas_underscores(tiny_sd15: Path, tmp_path: Path) -> None:
    names = [
        name
        for name, module in load(tiny_sd15).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        and name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
    ]
    assert {name.rpartition(".")[2] for name in names} > {"conv1", "conv_shortcut", "time_emb_proj"}
    factors = Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    path = tmp_path / "names.safetensors"
    formats.write(path, {"unet": dict.fromkeys(names, factors)}, "kohya")
    lora_, left = reading.read(path)
    assert not left
    assert set(lora_["unet"]) == set(names)


def test_a_file_of_diffusers_is_taken_up(tiny_sd15: Path, saved: tuple[Path, Tensor]) -> None:
    folder, expected = saved
    found = predict(fresh(tiny_sd15, folder, rank=8, lora_alpha=None))
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="which --lora_layers does not"):
        fresh(tiny_sd15, folder, lora_layers=("attn",))
    with pytest.raises(UserError, match="--rank 2 is smaller"):
        fresh(tiny_sd15, folder, rank=2)


def test_what_a_kohya_file_adapts_besides_is_left_out_and_said(
    tiny_sd15: Path, saved: tuple[Path, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = saved
    path = lora.export(folder, "kohya")
    state = load_file(path)
    for name in (
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        shape = (1, 1) if "proj_in" in name else ()
        state[f"{name}.lora_down.weight"] = torch.ones(4, 64, *shape)
        state[f"{name}.lora_up.weight"] = torch.ones(64, 4, *shape)
    save_file(state, path)
    capsys.readouterr()
    assert torch.equal(predict(fresh(tiny_sd15, path, lora_alpha=6.0)), expected)
    said = capsys.readouterr().out
    assert "2 layers are not trained here" in said
    save_file({name: value for name, value in state.items() if "lora_te_" in name}, path)
    with pytest.raises(UserError, match="not one layer fits this model, such as text_encoder"):
        fresh(tiny_sd15, path)


def test_our_loading_counts_what_arrives(tiny_sd15: Path, saved: tuple[Path, Tensor]) -> None:
    folder, expected = saved
    count = len(load_file(folder / lora.WEIGHTS))
    for path in (folder, lora.export(folder, "kohya")):
        pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd15)
        assert lora.load(pipeline, path, "trained") == count
        torch.testing.assert_close(predict(pipeline.unet), expected)


def test_an_adapter_of_the_other_family_is_refused(
    tiny_sd15: Path, saved: tuple[Path, Tensor], tiny_sd3: Path, tmp_path: Path
) -> None:
    folder, _ = saved
    transformer: Any = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    args = lora.LoraArgs(rank=2, init_lora_weights_path=str(folder))
    lora.add(transformer, args)
    with pytest.raises(UserError, match="is a LoRA for Stable Diffusion 1"):
        lora.start_from(args, transformer)
    lora.save(tmp_path / "sd3", transformer)
    with pytest.raises(UserError, match="not one layer fits this model, such as transformer"):
        fresh(tiny_sd15, tmp_path / "sd3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    for path in (folder, lora.export(folder, "kohya")):
        with pytest.raises(UserError, match="not one layer fits this model, such as unet"):
            lora.load(pipeline, path, "wrong")


def test_the_header_says_the_configuration(saved: tuple[Path, Tensor]) -> None:
    with safe_open(saved[0] / lora.WEIGHTS, framework="pt") as file:
        config = json.loads(file.metadata()[formats.METADATA])
    assert config["unet.r"] == 4
    assert config["unet.lora_alpha"] == 6
