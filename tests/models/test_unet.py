"""Claims about what families with a UNet share: the objective's options, and what a scheduler says
of a training, against diffusers' own schedulers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.maths import ddpm, denoising
from dojo.maths.objective import Diffusion
from dojo.models import sd15
from dojo.models.family import Saving
from dojo.models.unet import noise, schedule
from dojo.models.unet.noise import NoiseArgs
from dojo.pocket.models import DDPM

SCHEDULE = ddpm.Schedule.of(DDPM)
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **DDPM}
DARK = NoiseArgs(prediction_type="v_prediction", rescale_betas_zero_snr=True)
VELOCITY = NoiseArgs(prediction_type="v_prediction")
# Those with zero terminal SNR of their own, and two without.
KNOWING = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
UNKNOWING = ("PNDMScheduler", "LMSDiscreteScheduler")
CPU = torch.device("cpu")
SIZE = (64, 64)


def of(args: NoiseArgs | None = None, own: ddpm.Prediction = "epsilon") -> Diffusion:
    return noise.objective(SCHEDULE, own, args)


def config_of(kind: str) -> dict[str, Any]:
    """A configuration as a folder has it, with every setting of its class."""
    made = schedule.own({**PNDM, "_class_name": kind, "clip_sample": False})
    return {**made.config, "_class_name": kind}


# -- options


@pytest.mark.parametrize("own", ["epsilon", "v_prediction"])
def test_without_options_the_model_learns_what_it_predicts(own: ddpm.Prediction) -> None:
    for args in (None, NoiseArgs()):
        objective = of(args, own)
        assert objective == Diffusion(schedule=SCHEDULE, prediction_type=own)
        assert objective.schedule is SCHEDULE


def test_every_option_reaches_the_objective() -> None:
    own: dict[str, Any] = {"min_timestep": 100, "max_timestep": 900, "snr_gamma": 5.0}
    own |= {"loss_type": "huber", "huber_c": 0.3, "huber_schedule": "exponential"}
    made = of(NoiseArgs(**own, prediction_type="v_prediction"))
    expected = Diffusion(schedule=SCHEDULE, prediction_type="v_prediction", **own)
    assert made == expected
    assert of(NoiseArgs(debiased_estimation=True)).debiased_estimation
    assert of(DARK).schedule.ends_without_signal


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "--prediction_type v"),
        ({"snr_gamma": 5.0, "debiased_estimation": True}, "two weights"),
        ({"huber_c": 0.5}, "--huber_c needs --loss_type"),
        ({"huber_schedule": "constant"}, "--huber_schedule needs --loss_type"),
        ({"min_timestep": 500, "max_timestep": 500}, "--max_timestep 500 must be above 500"),
        ({"loss_type": "huber", "huber_c": 1.5}, "--huber_c 1.5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NoiseArgs(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr: .*v_prediction"),
        ({"max_timestep": 1001}, "--max_timestep: the model has 1000"),
        ({"min_timestep": 1000}, "--min_timestep: the model has 1000"),
    ],
)
def test_what_the_model_cannot_learn_is_refused(options: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        of(NoiseArgs(**options))


def test_noise_is_not_learned_where_the_models_own_schedule_ends_without_signal() -> None:
    dark = SCHEDULE.without_signal_at_its_end()
    with pytest.raises(UserError, match=r"--prediction_type: .*v_prediction"):
        noise.objective(dark, "v_prediction", NoiseArgs(prediction_type="epsilon"))


# -- what the scheduler says


@pytest.mark.parametrize("kind", [*KNOWING, *UNKNOWING])
def test_a_training_that_changes_nothing_leaves_the_scheduler_alone(kind: str) -> None:
    config = config_of(kind)
    some = NoiseArgs(snr_gamma=5, noise_offset=0.1, min_timestep=5, loss_type="huber")
    assert schedule.trained(config, of(some)) == config
    own = {**config, "prediction_type": "v_prediction"}
    assert schedule.trained(own, of(some, "v_prediction")) == own


@pytest.mark.parametrize("kind", [*KNOWING, *UNKNOWING])
def test_velocity_is_said_and_no_more_is_changed(kind: str) -> None:
    config = config_of(kind)
    changed = schedule.trained(config, of(VELOCITY))
    assert changed == {**config, "prediction_type": "v_prediction"}
    assert schedule.own(changed).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", [*KNOWING, *UNKNOWING])
def test_a_schedule_that_ends_without_signal_begins_there_when_drawing(kind: str) -> None:
    objective = of(DARK)
    made = schedule.own(schedule.trained(config_of(kind), objective))
    assert type(made).__name__ == (kind if kind in KNOWING else "DDIMScheduler")
    assert made.config.prediction_type == "v_prediction"
    ours = objective.schedule.alphas_cumprod.float()
    assert torch.allclose(made.alphas_cumprod, ours, atol=1e-6)
    assert made.alphas_cumprod[-1] < 1e-7  # Euler's is 2^-24, for it divides by it
    made.set_timesteps(10)
    assert made.timesteps.long().tolist() == list(
        objective.schedule.sampling_timesteps(10, spacing="trailing")
    )
    assert made.timesteps[0] == 999


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_the_first_step_from_pure_noise_takes_the_velocity_for_the_picture_turned_over(
    kind: str,
) -> None:
    made = schedule.own(schedule.trained(config_of(kind), of(DARK)))
    made.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * made.init_noise_sigma
    v = torch.randn(1, 4, 8, 8, generator=generator)
    first = made.timesteps[0]
    seen = made.scale_model_input(latents, first)
    assert seen.std().item() == pytest.approx(1, abs=0.1)
    found = made.step(v, first, latents).pred_original_sample
    assert torch.allclose(found, -v, atol=2e-3)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("args", [VELOCITY, DARK])
def test_what_is_learned_is_diffusers_velocity_of_the_saved_scheduler(
    kind: str, args: NoiseArgs
) -> None:
    objective = of(args)
    made = schedule.own(schedule.trained(config_of(kind), objective))
    generator = torch.Generator().manual_seed(0)
    clean, drawn = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    level = torch.tensor([0, 10, 400, 800, 999])
    ours = objective.target(clean, drawn, level)
    assert torch.allclose(ours, made.get_velocity(clean, drawn, level), atol=1e-5)
    noisy = objective.noisy(clean, drawn, level)
    assert torch.allclose(noisy, made.add_noise(clean, drawn, level), atol=1e-5)


@pytest.mark.parametrize("kind", [*KNOWING, *UNKNOWING])
def test_a_scheduler_of_any_class_takes_over_what_weights_were_trained_for(kind: str) -> None:
    saved = schedule.trained(config_of("EulerDiscreteScheduler"), of(DARK))
    made = schedule.own(schedule.taken_over(config_of(kind), saved))
    assert type(made).__name__ == (kind if kind in KNOWING else "DDIMScheduler")
    for name in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing"):
        assert made.config[name] == saved[name]


# -- a whole model


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> sd15.Model:
    """The untrained SD1, whose scheduler is PNDM."""
    return sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15)))


def test_the_pipeline_of_a_model_without_signal_at_the_end_walks_our_way(
    model: sd15.Model,
) -> None:
    model = replace(model, scheduler={**model.scheduler, "set_alpha_to_one": True})
    objective = model.objective(SIZE, DARK)
    network, vae = model.load_network(torch.float32, CPU).eval(), model.load_vae(CPU)
    pipeline = model.pipeline(network, vae, objective)
    pipeline.set_progress_bar_config(disable=True)
    embeds = model.load_text(torch.float32, CPU)(["a red star"])
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 1.0}
    theirs = pipeline(**embeds, latents=start, output_type="latent", **options).images

    def predict(latents: Tensor, level: Tensor) -> Tensor:
        return model.predict(network, latents, level, embeds, torch.float32)

    way = denoising.Way.of(objective.schedule, 5, eta=0, prediction=objective.prediction_type)
    ours = denoising.sample(predict, start, way)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, start, atol=0.1)


def test_a_result_says_what_was_trained_and_one_plain_call_loads_it(
    model: sd15.Model, tmp_path: Path
) -> None:
    network = model.load_network(torch.float32, CPU)
    for name, args, kind in (
        ("plain", NoiseArgs(snr_gamma=5), "PNDMScheduler"),
        ("velocity", VELOCITY, "PNDMScheduler"),
        ("dark", DARK, "DDIMScheduler"),
    ):
        folder = tmp_path / name
        model.save_whole(folder, network, Saving(), model.objective(SIZE, args))
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.scheduler).__name__ == kind
        expected = args.prediction_type or "epsilon"
        assert pipeline.scheduler.config.prediction_type == expected
        assert bool(pipeline.scheduler.config.get("rescale_betas_zero_snr")) == (name == "dark")
        again = sd15.open_model(sd15.ModelArgs(pretrained_model_name_or_path=str(folder)))
        assert again.prediction_type == expected
        assert again.schedule.ends_without_signal == (name == "dark")
        assert pipeline("a star", num_inference_steps=2, guidance_rescale=0.7).images


def test_beside_a_lora_lies_a_scheduler_where_the_bases_is_not_right(
    model: sd15.Model, tmp_path: Path
) -> None:
    for name, args in (("plain", None), ("velocity", VELOCITY), ("dark", DARK)):
        folder = tmp_path / name
        folder.mkdir()
        model.finish(folder, model.objective(SIZE, args))
        path = folder / "scheduler" / "scheduler_config.json"
        assert path.is_file() == (args is not None)
        base = schedule.own(model.scheduler)
        found = pipelines._trained_with(base, folder)
        if args is None:
            assert found is base
            continue
        assert json.loads(path.read_text())["prediction_type"] == "v_prediction"
        assert found.config.prediction_type == "v_prediction"
        assert found.config.get("rescale_betas_zero_snr", False) == (name == "dark")
        # A user who draws with Euler keeps it.
        euler = schedule.own(config_of("EulerDiscreteScheduler"))
        taken = pipelines._trained_with(euler, folder)
        assert type(taken) is type(euler)
        assert taken.config.prediction_type == "v_prediction"
        spacing = "trailing" if name == "dark" else "leading"
        assert taken.config.timestep_spacing == spacing
