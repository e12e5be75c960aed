"""Claims about what SDXL alone has: sizes and crops, zeros for no caption, two CLIPs, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from dojo.cli import UserError
from dojo.data import Geometry
from dojo.data.geometry import framed
from dojo.finetune import lora
from dojo.inputs.pictures import latent_settings, needs
from dojo.inputs.steering import Steering
from dojo.models import sdxl
from dojo.models.family import Saving
from dojo.models.unet import sizes

CPU = torch.device("cpu")
SIZE = (64, 64)
# Of SDXL-base's own configuration.
REAL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def opened(folder: Path, text: sdxl.TextArgs | None = None, **options: Any) -> sdxl.Model:
    args = sdxl.ModelArgs(pretrained_model_name_or_path=str(folder), **options)
    return sdxl.open_model(args, text)


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> sdxl.Model:
    return opened(tiny_sdxl)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path) -> Any:
    """The tiny model through one plain call of diffusers."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(folder: Path, source: Path, part: str, **settings: Any) -> Path:
    """A copy of a model with other settings in one of its configurations."""
    copy = Path(shutil.copytree(source, folder / "changed"))
    path = copy / part if part.endswith(".json") else copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


# Sizes


def geometry(*rows: dict[str, Tensor], target: tuple[int, int]) -> Geometry:
    """That of some pictures in a batch."""
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Geometry(**columns, target=torch.tensor([target] * len(rows), dtype=torch.float32))


@pytest.mark.parametrize("kind", ["file", "resized", "constant"])
@pytest.mark.parametrize("flip", [False, True])
def test_the_unet_is_told_what_became_of_the_files_picture(kind: Any, flip: bool) -> None:
    target = (1024, 768)
    # 1333 wide and 1023 high: resized to 1024 high, some 1334 wide, of which 768 are kept, from a
    # fifth of what is too much on; in a mirrored picture that is what is left on the other side.
    wide = framed((1023, 1333), target, (0.5, 0.2), flip)
    # 500 wide and 4000 high: enlarged to 768 wide and 6144 high, cut above and below.
    high = framed((4000, 500), target, (0.25, 0.5), flip)
    found = sizes.time_ids(geometry(wide, high, target=target), kind)
    width = 1333 * 1024 / 1023
    left = (0.8 if flip else 0.2) * (width - 768)
    expected = {
        "file": [[1023, 1333, 0, left, *target], [4000, 500, 1280, 0, *target]],
        "resized": [[1024, width, 0, left, *target], [6144, 768, 1280, 0, *target]],
        "constant": [[*target, 0, 0, *target]] * 2,
    }[kind]
    assert found.dtype == torch.float32
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-3)
    exact = found == wanted
    assert exact[:, 4:].all()
    if kind == "resized":  # the side that was not cut has the target's length to the bit
        assert exact[0, 0]
        assert exact[1, 1]


def test_a_drawn_picture_is_told_of_as_the_pipeline_tells_it(
    model: sdxl.Model, pipeline: Any
) -> None:
    whole = Geometry.whole((64, 128), 2)
    expected = pipeline._get_add_time_ids(
        (64, 128), (0, 0), (64, 128), torch.float32, text_encoder_projection_dim=model.pooled_width
    )
    for kind in ("file", "resized", "constant"):
        assert torch.equal(sizes.time_ids(whole, kind), expected.expand(2, -1))


