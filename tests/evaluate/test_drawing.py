"""A seed is one picture everywhere: in validations, evaluations, demo.py and pipelines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import demo
import train_dpo_sd15
import train_grpo_sd3
import train_lora_sd3
import train_refl_sd15
from dojo import cli
from dojo.evaluate import drawing
from dojo.models import sd3, sd15
from tests.conftest import MakeArgs, rl_flags, run_flags

CPU = torch.device("cpu")
SEEDS = (5, 9)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_pipeline(pipeline: Any, **options: Any) -> Tensor:
    """The latents of the two seeds, drawn by diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options |= {"height": 64, "width": 64, "num_images_per_prompt": len(SEEDS)}
    return pipeline("a star", generator=generators, output_type="latent", **options).images


@pytest.mark.parametrize(
    "name",
    [
        *("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"),
        *(
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "HeunDiscreteScheduler",
        ),
    ],
)
def test_sd15_is_drawn_to_the_bit_as_its_pipeline_draws(tiny_sd15: Path, name: str) -> None:
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(tiny_sd15))
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    expected = by_pipeline(pipeline, num_inference_steps=4, guidance_scale=1.0)
    embeds = pipeline.encode_prompt("a star", CPU, len(SEEDS), False)[0]

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return sd15.prediction(pipeline.unet, latents, timestep, embeds, torch.float32)

    ours = drawing.sample(
        predict, (4, 8, 8), SEEDS, pipeline.scheduler, 4, dtype=torch.float32, device=CPU
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sd3_is_drawn_to_the_bit_as_its_pipeline_draws(tiny_sd3: Path, shift: float) -> None:
    pipeline = quiet(StableDiffusion3Pipeline.from_pretrained(tiny_sd3))
    config = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    pipeline.scheduler = config.with_shift(shift)
    expected = by_pipeline(
        pipeline, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=24
    )
    with torch.no_grad():  # attention takes another kernel where gradients are on
        text, _, pooled, _ = pipeline.encode_prompt(
            *["a star"] * 3, num_images_per_prompt=2, max_sequence_length=24
        )

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        sigma = timestep.double() / 1000
        return sd3.velocity(pipeline.transformer, latents, sigma, text, pooled, torch.float32)

    ours = drawing.sample(
        predict, (16, 8, 8), SEEDS, pipeline.scheduler, 4, dtype=torch.float32, device=CPU
    )
    assert torch.equal(ours, expected)


def test_a_network_in_half_precision_begins_with_the_pipelines_noise() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    first: list[Tensor] = []

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        first.append(latents)
        return torch.zeros_like(latents)

    drawing.sample(predict, (4, 8, 8), SEEDS, scheduler, 1, dtype=torch.bfloat16, device=CPU)
    for row, seed in zip(first[0], SEEDS, strict=True):
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(row, torch.randn(4, 8, 8, generator=own, dtype=torch.bfloat16).float())


# From a script's run to demo.py, as a user would check it.


def same_as_demo(folder: Path, step: int, model: Path, flags: Sequence[str]) -> None:
    """Every picture of a validation, drawn again by demo.py from what prompts.json says."""
    pictures = json.loads((folder / "validation" / "prompts.json").read_text())["pictures"]
    assert len(pictures) == 2
    assert len({picture["seed"] for picture in pictures}) == 2
    for picture in pictures:
        own = {
            "pretrained_model_name_or_path": model,
            "prompt": picture["prompt"],
            "seed": picture["seed"],
            "num_inference_steps": picture["num_inference_steps"],
            "height": 64,
            "width": 64,
            "output_dir": folder.parent / f"demo-{picture['seed']}",
        }
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        demo.main(cli.parse(demo.Args, None, [*words, *flags]))
        (again,) = Path(own["output_dir"]).glob("*.png")
        kept = folder / "validation" / f"step-{step}" / picture["file"]
        np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(kept)))


def test_a_validation_picture_is_that_of_demo_with_its_seed(
    tmp_path: Path, lora_args: MakeArgs, tiny_sd3: Path
) -> None:
    flags = ("--learning_rate", "1e-2", "--max_train_steps", "1", "--validation_seed", "7")
    drawn = ("--validation_prompt", "a red star", "--num_validation_images", "2")
    drawn += ("--validation_inference_steps", "3", "--validation_guidance_scale", "2")
    train_lora_sd3.main(lora_args(tmp_path, *flags, *drawn))
    options = ("--guidance_scale", "2", "--max_sequence_length", "24")
    same_as_demo(tmp_path / "run", 0, tiny_sd3, options)
    tuned = ("--lora_weights_path", str(tmp_path / "run"), *options)
    same_as_demo(tmp_path / "run", 1, tiny_sd3, tuned)


@pytest.mark.parametrize("guidance", ["1", "2"])
def test_the_evaluation_of_a_policy_is_that_of_demo(
    tmp_path: Path, tiny_sd3: Path, guidance: str
) -> None:
    words = [*rl_flags(tmp_path, tiny_sd3), "--max_train_steps", "2", "--learning_rate", "1e-2"]
    words += ["--eval_batch_size", "1", "--eval_guidance_scale", guidance, "--eval_seed", "3"]
    train_grpo_sd3.main(cli.parse(train_grpo_sd3.Args, None, words))
    options = ("--guidance_scale", guidance, "--max_sequence_length", "24")
    tuned = ("--lora_weights_path", str(tmp_path / "run"), *options)
    same_as_demo(tmp_path / "run", 2, tiny_sd3, tuned)


SD15 = ["--max_train_steps", "1", "--eval_batch_size", "1", "--eval_sample_steps", "3"]
SD15 += [
    "--eval_guidance_scale",
    "2",
    "--finetune",
    "lora",
    "--rank",
    "2",
    "--learning_rate",
    "1e-2",
]


def sd15_flags(folder: Path, model: Path, *more: str) -> list[str]:
    words = run_flags(folder, model, None)
    place = words.index("--max_sequence_length")
    return [*words[:place], *words[place + 2 :], *SD15, *more]


def test_the_evaluation_of_refl_is_that_of_demo(tmp_path: Path, tiny_sd15: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
        "red.differentiable = True\n"
    )
    more = ("--prompt_set", "pocket", "--max_prompts", "6", "--num_eval_prompts", "2")
    more += ("--reward", f"{mine}:red", "--sample_steps", "4", "--first_step", "2")
    more += ("--last_step", "3")
    train_refl_sd15.main(
        cli.parse(train_refl_sd15.Args, None, sd15_flags(tmp_path, tiny_sd15, *more))
    )
    tuned = ("--lora_weights_path", str(tmp_path / "run"), "--guidance_scale", "2")
    same_as_demo(tmp_path / "run", 1, tiny_sd15, tuned)


def test_the_pictures_of_dpo_are_those_of_demo(tmp_path: Path, tiny_sd15: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    row = {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "caption": "a star"}
    lines = [json.dumps({**row, "caption": f"a star {i}"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    more = ("--train_data_dir", str(folder), "--validation_prompt", "a red star", "two rings")
    train_dpo_sd15.main(
        cli.parse(train_dpo_sd15.Args, None, sd15_flags(tmp_path, tiny_sd15, *more))
    )
    tuned = ("--lora_weights_path", str(tmp_path / "run"), "--guidance_scale", "2")
    same_as_demo(tmp_path / "run", 1, tiny_sd15, tuned)
