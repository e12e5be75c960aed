"""The scripts of SDXL from end to end: what they write, what the UNet is told, how they resume."""

import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora import formats
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors
from dojo.finetune.lora.placing import in_file
from dojo.models import sdxl
from dojo.models.unet.sgm import Blocks
from dojo.pocket import scenes
from tests.conftest import ROOT, reset_accelerate, run_flags

# Height and width of pictures, of which none is a square.
SIZES = ((128, 96), (64, 80), (96, 128), (200, 100), (64, 192), (80, 64))
SCRIPTS = ("lora", "full", "dreambooth_lora", "dpo", "refl")
# A reward of a user's own.
REWARD = """
def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))

brightness.differentiable = True
"""


def draw_scenes(folder: Path) -> list[str]:
    """A picture of every size; returns their captions."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    captions: list[str] = []
    for i, (height, width) in enumerate(SIZES):
        caption, scene = scenes.sample(rng)
        Image.fromarray(scenes.draw(scene)).resize((width, height)).save(folder / f"{i}.png")
        captions.append(caption)
    return captions


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures of different sizes."""
    folder = tmp_path_factory.mktemp("datas") / "pictures"
    captions = draw_scenes(folder)
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    return write_rows(folder, rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs, whose pictures have different sizes; the first one wins."""
    folder = tmp_path_factory.mktemp("datas") / "pairs"
    captions = draw_scenes(folder)
    rows = [
        {"image_0": f"{i}.png", "image_1": f"{i + 1}.png", "label_0": 1, "caption": captions[i]}
        for i in range(0, len(SIZES), 2)
    ]
    return write_rows(folder, rows)


def own_flags(name: str, folder: Path, data: Path, pairs: Path) -> list[str]:
    """What a script needs beside the model and the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(REWARD)
    refl = ["--prompt_set", "pocket", "--max_prompts", "6", "--num_eval_prompts", "2"]
    refl += ["--reward", f"{folder}/mine.py:brightness", "--sample_steps", "4"]
    refl += ["--eval_sample_steps", "2"]
    subject = ["--instance_data_dir", str(data), "--instance_prompt", "a photo of sks star"]
    subject += ["--with_prior_preservation", "--class_data_dir", str(folder / "class")]
    subject += ["--class_prompt", "a star", "--num_class_images", "2"]
    subject += ["--prior_inference_steps", "2"]
    adapter = ["--rank", "2"]
    return {
        "lora": ["--dataset_name", str(data), *adapter],
        "full": ["--dataset_name", str(data)],
        "dreambooth_lora": [*subject, *adapter],
        "dpo": ["--dataset_name", str(pairs), "--finetune", "lora", *adapter],
        "refl": [*refl, "--finetune", "lora", *adapter],
    }[name]


def train(name: str, folder: Path, model: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    reset_accelerate()
    script = importlib.import_module(f"train_{name}_sdxl")
    words = run_flags(folder, model, None)
    place = words.index("--max_sequence_length")
    del words[place : place + 2]
    words += ["--latent_cache_dir", str(model.parent / "cache"), "--seed", "0"]
    args = script.cli.parse(script.Args, None, [*words, "--learning_rate", "1e-2", *flags])
    script.main(args)
    return folder / "run"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / lora.WEIGHTS)


def same(one: Path, two: Path) -> bool:
    return (one / lora.WEIGHTS).read_bytes() == (two / lora.WEIGHTS).read_bytes()


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64}
    call = {"num_inference_steps": 2, "generator": seeded, "output_type": "pt", **size}
    return pipeline("a star", **call).images


