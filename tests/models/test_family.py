"""Claims about every family of models: what the contract promises is what its pipeline does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dojo.cli import UserError
from dojo.data import Geometry
from dojo.finetune import Adapters, AllWeights, Trained, WholeArgs, lora
from dojo.inputs.steering import Steering
from dojo.models import hunyuandit, kolors, opening, sd3, sd15, sdxl
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import facts_of, open_model
from dojo.run import EmaArgs, Learner, OptimArgs, Run, RunArgs, start
from tests.conftest import load_adapter, reset_accelerate

CPU = torch.device("cpu")
SIZE = (64, 64)
CAPTIONS = ["a red star", "two blue circles above a green square"]
SHORT = {"max_sequence_length": 24}  # where a family has the option: T5 is slow


OLDER = pytest.param("hunyuandit11", marks=pytest.mark.slow)


@pytest.fixture(params=["sd15", "sd2", "sd3", "sdxl", "kolors", "hunyuandit", OLDER])
def folder(request: pytest.FixtureRequest) -> Path:
    """An untrained model of a family; sd2 is one of sd15's that predicts v.

    hunyuandit is a v1.2, hunyuandit11 a v1.1.
    """
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def model(folder: Path) -> Model:
    """The same, opened."""
    opened = open_model(ModelArgs(pretrained_model_name_or_path=str(folder)))
    own = {name: value for name, value in SHORT.items() if hasattr(opened.args, name)}
    return replace(opened, args=replace(opened.args, **own))


@pytest.fixture
def pipeline(folder: Path) -> Any:
    """The family's own, as a user of diffusers loads it."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds_of(model: Model) -> dict[str, Tensor]:
    return model.load_text(torch.float32, CPU)(CAPTIONS)


def conditions_of(model: Model) -> dict[str, Tensor]:
    return model.conditions(embeds_of(model), Geometry.whole(SIZE, 2) if model.sized else None)


def told(model: Model) -> dict[str, Any]:
    """What a plain call of the pipeline is told, so that it draws what is trained on."""
    sizes = {"original_size": SIZE} if isinstance(model, hunyuandit.Model) else {}
    return {**model.call_options, **sizes}


def test_every_family_is_listed_once_and_opened_by_what_is_there(
    folder: Path, model: Model
) -> None:
    families = list(opening.FAMILIES.values())
    assert len({family.Model for family in families}) == len(families)
    for one in families:  # families may share a class of networks, and what is known of it
        same = [f for f in families if f.Model.network_class == one.Model.network_class]
        assert {id(f.Model.network_facts) for f in same} == {id(one.Model.network_facts)}
    assert [type(model)] == [f.Model for f in families if isinstance(model, f.Model)]
    assert model.part in json.loads((folder / "model_index.json").read_text())
    assert facts_of(model.load_network(torch.float32, CPU)) is model.network_facts


@pytest.mark.parametrize("family", [sd3, sd15, sdxl, kolors, hunyuandit])
def test_a_family_refuses_the_folder_of_another(folder: Path, family: Any) -> None:
    args = family.ModelArgs(pretrained_model_name_or_path=str(folder))
    if isinstance(open_model(ModelArgs(pretrained_model_name_or_path=str(folder))), family.Model):
        assert isinstance(open_model(args), family.Model)
        return
    with pytest.raises(
        UserError, match=f"holds a (StableDiffusion|Kolors|Hunyuan).*, no {family.Model.name}"
    ):
        open_model(args)


def test_a_pipeline_of_no_known_family_is_refused_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(UserError, match=r"holds a PixArtAlphaPipeline; known are .*Diffusion 3"):
        open_model(ModelArgs(pretrained_model_name_or_path=str(tmp_path)))


def test_the_embeddings_are_the_pipelines_own_to_the_bit(model: Model, pipeline: Any) -> None:
    found = embeds_of(model)
    assert tuple(found) == model.embed_names
    with torch.no_grad():
        if isinstance(model, sd3.Model):
            length = model.args.max_sequence_length
            rows, _, pooled, _ = pipeline.encode_prompt(
                *(CAPTIONS, None, None),
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
            expected = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
        elif isinstance(model, sdxl.Model | kolors.Model):
            second = [None] if isinstance(model, sdxl.Model) else []
            rows, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, *second, CPU, 1, False)
            expected = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
        elif isinstance(model, hunyuandit.Model):
            expected = {}
            for i, end in enumerate(("", "_2")):
                rows, _, mask, _ = pipeline.encode_prompt(
                    CAPTIONS, do_classifier_free_guidance=False, text_encoder_index=i
                )
                expected |= {f"prompt_embeds{end}": rows, f"prompt_attention_mask{end}": mask}
        else:
            expected = {"prompt_embeds": pipeline.encode_prompt(CAPTIONS, CPU, 1, False)[0]}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    shapes = [value.shape[1:] for value in found.values()]
    assert sum(shape.numel() for shape in shapes) == model.text_numbers


def test_the_first_prediction_is_that_of_the_pipelines_first_call(
    model: Model, pipeline: Any
) -> None:
    network = getattr(pipeline, model.part)
    asked: list[dict[str, Any]] = []
    answers: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        names = ("hidden_states", "timestep") if model.part == "transformer" else ("sample", "t")
        asked.append(dict(zip(names, args, strict=False)) | kwargs)
        answers.append(output[0])

    hook = network.register_forward_hook(keep, with_kwargs=True)
    embeds = embeds_of(model)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0}
    options |= {"output_type": "latent", **told(model)}
    pipeline(**embeds, height=64, width=64, latents=draw(2, *model.latent_shape(*SIZE)), **options)
    hook.remove()
    first = asked[0]
    timestep = torch.as_tensor(first["t"] if "t" in first else first["timestep"])
    noisy = first["sample"] if "sample" in first else first["hidden_states"]
    level = model.objective(SIZE).of_timestep(timestep.expand(2))
    with torch.no_grad():
        found = model.predict(network, noisy, level, conditions_of(model), torch.float32)
    channels = found.shape[1]
    assert torch.equal(found, answers[0][:, :channels])
    assert answers[0].shape[1] == channels * (2 if isinstance(model, hunyuandit.Model) else 1)
    assert found.dtype == torch.float32


