"""Claims about the one package that knows SD1: sizes, schedule, text, folders, decoding, texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from dojo import data
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.inputs import texts
from dojo.models import sd15
from dojo.run import run as training
from dojo.run.optim import OptimArgs
from tests.conftest import ROOT

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "two blue stars on a black background", ""]


def args_of(folder: Path | str, **options: Any) -> sd15.ModelArgs:
    return sd15.ModelArgs(pretrained_model_name_or_path=str(folder), **options)


@pytest.fixture(scope="module")
def config(tiny_sd15: Path) -> sd15.Model:
    """What is known of the tiny model without its weights."""
    return sd15.open_model(args_of(tiny_sd15))


@pytest.fixture(scope="module")
def pipeline(tiny_sd15: Path) -> Any:
    """The tiny model through one plain call of diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(folder: Path, source: Path, part: str, **settings: Any) -> Path:
    """A copy of a model with other settings in one of its configurations."""
    copy = Path(shutil.copytree(source, folder / "changed"))
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = copy / part / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


# Sizes and the schedule


def test_latents_have_the_shape_that_the_autoencoder_gives(
    config: sd15.Model, pipeline: Any
) -> None:
    shape = config.latent_shape(32, 64)
    mean, std = sd15.posterior(pipeline.vae, torch.zeros(2, 3, 32, 64))
    assert mean.shape == std.shape == (2, *shape) == (2, 4, 4, 8)
    assert config.pixels_per_latent == 8
    assert config.pixel_step == 16  # the tiny UNet halves once; SD 1.5 halves three times
    assert config.native_size == 64
    assert config.clip_tokens == 20
    assert config.text_numbers == 20 * 64