class Asked(torch.nn.Module):
    """Keeps what a UNet is asked."""

    def forward(self, sample: Tensor, timestep: Tensor, **rest: Any) -> tuple[Tensor]:
        assert sample.dtype == rest["encoder_hidden_states"].dtype == torch.bfloat16
        assert rest["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
        self.time_ids = rest["added_cond_kwargs"]["time_ids"]
        return (sample,)


def conditions(model: sdxl.Model, height: float) -> dict[str, Tensor]:
    whole = Geometry.whole(SIZE, 1)
    told = replace(whole, original=torch.tensor([[height, 64.0]]))
    width = model.unet["cross_attention_dim"]
    embeds = {"prompt_embeds": noise(1, 20, width), "pooled_prompt_embeds": noise(1, 96)}
    return model.conditions(embeds, told)


def test_sizes_stay_float32_whatever_the_network_computes_in(model: sdxl.Model) -> None:
    network, timestep = Asked(), torch.tensor([7])
    inputs = conditions(model, 1023)
    found = model.predict(network, noise(1, 4, 8, 8), timestep, inputs, torch.bfloat16)
    assert found.dtype == network.time_ids.dtype == torch.float32
    assert network.time_ids[0, 0] == 1023  # bfloat16 has 1020 and 1024 there


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_sizes_that_bfloat16_cannot_tell_apart_reach_the_unet(model: sdxl.Model, cast: str) -> None:
    half = cast == "weights"
    unet = model.load_network(torch.bfloat16 if half else torch.float32, CPU)
    seen: list[Tensor] = []
    sines: Any = unet.add_time_proj
    sines.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not half):
        for height in (1023.0, 1024.0):
            inputs = (noise(1, 4, 8, 8), torch.tensor([7]), conditions(model, height))
            model.predict(unet, *inputs, torch.bfloat16 if half else torch.float32)
        expected = sines(torch.tensor([1023.0, 64, 0, 0, 64, 64]))
    assert torch.tensor(1023.0).bfloat16() == torch.tensor(1024.0).bfloat16()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], expected)
    assert seen[0].dtype == torch.float32


def test_caches_stay_as_they_are_when_only_the_sizes_are_told_otherwise(tiny_sdxl: Path) -> None:
    run: Any = SimpleNamespace(device=CPU)
    found = [
        (latent_settings(run, one), one.fingerprint(one.text_folders), one.text_settings)
        for kind in ("file", "resized", "constant")
        for uncond in ("zeros", "empty_string")
        for one in [opened(tiny_sdxl, sdxl.TextArgs(uncond=uncond), micro_conditioning=kind)]
    ]
    assert all(one == found[0] for one in found)


def test_pictures_far_below_the_models_size_are_remarked_upon(model: sdxl.Model) -> None:
    real = replace(model, unet={**model.unet, "sample_size": 128})
    assert real.native_size == 1024
    said = real.remark(512, 512)
    assert said is not None
    assert "25%" in said
    assert "1024 x 1024" in said
    for height, width in ((768, 768), (1024, 1024), (640, 1536)):
        assert real.remark(height, width) is None


@pytest.mark.parametrize("size", [SIZE, (1024, 1024)])
def test_the_remark_is_said_before_anything_is_trained(
    model: sdxl.Model, size: tuple[int, int]
) -> None:
    real = replace(model, unet={**model.unet, "sample_size": 128})
    said: list[str] = []
    run: Any = SimpleNamespace(say_once=lambda _, text: said.append(text), dtype=torch.float32)
    flags = SimpleNamespace(resolution=[size[0]], height=None, width=None, location="datas")
    cache = SimpleNamespace(no_cache_latents=False, no_cache_text_embeddings=False)
    args: Any = SimpleNamespace(data=flags, cache=cache)
    needs(run, real, args, size, 1, drawn=False)
    assert said == ([real.remark(*size)] if size == SIZE else [])


# No caption


