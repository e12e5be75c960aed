"""The pocket models: ordinary folders that load in plain diffusers and transformers, and work."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from dojo import cli
from dojo.pocket import build, chinese, datasets, fitting, models, scenes, score, text, verifier
from tests.conftest import ROOT

SD3, CLIP = ROOT / "models" / "pocket-sd3", ROOT / "models" / "pocket-clip"
SD15, SDXL = ROOT / "models" / "pocket-sd15", ROOT / "models" / "pocket-sdxl"
MB = 10**6


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return StableDiffusion3Pipeline.from_pretrained(SD3)


def test_a_plain_call_draws_a_picture_in_float32(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert getattr(pipeline, part).dtype == torch.float32, part
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a large red circle", num_inference_steps=8, generator=generator).images[0]
    assert picture.size == (64, 64)  # the model's own size; T5 padded to 256


def test_single_file_loaders_can_tell_the_text_encoders_apart(pipeline: Any) -> None:
    first, second = pipeline.text_encoder, pipeline.text_encoder_2
    assert first.config.hidden_size != second.config.hidden_size
    assert first.config.projection_dim == first.config.hidden_size
    assert torch.equal(first.text_projection.weight, torch.eye(first.config.hidden_size))


def test_weights_are_half_precision_safetensors_within_their_budget() -> None:
    folders = (SD3, SD15, SDXL, CLIP)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pth", ".pt")]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert max(path.stat().st_size for path in weights) < 16 * MB
    assert sum(path.stat().st_size for path in weights) < 37 * MB
    # Its autoencoder and second text encoder are others' files, which git keeps once.
    own = [path for path in weights if path.parent in (SDXL / "unet", SDXL / "text_encoder")]
    assert len(own) == 2
    assert sum(path.stat().st_size for path in own) < 5 * MB
    parts = ("unet", "vae", "text_encoder")
    for folder in (SD3 / "transformer", *[base / part for base in (SD15, SDXL) for part in parts]):
        header = next(folder.glob("*.safetensors")).read_bytes()
        length = int.from_bytes(header[:8], "little")
        tensors = json.loads(header[8 : 8 + length])
        dtypes = {row["dtype"] for name, row in tensors.items() if name != "__metadata__"}
        assert dtypes <= {"F16", "I64"}, folder  # positions are integers


def test_text_encoder_configs_say_float32() -> None:
    folders = (SD3, SD15, SDXL)
    paths = [path for folder in folders for path in folder.glob("text_encoder*/config.json")]
    paths.append(CLIP / "config.json")
    assert len(paths) == 7
    assert all(json.loads(path.read_text())["dtype"] == "float32" for path in paths)


def test_the_base_draws_what_simple_captions_say(pipeline: Any) -> None:
    captions = [f"a large {color} {shape}" for color in ("red", "blue") for shape in scenes.SHAPES]
    pictures = score.generate(
        pipeline,
        captions,
        guidance_scale=4.0,
        num_inference_steps=16,
        max_sequence_length=text.T5_LENGTH,
        seed=0,
    )
    assert verifier.score(pictures, captions, strict=True).mean() >= 0.5
    swapped = captions[1:] + captions[:1]  # the same pictures do not fit the neighbour's caption
    assert verifier.score(pictures, swapped, strict=True).mean() <= 0.2


def plain(folder: Path, kind: Any) -> Any:
    """A pipeline as diffusers loads it, of the class that it should be."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is kind
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("folder", "kind", "scheduler"),
    [
        (SD15, StableDiffusionPipeline, "PNDMScheduler"),
        (SDXL, StableDiffusionXLPipeline, "EulerDiscreteScheduler"),
    ],
)
def test_the_bases_with_a_unet_are_what_theirs_are(folder: Path, kind: Any, scheduler: str) -> None:
    pipeline = plain(folder, kind)
    encoders = [name for name in pipeline.components if re.fullmatch(r"text_encoder(_2)?", name)]
    for part in ("unet", "vae", *encoders):
        assert getattr(pipeline, part).dtype == torch.float32, part
    assert pipeline.vae.config.latent_channels == 4
    assert type(pipeline.scheduler).__name__ == scheduler
    schedule = pipeline.scheduler.config
    assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert schedule.prediction_type == "epsilon"
    assert (schedule.steps_offset, schedule.timestep_spacing) == (1, "leading")
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a large red circle", num_inference_steps=8, generator=generator).images[0]
    assert picture.size == (64, 64)  # the model's own size