def test_the_real_sizes_are_those_of_sd15() -> None:
    real = sd15.Model(
        args=args_of(Path("-")),
        folder=Path(),
        unet={"block_out_channels": [320, 640, 1280, 1280], "in_channels": 4, "sample_size": 64},
        vae={"block_out_channels": [128, 256, 512, 512]},  # says no scaling_factor
        scheduler={},
        encoders={},
    )
    assert (real.pixel_step, real.native_size, real.scaling_factor) == (64, 512, 0.18215)
    assert real.latent_shape(512, 768) == (4, 64, 96)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (60, 64, "--height (or --resolution) 60 is not a multiple of 16"),
        (64, 72, "--width (or --resolution) 72 is not a multiple of 16"),
        (5, 64, "the nearest is 16"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(
    config: sd15.Model, height: int, width: int, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        config.latent_shape(height, width)
    assert message in str(refused.value)


def test_the_schedule_is_the_schedulers_own(config: sd15.Model, pipeline: Any) -> None:
    torch.testing.assert_close(
        config.schedule.alphas_cumprod.float(), pipeline.scheduler.alphas_cumprod
    )
    assert config.schedule is config.schedule
    assert config.steps_offset == 1


# Latents and pictures


def test_a_draw_from_the_posterior_is_what_diffusers_scripts_train_on(
    config: sd15.Model, pipeline: Any
) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        sample = pipeline.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    mean, std = sd15.posterior(pipeline.vae, pixels)
    found = config.scaled(mean, std, noise(*sample.shape, seed=1))
    torch.testing.assert_close(found, sample * 0.18215)


def test_decode_is_the_pipelines_own(config: sd15.Model, pipeline: Any) -> None:
    def draw(output: str) -> Tensor:
        return pipeline(
            "a red circle",
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type=output,
        ).images

    with torch.no_grad():
        found = sd15.decode(pipeline.vae, config, draw("latent"))
    torch.testing.assert_close(found, draw("pt"), rtol=0, atol=1e-5)


def test_a_gradient_goes_back_through_the_decoder(config: sd15.Model, tiny_sd15: Path) -> None:
    vae = config.load_vae(CPU)
    # Of a size at which the untrained decoder does not leave [0, 1], where there is no gradient.
    latents = (0.1 * noise(1, 4, 4, 4)).requires_grad_()
    images = sd15.decode(vae, config, latents)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    images.mean().backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().min() > 0
    assert not any(param.requires_grad for param in vae.parameters())


def test_the_decoder_recomputes_its_activations_where_asked(
    config: sd15.Model, tiny_sd15: Path
) -> None:
    """The autoencoder is frozen and in eval mode: fewer bytes are kept, the gradient is equal."""

    def measure(checkpointing: bool) -> tuple[int, Tensor, Tensor]:
        vae = config.load_vae(CPU, checkpointing=checkpointing)
        assert not vae.training
        latents = noise(1, 4, 8, 8).requires_grad_()
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            images = sd15.decode(vae, config, latents)
        weights = {param.untyped_storage().data_ptr() for param in vae.parameters()}
        size = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
        images.square().mean().backward()
        assert latents.grad is not None
        return size, images, latents.grad

    plain, images, grad = measure(False)
    less, same, equal = measure(True)
    assert less < plain / 4
    assert torch.equal(images, same)
    assert torch.equal(grad, equal)


def test_latents_are_float32_even_from_a_half_precision_autoencoder(
    config: sd15.Model, tiny_sd15: Path
) -> None:
    vae = sd15.open_model(args_of(tiny_sd15, vae_dtype="bf16")).load_vae(CPU)
    assert vae.dtype == torch.bfloat16
    mean, std = sd15.posterior(vae, torch.zeros(1, 3, 16, 16))
    latents = config.scaled(mean, std, noise(*mean.shape))
    assert latents.dtype == sd15.decode(vae, config, latents).dtype == torch.float32


# Noise


def test_epsilon_is_the_unets_own(config: sd15.Model, tiny_sd15: Path, pipeline: Any) -> None:
    unet = config.load_network(torch.float32, CPU)
    assert not any(param.requires_grad for param in unet.parameters())
    noisy, embeds, timestep = noise(2, 4, 8, 8), noise(2, 20, 64), torch.tensor([3, 999])
    with torch.no_grad():
        found = sd15.prediction(unet, noisy, timestep, embeds, torch.float32)
        expected = pipeline.unet(noisy, timestep, embeds).sample
    assert torch.equal(found, expected)


def test_epsilon_is_float32_whatever_the_network_computes_in() -> None:
    class Spy(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, **rest: Any) -> tuple[Tensor]:
            assert sample.dtype == rest["encoder_hidden_states"].dtype == torch.bfloat16
            assert timestep.dtype == torch.int64
            return (sample,)

    timestep = torch.arange(3)
    found = sd15.prediction(Spy(), noise(3, 4, 2, 2), timestep, noise(3, 2, 2), torch.bfloat16)
    assert found.dtype == torch.float32


def test_the_unet_recomputes_its_activations_where_asked(
    tiny_sd15: Path,
) -> None:
    config = sd15.open_model(args_of(tiny_sd15, gradient_checkpointing=True))
    unet = config.load_network(torch.float32, CPU)
    assert unet.is_gradient_checkpointing


def test_operations_grow_with_batch_and_recomputation(config: sd15.Model, tiny_sd15: Path) -> None:
    def cost(batch: int, checkpointing: bool = False) -> Any:
        return config.training_cost(
            torch.float32,
            lambda model: lora.add(model, lora.LoraArgs(rank=2)),
            batch,
            (4, 8, 8),
            checkpointing=checkpointing,
        )[1]

    one, two, recomputed = cost(1), cost(2), cost(2, checkpointing=True)
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert recomputed.flops > two.flops
    assert recomputed.saved_bytes < two.saved_bytes


# Text


def test_texts_are_encoded_as_the_pipeline_does_it(
    config: sd15.Model, pipeline: Any, tiny_sd15: Path
) -> None:
    # The last is longer than CLIP reads: it is cut before the end token.
    captions = [*CAPTIONS, " ".join(["red"] * 90) + " star"]
    encode = config.load_text(torch.float32, CPU)
    found = encode(captions)
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(captions, CPU, 1, False)
    assert found.keys() == {"prompt_embeds"}
    assert found["prompt_embeds"].shape == (4, 20, 64)
    assert torch.equal(found["prompt_embeds"], embeds)
    (tokenizer,) = encode.tokenizers
    ids = tokenizer(captions[3], max_length=20, truncation=True).input_ids
    assert ids[-1] == tokenizer.eos_token_id


def test_the_encoder_sits_in_the_precision_that_was_asked(
    config: sd15.Model, tiny_sd15: Path
) -> None:
    encode = config.load_text(torch.bfloat16, CPU)
    assert encode(["a star"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("no_cache", [False, True])
def test_prepared_texts_are_those_of_the_encoder(
    config: sd15.Model, tiny_sd15: Path, tmp_path: Path, no_cache: bool, monkeypatch: Any
) -> None:
    run_args = training.RunArgs(output_dir=tmp_path / "run", report_to=("none",), seed=0)
    run = training.start(run_args, OptimArgs(max_train_steps=1))
    cache = data.TextCacheArgs(latent_cache_dir=tmp_path, no_cache_text_embeddings=no_cache)
    embed = texts.prepare(run, config, cache, [CAPTIONS[:2], [""]])
    found = embed(CAPTIONS)
    expected = config.load_text(torch.float32, CPU)(CAPTIONS)
    assert found.keys() == {"prompt_embeds"}
    torch.testing.assert_close(found["prompt_embeds"], expected["prompt_embeds"], rtol=0, atol=1e-5)
    if not no_cache:  # the second time nothing is loaded
        monkeypatch.setattr(sd15.Model, "load_text", lambda *_, **__: pytest.fail("loaded"))
        again = texts.prepare(run, config, cache, [CAPTIONS])(CAPTIONS)
        assert again.keys() == {"prompt_embeds"}


# Folders


def refusal(name: Path | str) -> str:
    with pytest.raises(UserError, match="--pretrained_model_name_or_path") as refused:
        sd15.open_model(args_of(name))
    message = str(refused.value)
    assert "\n" not in message
    assert str(name) in message
    return message


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "none")
    assert "model_index.json" in refusal(tmp_path)
    assert "neither a folder nor a reachable hub" in refusal("runway/no-such-model")


def test_a_pipeline_of_another_kind_is_refused(tiny_sd3: Path) -> None:
    assert "holds a StableDiffusion3Pipeline, no Stable Diffusion 1" in refusal(tiny_sd3)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder"])
def test_a_half_downloaded_folder_is_refused(tmp_path: Path, tiny_sd15: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "half"))
    shutil.rmtree(folder / part)
    assert f"{part}/" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("scheduler", {"prediction_type": "sample"}, "predicts sample"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "ends without signal"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ("unet", {"addition_embed_type": "text_time"}, "text_time"),
        ("unet", {"class_embed_type": "timestep"}, "class labels"),
        ("unet", {"num_class_embeds": 1000}, "class labels"),
        ("unet", {"time_cond_proj_dim": 256}, "guidance scale"),
    ],
)
def test_models_that_are_trained_otherwise_are_refused(
    tmp_path: Path, tiny_sd15: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    assert message in refusal(changed(tmp_path, tiny_sd15, part, **settings))


def test_a_unet_with_further_channels_is_refused(tmp_path: Path, tiny_sd15: Path) -> None:
    folder = changed(tmp_path, tiny_sd15, "unet", in_channels=9)  # inpainting
    with pytest.raises(UserError, match="the UNet expects 9"):
        sd15.open_model(args_of(folder))


def test_a_fingerprint_changes_with_a_weight(
    config: sd15.Model, tmp_path: Path, tiny_sd15: Path
) -> None:
    parts = ["vae", *sd15.TEXT_FOLDERS]
    copy = Path(shutil.copytree(tiny_sd15, tmp_path / "copy"))
    other = sd15.open_model(args_of(copy))
    assert other.fingerprint(parts) == config.fingerprint(parts)
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + 1 for name, value in weights.items()}, path, {"format": "pt"})
    assert other.fingerprint(parts) != config.fingerprint(parts)
    assert other.fingerprint(["vae"]) == config.fingerprint(["vae"])


