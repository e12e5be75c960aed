"""Claims about what Kolors alone has: a language model that reads, its layouts, its schedule."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.evaluate.picture import DrawArgs, draw
from dojo.finetune import lora
from dojo.finetune.lora import formats
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors
from dojo.models import kolors, loaded, published, sd3, sd15, sdxl, truncation
from dojo.models.family import ModelArgs
from dojo.models.opening import open_model
from dojo.run import phases

CPU = torch.device("cpu")
CHINESE = "一颗红色的星星在白色背景上"
CAPTIONS = ["a red star", CHINESE, "", "两个蓝色圆形 above a green square " * 40]


def opened(folder: Path, **options: Any) -> kolors.Model:
    return kolors.open_model(kolors.ModelArgs(pretrained_model_name_or_path=str(folder), **options))


@pytest.fixture(scope="module")
def pipeline(tiny_kolors: Path) -> Any:
    """The tiny model through one plain call of diffusers."""
    pipeline: Any = KolorsPipeline.from_pretrained(tiny_kolors)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def said(folder: Path, captions: list[str] = CAPTIONS, **options: Any) -> dict[str, Tensor]:
    return opened(folder, **options).load_text(torch.float32, CPU)(captions)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(folder: Path, source: Path, part: str, **settings: Any) -> Path:
    """A copy of a model with other settings in one of its configurations."""
    copy = Path(shutil.copytree(source, folder / "changed"))
    path = copy / part if part.endswith(".json") else copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


# -- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [[one] for one in CAPTIONS] + [CAPTIONS], ids=range(5))
def test_every_caption_says_what_the_pipeline_says_of_it(
    tiny_kolors: Path, pipeline: Any, captions: list[str]
) -> None:
    found = said(tiny_kolors, captions)
    with torch.no_grad():
        rows, _, pooled, _ = pipeline.encode_prompt(captions, CPU, 1, False)
    assert torch.equal(found["prompt_embeds"], rows)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)
    assert rows.shape == (len(captions), 256, 32)
    assert rows.is_contiguous()


def test_guidance_goes_away_from_the_embeddings_of_nothing(
    tiny_kolors: Path, pipeline: Any
) -> None:
    model, found = opened(tiny_kolors), said(tiny_kolors, [""])
    assert equal(model.no_caption(found, [""]), found)
    with torch.no_grad():
        _, rows, _, pooled = pipeline.encode_prompt(CHINESE, CPU, 1, True)
    assert torch.equal(found["prompt_embeds"], rows)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)


def test_padding_stands_on_the_left_and_hangs_on_the_caption(tiny_kolors: Path) -> None:
    one, other = said(tiny_kolors, ["a red star"]), said(tiny_kolors, ["two blue stars"])
    # The first of 256 tokens is padding in both, and the network attends to it all the same.
    assert not torch.equal(one["prompt_embeds"][0, 0], other["prompt_embeds"][0, 0])
    assert not torch.equal(one["pooled_prompt_embeds"], other["pooled_prompt_embeds"])


def test_captions_that_are_cut_are_counted_with_their_prefix(tiny_kolors: Path) -> None:
    model = opened(tiny_kolors)
    (reader,) = model.readers()
    words = " ".join(["a"] * 600)
    length = len(reader.tokenizer(words)["input_ids"])
    assert length > 256
    found = truncation.find_cut([words, f"{words} 红", "a red star"], [reader])
    assert found.texts[words] == {"ChatGLM": length}
    assert list(found.texts) == [words, f"{words} 红"]
    assert list(map(list, found.alike)) == [[words, f"{words} 红"]]  # no mark at the end
    assert equal(said(tiny_kolors, [words]), said(tiny_kolors, [f"{words} 红"]))
    assert model.text_lengths == {"text_encoder": 256}


def test_a_half_precision_that_the_folder_names_does_not_count(
    tmp_path: Path, tiny_kolors: Path
) -> None:
    """Without a precision of its own, transformers would mix the two: an error of torch's."""
    folder = changed(tmp_path, tiny_kolors, "text_encoder", torch_dtype="float16", dtype="float16")
    assert equal(said(folder), said(tiny_kolors))


