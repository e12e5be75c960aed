"""Claims about LoRA files in three public formats: one model's output, whatever the names."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo import cli
from dojo.cli import UserError
from dojo.files import tensors
from dojo.finetune import lora
from dojo.finetune.lora import __main__ as command_line
from dojo.finetune.lora import formats, reading
from dojo.finetune.lora.layers import Factors
from dojo.models import sd3
from dojo.models.sd3 import keys
from tests.processes import spawn

ORIGINAL = ("kohya", "comfyui")
CPU = torch.device("cpu")


def predict(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 20, 192, generator=generator),
        "pooled_projections": torch.randn(2, 160, generator=generator),
        "timestep": torch.tensor([100.0, 900.0]),
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def embed(model: Any) -> Tensor:
    tokens = torch.arange(20)[None] % 7
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(), output[0].flatten()])


@pytest.fixture
def base(tiny_sd3: Path) -> SD3Transformer2DModel:
    """The frozen MMDiT."""
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3))
    return sd3.open_model(args).load_network(torch.float32, CPU)


@pytest.fixture
def pipeline(tiny_sd3: Path) -> Any:
    """A pipeline to load files into, with everything that may be adapted."""
    return load_pipeline(tiny_sd3)


def load_pipeline(folder: Path) -> Any:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        folder, vae=None, text_encoder_3=None, tokenizer_3=None
    )
    for part in formats.PARTS:
        getattr(pipeline, part).requires_grad_(False)
    return pipeline


def randomize(params: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    for param in params:
        param.data = 0.1 * torch.randn(param.shape, generator=generator)


def trained(folder: Path, model: Any, *layers: str, rank: int = 3, alpha: float = 5.0) -> Tensor:
    """Saves a random adapter and gives what the model computes with it."""
    args = lora.LoraArgs(rank=rank, lora_alpha=alpha, lora_layers=layers)
    randomize(lora.add(model, args))
    lora.save(folder, model)
    return predict(model)


def merged(base: Any, path: Path, form: str) -> Tensor:
    """What the base computes when a file is merged into it under the original names.

    This is how ComfyUI and sd-scripts apply such files, and asks nothing of the code under test:
    diffusers' own converter gives the merged model its names back.
    """
    state = {n: make("cpu") for n, make in keys.transformer_to_original(base.state_dict()).items()}
    file = load_file(path)
    merges = 0
    for name in state:
        module = name.removesuffix(".weight")
        key = f"diffusion_model.{module}"
        if form == "kohya":
            key = "lora_unet_" + module.replace(".", "_")
        if f"{key}.lora_down.weight" in file:
            down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
            alpha = file.get(f"{key}.alpha", torch.tensor(len(down)))
            state[name] = state[name] + alpha.item() / len(down) * up.float() @ down.float()
            merges += 1
    assert merges
    converted = convert_sd3_transformer_checkpoint_to_diffusers(state)
    other: Any = SD3Transformer2DModel.from_config(base.config)
    other.load_state_dict(converted)
    return predict(other.eval())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


CHOICES = {
    "attn": ("attn",),
    "all-linear": ("all-linear",),
    "key and value": ("attn.to_k", "attn.to_v", "attn2.to_v"),
    "queries": ("attn.to_q", "attn.add_q_proj"),
    "outside the blocks": (
        r"re:norm_out.linear|proj_out|context_embedder|time_text_embed\..*|.*3.norm1_context.*",
    ),
}


@pytest.mark.parametrize("form", ORIGINAL)
@pytest.mark.parametrize("layers", CHOICES.values(), ids=CHOICES)
def test_a_file_computes_the_same_in_every_format(
    base: Any, pipeline: Any, tiny_sd3: Path, tmp_path: Path, layers: tuple[str, ...], form: Any
) -> None:
    plain = predict(base)
    expected = trained(tmp_path, base, *layers)
    assert (expected - plain).abs().max() > 1e-3  # else nothing is shown
    path = lora.export(tmp_path, form)
    assert path == tmp_path / f"pytorch_lora_weights_{form}.safetensors"
    # Merged by names, as the programs that this file is for do it.
    close(merged(pipeline.transformer, path, form), expected)
    # Loaded by us.
    lora.load(pipeline, path, "mine")
    close(predict(pipeline.transformer), expected)
    # Converted back, and loaded by plain diffusers.
    back, lost = reading.read(path)
    assert lost == []
    formats.write(tmp_path / "back.safetensors", back, "diffusers")
    plain_pipeline = load_pipeline(tiny_sd3)
    plain_pipeline.load_lora_weights(tmp_path, weight_name="back.safetensors")
    close(predict(plain_pipeline.transformer), expected)
    # The way there and back loses no rank and makes none up.
    original, _ = reading.read(tmp_path / lora.WEIGHTS)
    ranks = {name: factors.rank for name, factors in original["transformer"].items()}
    assert {name: factors.rank for name, factors in back["transformer"].items()} == ranks


# Written down from networks/lora_sd3.py of kohya-ss/sd-scripts and comfy/lora.py of ComfyUI.
PUBLIC_NAMES = {
    "kohya": [
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight",
        "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha",
        "lora_unet_joint_blocks_0_x_block_attn2_qkv.alpha",
        "lora_unet_joint_blocks_0_x_block_attn2_proj.alpha",
        "lora_unet_joint_blocks_0_x_block_attn_proj.lora_up.weight",
        "lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_up.weight",
        "lora_unet_joint_blocks_0_x_block_mlp_fc2.lora_up.weight",
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1.lora_down.weight",
        "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight",
        "lora_unet_joint_blocks_0_context_block_attn_proj.lora_down.weight",
        "lora_unet_joint_blocks_0_context_block_mlp_fc1.lora_down.weight",
        "lora_unet_joint_blocks_3_context_block_adaLN_modulation_1.alpha",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj.alpha",
        "lora_te2_text_model_encoder_layers_2_self_attn_v_proj.lora_up.weight",
    ],
    "comfyui": [
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight",
        "diffusion_model.joint_blocks.0.x_block.attn2.qkv.lora_up.weight",
        "diffusion_model.joint_blocks.0.context_block.mlp.fc2.alpha",
        "diffusion_model.joint_blocks.3.context_block.adaLN_modulation.1.lora_up.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.k_proj.alpha",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.2.self_attn.v_proj"
        ".lora_down.weight",
    ],
}


def three_adapters(pipeline: Any, folder: Path, **options: Any) -> None:
    """Saves random adapters of the transformer and of both CLIPs."""
    args = lora.LoraArgs(lora_layers=("all-linear",), **options)
    params = lora.add(pipeline.transformer, args)
    params += lora.add_text(pipeline.text_encoder, args, rank=2)
    params += lora.add_text(pipeline.text_encoder_2, args, rank=5)
    randomize(params)
    lora.save(folder, *(getattr(pipeline, part) for part in formats.PARTS))


@pytest.mark.parametrize("form", ORIGINAL)
def test_the_names_are_public_and_the_text_encoders_come_along(
    pipeline: Any, tiny_sd3: Path, tmp_path: Path, form: Any
) -> None:
    three_adapters(pipeline, tmp_path, rank=4, lora_alpha=6.0)
    path = lora.export(tmp_path, form)
    header, metadata = tensors.read_header(path)
    assert header.keys() >= set(PUBLIC_NAMES[form])
    assert all(name.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for name in header)
    assert metadata["ss_network_module"] == "networks.lora_sd3"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6.0")
    assert metadata["modelspec.architecture"] == "stable-diffusion-3.5-medium/lora"
    fresh = load_pipeline(tiny_sd3)
    before = embed(fresh.text_encoder_2)
    lora.load(fresh, path, "mine")
    close(predict(fresh.transformer), predict(pipeline.transformer))
    close(embed(fresh.text_encoder), embed(pipeline.text_encoder))
    close(embed(fresh.text_encoder_2), embed(pipeline.text_encoder_2))
    assert (embed(fresh.text_encoder_2) - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", ORIGINAL)
def test_every_layer_may_have_its_own_rank_and_alpha(
    base: Any, pipeline: Any, tmp_path: Path, form: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    modules = dict(base.named_modules())
    layers = {}
    for i, name in enumerate(lora.target_layers(base, ["all-linear"])):
        rank, (rows, columns) = 1 + i % 4, modules[name].weight.shape
        down = 0.1 * torch.randn(rank, columns, generator=generator)
        up = 0.1 * torch.randn(rows, rank, generator=generator)
        layers[name] = Factors(down, up, alpha=1.0 + i % 3)
    for name, factors in layers.items():
        weight = modules[name].weight
        weight.data = weight + factors.scale * factors.up @ factors.down
    formats.write(tmp_path / "own.safetensors", {"transformer": layers}, form)
    formats.write(tmp_path / "plain.safetensors", {"transformer": layers}, "diffusers")
    close(merged(pipeline.transformer, tmp_path / "own.safetensors", form), predict(base))
    lora.load(pipeline, tmp_path / "own.safetensors", "mine")
    close(predict(pipeline.transformer), predict(base))
    pipeline.delete_adapters("mine")
    pipeline.load_lora_weights(tmp_path, weight_name="plain.safetensors")
    close(predict(pipeline.transformer), predict(base))


def foreign(names: tuple[str, str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """A file as others train it: one dense adapter over query, key and value, rank 4, alpha 1."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    prefix, down, up = names
    dot = "_" if prefix == "lora_unet_" else "."
    for module, rows, columns in (
        ("joint_blocks.0.x_block.attn.qkv", 576, 192),
        ("joint_blocks.1.x_block.attn2.qkv", 576, 192),
        ("joint_blocks.3.context_block.attn.qkv", 576, 192),
        ("joint_blocks.2.x_block.mlp.fc2", 192, 768),
        ("joint_blocks.3.context_block.adaLN_modulation.1", 384, 192),
        ("final_layer.adaLN_modulation.1", 384, 192),
    ):
        name = prefix + module.replace(".", dot)
        state[f"{name}.{down}.weight"] = 0.3 * torch.randn(4, columns, generator=generator)
        state[f"{name}.{up}.weight"] = 0.3 * torch.randn(rows, 4, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("lora_unet_", "lora_down", "lora_up"), torch.float32),
        (("lora_unet_", "lora_down", "lora_up"), torch.bfloat16),
        (("diffusion_model.", "lora_down", "lora_up"), torch.float16),
        (("diffusion_model.", "lora_A", "lora_B"), torch.float32),
    ],
)
def test_files_of_other_trainers_are_loaded(
    base: Any, pipeline: Any, tmp_path: Path, names: tuple[str, str, str], dtype: torch.dtype
) -> None:
    state = foreign(names, dtype)
    save_file(state, tmp_path / "foreign.safetensors")
    # The same under the names that `merged` reads.
    same = {
        n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): x for n, x in state.items()
    }
    save_file(same, tmp_path / "same.safetensors")
    form = "kohya" if names[0] == "lora_unet_" else "comfyui"
    expected = merged(base, tmp_path / "same.safetensors", form)
    # Three dense qkv make nine layers, three single ones three: two factors each.
    assert lora.load(pipeline, tmp_path / "foreign.safetensors", "mine") == 2 * (9 + 3)
    close(predict(pipeline.transformer), expected)
    assert (expected - predict(base)).abs().max() > 1e-3


