"""Claims about the one file that knows SD3: shapes, shift, precision, text, folders, decoding."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.maths import flow
from dojo.models import sd3

CPU = torch.device("cpu")


def args_of(folder: Path | str, **options: Any) -> sd3.ModelArgs:
    return sd3.ModelArgs(pretrained_model_name_or_path=str(folder), **options)


@pytest.fixture(scope="module")
def config(tiny_sd3: Path) -> sd3.Model:
    """What is known of the tiny model without its weights."""
    return sd3.open_model(args_of(tiny_sd3))


@pytest.fixture(scope="module")
def pipeline(tiny_sd3: Path) -> Any:
    """The tiny model through one plain call of diffusers."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Sizes


def test_latents_have_the_shape_that_the_autoencoder_gives(
    config: sd3.Model, pipeline: Any
) -> None:
    shape = config.latent_shape(32, 64)
    mean, std = sd3.posterior(pipeline.vae, torch.zeros(2, 3, 32, 64))
    assert mean.shape == std.shape == (2, *shape) == (2, 16, 4, 8)
    assert config.pixel_step == 16
    assert config.pixels_per_latent == 8
    assert config.clip_tokens == 20


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (60, 64, "--height (or --resolution) 60 is not a multiple of 16"),
        (64, 72, "--width (or --resolution) 72 is not a multiple of 16"),
        (5, 64, "the nearest is 16"),
        (100, 64, "the nearest is 96"),
        (64, 272, "larger than this model's positions reach (256)"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(
    config: sd3.Model, height: int, width: int, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        config.latent_shape(height, width)
    assert message in str(refused.value)


def test_the_largest_size_runs_through_the_transformer(config: sd3.Model, pipeline: Any) -> None:
    shape = config.latent_shape(256, 16)
    out = sd3.velocity(
        pipeline.transformer,
        torch.zeros(1, *shape),
        torch.ones(1),
        torch.zeros(1, 21, 192),
        torch.zeros(1, 160),
        torch.float32,
    )
    assert out.shape == (1, *shape)


# Shift


def test_the_shift_is_the_schedulers_own_unless_told(config: sd3.Model) -> None:
    assert config.shift(None, 64, 64) == config.shift(None, 256, 256) == 3.0
    assert config.shift(1.5, 64, 64) == 1.5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (128, 64), (256, 256)])
def test_the_automatic_shift_follows_the_root_of_the_tokens(
    config: sd3.Model, height: int, width: int
) -> None:
    native = (config.transformer["sample_size"] // 2) ** 2  # pyright: ignore
    tokens = (height // 16) * (width // 16)
    assert config.shift("auto", height, width) == pytest.approx(3 * math.sqrt(tokens / native))


def test_the_automatic_shift_is_three_at_the_native_size_of_sd35() -> None:
    medium = sd3.Model(
        args=args_of("-"),
        folder=Path(),
        transformer={"sample_size": 128, "patch_size": 2, "in_channels": 16},
        vae={"block_out_channels": [128, 256, 512, 512]},
        scheduler={"shift": 3.0},
    )
    assert medium.shift("auto", 1024, 1024) == 3.0
    assert medium.shift("auto", 512, 512) == 1.5


def test_the_saved_scheduler_samples_with_the_shift_of_the_training(
    config: sd3.Model, tmp_path: Path
) -> None:
    shift = config.shift("auto", 32, 32)
    config.with_shift(shift).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["shift"] == shift == 1.5
    grid = config.with_shift(shift).sigmas
    even = torch.linspace(1, 1000, 1000).flip(0) / 1000
    torch.testing.assert_close(grid, flow.shift_sigma(even, shift))


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="--flow_shift"):
        sd3.NoiseArgs(flow_shift=shift)


def test_an_unbounded_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="--precondition_outputs"):
        sd3.NoiseArgs(weighting_scheme="sigma_sqrt")
    sd3.NoiseArgs(weighting_scheme="sigma_sqrt", precondition_outputs=True)