@pytest.mark.parametrize(
    ("folder_says", "uncond", "zeros"),
    [
        (True, None, True),
        (False, None, False),
        (None, None, True),  # as the pipeline reads a folder that does not say it
        (True, "empty_string", False),
        (False, "zeros", True),
    ],
)
def test_no_caption_is_what_the_folder_or_the_option_says(
    tmp_path: Path, tiny_sdxl: Path, folder_says: bool | None, uncond: Any, zeros: bool
) -> None:
    folder = changed(
        tmp_path, tiny_sdxl, "model_index.json", force_zeros_for_empty_prompt=folder_says
    )
    if folder_says is None:
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        del index["force_zeros_for_empty_prompt"]
        path.write_text(json.dumps(index))
    model = opened(folder, sdxl.TextArgs(uncond=uncond))
    captions = ["a red star", "", "a ring"]
    said = model.load_text(torch.float32, CPU)(captions)
    found = model.no_caption(said, captions)
    for name, value in said.items():
        assert value[1].abs().sum() > 0
        assert torch.equal(found[name][[0, 2]], value[[0, 2]])
        expected = torch.zeros_like(value[1]) if zeros else value[1]
        assert torch.equal(found[name][1], expected), name
    # What draws, and the result's own pipeline, guide away from the same.
    unet, vae = model.load_network(torch.float32, CPU), model.load_vae(CPU)
    around = model.pipeline(unet, vae, model.objective(SIZE))
    assert around.config["force_zeros_for_empty_prompt"] == zeros
    sdxl.copy_parts(model, tmp_path / "result", ("vae", "scheduler", *sdxl.TEXT_FOLDERS))
    index = json.loads((tmp_path / "result" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] == zeros


@pytest.mark.parametrize("uncond", ["zeros", "empty_string"])
def test_validation_guides_away_from_what_the_results_pipeline_does(
    tmp_path: Path, tiny_sdxl: Path, uncond: Any
) -> None:
    model = opened(tiny_sdxl, sdxl.TextArgs(uncond=uncond))
    unet = model.load_network(torch.float32, CPU)
    model.save_whole(tmp_path / "result", unet, Saving(), model.objective(SIZE))
    result: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "result")
    around = model.pipeline(unet.eval(), model.load_vae(CPU), model.objective(SIZE))
    encode = model.load_text(torch.float32, CPU)
    prompt, negative = (model.no_caption(encode([text]), [text]) for text in ("a red star", ""))
    options = {"guidance_scale": 5.0, "num_inference_steps": 2, "height": 64, "width": 64}
    options |= {"latents": noise(1, 4, 8, 8), "output_type": "np"}
    for one in (around, result):
        one.set_progress_bar_config(disable=True)
    found = around(**prompt, **{f"negative_{k}": v for k, v in negative.items()}, **options).images
    assert (found == result("a red star", **options).images).all()
    other = replace(model, text=sdxl.TextArgs(uncond="zeros" if uncond != "zeros" else None))
    if uncond == "empty_string":
        negative = other.no_caption(encode([""]), [""])
        negative = {f"negative_{name}": value for name, value in negative.items()}
        assert (found != around(**prompt, **negative, **options).images).any()


def test_guidance_while_training_is_told_the_drawn_size(model: sdxl.Model, pipeline: Any) -> None:
    texts: Any = model.load_text(torch.float32, CPU)
    steering = Steering(
        model=model, texts=texts, size=(64, 128), dtype=torch.float32, guidance_scale=3.0
    )
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, sample: Tensor, _: Tensor, **rest: Any) -> tuple[Tensor]:
            seen.append(rest["added_cond_kwargs"]["time_ids"])
            return (sample,)

    steering(Spy(), ["a star", "a ring"])(noise(2, 4, 8, 16), torch.tensor([5, 5]))
    assert seen[0].tolist() == [[64, 128, 0, 0, 64, 128]] * 4


# The autoencoder


