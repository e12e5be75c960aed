"""New words by train_textual_inversion_*.py and the DreamBooth scripts: what plain diffusers and
demo.py draw with them, what a run that was broken off ends with, and that they learn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import demo
from dojo import cli
from dojo.cli import UserError
from tests.conftest import ROOT
from tests.scripts import runs
from tests.scripts.runs import SCRIPTS, in_process

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread

WORD = ("--new_tokens", "<thing>:2", "--seed", "0", "--learning_rate", "1e-2")
DRAWN = ("--validation_prompt", "a <thing> left of a star", "--validation_inference_steps", "2")
PROMPT = DRAWN[1]


def train(name: str, folder: Path, model: Path, data: Path, *more: str) -> Path:
    """A run of two steps of a script on pictures that all show `a <thing>`."""
    flags = runs.family_flags(folder, model, None)
    own = ["--instance_data_dir", str(data), "--instance_prompt", "a <thing>"]
    length = ("--max_train_steps", "2", "--checkpointing_steps", "1")
    in_process(SCRIPTS[name].load(), [*flags, *own, *WORD, *length, *more])
    return folder / "run"


def last_picture(run: Path) -> np.ndarray:
    [path] = (run / "validation" / "step-2").glob("*.png")
    return np.asarray(Image.open(path))


def by_diffusers(base: Path, run: Path) -> np.ndarray:
    """The same picture by a plain pipeline, as the model card says."""
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    name = "embeddings/thing.safetensors"
    if hasattr(pipeline, "text_encoder_2"):
        rows = load_file(run / name)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            part = {one: getattr(pipeline, one + number) for one in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(rows[key], token="<thing>", **part)
        end = pipeline.tokenizer_2.eos_token_id
        pipeline.text_encoder_2.text_model.eos_token_id = end
    else:
        pipeline.load_textual_inversion(str(run), weight_name=name)
    if (run / runs.lora.WEIGHTS).exists():
        pipeline.load_lora_weights(str(run), weight_name=runs.lora.WEIGHTS)
    [picture] = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        guidance_scale=5.0,
        height=64,
        width=64,
    ).images
    return np.asarray(picture)


def by_demo(base: Path, run: Path, folder: Path) -> np.ndarray:
    flags = ["--embeddings", str(run), "--prompt", PROMPT, "--seed", "0"]
    flags += ["--num_inference_steps", "2", "--height", "64", "--width", "64"]
    flags += ["--pretrained_model_name_or_path", str(base), "--output_dir", str(folder)]
    if (run / runs.lora.WEIGHTS).exists():
        flags += ["--lora_weights_path", str(run)]
    if "sd3" in base.name:
        flags += ["--max_sequence_length", "24"]
    demo.main(cli.parse(demo.Args, None, flags))
    [path] = folder.glob("*.png")
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    "name",
    [
        "textual_inversion_sd15",
        "dreambooth_lora_sdxl",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("textual_inversion_sdxl", "dreambooth_lora_sd15")
        ),
    ],
)
def test_diffusers_and_the_demo_draw_what_validation_drew(
    name: str, tmp_path: Path, scene_data: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"tiny_{SCRIPTS[name].family}")
    run = train(name, tmp_path, base, scene_data, *DRAWN)
    card = (run / "README.md").read_text()
    assert "pipe.load_textual_inversion(" in card
    assert "`<thing>`" in card
    drawn = last_picture(run)
    assert np.array_equal(by_diffusers(base, run), drawn)
    assert np.array_equal(by_demo(base, run, tmp_path / "demo"), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["textual_inversion_sd3", "dreambooth_lora_sd3"])
def test_the_demo_draws_what_sd3s_validation_drew(
    name: str, tmp_path: Path, scene_data: Path, tiny_sd3: Path
) -> None:
    run = train(name, tmp_path, tiny_sd3, scene_data, *DRAWN, "--initializer_token", "star")
    assert "has no `load_textual_inversion`" in (run / "README.md").read_text()
    assert np.array_equal(by_demo(tiny_sd3, run, tmp_path / "demo"), last_picture(run))


def test_words_beside_an_adapter_go_on_to_the_same_bytes(
    tmp_path: Path, scene_data: Path, tiny_sd15: Path
) -> None:
    more = ("--train_text_encoder", "--use_ema", "--token_steps", "1", "--keep_token_norm")
    run = train("dreambooth_lora_sd15", tmp_path, tiny_sd15, scene_data, *more)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    # As a kill before the second step would leave it.
    shutil.rmtree(run / "checkpoint-2")
    for path in before:
        path.unlink() if path.parent == run else None
    (run / "finished.json").unlink()
    again = (*more, "--resume_from_checkpoint", "latest")
    train("dreambooth_lora_sd15", tmp_path, tiny_sd15, scene_data, *again)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    rows = [load_file(run / f"checkpoint-{k}" / "new_rows.safetensors") for k in (1, 2)]
    assert runs.equal(*rows), "--token_steps 1: the second step leaves them"


def test_class_pictures_are_not_drawn_of_a_new_word(
    tmp_path: Path, scene_data: Path, tiny_sd15: Path
) -> None:
    own = ("--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"))
    with pytest.raises(UserError, match="--class_prompt has <thing>"):
        train(
            "dreambooth_lora_sd15",
            *(tmp_path, tiny_sd15, scene_data, *own),
            *("--class_prompt", "a <thing>"),
        )


@pytest.mark.slow
def test_a_word_learns_what_its_pictures_show(tmp_path: Path) -> None:
    """On the trained pocket model: held-out pictures are predicted better, by the word alone."""
    base, data = ROOT / "models" / "pocket-sd15", make_toys(tmp_path / "toys")
    flags = ["--instance_prompt", "a <thing>", "--eval_fraction", "0.25", "--resolution", "64"]
    flags += ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data)]
    flags += ["--max_train_steps", "60", "--validation_steps", "60", "--report_to", "none"]
    flags += ["--output_dir", str(tmp_path / "run"), "--latent_cache_dir", str(tmp_path / "cache")]
    in_process(SCRIPTS["textual_inversion_sd15"].load(), [*flags, *WORD])
    first, *_, last = (row["eval_loss"] for row in runs.with_loss(tmp_path / "run"))
    assert last < 0.75 * first


def make_toys(folder: Path) -> Path:
    """Pictures of green stars."""
    import random

    from dojo.pocket import scenes

    folder.mkdir()
    rng = random.Random(0)
    for k in range(16):
        scene = scenes.realise(scenes.parse("a green star"), rng)
        Image.fromarray(scenes.draw(scene)).save(folder / f"{k:02d}.png")
    return folder