def test_options_reach_the_density(config: sd3.Model) -> None:
    uniform = torch.linspace(0.01, 1, 50)
    noise = sd3.NoiseArgs(logit_mean=0.7, logit_std=0.5, flow_shift=2.0)
    expected = flow.draw_sigma(uniform, "logit_normal", shift=2.0, logit_mean=0.7, logit_std=0.5)
    assert torch.equal(config.objective((64, 64), noise).level(uniform), expected)
    mode = sd3.NoiseArgs(weighting_scheme="mode", mode_scale=0.3, flow_shift=1.0)
    found = config.objective((64, 64), mode).level(uniform)
    assert torch.equal(found, flow.draw_sigma(uniform, "mode", mode_scale=0.3))


# Latents


def test_a_draw_from_the_posterior_is_what_diffusers_scripts_train_on(
    config: sd3.Model, pipeline: Any
) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        sample = pipeline.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    expected = (sample - 0.0609) * 1.5305
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    mean, std = sd3.posterior(pipeline.vae, pixels)
    torch.testing.assert_close(config.scaled(mean, std, noise), expected)


def test_latents_are_float32_even_from_a_half_precision_autoencoder(
    config: sd3.Model, tiny_sd3: Path
) -> None:
    vae = sd3.open_model(args_of(tiny_sd3, vae_dtype="bf16")).load_vae(CPU)
    assert vae.dtype == torch.bfloat16
    assert not any(param.requires_grad for param in vae.parameters())
    mean, std = sd3.posterior(vae, torch.zeros(1, 3, 32, 32))
    latents = config.scaled(mean, std, torch.randn(mean.shape))
    assert latents.dtype == torch.float32
    assert sd3.decode(vae, config, latents).dtype == torch.float32


def test_decode_is_the_pipelines_own(config: sd3.Model, pipeline: Any) -> None:
    def draw(output: str) -> Tensor:
        return pipeline(
            "a red circle",
            num_inference_steps=2,
            guidance_scale=1.0,
            height=64,
            width=64,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(0),
            output_type=output,
        ).images

    torch.testing.assert_close(
        sd3.decode(pipeline.vae, config, draw("latent")), draw("pt"), rtol=0, atol=1e-5
    )