def test_the_sdxl_base_hears_two_encoders_pooled_text_and_sizes() -> None:
    pipeline = plain(SDXL, StableDiffusionXLPipeline)
    widths = [pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size]
    unet = pipeline.unet.config
    assert widths[0] != widths[1]
    assert unet.cross_attention_dim == sum(widths)
    assert unet.addition_embed_type == "text_time"
    assert unet.projection_class_embeddings_input_dim == (
        pipeline.text_encoder_2.config.projection_dim + 6 * unet.addition_time_embed_dim
    )
    assert unet.use_linear_projection
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.tokenizer.pad_token != pipeline.tokenizer_2.pad_token == "!"
    assert "projection" not in " ".join(pipeline.text_encoder.state_dict())


@pytest.mark.parametrize(
    ("folder", "kind"), [(SD15, StableDiffusionPipeline), (SDXL, StableDiffusionXLPipeline)]
)
def test_the_bases_with_a_unet_draw_what_simple_captions_say(folder: Path, kind: Any) -> None:
    captions = [f"a large {color} {shape}" for color in ("red", "blue") for shape in scenes.SHAPES]
    pictures = score.generate(
        plain(folder, kind),
        captions,
        guidance_scale=4.0,
        num_inference_steps=16,
        max_sequence_length=None,
        seed=0,
    )
    assert verifier.score(pictures, captions, strict=True).mean() >= 0.5
    swapped = captions[1:] + captions[:1]
    assert verifier.score(pictures, swapped, strict=True).mean() <= 0.2


def test_the_report_says_that_the_bases_are_neither_too_weak_nor_too_good() -> None:
    facts = json.loads((ROOT / "models" / build.FACTS).read_text())
    for name in ("sd3", "sd15", "sdxl", "kolors"):
        best = max(column["overall"] for column in facts[name]["scores"].values())
        assert 0.35 <= best <= 0.75


def test_the_page_of_the_models_has_the_scores_of_all_and_their_licence() -> None:
    facts = json.loads((ROOT / "models" / build.FACTS).read_text())
    page = (ROOT / "models" / "README.md").read_text()
    folders = sorted(path.name for path in (ROOT / "models").glob("pocket-*"))
    assert folders == sorted(f"pocket-{name}" for name in facts)
    assert all(f"`{folder}`" in page for folder in folders)
    for fact in facts.values():
        for column in fact.get("scores", {}).values():
            assert f"{column['overall']:.3f}" in page
    assert "Licence: Apache-2.0" in page
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_real_photographs_survive_the_autoencoder(pipeline: Any) -> None:
    dog = build.squares(ROOT / "datas" / "dog")
    assert len(dog) == 6
    assert build.psnr(pipeline.vae, dog, "cpu") >= 24.0


def test_any_caption_has_tokens(pipeline: Any) -> None:
    for caption in ("a photo of sks dog", "", "一只狗 Größe!", "x" * 2000):
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
            ids = tokenizer(caption, truncation=True, max_length=20).input_ids
            assert 1 <= len(ids) <= 20
            assert max(ids) < len(tokenizer)


def test_words_have_the_same_numbers_in_every_process() -> None:
    tokenizer = text.clip_tokenizer()
    assert tokenizer("a red star on the left").input_ids == [629, 320, 610, 618, 605, 621, 602, 630]
    assert text.clip_tokenizer("!").get_vocab() == tokenizer.get_vocab()
    assert all(len(tokenizer(word).input_ids) == 3 for word in text.grammar_words())


def test_every_caption_of_the_grammar_fits_the_short_texts(pipeline: Any) -> None:
    draw = random.Random(3)
    for _ in range(500):
        caption = scenes.sample(draw)[0]
        assert len(pipeline.tokenizer(caption).input_ids) <= text.CLIP_LENGTH
        assert len(pipeline.tokenizer_3(caption).input_ids) <= text.T5_LENGTH
        assert 2 not in pipeline.tokenizer_3(caption).input_ids  # <unk>