def test_latents_go_to_pixels_and_back_as_in_the_pipeline(model: Model, pipeline: Any) -> None:
    latents = draw(1, *model.latent_shape(*SIZE))
    embeds = {name: value[:1] for name, value in embeds_of(model).items()}
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    options |= model.call_options
    with torch.no_grad():
        drawn = pipeline(**embeds, latents=latents, output_type="latent", **options).images
        pixels = pipeline(**embeds, latents=latents, output_type="pt", **options).images
        found = model.decode(pipeline.vae, drawn)
    torch.testing.assert_close(found, pixels.float(), rtol=0, atol=1e-5)
    mean = draw(1, *model.latent_shape(*SIZE), seed=1)
    scaled = model.scaled(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    step = (model.scaled(mean + 1, torch.zeros_like(mean), torch.zeros_like(mean)) - scaled).mean()
    assert step.item() == pytest.approx(pipeline.vae.config.scaling_factor, rel=1e-5)


def test_the_pipeline_around_a_network_draws_what_the_whole_one_draws(
    model: Model, pipeline: Any
) -> None:
    embeds = embeds_of(model)
    network, vae = model.load_network(torch.float32, CPU).eval(), model.load_vae(CPU)
    around = model.pipeline(network, vae, model.objective(SIZE))
    around.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    options |= {"output_type": "np", **model.call_options}
    found, expected = (
        one(**embeds, latents=draw(2, *model.latent_shape(*SIZE)), **noise, **options).images
        for one, noise in (
            (around, {"generator": torch.Generator().manual_seed(3)}),
            (pipeline, {"generator": torch.Generator().manual_seed(3)}),
        )
    )
    assert (found == expected).all()


def test_what_a_step_costs_is_counted_of_the_real_network(model: Model) -> None:
    network, cost = model.training_cost(
        torch.float32,
        lambda one: one.requires_grad_(True),
        2,
        model.latent_shape(*SIZE),
        checkpointing=False,
    )
    real = model.load_network(torch.float32, CPU)
    shapes = {name: value.shape for name, value in real.state_dict().items()}
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes
    assert 0 < 2 * cost.forward_flops < cost.flops


# -- trained, kept, resumed ---------------------------------------------------------------------


def begun(folder: Path, kind: str, model: Model, resume: bool) -> tuple[Run, Trained, Learner]:
    reset_accelerate()
    args = RunArgs(
        output_dir=folder,
        report_to=("none",),
        seed=0,
        mixed_precision="no",
        checkpointing_steps=1,
        resume_from_checkpoint="latest" if resume else None,
    )
    optim = OptimArgs(max_train_steps=3, train_batch_size=2, learning_rate=1e-3)
    run = start(args, optim)
    run.plan(optim, 6, "six samples")
    trained: Trained = (
        Adapters(run, lora.LoraArgs(rank=2)) if kind == "lora" else AllWeights(run, WholeArgs())
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained.load(model, model.objective(SIZE))
    return run, trained, Learner(run, trained, optim, EmaArgs(use_ema=True))


def taught(model: Model, run: Run, learner: Learner, steps: int) -> None:
    """Steps on latents and levels that hang on the step alone."""
    objective, conditions = model.objective(SIZE), conditions_of(model)
    while run.step < steps:
        with learner.accumulate():
            clean = draw(2, *model.latent_shape(*SIZE), seed=2 * run.step)
            noise = draw(*clean.shape, seed=2 * run.step + 1)
            level = objective.level(torch.tensor([0.2, 0.7]))
            noisy = objective.noisy(clean, noise, level)
            predicted = model.predict(learner.network, noisy, level, conditions, run.dtype)
            errors = objective.errors(predicted, noisy, level, clean=clean, noise=noise)
            assert learner.step(errors.mean())
        learner.keep()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_that_goes_on_ends_as_one_that_was_never_broken_off(
    tmp_path: Path, model: Model, kind: str
) -> None:
    run, whole, learner = begun(tmp_path / "whole", kind, model, False)
    taught(model, run, learner, 3)
    run, _, learner = begun(tmp_path / "broken", kind, model, False)
    taught(model, run, learner, 2)
    run, again, learner = begun(tmp_path / "broken", kind, model, True)
    assert run.step == 2
    taught(model, run, learner, 3)
    before, after = (one.network.state_dict() for one in (whole, again))
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Saved, loaded in diffusers by one plain call, and drawn from.
    result = again.save_result(tmp_path / "broken")
    source = model.folder if kind == "lora" else result
    loaded: Any = DiffusionPipeline.from_pretrained(source, safety_checker=None)
    if kind == "lora":
        load_adapter(loaded, source, result.parent)
    steering = Steering(
        model=model,
        texts=lambda captions: model.load_text(torch.float32, CPU)(captions),  # pyright: ignore
        size=SIZE,
        dtype=torch.float32,
    )
    noisy, level = draw(2, *model.latent_shape(*SIZE)), model.objective(SIZE).level(torch.ones(2))
    with torch.no_grad():
        found, expected = (
            steering(network, CAPTIONS)(noisy, level)
            for network in (getattr(loaded, model.part).eval(), again.network.eval())
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
