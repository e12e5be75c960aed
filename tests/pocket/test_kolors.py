"""What makes pocket-kolors: its tokenizer, its start from pocket-sdxl, the text that it hears in
training; and the model, which is asked in two languages."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, KolorsPipeline

from dojo.maths import ddpm
from dojo.pocket import build_kolors, build_sdxl, chinese, models, scenes, score, text, verifier
from tests.conftest import ROOT

MODELS = ROOT / "models"
KOLORS = MODELS / "pocket-kolors"
CAPTIONS = ["a star", "一个小的红色五角星在一个圆环的左边，灰色背景", ""]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return models.kolors_pipeline(tmp_path_factory.mktemp("tokenizer"))


# ---- The tokenizer ----


def test_every_word_of_both_languages_is_one_piece(untrained: Any) -> None:
    tokenizer, draw = untrained.tokenizer, random.Random(0)
    for _ in range(200):
        english, said = chinese.both(scenes.random_spec(draw))
        assert tokenizer.tokenize(english) == ["▁" + word for word in english.split()]
        first, *pieces = tokenizer.tokenize(said)
        assert first == "▁"
        assert "".join(pieces) == said
        assert set(pieces) <= set(chinese.words())


def test_any_other_text_has_bytes_and_comes_back(untrained: Any) -> None:
    tokenizer = untrained.tokenizer
    for typed in ("一张sks狗的照片", "naïve – 🐕", "a photo of sks dog"):
        ids = tokenizer(typed).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.tokenizer.decode(ids[2:]) == typed  # behind [gMASK] and sop
    assert tokenizer("").input_ids == [
        tokenizer.get_command("[gMASK]"),
        tokenizer.get_command("sop"),
    ]


def test_the_vocabulary_is_the_same_at_every_call() -> None:
    first = text.glm_vocabulary()
    text.glm_vocabulary.cache_clear()
    assert text.glm_vocabulary() == first
    assert first == (KOLORS / "tokenizer" / "tokenizer.model").read_bytes()


# ---- The start ----


def test_the_untrained_unet_predicts_what_sdxls_does_for_the_mapped_text() -> None:
    torch.manual_seed(0)
    teacher: Any = models.sdxl_unet()
    unet: Any = models.kolors_unet()
    row_map = torch.randn(160, models.KOLORS_WIDTH) / 7
    pooled_map = torch.randn(96, models.GLM_WIDTH) / 7
    build_kolors.inherit_unet(unet, teacher, row_map, pooled_map)
    noisy, timestep = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    rows, pooled = torch.randn(3, 20, models.GLM_WIDTH), torch.randn(3, models.GLM_WIDTH)
    time_ids = torch.rand(3, 6) * 100
    with torch.no_grad():
        said = {"text_embeds": pooled, "time_ids": time_ids}
        found = unet(noisy, timestep, rows, added_cond_kwargs=said).sample
        heard = {"text_embeds": pooled @ pooled_map.T, "time_ids": time_ids}
        mapped = unet.encoder_hid_proj(rows) @ row_map.T
        expected = teacher(noisy, timestep, mapped, added_cond_kwargs=heard).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_directions_say_all_that_so_many_can() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 20, 5, generator=generator) @ torch.randn(5, 160, generator=generator)
    found = build_kolors.directions(rows, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ found @ found.T, rows, rtol=0, atol=1e-3)


# ---- Training ----


def test_the_text_of_training_is_the_pipelines_with_its_padding_counted(untrained: Any) -> None:
    with torch.no_grad():
        found = build_kolors.text_of(untrained, CAPTIONS)
        rows, _, pooled, _ = untrained.encode_prompt(
            CAPTIONS, device="cpu", do_classifier_free_guidance=False
        )
        kept = found.rows.shape[1]
        assert kept < 20
        torch.testing.assert_close(found.rows, rows[:, -kept:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-4)
        noisy, timestep = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 1099])
        told = {"text_embeds": pooled, "time_ids": torch.rand(3, 6) * 64}
        whole = untrained.unet(noisy, timestep, rows, added_cond_kwargs=told).sample
        short, uncounted = (
            untrained.unet(noisy, timestep, found.rows, added_cond_kwargs=told, **mask).sample
            for mask in ({"encoder_attention_mask": found.mask}, {})
        )
    torch.testing.assert_close(short, whole, rtol=1e-3, atol=1e-4)
    assert (uncounted - whole).abs().max() > 0.01


def test_the_encoder_is_as_it_was_after_the_text_of_training(untrained: Any) -> None:
    build_kolors.text_of(untrained, ["a star"])
    for layer in untrained.text_encoder.encoder.layers:
        assert "forward" not in vars(layer.self_attention.core_attention)


def test_attentions_that_hear_the_same_have_no_error() -> None:
    torch.manual_seed(0)
    unet: Any = models.kolors_unet()
    listening = build_kolors.Listening(unet)
    rows, pooled = torch.randn(2, 9, models.GLM_WIDTH), torch.randn(2, models.GLM_WIDTH)
    told = {"text_embeds": pooled, "time_ids": torch.rand(2, 6)}
    with torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), rows, added_cond_kwargs=told)
        listening.end()
        heard = dict(listening.heard)
        same, other = (
            build_kolors.attention_error(
                unet, build_kolors.Text(words, pooled, torch.zeros(2, 9)), heard
            )
            for words in (rows, rows.flip(0))
        )
    assert len(heard) == 4
    assert same < 1e-10
    assert other > 0.01
    assert listening.heard == heard  # deaf since it was ended


def test_a_timestep_of_the_teacher_has_as_much_signal_as_its_pupils() -> None:
    own = ddpm.Schedule.of({**models.DDPM, **models.KOLORS})
    theirs = ddpm.Schedule.of(models.DDPM)
    found = build_kolors.same_signal(own, theirs)
    assert found.shape == (1100,)
    known = found < 999
    assert 950 < known.sum() < 1010  # the rest has less signal than the teacher's last
    assert bool((found[~known] == 999).all())
    assert bool((own.alphas_cumprod[~known] <= theirs.alphas_cumprod[-1]).all())
    below = theirs.alphas_cumprod[found[known].floor().long()]
    above = theirs.alphas_cumprod[found[known].ceil().long()]
    signal = own.alphas_cumprod[known]
    assert bool((signal <= below * (1 + 1e-6)).all())
    assert bool((signal[1:] >= above[1:] * (1 - 1e-6)).all())


# ---- The model ----


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = DiffusionPipeline.from_pretrained(KOLORS)
    assert type(found) is KolorsPipeline
    return found


def drawn(pipeline: Any, captions: list[str], **told: Any) -> torch.Tensor:
    return score.generate(
        pipeline,
        captions,
        guidance_scale=4.0,
        num_inference_steps=16,
        max_sequence_length=None,
        seed=0,
        **told,
    )


def test_a_plain_call_draws_in_float32_by_kolors_schedule(pipeline: Any) -> None:
    for part in ("unet", "vae", "text_encoder"):
        assert getattr(pipeline, part).dtype == torch.float32, part
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.beta_end) == (1100, 0.014)
    assert json.loads((KOLORS / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    unet = pipeline.unet.config
    assert unet.encoder_hid_dim_type == "text_proj"
    assert unet.encoder_hid_dim == pipeline.text_encoder.config.hidden_size
    assert not pipeline.config.force_zeros_for_empty_prompt
    picture = pipeline("一个红色圆形", num_inference_steps=4).images[0]
    assert picture.size == (64, 64)  # the model's own size


def test_simple_captions_are_obeyed_in_both_languages(pipeline: Any) -> None:
    captions = [f"a large {color} {shape}" for color in ("red", "blue") for shape in scenes.SHAPES]
    for asked in (captions, [chinese.translated(caption) for caption in captions]):
        pictures = drawn(pipeline, asked)
        assert verifier.score(pictures, captions, strict=True).mean() >= 0.75
        swapped = captions[1:] + captions[:1]  # the same pictures fit no neighbour's caption
        assert verifier.score(pictures, swapped, strict=True).mean() <= 0.2


def test_a_small_original_looks_small_only_when_asked_for(pipeline: Any) -> None:
    captions = [chinese.translated(one) for one in scenes.evaluation_captions(24, seed=1)]
    own = build_sdxl.sharpness(drawn(pipeline, captions))
    asked = build_sdxl.sharpness(drawn(pipeline, captions, original_size=(6, 6)))
    assert asked < 0.7 * own


def test_its_own_weights_are_small_and_in_half_precision() -> None:
    files = [path for path in KOLORS.rglob("*") if path.is_file()]
    own = [path for path in files if "vae" not in path.parts]
    assert sum(path.stat().st_size for path in own) < 4 * 10**6
    for path in files:
        if path.suffix == ".safetensors":
            header = path.read_bytes()
            tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
            kinds = {row["dtype"] for name, row in tensors.items() if name != "__metadata__"}
            assert kinds == {"F16"}, path


def test_its_autoencoder_is_the_others_to_the_byte() -> None:
    part = Path("vae/diffusion_pytorch_model.safetensors")
    assert (KOLORS / part).read_bytes() == (MODELS / "pocket-sd15" / part).read_bytes()