def test_pocket_clip_finds_the_caption_of_a_picture() -> None:
    clip: Any = CLIPModel.from_pretrained(CLIP)
    assert clip.dtype == torch.float32
    processor: Any = CLIPProcessor.from_pretrained(CLIP)
    draw = random.Random(11)
    pairs: dict[str, Image.Image] = {}
    while len(pairs) < 32:
        caption, scene = scenes.sample(draw)
        pairs[caption] = Image.fromarray(scenes.draw(scene))
    inputs = processor(
        text=list(pairs), images=list(pairs.values()), padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        logits = clip(**inputs).logits_per_image
    assert (logits.argmax(1) == torch.arange(32)).float().mean() >= 0.7


def test_the_shipped_hearts_are_what_the_command_makes(tmp_path: Path) -> None:
    datasets.main(datasets.Args(output_dir=tmp_path))
    shipped = ROOT / "datas" / "pocket-hearts"
    assert (tmp_path / "metadata.jsonl").read_text() == (shipped / "metadata.jsonl").read_text()
    for path in sorted(tmp_path.glob("*.png")):
        there = np.asarray(Image.open(shipped / path.name))
        assert np.array_equal(np.asarray(Image.open(path)), there), path.name


def test_a_set_in_chinese_is_the_same_pictures(tmp_path: Path) -> None:
    for language in ("english", "chinese"):
        argv = ["--set", "framed", "--count", "6", "--language", language]
        datasets.main(
            cli.parse(datasets.Args, None, [*argv, "--output_dir", str(tmp_path / language)])
        )
    said: dict[str, list[str]] = {}
    for folder in sorted(tmp_path.iterdir()):
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        said[folder.name] = [json.loads(line)["text"] for line in lines]
    assert [chinese.translated(text) for text in said["english"]] == said["chinese"]
    for path in (tmp_path / "english").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "chinese" / path.name).read_bytes()


def test_a_quarter_of_the_careless_captions_are_of_other_scenes(tmp_path: Path) -> None:
    pictures, captions = [], []
    for caption, picture in datasets.careless(600):
        captions.append(caption)
        pictures.append(picture)
    tasks = [scenes.parse(caption).task for caption in captions]
    assert tasks == [scenes.TASKS[i % 6] for i in range(600)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    right = verifier.task_scores(images, captions)
    # Another scene now and then fits too: a lone circle is any circle.
    assert 0.75 - 0.05 < right["overall"] < 0.75 + 0.1
    datasets.main(datasets.Args(set="careless", output_dir=tmp_path, count=12))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == captions[:12]
    for row, picture in zip(rows, pictures, strict=False):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file_name"])), picture)


@pytest.mark.slow
def test_a_build_that_was_interrupted_ends_with_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SAVE_EVERY", 1)
    steps = {"vae_steps": 2, "sd3_steps": 2, "clip_steps": 1, "vae4_steps": 8, "sd15_steps": 2}
    steps["sdxl_steps"] = 2
    small = {"num_scenes": 200, "sd15_scenes": 200, "sdxl_scenes": 20, "report_captions": 6}
    common = {**steps, **small, "device": "cpu"}
    photos = {"photos_dir": ROOT / "datas" / "photos", "dog_dir": ROOT / "datas" / "dog"}
    original, calls = models.transformer, []
    for name in ("whole", "broken"):
        args = build.Args(
            models_dir=tmp_path / name / "models",
            work_dir=tmp_path / name / "work",
            **photos,
            **common,
        )
        if name == "broken":

            def once() -> Any:
                calls.append(1)
                if len(calls) == 1:
                    raise KeyboardInterrupt
                return original()

            monkeypatch.setattr(models, "transformer", once)
            with pytest.raises(KeyboardInterrupt):
                build.main(args)
        build.main(args)
    for path in (tmp_path / "whole" / "models").rglob("*.safetensors"):
        other = tmp_path / "broken" / "models" / path.relative_to(tmp_path / "whole" / "models")
        assert path.read_bytes() == other.read_bytes(), path.name
