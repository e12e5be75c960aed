"""train_dreambooth_lora_sd3.py: both halves of a batch, class pictures, text encoders, resume."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

import train_dreambooth_lora_sd3 as script
from dojo import cli, data
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.maths import flow
from dojo.models import sd3
from tests.conftest import run_flags
from tests.processes import Death, launch, spawn
from tests.scripts.runs import adapter, metrics

SCRIPT = "train_dreambooth_lora_sd3.py"
INSTANCE, CLASS = "a photo of sks dog", "a red circle"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of one subject, with files beside them that are no pictures."""
    folder = tmp_path_factory.mktemp("subject")
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 64 + 16 * i), color).save(folder / f"{i}.png")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.md").write_text("mine")
    return folder


def words(folder: Path, model: Path, subject: Path, *more: str) -> list[str]:
    """The command line of a small DreamBooth run without prior preservation."""
    flags = [*run_flags(folder, model, None), "--instance_data_dir", str(subject)]
    return [*flags, "--instance_prompt", INSTANCE, "--rank", "2", *more]


def prior(folder: Path) -> tuple[str, ...]:
    """The flags of prior preservation with three class pictures."""
    flags = ("--with_prior_preservation", "--class_data_dir", str(folder / "class"))
    flags += ("--class_prompt", CLASS, "--num_class_images", "3", "--sample_batch_size", "2")
    return (*flags, "--prior_inference_steps", "1")


@pytest.fixture
def train(tiny_sd3: Path, subject: Path) -> Any:
    """`train(folder, *flags)`: a run of three small steps; returns its output folder."""

    def run(folder: Path, *flags: str) -> Path:
        args = cli.parse(script.Args, None, words(folder, tiny_sd3, subject, *flags))
        script.main(args)
        return args.run.output_dir

    return run


def test_a_run_without_class_pictures_trains_on_the_folder(train: Any, tmp_path: Path) -> None:
    folder = train(tmp_path)
    assert json.loads((folder / "data_report.json").read_text())["train"] == 3
    assert any(value.any() for name, value in adapter(folder).items() if "lora_B" in name)
    card = (folder / "README.md").read_text()
    assert INSTANCE in card