def test_without_alpha_the_scale_is_one(base: Any, pipeline: Any, tmp_path: Path) -> None:
    state = foreign(("lora_unet_", "lora_down", "lora_up"), torch.float32)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    save_file(state, tmp_path / "foreign.safetensors")
    lora.load(pipeline, tmp_path / "foreign.safetensors", "mine")
    close(predict(pipeline.transformer), merged(base, tmp_path / "foreign.safetensors", "kohya"))


def test_what_finds_no_place_is_said(
    pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = foreign(("lora_unet_", "lora_down", "lora_up"), torch.float32)
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"  # T5, which diffusers cannot adapt
    state[f"{name}.lora_down.weight"] = torch.ones(2, 192)
    state[f"{name}.lora_up.weight"] = torch.ones(192, 2)
    # A larger model's block, and one with a second attention where this one has none.
    for name in (
        "lora_unet_joint_blocks_9_x_block_attn_proj",
        "lora_unet_joint_blocks_3_x_block_attn2_proj",
    ):
        state[f"{name}.lora_down.weight"] = torch.ones(2, 192)
        state[f"{name}.lora_up.weight"] = torch.ones(192, 2)
    save_file(state, tmp_path / "foreign.safetensors")
    assert lora.load(pipeline, tmp_path / "foreign.safetensors", "mine") == 24
    said = capsys.readouterr().out
    assert "foreign.safetensors: 3 layers have no place in this model" in said
    assert "lora_te3_encoder_block_0" in said


def test_nothing_is_said_when_everything_fits(
    base: Any, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, base, "all-linear")
    capsys.readouterr()
    for i, path in enumerate([tmp_path, *(lora.export(tmp_path, form) for form in ORIGINAL)]):
        lora.load(pipeline, path, f"a{i}")
    assert capsys.readouterr().out == ""


def test_dora_has_no_form_in_the_other_formats(base: Any, tmp_path: Path) -> None:
    lora.add(base, lora.LoraArgs(rank=2, use_dora=True))
    lora.save(tmp_path, base)
    with pytest.raises(UserError, match="DoRA"):
        lora.export(tmp_path, "kohya")
    assert lora.export(tmp_path, "diffusers") == tmp_path / lora.WEIGHTS
    with pytest.raises(ValueError, match="--lora_format"):
        lora.LoraArgs(use_dora=True, lora_format="comfyui")


# The command


def test_the_command_converts_and_does_not_overwrite(base: Any, tmp_path: Path) -> None:
    trained(tmp_path / "run", base, "attn")
    target = tmp_path / "hearts.safetensors"
    words = ["--input", str(tmp_path / "run"), "--output", str(target), "--lora_format", "kohya"]
    code, said = spawn("dojo.lora", ["convert", *words], tmp_path / "log")
    assert code == 0, said
    assert "{'transformer': 38} layers in kohya's format" in said
    exported = load_file(lora.export(tmp_path / "run", "kohya"))
    converted = load_file(target)
    assert exported.keys() == converted.keys()
    assert all(torch.equal(exported[name], converted[name]) for name in exported)
    args = cli.parse(command_line.Args, None, words)
    with pytest.raises(UserError, match="--overwrite"):
        command_line.main(args)
    with pytest.raises(SystemExit):
        cli.parse(command_line.Args, None, [*words, "--output", "hearts.bin"])


def test_a_file_that_is_no_lora_for_sd3_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"flux.safetensors is a LoRA for FLUX"):
        reading.read(path)
    path.write_text("<html>404</html>")
    with pytest.raises(UserError, match="cannot be read"):
        reading.read(path)