def test_eight_bits_move_the_embeddings_by_little(tiny_kolors: Path) -> None:
    plain, found = said(tiny_kolors), said(tiny_kolors, text_encoder_precision="int8")
    for name, value in plain.items():
        assert 0 < (found[name] - value).norm() / value.norm() < 0.05, name


def test_what_only_a_chat_needs_is_not_kept(tiny_kolors: Path) -> None:
    texts = opened(tiny_kolors).load_text(torch.float32, CPU)
    (encoder,) = texts.encoders
    kept = sum(param.numel() for param in encoder.parameters())
    whole: Any = ChatGLMModel.from_pretrained(tiny_kolors / "text_encoder")
    assert kept == sum(p.numel() for p in whole.parameters()) - whole.output_layer.weight.numel()
    assert texts.trainable == []


# -- the layouts --------------------------------------------------------------------------------


def authors_layout(source: Path, folder: Path, index: dict[str, Any], shards: int = 3) -> Path:
    """The same model as Kwai-Kolors/Kolors has it: pickled shards, the tokenizer beside them."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer", "model*"))
    inside = folder / "text_encoder"
    for path in (source / "tokenizer").iterdir():
        shutil.copy(path, inside)
    remote = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    own = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "auto_map": remote}
    (inside / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copy(source / "text_encoder" / "config.json", inside)
    path = inside / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("dtype", None)
    remote_model = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    path.write_text(json.dumps({**settings, "torch_dtype": "float16", "auto_map": remote_model}))
    weights = load_file(source / "text_encoder" / "model.safetensors")
    if shards == 1:
        torch.save(weights, inside / "pytorch_model.bin")
        return folder
    places: dict[str, str] = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        some = dict(list(weights.items())[i::shards])
        torch.save(some, inside / name)
        places |= dict.fromkeys(some, name)
    listed = {"metadata": {}, "weight_map": places}
    (inside / "pytorch_model.bin.index.json").write_text(json.dumps(listed))
    return folder


def half_only(source: Path, folder: Path) -> Path:
    """The same model with half weights alone, under the names of a variant."""
    shutil.copytree(source, folder)
    for path in folder.rglob("*.safetensors"):
        weights = {name: value.half() for name, value in load_file(path).items()}
        save_file(weights, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    return folder


PARTS = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
OWN = {
    "text_encoder": ["modeling_chatglm", "ChatGLMModel"],
    "tokenizer": ["tokenization_chatglm", "ChatGLMTokenizer"],
}
INDICES = {
    "SDXL": {"_class_name": "StableDiffusionXLPipeline", **PARTS, **OWN},
    "SDXL alone": {"_class_name": "StableDiffusionXLPipeline", **PARTS},
    "Kolors": {"_class_name": "KolorsPipeline", **PARTS, **OWN},
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_the_authors_folder_is_read_as_diffusers_is(
    tmp_path: Path, tiny_kolors: Path, pipeline: Any, index: dict[str, Any], shards: int
) -> None:
    folder = authors_layout(tiny_kolors, tmp_path / "authors", index, shards)
    args = ModelArgs(pretrained_model_name_or_path=str(folder))
    model = open_model(args)
    assert isinstance(model, kolors.Model)
    model.check_weights(model.needed)
    assert equal(said(folder), said(tiny_kolors))
    drawn = pipelines.load_pipeline(str(folder), torch.float32)
    wish = DrawArgs(num_inference_steps=2, height=64, width=64)
    assert picture(drawn, wish) == picture(pipeline, wish)


def test_a_whole_pipeline_is_loaded_part_by_part(tiny_kolors: Path, pipeline: Any) -> None:
    """As one of a hub is."""
    checked = loaded.pipeline(tiny_kolors, flag="--versus", dtype=torch.float32)
    wish = DrawArgs(num_inference_steps=2, height=64, width=64)
    assert picture(checked, wish) == picture(pipeline, wish)


def test_a_pipeline_without_texts_is_given_embeddings(tiny_kolors: Path, pipeline: Any) -> None:
    alone = opened(tiny_kolors).load_pipeline(torch.float32, CPU, texts=False)
    assert alone.text_encoder is None
    assert alone.tokenizer is None
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 1.0}
    drawn = [
        one(**what, **options, generator=torch.Generator().manual_seed(0)).images[0].tobytes()
        for one, what in ((alone, said(tiny_kolors, [CHINESE])), (pipeline, {"prompt": CHINESE}))
    ]
    assert drawn[0] == drawn[1]


def picture(pipeline: Any, wish: DrawArgs) -> bytes:
    return draw(pipeline, wish, CHINESE, [0])[0].tobytes()


def test_another_file_is_another_cache(tmp_path: Path, tiny_kolors: Path) -> None:
    folder = authors_layout(tiny_kolors, tmp_path / "authors", INDICES["SDXL"])
    model = opened(folder)
    before = model.fingerprint(model.text_folders)
    words = folder / "text_encoder" / "tokenizer.model"
    words.write_bytes(words.read_bytes() + b"\0")
    assert model.fingerprint(model.text_folders) != before


def test_a_folder_with_half_weights_alone_needs_no_flag(tmp_path: Path, tiny_kolors: Path) -> None:
    folder = half_only(tiny_kolors, tmp_path / "half")
    found = said(folder)
    assert equal(found, said(folder, variant="fp16"))
    torch.testing.assert_close(
        found["prompt_embeds"], said(tiny_kolors)["prompt_embeds"], rtol=1e-2, atol=1e-2
    )
    model = opened(folder)
    for network in (model.load_network(torch.float32, CPU), model.load_vae(CPU)):
        assert {param.dtype for param in network.parameters()} == {torch.float32}
    assert pipelines.load_pipeline(str(folder), torch.float32).unet.dtype == torch.float32


# -- the schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_train_timesteps": 1000, "beta_end": 0.012}])
def test_the_schedule_is_the_folders(
    tmp_path: Path, tiny_kolors: Path, settings: dict[str, Any]
) -> None:
    where = "scheduler/scheduler_config.json"
    objective = opened(changed(tmp_path, tiny_kolors, where, **settings)).objective((64, 64))
    count = settings.get("num_train_timesteps", 1100)
    assert objective.schedule.num_timesteps == count
    last = objective.level(torch.tensor([1e-6]))
    assert last.tolist() == [count - 1]
    if not settings:  # the share of signal at the last timestep
        share = float(objective.schedule.alphas_cumprod[-1])
        assert share == pytest.approx(1.18e-3, rel=5e-3)


# -- files of LoRA ------------------------------------------------------------------------------


def test_either_file_of_an_adapter_loads_in_the_pipeline(
    tmp_path: Path, tiny_kolors: Path, pipeline: Any
) -> None:
    torch.manual_seed(3)
    layers: Any = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            rows, columns = module.weight.shape
            layers[name] = Factors(torch.randn(2, columns), torch.randn(rows, 2), alpha=2.0)
    base = Base.of(opened(tiny_kolors))
    assert base.family == "kolors"
    drawn: list[bytes] = []
    wish = DrawArgs(num_inference_steps=2, height=64, width=64)
    for kind in ("diffusers", "kohya"):
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / lora.WEIGHTS
        formats.write(path, {"unet": layers}, kind, base)
        assert not any("input_blocks" in name for name in load_file(path))
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        drawn.append(picture(pipeline, wish))
        pipeline.unload_lora_weights()
    assert drawn[0] == drawn[1]
    assert drawn[0] != picture(pipeline, wish)


# -- the real sizes -----------------------------------------------------------------------------


def test_the_real_networks_have_the_published_sizes() -> None:
    with published.planning():
        model = open_model(ModelArgs(pretrained_model_name_or_path="kolors"))
    assert isinstance(model, kolors.Model)
    unet: Any = model.meta_network()
    assert isinstance(unet, UNet2DConditionModel)
    assert sum(param.numel() for param in unet.parameters()) == 2_579_458_820
    linear = [one for one in unet.modules() if isinstance(one, nn.Linear)]
    counts = [len(lora.target_layers(unet, [word])) for word in ("attn", "attn+ff")]
    assert (len(linear), *counts) == (744, 560, 700)
    encoder = model.meta_encoder("text_encoder")
    assert sum(param.numel() for param in encoder.parameters()) == 6_243_584_000
    assert model.schedule.num_timesteps == 1100


def test_a_plan_counts_the_language_model() -> None:
    with published.planning():
        model = open_model(ModelArgs(pretrained_model_name_or_path="kolors"))
        needs = model.needs(torch.bfloat16, (1024, 1024))
    held = phases.Held(network=model.meta_network(), kept=1, activations=1)
    (texts,) = [one for one in phases.compute(needs, held) if one.name == phases.TEXTS]
    assert texts.parts["text_encoder"] == 2 * 6_243_584_000
    # The states of 32 captions going into each layer, at least.
    assert texts.parts["activations"] > 28 * 32 * 256 * 4096 * 2


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [sd3, sd15, sdxl])
def test_each_script_names_the_one_for_the_other_family(
    tmp_path: Path, tiny_kolors: Path, family: Any, request: pytest.FixtureRequest
) -> None:
    name = family.__name__.rpartition(".")[2]
    authors = authors_layout(tiny_kolors, tmp_path / "authors", INDICES["SDXL"])
    for folder in (tiny_kolors, authors):
        with pytest.raises(UserError, match=r"KolorsPipeline.*train_\*_kolors\.py"):
            family.open_model(family.ModelArgs(pretrained_model_name_or_path=str(folder)))
    other = request.getfixturevalue(f"tiny_{name}")
    with pytest.raises(UserError, match=rf"no Kolors \(its scripts are train_\*_{name}\.py\)"):
        opened(other)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"in_channels": 9}, "holds an inpainting model"),
        ("unet", {"encoder_hid_dim": None}, "has no encoder_hid_dim"),
        ("unet", {"encoder_hid_dim": 64}, "gives 32 numbers per token, the UNet reads 64"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "projected pictures"),
        ("unet", {"projection_class_embeddings_input_dim": 100}, "the UNet reads 100 numbers"),
        ("text_encoder", {"seq_length": 77}, "has 77 places"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "which no Kolors's have"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, tiny_kolors: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"tmp|changed") as refused:
        opened(changed(tmp_path, tiny_kolors, part, **settings))
    assert message in str(refused.value)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_half_downloaded_folder_is_refused(tmp_path: Path, tiny_kolors: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_kolors, tmp_path / "half"))
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=part):
        opened(folder)


def test_half_precision_is_refused_where_the_autoencoder_overflows(
    tmp_path: Path, tiny_kolors: Path
) -> None:
    with pytest.raises(UserError, match=r"--vae_dtype fp16: .*sdxl-vae-fp16-fix"):
        opened(tiny_kolors, vae_dtype="fp16")
    fixed = changed(tmp_path, tiny_kolors, "vae", force_upcast=False)
    other = {"vae_dtype": "fp16", "pretrained_vae_model_name_or_path": str(fixed / "vae")}
    assert opened(tiny_kolors, **other).load_vae(CPU).dtype == torch.float16
    assert opened(tiny_kolors, vae_dtype="bf16").load_vae(CPU).dtype == torch.bfloat16


def test_a_length_that_the_pipeline_passes_over_is_refused(pipeline: Any) -> None:
    wish = DrawArgs(num_inference_steps=1, height=64, width=64, max_sequence_length=77)
    with pytest.raises(UserError, match="--max_sequence_length: KolorsPipeline reads 256 tokens"):
        draw(pipeline, wish, CHINESE, [0])


def test_prompts_that_are_too_long_are_named(
    pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines.tell_cut(pipeline, [CHINESE, " ".join(["star"] * 600)])
    assert "1 of 2 captions and prompts are cut for ChatGLM" in capsys.readouterr().out