def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Batches with their captions, weights and errors, as the loss saw them."""
    seen: list[dict[str, Any]] = []
    original, error = data.collate, flow.squared_error

    def collate(batch: Any) -> Any:
        seen.append(original(batch))
        return seen[-1]

    def squared_error(*args: Any) -> Tensor:
        errors = error(*args)
        if torch.is_grad_enabled():
            seen[-1]["errors"] = errors.detach()
        return errors

    monkeypatch.setattr(data, "collate", collate)
    monkeypatch.setattr(flow, "squared_error", squared_error)
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(
    "cache", [(), ("--no_cache_latents", "--no_cache_text_embeddings")], ids=["cached", "fresh"]
)
def test_every_batch_holds_both_halves_with_their_captions_and_weights(
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    cache: tuple[str, ...],
) -> None:
    # diffusers #8589, #13292, #13743: B > 1 crashed, and the class half was weighed wrongly.
    seen = spy(monkeypatch)
    size = ("--train_batch_size", str(batch_size), "--prior_loss_weight", "0.25", "--seed", "1")
    folder = train(tmp_path, *prior(tmp_path), *size, *cache)
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    batches = [batch for batch in seen if "errors" in batch]
    assert len(batches) == 3
    for batch, row in zip(batches, metrics(folder), strict=True):
        half = [INSTANCE] * batch_size + [CLASS] * batch_size
        assert batch["caption"] == half
        assert batch["weight"].tolist() == [1.0] * batch_size + [0.25] * batch_size
        assert batch["regularisation"].tolist() == [False] * batch_size + [True] * batch_size
        mine, theirs = batch["errors"][:batch_size], batch["errors"][batch_size:]
        assert row["loss"] == pytest.approx((mine.mean() + 0.25 * theirs.mean()).item(), rel=1e-5)


def test_the_right_latents_stand_beside_the_right_captions(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spy(monkeypatch)
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), "white").save(folder / f"{i}.png")
    train(tmp_path, *prior(tmp_path), "--no_cache_latents", "--train_batch_size", "2")
    for batch in (batch for batch in seen if "errors" in batch):
        white = (batch["pixels"] == 1).flatten(1).all(1).tolist()
        assert white == [caption == CLASS for caption in batch["caption"]]


def test_zero_weight_is_training_without_class_pictures(train: Any, tmp_path: Path) -> None:
    flags = ("--seed", "2", "--prior_loss_weight", "0", "--learning_rate", "1e-2")
    one = adapter(train(tmp_path / "prior", *prior(tmp_path), *flags))
    assert any(value.any() for name, value in one.items() if "lora_B" in name)
    other = adapter(
        train(tmp_path / "other", *prior(tmp_path), *flags[:2], "--learning_rate", "1e-2")
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_class_pictures_of_ones_own_are_used_and_no_others_are_drawn_among_them(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), "white").save(folder / f"mine-{i}.jpg")
    (folder / "class-00000.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"2 pictures of your own.*--num_class_images 2 takes them"):
        train(tmp_path, *prior(tmp_path))
    train(tmp_path, *prior(tmp_path), "--num_class_images", "2")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_class_pictures_are_reused_and_topped_up(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "class"
    train(tmp_path, *prior(tmp_path), "--num_class_images", "2")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["class-00000.png", "class-00001.png"]
    train(tmp_path / "more", *prior(tmp_path))
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("class pictures were drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(sd3.Model, "load_pipeline", refuse)
        train(tmp_path / "second", *prior(tmp_path))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_class_folder_with_captions_keeps_them(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spy(monkeypatch)
    folder = tmp_path / "class"
    folder.mkdir()
    captions = [f"caption {i}" for i in range(3)]
    for i, caption in enumerate(captions):
        Image.new("RGB", (64, 64), "white").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    train(tmp_path, *prior(tmp_path))
    used = {text for batch in seen if "errors" in batch for text in batch["caption"][2:]}
    assert used <= set(captions)
    assert len(used) > 1


def test_a_captioned_class_folder_is_filled_up_with_captions(train: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (64, 64), "white").save(folder / "class-00007.png")
    (folder / "class-00007.txt").write_text("a white wall")
    (folder / "class-00001.txt").write_text("mine")
    train(tmp_path, *prior(tmp_path))
    assert len(list(folder.glob("*.png"))) == 3
    texts = {path.stem: path.read_text() for path in folder.glob("class-*.txt")}
    assert texts == {"class-00007": "a white wall", "class-00001": "mine", "class-00000": CLASS}
    (folder / "metadata.csv").write_text("file_name,text\nclass-00007.png,a wall\n")
    with pytest.raises(UserError, match="--num_class_images 3 takes"):
        train(tmp_path / "more", *prior(tmp_path), "--num_class_images", "9")


def test_drawing_class_pictures_goes_on_after_a_kill(
    train: Any, tmp_path: Path, tiny_sd3: Path, subject: Path
) -> None:
    flags = words(tmp_path, tiny_sd3, subject, *prior(tmp_path), "--sample_batch_size", "1")
    death = Death(place="class picture", count=3)
    code, said = spawn(SCRIPT, flags, tmp_path, death)
    assert code == -signal.SIGKILL, said
    folder = tmp_path / "class"
    assert len(list(folder.glob("class-*.png"))) == 2
    train(tmp_path, *prior(tmp_path), "--sample_batch_size", "1")
    train(tmp_path / "whole", *prior(tmp_path / "whole"), "--sample_batch_size", "1")
    whole = tmp_path / "whole" / "class"
    assert {path.name for path in whole.iterdir()} == {path.name for path in folder.iterdir()}
    for path in sorted(whole.iterdir()):
        # Another number of threads adds in another order: a step of 1/255 here and there.
        one, two = (
            np.asarray(Image.open(place), dtype=int) for place in (path, folder / path.name)
        )
        assert np.abs(one - two).max() <= 2


def test_a_missing_class_picture_is_drawn_among_its_neighbours(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    plain = StableDiffusion3Pipeline.__call__

    def call(self: Any, *, prompt_embeds: Any, **options: Any) -> Any:
        drawn.append(len(prompt_embeds))
        return plain(self, prompt_embeds=prompt_embeds, **options)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)
    train(tmp_path, *prior(tmp_path))
    pictures = {path: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert len(pictures) == 3
    (tmp_path / "class" / "class-00001.png").unlink()
    train(tmp_path / "again", *prior(tmp_path))
    assert {path: path.read_bytes() for path in (tmp_path / "class").iterdir()} == pictures
    assert drawn == [2, 2, 2]


def test_a_copied_folder_trains_to_the_same_bits_with_class_pictures_of_its_own(
    train: Any, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (3, 64, 128, 3))):
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "set" / f"{i}.png")

    def trained(folder: Path) -> dict[str, Tensor]:
        copied = shutil.copytree(tmp_path / "set", folder / "set", copy_function=shutil.copyfile)
        # The places of crops hang on the samples' ids.
        flags = ("--instance_data_dir", str(copied), "--crop_variants", "3", "--seed", "1")
        return adapter(train(folder, *flags, *prior(folder)))

    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "flags",
    [
        ("--with_prior_preservation",),
        ("--with_prior_preservation", "--class_data_dir", "somewhere"),
        ("--class_prompt", "a dog"),
    ],
)
def test_half_a_prior_is_refused(
    train: Any, tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, *flags)
    assert "--class" in capsys.readouterr().err.replace("\n", " ")


def test_missing_captions_and_prompt_are_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    Image.new("RGB", (64, 64), "white").save(folder / "0.png")
    flags = [*run_flags(tmp_path, tiny_sd3, None), "--instance_data_dir", str(folder)]
    with pytest.raises(UserError, match="--instance_prompt"):
        script.main(cli.parse(script.Args, None, flags))


# -- text encoders ------------------------------------------------------------------------------

CLIPS = ("--train_text_encoder", "--text_encoder_lr", "1e-2", "--learning_rate", "1e-2")


def test_text_encoders_are_trained_saved_and_loaded_by_plain_diffusers(
    train: Any, tmp_path: Path, tiny_sd3: Path
) -> None:
    folder = train(tmp_path, *CLIPS, "--lora_alpha", "4", "--eval_fraction", "0.3")
    saved = adapter(folder)
    parts = {name.split(".")[0] for name in saved}
    assert parts == {"transformer", "text_encoder", "text_encoder_2"}
    ups = {part: [v for n, v in saved.items() if n.startswith(f"{part}.") and "lora_B" in n]
           for part in parts}  # fmt: skip
    assert all(any(value.any() for value in values) for values in ups.values())
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    plain = pipeline.encode_prompt("a star", None, None, max_sequence_length=24)
    pipeline.load_lora_weights(str(folder))
    tuned = pipeline.encode_prompt("a star", None, None, max_sequence_length=24)
    # Both encoders' pooled vectors moved: the first 64 numbers are CLIP-L's.
    assert not torch.equal(plain[2][:, :64], tuned[2][:, :64])
    assert not torch.equal(plain[2][:, 64:], tuned[2][:, 64:])


def test_training_text_encoders_resumes_exactly(train: Any, tmp_path: Path) -> None:
    # diffusers: the second CLIP has the class of the first, stayed None and was not restored.
    common = (*CLIPS, "--seed", "3", "--checkpointing_steps", "2", "--lora_dropout", "0.1")
    common += (*prior(tmp_path), "--use_ema")
    whole = train(tmp_path / "whole", *common, "--max_train_steps", "4")
    train(tmp_path / "part", *common, "--max_train_steps", "2")
    more = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    resumed = train(tmp_path / "part", *common, *more)
    assert (whole / lora.WEIGHTS).read_bytes() == (resumed / lora.WEIGHTS).read_bytes()
    for folder in ("checkpoint-4", "checkpoint-4/ema"):
        one, two = whole / folder / lora.WEIGHTS, resumed / folder / lora.WEIGHTS
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(
    train: Any, tmp_path: Path, tiny_sd3: Path, subject: Path
) -> None:
    more = (*prior(tmp_path), *CLIPS, "--seed", "5", "--max_train_steps", "3")
    half = words(tmp_path, tiny_sd3, subject, *more, "--train_batch_size", "1")
    two = launch(SCRIPT, half, tmp_path, 2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["num_processes"] == 2
    alone = train(tmp_path / "alone", *more)
    for row, other in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "lr", "epoch"):
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-3), name


def test_dry_run_counts_both_halves(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def flops() -> float:
        text = capsys.readouterr().out
        return float(text.split("operations per process and step: ")[1].split()[0])

    train(tmp_path, "--dry_run")
    one = flops()
    train(tmp_path, "--dry_run", *prior(tmp_path))
    assert flops() == pytest.approx(2 * one, rel=0.05)
    assert not (tmp_path / "class").exists()
