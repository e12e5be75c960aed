"""Claims about the frozen parts: what captions become, what is dropped, what masks leave out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dojo.cli import UserError
from dojo.data import Batch
from dojo.data.colour import BAD_PROFILE
from dojo.finetune import lora
from dojo.inputs import pictures
from dojo.maths import flow
from dojo.models import sd3
from dojo.run import run as training
from tests.conftest import MakeArgs


class Opened:
    """A run with its data prepared, as a script has them before its loop."""

    def __init__(self, args: Any, texts: tuple[str, ...] = ()) -> None:
        self.run = training.start(args.run, args.optim)
        self.config = sd3.open_model(args.model, args.text)
        sources = pictures.open_sources(self.run, args)
        sources = pictures.check_samples(self.run, sources, self.config, args)
        self.run.plan(args.optim, sources.samples_per_epoch, sources.fingerprint(2))
        assert self.run.begin(args, lora.WEIGHTS)
        self.fixed = pictures.prepare(self.run, sources, self.config, args, texts)

    def batches(self, count: int, batch_size: int = 2) -> list[Batch]:
        loader = iter(self.fixed.loader(batch_size))
        return [next(loader) for _ in range(count)]


def equal(one: sd3.Embeds, two: sd3.Embeds) -> bool:
    return all(torch.equal(one[name], two[name]) for name in sd3.EMBEDS)


def test_a_plan_counts_the_largest_validation_picture(lora_args: MakeArgs, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a star", "size": "128x64"}\n')
    for flags, size in (
        ((), (64, 64)),
        (("--validation_resolution", "32", "128x32"), (32, 128)),
        (("--validation_prompts_file", str(prompts)), (64, 128)),
    ):
        flags = ("--dry_run", "--validation_prompt", "a ring", *flags)
        args = lora_args(tmp_path / "out", *flags)
        run = training.start(args.run, args.optim)
        model = sd3.open_model(args.model, args.text)
        needs = pictures.needs(run, model, args, (64, 64), 2, drawn=True)
        assert (needs.size, needs.drawn_size) == ((64, 64), size)


@pytest.mark.parametrize("cache", [(), ("--no_cache_text_embeddings",)], ids=["cached", "fresh"])
def test_the_empty_caption_follows_uncond(
    lora_args: MakeArgs, tmp_path: Path, cache: tuple[str, ...]
) -> None:
    # SimpleTuner's switches of this name are logged and nothing else.
    plain = Opened(lora_args(tmp_path / "a", *cache), ("a star",)).fixed.text(["", "a star"])
    zeros = Opened(lora_args(tmp_path / "b", *cache, "--uncond", "zeros"), ("a star",))
    embeds = zeros.fixed.text(["", "a star"])
    for name in sd3.EMBEDS:
        assert plain[name][0].any()
        assert not embeds[name][0].any()
        assert torch.equal(plain[name][1], embeds[name][1])


def test_caption_dropout_gives_what_uncond_says(lora_args: MakeArgs, tmp_path: Path) -> None:
    flags = ("--caption_dropout", "1", "--uncond", "zeros")
    opened = Opened(lora_args(tmp_path, *flags))
    for batch in opened.batches(2):
        assert batch["caption"] == ["", ""]
        embeds = opened.fixed.conditions(batch)
        assert not any(embeds[name].any() for name in sd3.EMBEDS)


def test_single_encoders_are_dropped_as_often_as_asked(lora_args: MakeArgs, tmp_path: Path) -> None:
    flags = ("--clip_l_dropout", "0.5", "--t5_dropout", "0.25", "--seed", "0")
    opened = Opened(lora_args(tmp_path, *flags))
    n, split = opened.config.clip_tokens, opened.config.layout.clip_l_width
    end = split + opened.config.layout.clip_g_width
    gone = torch.zeros(3)
    for batch in opened.batches(100):
        rows = opened.fixed.conditions(batch)["prompt_embeds"]
        again = opened.fixed.conditions(batch)["prompt_embeds"]
        assert torch.equal(rows, again), "a place has its draw"
        parts = (rows[:, :n, :split], rows[:, :n, split:end], rows[:, n:])
        gone += torch.stack([(part == 0).flatten(1).all(1).sum() for part in parts])
    # 200 samples: three standard errors are 0.11 and 0.09.
    assert gone[0] / 200 == pytest.approx(0.5, abs=0.11)
    assert gone[1] == 0
    assert gone[2] / 200 == pytest.approx(0.25, abs=0.09)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_cached_embeddings_of_a_batch_are_those_of_its_captions(
    lora_args: MakeArgs, tmp_path: Path, workers: str
) -> None:
    flags = ("--caption_dropout", "0.3", "--dataloader_num_workers", workers)
    opened = Opened(lora_args(tmp_path, *flags))
    for batch in opened.batches(5):
        assert equal(opened.fixed.conditions(batch), opened.fixed.text(batch["caption"]))


@pytest.fixture
def masked(scene_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The ten scenes, and masks whose left half is white."""
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    shutil.copytree(scene_data, pictures)
    masks.mkdir()
    for path in pictures.glob("*.png"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(masks / path.name)
    return pictures, masks


@pytest.mark.parametrize("cache", [(), ("--no_cache_latents",)], ids=["cached", "fresh"])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_what_a_mask_leaves_out_gives_no_gradient(
    lora_args: MakeArgs,
    tmp_path: Path,
    masked: tuple[Path, Path],
    cache: tuple[str, ...],
    weight: float,
) -> None:
    flags = ("--dataset_name", str(masked[0]), "--mask_dir", str(masked[1]), *cache)
    opened = Opened(lora_args(tmp_path, *flags, "--masked_loss_weight", str(weight)))
    (batch,) = opened.batches(1)
    area = opened.fixed.area(batch)
    assert area is not None
    assert area.shape == (2, 1, 8, 8)
    assert (area[..., :4] == 1).all()
    assert (area[..., 4:] == weight).all()
    predicted = torch.randn(2, 16, 8, 8, requires_grad=True)
    flow.squared_error(predicted, torch.zeros_like(predicted), area).sum().backward()
    assert predicted.grad is not None
    inside, outside = predicted.grad[..., :4], predicted.grad[..., 4:]
    assert inside.all()
    ratio = (outside / predicted.detach()[..., 4:]).mean() / (
        inside / predicted.detach()[..., :4]
    ).mean()
    assert ratio.item() == pytest.approx(weight, abs=1e-5)


def test_the_mask_is_mirrored_with_its_picture(
    lora_args: MakeArgs, tmp_path: Path, masked: tuple[Path, Path]
) -> None:
    flags = ("--dataset_name", str(masked[0]), "--mask_dir", str(masked[1]), "--random_flip")
    opened = Opened(lora_args(tmp_path, *flags, "--seed", "0"))
    sides = set()
    for batch in opened.batches(10):
        area = opened.fixed.area(batch)
        assert area is not None
        sides |= {tuple(row[0, 0, ::7].tolist()) for row in area}
    assert sides == {(1.0, 0.0), (0.0, 1.0)}


def test_without_masks_every_place_counts(lora_args: MakeArgs, tmp_path: Path) -> None:
    opened = Opened(lora_args(tmp_path))
    assert opened.fixed.area(opened.batches(1)[0]) is None


def test_evaluation_sees_pictures_as_they_are(lora_args: MakeArgs, tmp_path: Path) -> None:
    flags = ("--eval_fraction", "0.3", "--random_flip", "--caption_dropout", "1")
    fixed = Opened(lora_args(tmp_path, *flags)).fixed
    names = {some.name: some for some in fixed.evaluation}
    assert set(names) == {"eval", "train"}
    assert len(names["eval"].draws) == len(names["train"].draws) == 3
    for some in fixed.evaluation:
        for draw in some.draws:
            row, same = some.dataset[draw], some.dataset[draw]
            assert row["caption"]
            assert torch.equal(row["mean"], same["mean"])


def test_evaluation_finds_unshuffled_captions(lora_args: MakeArgs, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"tag {i}, red, square, plain, small")
    flags = ("--dataset_name", str(pictures), "--shuffle_caption", "--keep_tokens", "1")
    opened = Opened(lora_args(tmp_path, *flags, "--eval_fraction", "0.3"))
    for some in opened.fixed.evaluation:
        for draw in some.draws:
            caption = some.dataset[draw]["caption"]
            assert caption.endswith(", red, square, plain, small")
            opened.fixed.text([caption])
    seen = {text for batch in opened.batches(20) for text in batch["caption"]}
    assert len(seen) > 4
    assert all(text.startswith("tag ") for text in seen)


def test_the_report_lists_buckets_and_counts(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, size in enumerate([(64, 64), (128, 32), (32, 128), (96, 48)]):
        Image.new("RGB", size, "red").save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    Image.new("RGB", (64, 64)).save(pictures / "0.png", icc_profile=b"no profile")
    (pictures / "IMG_1.CR2").write_bytes(b"x")
    flags = ("--dataset_name", str(pictures), "--aspect_buckets", "--bucket_step", "16")
    opened = Opened(lora_args(tmp_path, *flags))
    report = json.loads((opened.run.output_dir / "data_report.json").read_text())
    assert report["train"] == 4
    assert sum(row["pictures"] for row in report["buckets"]) == 4
    remedy = "export them as PNG or JPEG"
    assert report["not_read"] == [{"kind": ".cr2 files", "count": 1, "remedy": remedy}]
    assert report["pictures_read"] == {BAD_PROFILE: 1}
    said = capsys.readouterr().out
    assert "128" in said
    assert f"not read: 1 .cr2 files ({remedy})" in said
    assert f"1 pictures {BAD_PROFILE}" in said
    for batch in opened.batches(8):
        assert len(set(batch["size"])) == 1
        height, width = batch["size"][0]
        assert batch["mean"].shape[-2:] == (height // 8, width // 8)


def test_pictures_too_small_are_refused_or_left_out(lora_args: MakeArgs, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, side in enumerate((64, 64, 20)):
        Image.new("RGB", (side, side), "red").save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    flags = ("--dataset_name", str(pictures), "--max_upscale", "2")
    with pytest.raises(UserError, match=r"2\.png.*20 x 20"):
        Opened(lora_args(tmp_path, *flags))
    opened = Opened(lora_args(tmp_path / "b", *flags, "--on_bad_sample", "skip"))
    assert {draw for batch in opened.batches(4) for draw in batch["caption"]} == {
        "picture 0",
        "picture 1",
    }
    report = json.loads((opened.run.output_dir / "data_report.json").read_text())
    assert "2.png" in report["left_out"][0]["name"]
