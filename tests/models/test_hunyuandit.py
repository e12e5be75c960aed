"""Hunyuan-DiT: versions, layouts and names, what its network is told, files of LoRA."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.data import Geometry
from dojo.evaluate import pipelines
from dojo.evaluate.picture import DrawArgs, draw
from dojo.finetune import lora
from dojo.finetune.lora import bases, formats, reading
from dojo.finetune.lora.layers import Factors
from dojo.models import hunyuandit, published
from dojo.models.family import ModelArgs
from dojo.models.hunyuandit import keys, original
from dojo.models.opening import open_model

CPU = torch.device("cpu")
CAPTIONS = ["一颗红色的星星", "two blue circles above a green square", ""]
WISH = DrawArgs(num_inference_steps=2, height=64, width=64, guidance_scale=3.0)


@pytest.fixture(params=["hunyuandit", "hunyuandit11"])
def folder(request: pytest.FixtureRequest) -> Path:
    """An untrained v1.2, and a v1.1."""
    return request.getfixturevalue(f"tiny_{request.param}")


def opened(folder: Path, **options: Any) -> hunyuandit.Model:
    args = hunyuandit.ModelArgs(pretrained_model_name_or_path=str(folder), **options)
    return hunyuandit.open_model(args)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer(model: hunyuandit.Model, size: tuple[int, int] = (64, 64)) -> Tensor:
    """What a model's network says of noise."""
    embeds = model.load_text(torch.float32, CPU)(CAPTIONS)
    conditions = model.conditions(embeds, Geometry.whole(size, len(CAPTIONS)))
    noisy = random(len(CAPTIONS), *model.latent_shape(*size))
    level = torch.tensor([1, 500, 999])
    with torch.no_grad():
        network = model.load_network(torch.float32, CPU).eval()
        return model.predict(network, noisy, level, conditions, torch.float32)


# -- Tencent's layout ---------------------------------------------------------------------------

Wrap = Callable[[dict[str, Tensor]], Any]
WRAPS: dict[str, Wrap] = {
    "bare": lambda state: state,
    "DeepSpeed": lambda state: {"module": state, "args": argparse.Namespace(lr=1e-4, tag="x")},
    "ema": lambda state: {"ema": state, "module": dict.fromkeys(state, torch.zeros(1))},
}


def tencents_layout(
    source: Path, folder: Path, kind: str = "ema", wrap: Wrap = WRAPS["bare"]
) -> Path:
    """The same model as Tencent publishes it: `folder/t2i`, pickled, in Tencent's names."""
    inside = folder / "t2i"
    parts = ("model", "clip_text_encoder", "mt5", "sdxl-vae-fp16-fix", "tokenizer")
    for part in parts:
        (inside / part).mkdir(parents=True)
    state = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = keys.to_original(state)
    if "style_embedder.weight" in theirs:  # a table of more styles than the one in use
        rows = theirs["style_embedder.weight"]
        theirs["style_embedder.weight"] = torch.cat([rows, torch.ones(7, rows.shape[1])])
    torch.save(wrap(theirs), inside / "model" / f"pytorch_model_{kind}.pt")

    bert = load_file(source / "text_encoder" / "model.safetensors")
    # The pooler, which nothing reads, is not there, and the CLIP's other half is.
    named = {f"bert.{name}": value for name, value in bert.items() if "pooler" not in name}
    named["logit_scale"] = torch.tensor(4.6)
    torch.save(named, inside / "clip_text_encoder" / "pytorch_model.bin")
    shutil.copy(source / "text_encoder" / "config.json", inside / "clip_text_encoder")

    mt5 = load_file(source / "text_encoder_2" / "model.safetensors")
    mt5 |= {"lm_head.weight": torch.ones(2, 2), "decoder.final_layer_norm.weight": torch.ones(2)}
    torch.save(mt5, inside / "mt5" / "pytorch_model.bin")
    settings = json.loads((source / "text_encoder_2" / "config.json").read_text())
    own = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
    (inside / "mt5" / "config.json").write_text(json.dumps({**settings, **own}))
    shutil.copy(source / "tokenizer_2" / "spiece.model", inside / "mt5")
    (inside / "mt5" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))

    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(vae, inside / "sdxl-vae-fp16-fix" / "diffusion_pytorch_model.bin")
    shutil.copy(source / "vae" / "config.json", inside / "sdxl-vae-fp16-fix")
    shutil.copy(source / "tokenizer" / "vocab.txt", inside / "tokenizer")
    return folder