# Starting from a file


@pytest.mark.parametrize("form", ["diffusers", *ORIGINAL])
@pytest.mark.parametrize("rank", [3, 8])
def test_training_may_start_from_a_file_of_any_format(
    base: Any, pipeline: Any, tmp_path: Path, form: Any, rank: int
) -> None:
    expected = trained(tmp_path, base, "attn", rank=3, alpha=5.0)
    path = lora.export(tmp_path, form)
    args = lora.LoraArgs(
        rank=rank, lora_alpha=2.0, lora_layers=("attn+ff",), init_lora_weights_path=str(path)
    )
    model = pipeline.transformer
    lora.add(model, args)
    lora.start_from(args, model)
    close(predict(model), expected)
    # The ranks that the file leaves over can learn: their half of A is not zero.
    model(
        hidden_states=torch.randn(1, 16, 8, 8),
        encoder_hidden_states=torch.randn(1, 30, 192),
        pooled_projections=torch.randn(1, 160),
        timestep=torch.ones(1),
    ).sample.square().mean().backward()
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.lora_B["default"].weight.grad.any(dim=0).all()
    assert layer.lora_A["default"].weight.shape[0] == rank


def test_a_file_that_does_not_fit_the_new_adapter_is_refused(
    base: Any, pipeline: Any, tmp_path: Path
) -> None:
    plain = copy.deepcopy(base)
    trained(tmp_path, base, "attn+ff")

    def refusal(**options: Any) -> str:
        args = lora.LoraArgs(init_lora_weights_path=str(tmp_path), **options)
        model = copy.deepcopy(plain)
        lora.add(model, args)
        with pytest.raises(UserError) as refused:
            lora.start_from(args, model)
        return str(refused.value)

    assert refusal(rank=2, lora_layers=("attn+ff",)).startswith("--rank 2 is smaller")
    assert "--lora_layers" in refusal(rank=4, lora_layers=("attn",))
    three_adapters(pipeline, tmp_path, rank=3)
    assert "--train_text_encoder" in refusal(rank=4, lora_layers=("all-linear",))
    (tmp_path / lora.WEIGHTS).unlink()
    args = lora.LoraArgs(init_lora_weights_path=str(tmp_path))
    with pytest.raises(UserError, match="--init_lora_weights_path"):
        lora.start_from(args, pipeline.transformer)
    with pytest.raises(ValueError, match="--init_lora_weights_path"):
        lora.LoraArgs(use_dora=True, init_lora_weights_path="x")


def test_text_encoders_start_from_the_file_too(
    pipeline: Any, tiny_sd3: Path, tmp_path: Path
) -> None:
    three_adapters(pipeline, tmp_path, rank=3, lora_alpha=4.0)
    fresh = load_pipeline(tiny_sd3)
    args = lora.LoraArgs(
        rank=6,
        lora_layers=("all-linear",),
        init_lora_weights_path=str(lora.export(tmp_path, "kohya")),
    )
    models = [getattr(fresh, part) for part in formats.PARTS]
    lora.add(models[0], args)
    lora.add_text(models[1], args)
    lora.add_text(models[2], args)
    lora.start_from(args, *models)
    close(predict(models[0]), predict(pipeline.transformer))
    close(embed(models[1]), embed(pipeline.text_encoder))
    close(embed(models[2]), embed(pipeline.text_encoder_2))


def test_an_unset_path_changes_nothing(base: Any) -> None:
    args = lora.LoraArgs(rank=2)
    lora.add(base, args)
    before = lora.state(base)
    lora.start_from(args, base)
    assert all(torch.equal(before[name], value) for name, value in lora.state(base).items())