def test_decode_undoes_the_scaling(config: sd3.Model, pipeline: Any) -> None:
    raw = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (pipeline.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = config.scaled(raw, torch.zeros_like(raw), torch.zeros_like(raw))
    torch.testing.assert_close(sd3.decode(pipeline.vae, config, latents), expected)


# Velocity


class Spy(torch.nn.Module):
    """Stands where the transformer stands and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.seen = inputs
        return (inputs["hidden_states"],)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_timestep_is_a_thousand_sigma_in_float32(dtype: torch.dtype) -> None:
    # Peers cast it to bfloat16, in which only 353 of the 1000 timesteps differ.
    spy = Spy()
    sigma = torch.linspace(0.001, 1, 1000)
    noisy = torch.zeros(1000, 1, 1, 1)
    out = sd3.velocity(spy, noisy, sigma, torch.zeros(1000, 1, 1), torch.zeros(1000, 1), dtype)
    assert out.dtype == torch.float32
    assert spy.seen["timestep"].dtype == torch.float32
    assert torch.equal(spy.seen["timestep"], 1000 * sigma)
    assert len(spy.seen["timestep"].unique()) == 1000
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        assert spy.seen[name].dtype == dtype


def test_nearby_sigmas_are_told_apart_by_a_bfloat16_model(
    config: sd3.Model, tiny_sd3: Path
) -> None:
    model = config.load_network(torch.bfloat16, CPU)
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    model.time_text_embed.time_proj.register_forward_hook(keep)
    sigma = torch.tensor([0.9000, 0.9004])
    sd3.velocity(
        model,
        torch.zeros(2, 16, 8, 8),
        sigma,
        torch.zeros(2, 44, 192),
        torch.zeros(2, 160),
        torch.bfloat16,
    )
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_frozen_transformer_has_no_gradients_of_its_own(
    tiny_sd3: Path, checkpointing: bool
) -> None:
    config = sd3.open_model(args_of(tiny_sd3, gradient_checkpointing=checkpointing))
    model = config.load_network(torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16
    assert model.is_gradient_checkpointing == checkpointing
    assert not any(param.requires_grad for param in model.parameters())


def test_counting_needs_no_memory(tiny_sd3: Path) -> None:
    config = sd3.open_model(args_of(tiny_sd3, max_sequence_length=24))
    meta, _ = config.training_cost(
        torch.bfloat16,
        lambda model: model.get_submodule("proj_out").requires_grad_(True),
        1,
        (16, 8, 8),
        checkpointing=False,
    )
    real = config.load_network(torch.float32, CPU)
    assert {param.device.type for param in meta.parameters()} == {"meta"}
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in real.parameters())


@pytest.mark.slow
def test_a_compiled_transformer_trains_an_adapter_as_before(
    tiny_sd3: Path,
) -> None:
    found = []
    names = set()
    for compile_ in (False, True):
        config = sd3.open_model(args_of(tiny_sd3, torch_compile=compile_))
        model = config.load_network(torch.float32, CPU)
        torch.manual_seed(0)
        params = lora.add(model, lora.LoraArgs(rank=2))
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(1, 16, 4, 4, generator=generator)
        text, pooled = torch.zeros(1, 24, 192), torch.zeros(1, 160)
        out = sd3.velocity(model, noisy, torch.ones(1), text, pooled, torch.float32)
        out.square().mean().backward()
        found.append((out, [param.grad for param in params]))
        names.add(tuple(lora.state(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert len(names) == 1


# Text


def encoders(args: sd3.ModelArgs, dtype: torch.dtype) -> sd3.TextEncoders:
    return sd3.open_model(args).load_text(dtype, CPU)


@pytest.mark.parametrize("length", [1, 24, 77, 256])
def test_texts_are_encoded_as_the_pipeline_does_it(
    config: sd3.Model, pipeline: Any, tiny_sd3: Path, length: int
) -> None:
    captions = ["a red circle", "two blue stars on a black background", ""]
    args = args_of(tiny_sd3, max_sequence_length=length)
    found = encoders(args, torch.float32)(captions)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions, captions, captions, max_sequence_length=length
        )
    assert found["prompt_embeds"].shape == (3, config.clip_tokens + length, 192)
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-5)


def test_a_long_caption_uses_the_whole_sequence_length(config: sd3.Model, tiny_sd3: Path) -> None:
    # The predecessor cut T5's text at 77 tokens whatever --max_sequence_length said.
    start = " ".join(["red"] * 90)
    encode = encoders(args_of(tiny_sd3, max_sequence_length=200), torch.float32)
    first, second = encode([f"{start} circle", f"{start} star"])["prompt_embeds"]
    assert not torch.allclose(first[20:], second[20:], atol=1e-4)


def test_encoders_sit_in_the_precision_that_was_asked(config: sd3.Model, tiny_sd3: Path) -> None:
    # transformers takes the dtype from config.json, diffusers float32: both must obey.
    encode = encoders(args_of(tiny_sd3), torch.bfloat16)
    assert encode.t5 is not None
    assert [part.dtype for part in (*encode.clips, encode.t5)] == [torch.bfloat16] * 3
    assert encode(["a star"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("length", [0, 513])
def test_sequence_lengths_that_no_sd3_knows_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="--max_sequence_length"):
        args_of("x", max_sequence_length=length)


# Folders


def refusal(name: Path | str) -> str:
    with pytest.raises(UserError, match="--pretrained_model_name_or_path") as refused:
        sd3.open_model(args_of(name))
    message = str(refused.value)
    assert "\n" not in message
    assert str(name) in message
    return message


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "none", "./none", "none", "models/pocket-sd4", "a/b/c", "~/none"):
        assert "there is no folder" in refusal(name)


def test_a_hub_id_without_a_network_is_refused_in_one_sentence() -> None:
    assert "neither a folder nor a reachable hub" in refusal("stabilityai/no-such-model")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)
    assert "model_index.json" in refusal(tiny_sd3 / "transformer")


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"], "vae": ["", ""]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "Stable Diffusion 3" in refusal(tmp_path)


def test_another_pipeline_with_a_transformer_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "pixart"))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "PixArtSigmaPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "Stable Diffusion 3" in refusal(folder)


@pytest.mark.parametrize("part", ["transformer/config.json", "vae", "scheduler"])
def test_a_half_downloaded_folder_is_refused(tmp_path: Path, tiny_sd3: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "half"))
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert part.split("/")[0] in refusal(folder)


def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "mixed"))
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_channels": 4}))
    with pytest.raises(UserError, match="4 channels"):
        sd3.open_model(args_of(folder))


def test_a_plain_call_draws_a_picture(pipeline: Any) -> None:
    # With T5 padded to 256, guidance and 28 steps by default; fewer steps and pixels here.
    image = pipeline("a photo of sks dog", num_inference_steps=1, height=64, width=64).images[0]
    assert image.size == (64, 64)


# Fingerprints


def test_a_fingerprint_is_that_of_the_content_not_of_the_place(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    parts = ["vae", *sd3.TEXT_FOLDERS]
    original = sd3.fingerprint(tiny_sd3, parts)
    copy = Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))
    assert sd3.fingerprint(copy, parts) == original
    link = tmp_path / "link"
    link.symlink_to(tiny_sd3)
    assert sd3.fingerprint(link, parts) == original


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder_3/model.safetensors",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_fingerprint_changes_with_any_file(tmp_path: Path, tiny_sd3: Path, name: str) -> None:
    copy = Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))
    path = copy / name
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content), 1000):
        content[i] ^= 1  # training changes every block
    path.write_bytes(content)
    parts = ["vae", *sd3.TEXT_FOLDERS]
    assert sd3.fingerprint(copy, parts) != sd3.fingerprint(tiny_sd3, parts)


def test_a_fingerprint_ignores_parts_that_were_not_asked_for(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    copy = Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))
    (copy / "transformer" / "config.json").write_text("{}")
    assert sd3.fingerprint(copy, ["vae"]) == sd3.fingerprint(tiny_sd3, ["vae"])


# Cost


def test_operations_grow_with_batch_and_recomputation(pocket_sd3: Path) -> None:
    config = sd3.open_model(args_of(pocket_sd3, max_sequence_length=24))

    def cost(batch: int, checkpointing: bool = False) -> int:
        _, found = config.training_cost(
            torch.float32,
            lambda model: model.get_submodule("pos_embed.proj").requires_grad_(True),
            batch,
            (16, 8, 8),
            checkpointing=checkpointing,
        )
        return found.flops

    assert cost(2) == pytest.approx(2 * cost(1), rel=0.01)
    # A frozen model: forward 1, gradients by activations 1; recomputing adds one forward.
    assert cost(2, checkpointing=True) == pytest.approx(1.5 * cost(2), rel=0.05)


def test_the_scheduler_of_a_config_is_not_changed(config: sd3.Model) -> None:
    config.with_shift(7.0)
    assert config.scheduler["shift"] == 3.0
    assert replace(config, scheduler={}).shift(None, 64, 64) == 1.0


FLOWS = {
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}


@pytest.mark.parametrize("name", FLOWS)
def test_another_scheduler_of_the_flow_keeps_class_and_shift(
    config: sd3.Model, tmp_path: Path, name: str
) -> None:
    kind = getattr(diffusers, name)
    kind(**FLOWS[name], flow_shift=5.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    other = replace(config, scheduler=saved)
    assert other.shift(None, 64, 64) == 5
    assert other.shift("auto", 32, 32) == pytest.approx(config.shift("auto", 32, 32) * 5 / 3)
    made = other.with_shift(7.0)
    assert type(made) is kind
    made.set_timesteps(4)
    expected = kind(**FLOWS[name], flow_shift=7.0)
    expected.set_timesteps(4)
    assert torch.equal(made.sigmas, expected.sigmas)


def test_a_scheduler_that_follows_no_flow_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "euler"))
    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    said = refusal(folder)
    assert "its scheduler, a DPMSolverMultistepScheduler, follows no rectified flow" in said


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("DEISMultistepScheduler", {}, "goes from sigma 1 to 0.1 in 28 steps"),
        ("SASolverScheduler", {}, "goes from sigma 1 to 0.1 in 28 steps"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "goes from sigma 157 to 0"),
        ("UniPCMultistepScheduler", {"use_beta_sigmas": True}, "goes from sigma 157 to 0"),
    ],
)
def test_a_flow_that_does_not_end_at_a_clean_picture_is_refused(
    tmp_path: Path, tiny_sd3: Path, name: str, more: dict[str, bool], words: str
) -> None:
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "other"))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    getattr(diffusers, name)(**flow, **more).save_pretrained(folder / "scheduler")
    assert f"its scheduler, a {name}, {words}" in refusal(folder)
    kind = diffusers.UniPCMultistepScheduler
    kind(**flow, use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    sd3.open_model(args_of(folder))