def test_tencents_folder_is_read_as_diffusers_is(tmp_path: Path, folder: Path) -> None:
    theirs = tencents_layout(folder, tmp_path / "HunyuanDiT")
    model, own = opened(theirs), opened(folder)
    model.check_weights(model.needed)
    sizes = {**model.transformer, "sample_size": own.transformer["sample_size"]}
    network: Any = HunyuanDiT2DModel.from_config(sizes)
    assert network.config.use_style_cond_and_image_meta_size == own.is_told_sizes
    assert model.is_told_sizes == own.is_told_sizes
    ends = [one.schedule.alphas_cumprod for one in (model, own)]
    assert torch.equal(*ends)  # those of its version
    found, expected = (one.load_text(torch.float32, CPU)(CAPTIONS) for one in (model, own))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(answer(model), answer(own))
    drawn = [
        draw(pipelines.load_pipeline(str(place), torch.float32), WISH, CAPTIONS[0], [0])[0]
        for place in (theirs, theirs / "t2i", folder)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes() == drawn[2].tobytes()


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_every_form_of_its_file_is_read_by_weights_only(
    tmp_path: Path, tiny_hunyuandit: Path, wrap: Wrap
) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT", wrap=wrap)
    found = opened(theirs).load_network(torch.float32, CPU).state_dict()
    expected = opened(tiny_hunyuandit).load_network(torch.float32, CPU).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Trap:
    """What runs a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(
    tmp_path: Path, tiny_hunyuandit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = tencents_layout(
        tiny_hunyuandit, tmp_path / "HunyuanDiT", wrap=lambda state: {"module": state, "x": Trap()}
    )
    with pytest.raises(UserError, match=r"pytorch_model_ema\.pt holds more than tensors"):
        opened(theirs)
    assert not (tmp_path / "ran").exists()


def test_the_network_is_the_one_that_was_asked_for(tmp_path: Path, tiny_hunyuandit: Path) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    place = theirs / "t2i" / "model"
    state = torch.load(place / "pytorch_model_ema.pt")
    torch.save({**state, "proj": torch.ones(1)}, place / "pytorch_model_module.pt")
    assert opened(theirs).load_network(torch.float32, CPU)
    with pytest.raises(UserError, match=r"_module\.pt is another network.*no place for proj"):
        opened(theirs, tencent_weights="module").load_network(torch.float32, CPU)
    with pytest.raises(UserError, match=r"--tencent_weights distill: .* has .*_ema\.pt"):
        opened(theirs, tencent_weights="distill")
    with pytest.raises(UserError, match=r"--tencent_weights ema is for Tencent's own folder"):
        opened(tiny_hunyuandit, tencent_weights="ema")
    (place / "pytorch_model_ema.pt").unlink()
    (place / "pytorch_model_module.pt").unlink()
    torch.save({"lora": torch.ones(1)}, place / "pytorch_model_distill.pt")
    with pytest.raises(UserError, match=r"_distill\.pt holds no Hunyuan-DiT"):
        opened(theirs)


@pytest.mark.parametrize("part", ["clip_text_encoder", "mt5", "sdxl-vae-fp16-fix", "tokenizer"])
def test_a_half_downloaded_folder_of_tencents_is_refused(
    tmp_path: Path, tiny_hunyuandit: Path, part: str
) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    shutil.rmtree(theirs / "t2i" / part)
    with pytest.raises(UserError, match=rf"HunyuanDiT/t2i is incomplete: it has no {part}/"):
        opened(theirs)


@pytest.mark.parametrize("part", ["model", "mt5"])
def test_what_is_wrong_with_tencents_folder_is_said_of_that_folder(
    tmp_path: Path, tiny_hunyuandit: Path, part: str
) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    if part == "mt5":
        settings = theirs / "t2i" / "mt5" / "config.json"
        settings.write_text('{"d_model": "wide"}')
    else:
        (weights,) = (theirs / "t2i" / "model").glob("*.pt")
        weights.write_bytes(b"PK no archive")

    def read() -> None:
        model = opened(theirs)
        model.check_weights(model.needed)
        model.load_text(torch.float32, torch.device("cpu"))

    with pytest.raises(UserError) as refused:
        read()
    assert str(theirs) in str(refused.value)
    assert "dojo-hunyuandit-" not in str(refused.value)


def test_tencents_names_differ_as_its_code_does() -> None:
    """Of both codes, read: which norm is before which layer, and where the halves lie."""
    assert keys.diffusers_modules("blocks.3.norm3") == ("blocks.3.norm2",)  # before attn2
    assert keys.diffusers_modules("blocks.3.norm2") == ("blocks.3.norm3",)  # before the mlp
    assert keys.original_module("blocks.7.attn2.to_v") == ("blocks.7.attn2.kv_proj", 1)
    found, unknown = keys.from_original(
        {
            "final_layer.adaLN_modulation.1.bias": torch.arange(4),
            "blocks.0.attn1.Wqkv.bias": torch.arange(6),
            "style_embedder.weight": torch.arange(6).reshape(3, 2),
            "freqs": torch.ones(1),
        }
    )
    assert found["norm_out.linear.bias"].tolist() == [2, 3, 0, 1]
    assert found["blocks.0.attn1.to_k.bias"].tolist() == [2, 3]
    assert found["time_extra_emb.style_embedder.weight"].tolist() == [[0, 1]]
    assert unknown == ["freqs"]


# -- what the network is told -------------------------------------------------------------------


def test_the_versions_end_with_their_own_share_of_signal(folder: Path) -> None:
    model = opened(folder)
    objective = model.objective((64, 64))
    assert objective.prediction_type == "v_prediction"
    share = float(objective.schedule.alphas_cumprod[-1])
    assert share == pytest.approx(5.67e-6 if model.is_told_sizes else 4.85e-4, rel=2e-3)
    assert model.title == f"Hunyuan-DiT {'v1.0 or v1.1' if model.is_told_sizes else 'v1.2'}"


def test_sizes_are_told_with_the_width_first(
    tiny_hunyuandit: Path, tiny_hunyuandit11: Path
) -> None:
    embeds = {"prompt_embeds": torch.zeros(1, 1)}
    geometry = Geometry(
        original=torch.tensor([[300.0, 200.0]]),  # height before width, and top before left
        crop=torch.tensor([[7.0, 5.0]]),
        target=torch.tensor([[96.0, 64.0]]),
    )
    told = opened(tiny_hunyuandit11).conditions(embeds, geometry)["image_meta_size"]
    assert told.tolist() == [[200, 300, 64, 96, 5, 7]]
    assert opened(tiny_hunyuandit).conditions(embeds, geometry) is embeds


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (96, 64)])
def test_it_draws_what_diffusers_draws_when_that_is_told_the_same(
    folder: Path, size: tuple[int, int]
) -> None:
    plain: Any = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    own = pipelines.load_pipeline(str(folder), torch.float32)
    height, width = size
    wish: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": 2}
    drawn = [
        pipeline(CAPTIONS[1], **wish, **more, generator=torch.Generator().manual_seed(0)).images[0]
        for pipeline, more in (
            (own, {}),
            (plain, {"use_resolution_binning": False, "target_size": (width, height)}),
        )
    ]
    assert drawn[0].size == (width, height)
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_timesteps_reach_the_network_whole(tiny_hunyuandit: Path) -> None:
    """bfloat16, in which the rest is told, would make 1000 of 999."""
    model = opened(tiny_hunyuandit)
    network = model.load_network(torch.bfloat16, CPU)
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    embeds = model.load_text(torch.bfloat16, CPU)(CAPTIONS)
    noisy, level = random(3, 4, 8, 8), torch.tensor([0, 501, 999])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        said = model.predict(network, noisy, level, embeds, torch.bfloat16)
    assert said.dtype == torch.float32
    assert seen[0].tolist() == [0, 501, 999]


def test_mt5_is_padded_with_token_0_and_each_text_has_its_mask(
    tmp_path: Path, tiny_hunyuandit: Path
) -> None:
    for place in (tiny_hunyuandit, tencents_layout(tiny_hunyuandit, tmp_path / "theirs")):
        encoders = opened(place).load_text(torch.float32, CPU)
        asked: list[Tensor] = []

        def keep(_: Any, given: Any, to: list[Tensor] = asked) -> None:
            to.append(given[0])

        encoders.encoders[1].register_forward_pre_hook(keep)
        said = encoders(CAPTIONS)
        mask = said["prompt_attention_mask_2"].bool()
        assert asked[0].shape == mask.shape == (3, 256)
        assert (asked[0][~mask] == 0).all()
        assert (asked[0][mask] != 0).all()
        assert mask.sum(1).tolist()[2] == 1  # the end token of no caption
        assert said["prompt_attention_mask"].shape == (3, 77)


def test_prompts_that_are_too_long_are_named_for_each_encoder(
    tiny_hunyuandit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pipelines.load_pipeline(str(tiny_hunyuandit), torch.float32)
    capsys.readouterr()
    pipelines.tell_cut(pipeline, ["星" * 100, "星" * 300])
    said = capsys.readouterr().out
    assert "2 of 2 captions and prompts are cut for BERT, which reads 77 tokens" in said
    assert "1 of 2 captions and prompts are cut for mT5, which reads 256 tokens" in said


# -- training -----------------------------------------------------------------------------------


def test_recomputed_blocks_give_the_same_gradients(tiny_hunyuandit: Path) -> None:
    gradients: list[list[Tensor]] = []
    model = opened(tiny_hunyuandit)
    embeds = model.load_text(torch.float32, CPU)(CAPTIONS)
    for again in (False, True):
        network = opened(tiny_hunyuandit, gradient_checkpointing=again).load_network(
            torch.float32, CPU
        )
        torch.manual_seed(0)
        params = lora.add(network, lora.LoraArgs(rank=2))
        for param in params:
            nn.init.normal_(param, std=0.1)
        noisy, level = random(3, 4, 8, 8), torch.tensor([1, 500, 999])
        said = model.predict(network, noisy, level, embeds, torch.float32)
        said.square().mean().backward()
        gradients.append([param.grad for param in params if param.grad is not None])
        assert len(gradients[-1]) == len(params) == 2 * 8 * 4
    assert all(map(torch.equal, *gradients))


@pytest.mark.slow
def test_recomputed_blocks_are_counted_so(tiny_hunyuandit: Path) -> None:
    model = opened(tiny_hunyuandit)

    def adapt(one: nn.Module) -> object:
        return lora.add(one, lora.LoraArgs(rank=2))

    kept = [
        model.training_cost(torch.float32, adapt, 2, (4, 8, 8), checkpointing=again)[1].saved_bytes
        for again in (False, True)
    ]
    assert kept[1] < kept[0] / 2


# -- files of LoRA ------------------------------------------------------------------------------


def factors_of(network: nn.Module) -> dict[str, Factors]:
    """Random updates of every attention, of ranks 2 and 4 that both mean half of their product."""
    torch.manual_seed(3)
    found: dict[str, Factors] = {}
    for name in lora.target_layers(network, ["attn"]):
        module = network.get_submodule(name)
        assert isinstance(module, nn.Linear)
        rank = 4 if "attn2" in name else 2
        down, up = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
        found[name] = Factors(down, up, alpha=rank / 2)
    return found


def written(folder: Path, form: Any, layers: Any, base: Any) -> Path:
    """The file of a LoRA in one format, as the end of a training writes it."""
    folder.mkdir(parents=True)
    formats.write(folder / lora.WEIGHTS, {"transformer": layers}, "diffusers", base)
    return lora.export(folder, form, base)


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("diffusers", "kohya")]


@pytest.mark.parametrize("form", ["comfyui", *SLOW])
def test_an_adapter_computes_the_same_from_a_file_of_either_names(
    tmp_path: Path, tiny_hunyuandit: Path, form: str
) -> None:
    model = opened(tiny_hunyuandit)
    base = bases.Base.of(model)
    assert base.family == "hunyuandit"
    pipeline = pipelines.load_pipeline(str(tiny_hunyuandit), torch.float32)
    layers = factors_of(pipeline.transformer)
    path = written(tmp_path / form, form, layers, base)
    names = load_file(path)
    start = {
        "diffusers": "transformer.blocks.0.attn1.to_q.",
        "kohya": "lora_unet_blocks_0_attn1_Wqkv.",
        "comfyui": "base_model.model.blocks.0.attn1.Wqkv.",
    }
    assert any(name.startswith(start[form]) for name in names)
    assert bases.guess(reading.read(path)[0])[0].family == "hunyuandit"
    before = draw(pipeline, WISH, CAPTIONS[0], [0])[0].tobytes()
    assert lora.load(pipeline, path, "one") == 2 * len(layers)
    pipeline.set_adapters(["one"], [1.0])
    drawn = draw(pipeline, WISH, CAPTIONS[0], [0])[0].tobytes()

    merged = pipelines.load_pipeline(str(tiny_hunyuandit), torch.float32)
    for name, one in layers.items():
        module: Any = merged.transformer.get_submodule(name)
        module.weight.data += one.scale * one.up @ one.down
    arrays = [
        torch.tensor(bytearray(picture), dtype=torch.uint8).int()
        for picture in (drawn, draw(merged, WISH, CAPTIONS[0], [0])[0].tobytes())
    ]
    assert (arrays[0] - arrays[1]).abs().max() <= 1  # rounding alone
    assert drawn != before
    pipeline.set_adapters(["one"], [0.0])
    assert draw(pipeline, WISH, CAPTIONS[0], [0])[0].tobytes() == before
    pipeline.set_adapters(["one"], [1.0])
    pipeline.disable_lora()
    assert draw(pipeline, WISH, CAPTIONS[0], [0])[0].tobytes() == before
    pipeline.enable_lora()
    assert draw(pipeline, WISH, CAPTIONS[0], [0])[0].tobytes() == drawn


class Fused(nn.Module):
    """The layers that Tencent's own code has, by its names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            place: nn.Module = self
            *path, leaf = name.split(".")
            for step in path:
                if not hasattr(place, step):
                    place.add_module(step, nn.Module())
                place = place.get_submodule(step)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            place.add_module(leaf, layer)


def test_pefts_own_reader_takes_the_file_for_tencents_code(
    tmp_path: Path, tiny_hunyuandit: Path
) -> None:
    model = opened(tiny_hunyuandit)
    network = model.load_network(torch.float32, CPU)
    layers = factors_of(network)
    path = written(tmp_path / "run", "comfyui", layers, bases.Base.of(model))
    assert path == tmp_path / "run" / "comfyui" / "adapter_model.safetensors"
    theirs = keys.to_original(network.state_dict())
    fused = Fused({name[:-7]: theirs[name] for name in theirs if theirs[name].ndim == 2})
    config: Any = LoraConfig.from_pretrained(str(path.parent))
    inject_adapter_in_model(config, fused)
    state = {name.removeprefix("base_model.model."): one for name, one in load_file(path).items()}
    report: Any = set_peft_model_state_dict(fused, state)
    assert not report.unexpected_keys
    changes = {name: one.scale * one.up @ one.down for name, one in layers.items()}
    expected = keys.to_original({f"{name}.weight": one for name, one in changes.items()})
    found: dict[str, Tensor] = {}
    for name, module in fused.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta: Any = module.get_delta_weight
            found[f"{name}.weight"] = delta("default")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    # The same in a reader that knows no rank of a layer's own but by the end of its name.
    assert set(config.rank_pattern) <= {"attn1.Wqkv", "attn2.kv_proj", "attn1.out_proj"} | {
        "attn2.q_proj",
        "attn2.out_proj",
    }


def test_other_families_adapters_are_refused(tmp_path: Path, tiny_hunyuandit: Path) -> None:
    pipeline = pipelines.load_pipeline(str(tiny_hunyuandit), torch.float32)
    path = tmp_path / "sd3.safetensors"
    layers = {"transformer_blocks.0.attn.to_q": Factors(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    formats.write(path, {"transformer": layers}, "diffusers")
    with pytest.raises(UserError, match="not one layer fits this model"):
        lora.load(pipeline, path, "one")


# -- the real sizes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_network_has_the_published_sizes() -> None:
    with published.planning():
        model = open_model(ModelArgs(pretrained_model_name_or_path="hunyuandit"))
    assert isinstance(model, hunyuandit.Model)
    network: Any = model.meta_network()
    assert isinstance(network, HunyuanDiT2DModel)
    assert sum(param.numel() for param in network.parameters()) == 1_499_952_032
    linear = [one for one in network.modules() if isinstance(one, nn.Linear)]
    counts = [len(lora.target_layers(network, [word])) for word in ("attn", "attn+ff")]
    assert (len(linear), *counts) == (471, 320, 400)
    told = {**model.transformer, "use_style_cond_and_image_meta_size": True}
    with torch.device("meta"):
        older: Any = HunyuanDiT2DModel.from_config(told)
    assert sum(param.numel() for param in older.parameters()) == 1_516_534_048
    for one in (network, older):  # the shapes tell all that the configuration says
        shapes = {name: tuple(v.shape) for name, v in keys.to_original(one.state_dict()).items()}
        found = original.config_of(shapes, "it")
        own = {name: one.config[name] for name in found if name != "_class_name"}
        assert {name: found[name] for name in own} == own


# -- refusals -----------------------------------------------------------------------------------


def changed(tmp_path: Path, source: Path, part: str, **settings: Any) -> Path:
    """A copy of a model with other settings of a part."""
    folder = Path(shutil.copytree(source, tmp_path / "changed"))
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("text_encoder", {"hidden_size": 64}, "text_encoder gives 64 numbers per token"),
        ("text_encoder_2", {"d_model": 64}, "text_encoder_2 gives 64 numbers per token"),
        ("text_encoder", {"max_position_embeddings": 64}, "has 64 places for them"),
        ("transformer", {"text_len_t5": 128}, "padded to 256 tokens"),
        ("transformer", {"patch_size": 0}, "patch_size"),
        ("vae", {"latent_channels": 16}, "the transformer expects 4"),
        ("scheduler", {"prediction_type": "sample"}, "predicts sample"),
        ("scheduler", {"beta_schedule": "wavy"}, "the scheduler of"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, tiny_hunyuandit: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match="changed") as refused:
        opened(changed(tmp_path, tiny_hunyuandit, part, **settings))
    assert message in str(refused.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "text_encoder_2", "tokenizer"])
def test_a_half_downloaded_folder_is_refused(
    tmp_path: Path, tiny_hunyuandit: Path, part: str
) -> None:
    folder = Path(shutil.copytree(tiny_hunyuandit, tmp_path / "half"))
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=part):
        opened(folder)
