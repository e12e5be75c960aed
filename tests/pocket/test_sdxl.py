"""What makes pocket-sdxl: its start from pocket-sd15, the pictures it learns sizes from, what it
draws when it is told another size."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from dojo.pocket import build_sdxl, models, scenes, score
from dojo.pocket.build_sdxl import WHOLE, View
from tests.conftest import ROOT

MODELS = ROOT / "models"
SCENE = scenes.realise(scenes.parse("a large red star in the center"), random.Random(0))


def views(count: int = 600) -> list[View]:
    draw = random.Random(1)
    return [build_sdxl.random_view(draw) for _ in range(count)]


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


# ---- Pictures that say something of sizes ----


def test_a_whole_picture_is_the_scene_and_told_as_the_pipeline_tells_its_own() -> None:
    assert np.array_equal(WHOLE.of(SCENE), scenes.draw(SCENE))
    assert WHOLE.time_ids == (64, 64, 0, 0, 64, 64)


def test_no_random_view_is_whole_and_every_one_lies_within_its_picture() -> None:
    found = views()
    assert all(view != WHOLE for view in found)
    for view in found:
        assert min(view.resized) == scenes.CANVAS
        ends = [start + scenes.CANVAS for start in view.crop]
        assert min(view.crop) >= 0
        assert all(end <= extent for end, extent in zip(ends, view.resized, strict=True))
        (own_height, own_width), (height, width) = view.original, view.resized
        assert own_height * width / height == pytest.approx(own_width, abs=1.4)  # the aspect stays
        assert view.of(SCENE).shape == (64, 64, 3)
    assert min(min(view.original) for view in found) < 8
    cropped = [view for view in found if view.resized != WHOLE.resized]
    small = [view for view in found if min(view.original) < 64]
    large = [view for view in found if min(view.original) > 64]
    both = [view for view in cropped if min(view.original) != 64]
    assert all(len(some) > len(found) / 6 for some in (cropped, small, large, both))
    assert {view.resized[0] > 64 for view in cropped} == {True, False}  # high ones and wide ones


def test_a_crop_shows_what_lies_there_of_the_wider_picture() -> None:
    wide = scenes.draw(SCENE, (64, 96))
    view = View(original=(64, 96), resized=(64, 96), crop=(0, 20))
    assert np.array_equal(view.of(SCENE), wide[:, 20:84])
    assert view.time_ids == (64, 96, 0, 20, 64, 64)
    high = View(original=(96, 64), resized=(96, 64), crop=(9, 0))
    assert np.array_equal(high.of(SCENE), scenes.draw(SCENE, (96, 64))[9:73])


def test_an_object_keeps_its_size_on_a_wider_canvas_and_lies_on_the_same_share_of_it() -> None:
    scene = replace(SCENE, things=(replace(SCENE.things[0], x=16.0, y=32.0),))
    wide, narrow = scenes.draw(scene, (64, 96)), scenes.draw(scene)
    assert wide.shape == (64, 96, 3)
    assert np.array_equal(wide[:, 8:56], narrow[:, :48])  # at 24 of 96 as at 16 of 64
    assert (wide[:, 56:] == scenes.BACKGROUNDS["white"]).all()


def test_what_is_cut_off_lies_at_the_left_or_the_right_edge() -> None:
    assert build_sdxl.cut(tensor(scenes.draw(SCENE))) == 0
    at_the_edge = scenes.draw(SCENE)[:, 30:64]  # the left half of the object is cut off
    assert build_sdxl.cut(tensor(at_the_edge)) > 0.2
    assert build_sdxl.cut(tensor(at_the_edge.transpose(1, 0, 2))) < 0.2


def test_a_small_file_is_blurred_the_more_the_smaller_and_a_large_one_is_not() -> None:
    sharpness = [
        build_sdxl.sharpness(tensor(View(original=(side, side)).of(SCENE)))
        for side in (6, 12, 24, 64, 640)
    ]
    assert sharpness[0] < 0.6 * sharpness[1] < sharpness[2] < sharpness[3] == sharpness[4]


def test_sharpness_is_nothing_on_a_slope_and_does_not_hang_on_the_contrast() -> None:
    slope = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    assert build_sdxl.sharpness(slope) == pytest.approx(0, abs=1e-9)
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # A pixel less the mean of nine, itself among them, has 8/9 of a pixel's variance.
    assert build_sdxl.sharpness(noise) == pytest.approx(8 / 9, rel=0.02)
    assert build_sdxl.sharpness(noise / 3 + 0.1) == pytest.approx(build_sdxl.sharpness(noise))


# ---- The start ----


def test_the_untrained_unet_predicts_what_sd15s_does_for_the_mapped_text() -> None:
    torch.manual_seed(0)
    teacher: Any = models.unet()
    unet: Any = models.sdxl_unet()
    text_map = torch.randn(64, 160) / 160**0.5
    build_sdxl.inherit_unet(unet, teacher, text_map)
    noisy, timestep = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    rows = torch.randn(3, 20, 160)
    # Whatever it is told beside.
    told = {"text_embeds": torch.randn(3, 96), "time_ids": torch.rand(3, 6) * 100}
    with torch.no_grad():
        found = unet(noisy, timestep, rows, added_cond_kwargs=told).sample
        expected = teacher(noisy, timestep, rows @ text_map.T).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_map_of_texts_is_found_where_there_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 20, 160, generator=generator)
    rows[..., 1] = rows[..., 0]  # words have fewer directions than rows
    text_map = torch.randn(64, 160, generator=generator)
    found = build_sdxl.fitted_map(rows, rows @ text_map.T)
    torch.testing.assert_close(rows @ found.T, rows @ text_map.T, rtol=0, atol=0.02)


def test_what_the_unet_hears_in_training_is_what_the_pipeline_gives_it() -> None:
    torch.manual_seed(0)
    pipeline: Any = models.sdxl_pipeline()
    captions = ["a red star", "two blue circles on a black background"]
    ids = [
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    rows, pooled = build_sdxl.text_rows(pipeline, (ids[0], ids[1]))
    with torch.no_grad():
        expected, without, pool, pool_without = pipeline.encode_prompt(
            captions, device="cpu", do_classifier_free_guidance=True
        )
        time_ids = pipeline._get_add_time_ids(
            (64, 96), (0, 20), (64, 64), torch.float32, text_encoder_projection_dim=96
        )
    assert torch.equal(rows, expected)
    assert torch.equal(pooled, pool)
    assert not without.any()  # no caption is zeros
    assert not pool_without.any()
    assert time_ids.tolist() == [[*View((64, 96), (64, 96), (0, 20)).time_ids]]


# ---- The model ----


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return StableDiffusionXLPipeline.from_pretrained(MODELS / "pocket-sdxl")


def drawn(pipeline: Any, **told: Any) -> torch.Tensor:
    return score.generate(
        pipeline,
        scenes.evaluation_captions(24, seed=1),
        guidance_scale=4.0,
        num_inference_steps=10,
        max_sequence_length=None,
        seed=0,
        **told,
    )


def test_a_small_original_looks_small_only_when_asked_for(pipeline: Any) -> None:
    own = build_sdxl.sharpness(drawn(pipeline))
    asked = build_sdxl.sharpness(drawn(pipeline, original_size=(6, 6)))
    large = build_sdxl.sharpness(drawn(pipeline, original_size=(512, 512)))
    assert asked < 0.7 * own
    assert large > 0.9 * own


def test_objects_are_cut_off_only_when_a_crop_is_asked_for(pipeline: Any) -> None:
    wide = {"original_size": (64, 128)}
    own, whole = build_sdxl.cut(drawn(pipeline)), build_sdxl.cut(drawn(pipeline, **wide))
    asked = build_sdxl.cut(drawn(pipeline, **wide, crops_coords_top_left=(0, 32)))
    assert max(own, whole) < 0.02
    assert asked > 2 * max(own, whole)


def test_the_parts_that_it_shares_are_the_others_to_the_byte() -> None:
    for part, other in (
        ("vae/diffusion_pytorch_model.safetensors", "pocket-sd15"),
        ("text_encoder_2/model.safetensors", "pocket-sd3"),
    ):
        own, theirs = (MODELS / name / part for name in ("pocket-sdxl", other))
        assert own.read_bytes() == theirs.read_bytes(), part
    pipeline, sd3 = (
        DiffusionPipeline.from_pretrained(MODELS / name) for name in ("pocket-sdxl", "pocket-sd3")
    )
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(pipeline, name).get_vocab() == getattr(sd3, name).get_vocab()
    # The first without its projection, which SDXL has not.
    first = {
        k.removeprefix("text_model."): v for k, v in pipeline.text_encoder.state_dict().items()
    }
    theirs = sd3.text_encoder.state_dict()
    assert all(torch.equal(v, theirs[f"text_model.{k}"]) for k, v in first.items())
    assert len(first) == len(theirs) - 1