def test_half_precision_is_refused_where_the_autoencoder_overflows(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    with pytest.raises(UserError, match="--vae_dtype fp16") as refused:
        opened(tiny_sdxl, vae_dtype="fp16")
    assert "--pretrained_vae_model_name_or_path" in str(refused.value)
    assert "bf16" in str(refused.value)
    opened(tiny_sdxl, vae_dtype="bf16")
    fixed = changed(tmp_path, tiny_sdxl, "vae", force_upcast=False)
    assert opened(fixed, vae_dtype="fp16").load_vae(CPU).dtype == torch.float16
    other = opened(
        tiny_sdxl, vae_dtype="fp16", pretrained_vae_model_name_or_path=str(fixed / "vae")
    )
    assert other.load_vae(CPU).dtype == torch.float16


def test_an_autoencoder_in_one_file_is_asked_whether_it_overflows(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    written = "diffusion_pytorch_model.safetensors"
    alone = tmp_path / "fixed.safetensors"
    alone.write_bytes((tiny_sdxl / "vae" / written).read_bytes())
    given: dict[str, Any] = {"vae_dtype": "fp16", "pretrained_vae_model_name_or_path": str(alone)}
    with pytest.raises(UserError, match="say --vae_fits_fp16"):
        opened(tiny_sdxl, **given)
    model = opened(tiny_sdxl, **given, vae_fits_fp16=True)
    assert model.load_vae(CPU).dtype == torch.float16
    # Its config.json in a result says so too, or the next program would upcast it.
    saving = Saving(dtype=torch.float32)
    unet = model.load_network(torch.float32, CPU)
    model.save_whole(tmp_path / "result", unet, saving, model.objective((64, 64)))
    assert not json.loads((tmp_path / "result" / "vae" / "config.json").read_text())["force_upcast"]

    fixed = changed(tmp_path, tiny_sdxl, "vae", force_upcast=False) / "vae"
    given["pretrained_vae_model_name_or_path"] = str(fixed / written)
    assert opened(tiny_sdxl, **given).load_vae(CPU).dtype == torch.float16
    given["pretrained_vae_model_name_or_path"] = str(fixed)
    with pytest.raises(UserError, match="--vae_fits_fp16 is for an autoencoder in one file"):
        opened(tiny_sdxl, **given, vae_fits_fp16=True)
    with pytest.raises(ValueError, match="--vae_fits_fp16 is said of an autoencoder"):
        opened(tiny_sdxl, vae_fits_fp16=True)


# The real sizes


def test_the_real_network_has_the_layers_that_are_adapted(model: sdxl.Model) -> None:
    unet: Any
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(REAL_UNET)
    assert sum(param.numel() for param in unet.parameters()) == 2_567_463_684
    linear = [one for one in unet.modules() if isinstance(one, torch.nn.Linear)]
    counts = [len(lora.target_layers(unet, [word])) for word in ("attn", "attn+ff", "all-linear")]
    assert (len(linear), *counts) == (743, 560, 700, 700)
    real = replace(
        model,
        unet={**REAL_UNET, "in_channels": 4},
        encoders={"text_encoder": {}, "text_encoder_2": {"projection_dim": 1280}},
    )
    assert (real.native_size, real.pixel_step, real.pooled_width) == (1024, 32, 1280)
    assert real.text_numbers == real.clip_tokens * 2048 + 1280
    assert real.latent_shape(832, 1216) == (4, 104, 152)


# Refusals


def refusal(folder: Path) -> str:
    with pytest.raises(UserError, match="--pretrained_model_name_or_path") as refused:
        opened(folder)
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_the_refiner_is_refused_by_its_name(tmp_path: Path, tiny_sdxl: Path) -> None:
    folder = changed(
        *(tmp_path, tiny_sdxl, "model_index.json"),
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
    )
    shutil.rmtree(folder / "text_encoder")
    assert "SDXL's refiner" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"in_channels": 9}, "holds an inpainting model"),
        ("unet", {"in_channels": 8}, "edits pictures"),
        ("unet", {"addition_embed_type": None}, "addition_embed_type None"),
        ("unet", {"addition_embed_type": "text_image"}, "text_image"),
        ("unet", {"encoder_hid_dim": 4096}, "encoder_hid_dim"),  # Kolors
        ("unet", {"cross_attention_dim": 64}, "give 160 numbers per token, the UNet reads 64"),
        ("unet", {"projection_class_embeddings_input_dim": 100}, "the UNet reads 100 numbers"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("text_encoder_2", {"projection_dim": 64}, "64 pooled ones"),
    ],
)
def test_models_that_are_no_sdxl_are_refused(
    tmp_path: Path, tiny_sdxl: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    assert message in refusal(changed(tmp_path, tiny_sdxl, part, **settings))


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "text_encoder_2"])
def test_a_half_downloaded_folder_is_refused(tmp_path: Path, tiny_sdxl: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "half"))
    shutil.rmtree(folder / part)
    assert part in refusal(folder)