PARTS = ("vae", "scheduler", *sd15.TEXT_FOLDERS)


def test_copied_parts_load_in_one_plain_call_as_float32(
    tmp_path: Path, tiny_sd15: Path, pipeline: Any
) -> None:
    half = tmp_path / "half"  # as real repositories are: half precision, which the config says
    StableDiffusionPipeline.from_pretrained(tiny_sd15, dtype=torch.float16).save_pretrained(
        half, variant="fp16"
    )
    args = args_of(half, variant="fp16")
    config = sd15.open_model(args)
    result = tmp_path / "result"
    sd15.copy_parts(config, result, PARTS)
    shutil.copytree(tiny_sd15 / "unet", result / "unet")
    found: Any = StableDiffusionPipeline.from_pretrained(result)
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(found, part)
        assert module.dtype == torch.float32
        own = getattr(pipeline, part).state_dict()
        for name, value in module.state_dict().items():
            rounded = own[name] if part == "unet" else own[name].half().to(own[name].dtype)
            assert torch.equal(value, rounded), name
    assert found.safety_checker is None
    assert not found.config["requires_safety_checker"]
    assert type(found.scheduler) is type(pipeline.scheduler)
    image = found("a red circle", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()


def test_a_safety_checker_comes_along_where_there_is_one(tmp_path: Path, tiny_sd15: Path) -> None:
    base = Path(shutil.copytree(tiny_sd15, tmp_path / "base"))
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes = {**width, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=sizes, text_config={**width, "num_hidden_layers": 1})
    )
    checker.half().save_pretrained(base / "safety_checker")
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(base / "feature_extractor")
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (base / "model_index.json").write_text(json.dumps(index))
    args = args_of(base)
    config = sd15.open_model(args)
    result = tmp_path / "result"
    sd15.copy_parts(config, result, ("unet", *PARTS))
    found: Any = StableDiffusionPipeline.from_pretrained(result)
    assert found.safety_checker.dtype == torch.float32
    assert found.feature_extractor is not None
    assert found.config["requires_safety_checker"]
    for part in ("safety_checker", "feature_extractor"):  # listed, but not downloaded
        shutil.rmtree(base / part)
    sd15.copy_parts(config, result, ("unet", *PARTS))
    found = StableDiffusionPipeline.from_pretrained(result)
    assert found.safety_checker is None
    # For pictures of a training nobody needs it.
    drawing: Any = config.load_pipeline(torch.float32, CPU)
    assert drawing.safety_checker is None
    assert drawing.unet.dtype == torch.float32


def test_a_result_is_called_after_its_own_base(tiny_sd15: Path, tmp_path: Path) -> None:
    def title(model: Path) -> str:
        return sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=str(model))).title

    assert title(tiny_sd15) == "Stable Diffusion 1.5"
    other = tmp_path / "sd2"
    shutil.copytree(tiny_sd15, other)
    path = other / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    assert title(other) == "Stable Diffusion 2"
    for script in ROOT.glob("train_*_sd15.py"):
        card = script.read_text().partition("publish.Card(")[2]
        assert "{model.title}" in card.partition("dataset=")[0], script.name