def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Everything that the UNet is given beside latents and timesteps, from now on."""
    given: list[dict[str, Tensor]] = []
    ask = sdxl.Model.conditions

    def conditions(self: sdxl.Model, embeds: Any, geometry: Any) -> dict[str, Tensor]:
        given.append(ask(self, embeds, geometry))
        return given[-1]

    monkeypatch.setattr(sdxl.Model, "conditions", conditions)
    return given


# -- every script -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_trained_loads_in_plain_diffusers_and_draws_something_else(
    name: str, tmp_path: Path, tiny_sdxl: Path, pictures: Path, pairs: Path
) -> None:
    flags = own_flags(name, tmp_path / "own", pictures, pairs)
    folder = train(name, tmp_path, tiny_sdxl, *flags, "--max_train_steps", "2")
    before = draw(StableDiffusionXLPipeline.from_pretrained(tiny_sdxl))
    if name == "full":
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        pipeline.load_lora_weights(str(folder))
    after = draw(pipeline)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_counts_and_writes_nothing(
    name: str,
    tmp_path: Path,
    tiny_sdxl: Path,
    pictures: Path,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = own_flags(name, tmp_path / "own", pictures, pairs)
    folder = train(name, tmp_path, tiny_sdxl, *flags, "--dry_run")
    said = capsys.readouterr().out
    assert "trainable parameters" in said
    assert "effective batch size: 2" in said
    assert not folder.exists()
    assert not (tmp_path / "own" / "class").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_far_smaller_than_the_models_are_remarked_on_once(
    name: str,
    tmp_path: Path,
    tiny_sdxl: Path,
    pictures: Path,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = own_flags(name, tmp_path / "own", pictures, pairs)
    train(name, tmp_path, tiny_sdxl, *flags, "--dry_run")
    assert "expect artifacts" not in capsys.readouterr().out
    train(name, tmp_path, tiny_sdxl, *flags, "--dry_run", "--resolution", "32")
    assert capsys.readouterr().out.count("pictures of 32 x 32 have 25% of the area") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_autoencoder_that_overflows_is_refused_in_half_precision(
    name: str, tmp_path: Path, tiny_sdxl: Path, pictures: Path, pairs: Path
) -> None:
    flags = own_flags(name, tmp_path / "own", pictures, pairs)
    with pytest.raises(UserError, match=r"--vae_dtype fp16: .*sdxl-vae-fp16-fix"):
        train(name, tmp_path, tiny_sdxl, *flags, "--vae_dtype", "fp16")


# -- LoRA ---------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path
) -> None:
    common = ["--dataset_name", str(pictures), "--rank", "2", "--random_flip"]
    common += ["--caption_dropout", "0.3", "--noise_offset", "0.1"]
    whole = train("lora", tmp_path / "whole", tiny_sdxl, *common, "--max_train_steps", "4")
    train("lora", tmp_path / "parts", tiny_sdxl, *common, "--max_train_steps", "2")
    resume = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    parts = train("lora", tmp_path / "parts", tiny_sdxl, *common, *resume)
    assert same(whole, parts)


def test_what_is_told_of_sizes_changes_the_result_and_no_cache(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dataset_name", str(pictures), "--rank", "2", "--micro_conditioning"]
    results = [train("lora", tmp_path / "file", tiny_sdxl, *flags, "file")]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is encoded again")

    monkeypatch.setattr(sdxl.Model, "load_text", refuse)
    monkeypatch.setattr("dojo.inputs.pictures.posterior", refuse)
    for kind in ("resized", "constant"):
        results.append(train("lora", tmp_path / kind, tiny_sdxl, *flags, kind))
    assert not any(same(*two) for two in zip(results, [*results[1:], results[0]], strict=True))


def test_the_unet_is_told_sizes_of_the_file_in_float32(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = told(monkeypatch)
    flags = ("--dataset_name", str(pictures), "--rank", "2", "--mixed_precision", "bf16")
    train("lora", tmp_path, tiny_sdxl, *flags)  # three steps of two pictures: every one once
    rows = torch.cat([one["time_ids"] for one in given])
    assert rows.dtype == torch.float32
    assert {(int(row[0]), int(row[1])) for row in rows} == set(SIZES)
    for height, width, top, left, *target in rows.tolist():
        assert target == [64, 64]
        # The middle of the picture when resized, whose shorter side is 64.
        scale = 64 / min(height, width)
        assert (top, left) == pytest.approx(
            ((height * scale - 64) / 2, (width * scale - 64) / 2), abs=1
        )


@pytest.mark.parametrize("uncond", [None, "zeros", "empty_string"])
def test_a_dropped_caption_is_what_stands_for_none(
    uncond: str | None,
    tmp_path: Path,
    tiny_sdxl: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = told(monkeypatch)
    flags = ["--dataset_name", str(pictures), "--rank", "2", "--caption_dropout", "1"]
    flags += ["--uncond", uncond] if uncond else []
    train("lora", tmp_path, tiny_sdxl, *flags, "--max_train_steps", "1")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    rows, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    if uncond != "empty_string":  # as this model's folder says
        rows, pooled = torch.zeros_like(rows), torch.zeros_like(pooled)
    wanted = {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
    assert len(given) == 1
    for name, value in wanted.items():
        torch.testing.assert_close(given[0][name], value.expand_as(given[0][name]))


def test_both_text_encoders_learn_each_at_its_own_rate(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path
) -> None:
    flags = ["--dataset_name", str(pictures), "--rank", "2", "--train_text_encoder"]
    flags += ["--text_encoder_lr", "1e-2", "--text_encoder_2_lr", "1e-6"]
    folder = train("lora", tmp_path, tiny_sdxl, *flags)
    moved: dict[str, float] = {}
    for name, value in weights(folder).items():
        if "lora_B" in name:
            part = name.split(".")[0]
            moved[part] = max(moved.get(part, 0), float(value.abs().max()))
    assert moved.keys() == {"unet", "text_encoder", "text_encoder_2"}
    assert moved["text_encoder"] > 1e-3
    assert 0 < moved["text_encoder_2"] < 1e-4


# -- DPO ----------------------------------------------------------------------------------------


def test_a_file_that_adapts_a_layer_nobody_reads_is_started_from(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """sd-scripts adapts CLIP-L's last layer too, and SDXL reads the one before it."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    torch.manual_seed(3)
    updates: Any = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        layers = updates.setdefault(part, {})
        for name, module in getattr(pipeline, part).named_modules():
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "k_proj", "v_proj", "q_proj")):
                rows, columns = module.weight.shape
                down, up = 0.1 * torch.randn(2, columns), 0.1 * torch.randn(rows, 2)
                layers[in_file(part, name)] = Factors(down, up, alpha=2.0)
    blocks = Blocks.of(pipeline.unet.config)
    path = tmp_path / "kohya.safetensors"
    formats.write(path, updates, "kohya", Base(family="sdxl", blocks=blocks))
    last = pipeline.text_encoder.config.num_hidden_layers - 1
    assert any(f"te1_text_model_encoder_layers_{last}_" in name for name in load_file(path))

    flags = ["--dataset_name", str(pictures), "--rank", "2", "--train_text_encoder"]
    flags += ["--init_lora_weights_path", str(path), "--learning_rate", "1e-30"]
    folder = train("lora", tmp_path, tiny_sdxl, *flags, "--max_train_steps", "1")
    said = capsys.readouterr().out
    assert f"left out, such as text_encoder.text_model.encoder.layers.{last}." in said
    first = [name for name in weights(folder) if name.startswith("text_encoder.")]
    assert first
    assert not any(f".layers.{last}." in name for name in first)
    # Nothing has been learned, and nothing that draws was left out.
    pictures_of = []
    for source in (path, folder):
        drawn: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        lora.load(drawn, source, "it")
        pictures_of.append(draw(drawn))
    torch.testing.assert_close(*pictures_of, rtol=0, atol=1e-3)
    assert (pictures_of[0] - draw(pipeline)).abs().max() > 1e-2


