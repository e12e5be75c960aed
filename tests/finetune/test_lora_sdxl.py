"""Claims about LoRA files of SDXL: the original code's names, at any depth, and what plain programs
make of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.files import tensors
from dojo.finetune import lora
from dojo.finetune.lora import bases, formats, reading
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors, Lora
from dojo.models.unet.sgm import Blocks
from tests.finetune import sdxl

SDXL = Base(family="sdxl")
TEXT = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def unpooled(**options: Any) -> dict[str, nn.Module]:
    return {"unet": sdxl.unet(**options)}


def everything(
    parts: dict[str, nn.Module], kinds: Any = nn.Linear | nn.Conv2d, ranks: int = 3
) -> Lora:
    """Random updates of every layer that a file may adapt, of as many ranks and alphas."""
    generator = torch.Generator().manual_seed(3)
    found: Lora = {}
    for part, model in parts.items():
        for name, module in model.named_modules():
            if not isinstance(module, kinds):
                continue
            if part != "unet" and not name.endswith(TEXT):
                continue
            weight: Any = module.weight
            shape, own = weight.shape, name
            if part != "unet" and not name.startswith("text_model."):
                own = f"text_model.{name}"
            rank = 1 + len(found.get(part, {})) % ranks
            down = 0.2 * torch.randn(rank, *shape[1:], generator=generator)
            up = 0.2 * torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
            found.setdefault(part, {})[own] = Factors(down, up, (0.5, 1.0, 2.0)[rank - 1])
    return found


def merged(parts: dict[str, nn.Module], updates: Lora) -> dict[str, Tensor]:
    """What the models compute with the updates in their weights."""
    models = copy.deepcopy(parts)
    for part, layers in updates.items():
        modules: dict[str, Any] = dict(models[part].named_modules())
        for name, factors in layers.items():
            module = modules.get(name) or modules[name.removeprefix("text_model.")]
            product = factors.up.flatten(1) @ factors.down.flatten(1)
            module.weight.data += factors.scale * product.reshape(module.weight.shape)
    return sdxl.outputs(sdxl.namespace(models))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=0, atol=2e-5)


def plainly(parts: dict[str, nn.Module], path: Path) -> Any:
    """The models after plain diffusers has loaded the file."""
    models = sdxl.namespace(copy.deepcopy(parts))
    kind: Any = StableDiffusionXLPipeline
    state, alphas, header = kind.lora_state_dict(
        str(path), unet_config=models.unet.config, return_lora_metadata=True
    )
    kind.load_lora_into_unet(state, alphas, models.unet, metadata=header)
    for part in ("text_encoder", "text_encoder_2"):
        if hasattr(models, part):
            kind.load_lora_into_text_encoder(
                *(state, alphas, getattr(models, part)),
                prefix=part,
                lora_scale=1.0,
                metadata=header,
            )
    return models


def ours(parts: dict[str, nn.Module], path: Path) -> Any:
    """The models after we have loaded it."""
    models = sdxl.namespace(copy.deepcopy(parts))
    lora.load(models, path, "mine")
    return models


UNETS: dict[str, dict[str, Any]] = {
    "as deep as SDXL": {},
    "one layer a block": {"layers": 1},
    "of two blocks": {
        "layers": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": (2, 1),
        "attention_head_dim": (1, 2),
    },
}


def base_of(parts: dict[str, nn.Module]) -> Base:
    config: Any = parts["unet"].config
    return Base(family="sdxl", blocks=Blocks.of(config))


@pytest.mark.parametrize("kind", UNETS)
def test_every_layer_keeps_its_place_through_the_original_names(kind: str, tmp_path: Path) -> None:
    parts = sdxl.parts(**UNETS[kind])
    wanted = everything(parts)
    path = tmp_path / "x.safetensors"
    formats.write(path, wanted, "kohya", base_of(parts))
    names = {name.partition(".")[0] for name in load_file(path)}
    assert not any("down_blocks" in name or "up_blocks" in name for name in names)
    expected = merged(parts, wanted)
    close(sdxl.outputs(ours(parts, path)), expected)
    base = sdxl.outputs(sdxl.namespace(parts))
    assert all((expected[part] - base[part]).abs().max() > 1e-3 for part in parts)


def test_the_names_are_those_of_kohyas_scripts(tmp_path: Path) -> None:
    parts = sdxl.parts()
    path = tmp_path / "x.safetensors"
    formats.write(path, everything(parts), "kohya", SDXL)
    names = {name.partition(".")[0] for name in load_file(path)}
    # Written down from files of networks/lora.py of kohya-ss/sd-scripts.
    assert names >= {
        "lora_unet_input_blocks_0_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_emb_layers_1",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_unet_input_blocks_4_0_out_layers_3",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "lora_unet_input_blocks_8_1_transformer_blocks_1_ff_net_0_proj",
        "lora_unet_label_emb_0_0",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_output_blocks_8_0_skip_connection",
        "lora_unet_out_2",
        "lora_unet_time_embed_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    }


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["as deep as SDXL", "one layer a block"])
def test_plain_diffusers_computes_what_we_do(
    kind: str, form: formats.Format, tmp_path: Path
) -> None:
    parts = sdxl.parts(**UNETS[kind])
    path = tmp_path / "x.safetensors"
    # diffusers loses kohya's alphas where they are not all the same.
    wanted = everything(parts, ranks=1 if form == "kohya" else 3)
    formats.write(path, wanted, form, base_of(parts))
    found, plain = sdxl.outputs(ours(parts, path)), sdxl.outputs(plainly(parts, path))
    assert all(torch.equal(found[part], plain[part]) for part in parts)


SPELLINGS = {
    "kohya, diffusers' names": lambda name: f"lora_unet_{name.replace('.', '_')}",
    "diffusers": lambda name: f"unet.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "kohya, a compiled model's": (
        lambda name: "lora_unet__orig_mod_" + Blocks().original(name).replace(".", "_")
    ),
    "ComfyUI": lambda name: f"diffusion_model.{Blocks().original(name)}",
    "single file": lambda name: f"model.diffusion_model.{Blocks().original(name)}",
    "LyCORIS": lambda name: f"lycoris_{Blocks().original(name).replace('.', '_')}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_mean_one_layer(spelling: str, tmp_path: Path) -> None:
    parts = unpooled()
    wanted, state = everything(parts), {}
    for name, factors in wanted["unet"].items():
        key = SPELLINGS[spelling](name)
        state[f"{key}.lora_down.weight"] = factors.down
        state[f"{key}.lora_up.weight"] = factors.up
        state[f"{key}.alpha"] = torch.tensor(factors.alpha)
    save_file(state, tmp_path / "x.safetensors")
    close(sdxl.outputs(ours(parts, tmp_path / "x.safetensors")), merged(parts, wanted))


@pytest.mark.parametrize(
    ("base", "version", "architecture"),
    [
        (Base(family="sd1"), "sd_v1", "stable-diffusion-v1/lora"),
        (Base(family="sd1", predicts_v=True), "sd_v1_v", "stable-diffusion-v1/lora"),
        (Base(family="sd2"), "sd_v2", "stable-diffusion-v2-512/lora"),
        (Base(family="sd2", predicts_v=True), "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (SDXL, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        (
            *(Base(family="sdxl", predicts_v=True), "sdxl_base_v1-0"),
            "stable-diffusion-xl-v1-base/lora",
        ),
    ],
)
def test_the_header_says_base_and_prediction(
    base: Base, version: str, architecture: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    formats.write(path, everything(unpooled(), nn.Linear), "kohya", base)
    metadata = tensors.read_header(path)[1]
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["ss_v_parameterization"] == str(base.predicts_v)
    assert metadata["ss_v2"] == str(base.family == "sd2")
    assert metadata["modelspec.prediction_type"] == ("v" if base.predicts_v else "epsilon")
    # And read again, the header is believed.
    found, reason = bases.guess(reading.read(path)[0], metadata)
    assert (found.family, found.predicts_v) == (base.family, base.predicts_v)
    assert "ss_base_model_version" in reason


def test_without_a_model_the_base_is_told_by_encoders_widths_or_blocks() -> None:
    parts = sdxl.parts()
    layers = everything(parts, nn.Linear)
    assert bases.guess(layers)[0].family == "sdxl"
    assert bases.guess({"unet": layers["unet"]})[0].family == "sdxl"  # two pairs in a block
    one: Lora = {"unet": {}}
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (100, "sd1")):
        name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        one["unet"][name] = Factors(torch.ones(2, width), torch.ones(4, 2), 2.0)
        assert bases.guess(one)[0].family == family


def test_a_file_for_kolors_has_diffusers_names(tmp_path: Path) -> None:
    parts = unpooled()
    path = tmp_path / "x.safetensors"
    formats.write(path, everything(parts, nn.Linear), "kohya", Base(family="kolors"))
    assert any(name.startswith("lora_unet_down_blocks_1_") for name in load_file(path))
    close(sdxl.outputs(ours(parts, path)), merged(parts, everything(parts, nn.Linear)))


def test_a_second_encoder_has_no_place_in_a_file_for_sd1(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sd1 has no text_encoder_2 in kohya's format"):
        formats.write(
            tmp_path / "x.safetensors", everything(sdxl.parts()), "kohya", Base(family="sd1")
        )


@pytest.mark.parametrize("kind", UNETS)
def test_training_starts_from_a_file_with_original_names(kind: str, tmp_path: Path) -> None:
    parts = unpooled(**UNETS[kind])
    wanted = everything(parts, nn.Linear)
    attention = {name: f for name, f in wanted["unet"].items() if ".attn" in name}
    path = tmp_path / "x.safetensors"
    formats.write(path, {"unet": attention}, "kohya", base_of(parts))
    network = copy.deepcopy(parts["unet"])
    args = lora.LoraArgs(rank=4, init_lora_weights_path=str(path))
    lora.add(network, args)
    lora.start_from(args, network)
    close(sdxl.outputs(sdxl.namespace({"unet": network})), merged(parts, {"unet": attention}))


# Convolutions


CONVOLUTIONS = {
    *("down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"),
    *("down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"),
    "mid_block.resnets.1.conv2",
}


def trained(network: nn.Module, **options: Any) -> nn.Module:
    """The network with an adapter of attentions and convolutions that does something."""
    args = lora.LoraArgs(**{"rank": 4, "lora_alpha": 2.0, "conv_rank": 3, **options})
    generator = torch.Generator().manual_seed(3)
    for param in lora.add(network, args):
        param.data = 0.1 * torch.randn(param.shape, generator=generator)
    return network


def test_conv_rank_adapts_resnets_and_samplers_at_a_rank_and_scale_of_their_own() -> None:
    network: Any = trained(sdxl.unet(), conv_alpha=6.0)
    adapted = {
        name: module for name, module in network.named_modules() if hasattr(module, "lora_A")
    }
    convolutions = {n: m for n, m in adapted.items() if isinstance(m.base_layer, nn.Conv2d)}
    assert convolutions.keys() > CONVOLUTIONS
    assert not convolutions.keys() & {"conv_in", "conv_out"}
    assert {(m.r["default"], m.scaling["default"]) for m in convolutions.values()} == {(3, 2.0)}
    linear = adapted.keys() - convolutions.keys()
    assert {(adapted[n].r["default"], adapted[n].scaling["default"]) for n in linear} == {(4, 0.5)}
    plain = trained(sdxl.unet(), conv_rank=0)
    assert linear == {name for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    # Unset, their scale is that of the others.
    same: Any = trained(sdxl.unet()).get_submodule("mid_block.resnets.1.conv2")
    assert same.scaling["default"] == 0.5


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_trained_convolutions_go_to_plain_diffusers(form: formats.Format, tmp_path: Path) -> None:
    network = trained(sdxl.unet(), lora_alpha=4.0, conv_rank=4)
    lora.save(tmp_path, network)
    path = lora.export(tmp_path, form, SDXL)
    expected = sdxl.outputs(sdxl.namespace({"unet": network}))
    plain = sdxl.outputs(plainly(unpooled(), path))
    close(plain, expected)
    found = sdxl.outputs(ours(unpooled(), path))
    assert torch.equal(found["unet"], plain["unet"])
    if form == "kohya":
        header = tensors.read_header(path)[1]
        assert header["ss_network_args"] == '{"conv_dim": "4", "conv_alpha": "4.0"}'


def test_a_saved_convolution_is_restored_to_the_bit_and_started_from(tmp_path: Path) -> None:
    network = trained(sdxl.unet(), conv_alpha=5.0)
    lora.save(tmp_path, network)
    expected = sdxl.outputs(sdxl.namespace({"unet": network}))["unet"]
    other = sdxl.unet()
    lora.add(other, lora.LoraArgs(rank=4, lora_alpha=2.0, conv_rank=3, conv_alpha=5.0))
    lora.restore(tmp_path, other)
    assert torch.equal(sdxl.outputs(sdxl.namespace({"unet": other}))["unet"], expected)
    path = lora.export(tmp_path, "kohya", SDXL)
    wider = sdxl.unet()
    args = lora.LoraArgs(rank=4, conv_rank=5, init_lora_weights_path=str(path))
    lora.add(wider, args)
    lora.start_from(args, wider)
    torch.testing.assert_close(
        sdxl.outputs(sdxl.namespace({"unet": wider}))["unet"], expected, rtol=0, atol=2e-5
    )
    args = lora.LoraArgs(rank=4, conv_rank=2, init_lora_weights_path=str(path))
    narrow = sdxl.unet()
    lora.add(narrow, args)
    with pytest.raises(UserError, match="--conv_rank 2 is smaller than the rank 3"):
        lora.start_from(args, narrow)


def test_sd1s_convolutions_around_its_attentions_are_adapted() -> None:
    network = sdxl.unet(use_linear_projection=False)
    trained(network)
    name = "down_blocks.1.attentions.0.proj_in"
    assert hasattr(network.get_submodule(name), "lora_A")
    assert not hasattr(trained(sdxl.unet()).get_submodule(name), "lora_A")  # it is linear there


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conv_rank": -1}, "--conv_rank must be at least 0"),
        ({"conv_alpha": 1.0}, "--conv_alpha needs --conv_rank"),
        ({"conv_rank": 2, "conv_alpha": 0.0}, "--conv_alpha must be positive"),
    ],
)
def test_the_options_of_convolutions_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lora.LoraArgs(**options)


def test_a_network_without_convolutions_says_so() -> None:
    with pytest.raises(UserError, match="--conv_rank: a Sequential has no convolutions"):
        lora.add(
            nn.Sequential(nn.Linear(2, 2)), lora.LoraArgs(lora_layers=("0",), rank=1, conv_rank=1)
        )