def test_each_picture_of_a_pair_has_its_own_size_and_crop(
    tmp_path: Path, tiny_sdxl: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = told(monkeypatch)
    flags = ("--dataset_name", str(pairs), "--finetune", "lora", "--rank", "2", "--no_hflip")
    train("dpo", tmp_path, tiny_sdxl, *flags, "--train_batch_size", "3", "--max_train_steps", "1")
    policy, reference = (one["time_ids"] for one in given)
    assert torch.equal(policy, reference)
    sides = [*zip(policy[:3].tolist(), policy[3:].tolist(), strict=True)]
    sizes = {(tuple(winner[:2]), tuple(loser[:2])) for winner, loser in sides}
    assert sizes == set(zip(SIZES[::2], SIZES[1::2], strict=True))
    assert all(winner[2:4] != loser[2:4] for winner, loser in sides)


# -- ReFL ---------------------------------------------------------------------------------------


def test_pictures_that_are_drawn_count_as_whole_ones(
    tmp_path: Path, tiny_sdxl: Path, pictures: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = told(monkeypatch)
    flags = own_flags("refl", tmp_path / "own", pictures, pairs)
    train("refl", tmp_path, tiny_sdxl, *flags, "--max_train_steps", "1")
    assert given
    for one in given:
        assert all(row == [64, 64, 0, 0, 64, 64] for row in one["time_ids"].tolist())


def test_the_scripts_are_these() -> None:
    assert {path.stem for path in ROOT.glob("train_*_sdxl.py")} == {
        # DDPO's is tried beside SD1.5's, by test_train_ddpo_sd15; words by test_textual_inversion.
        f"train_{name}_sdxl"
        for name in (*SCRIPTS, "ddpo", "textual_inversion")
    }
