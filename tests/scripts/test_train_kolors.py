"""The script of Kolors from end to end: Chinese captions, either layout, what diffusers draws."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import KolorsPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import demo
import train_dreambooth_lora_kolors
import train_lora_kolors
from dojo import cli
from dojo.cli import UserError
from dojo.files.records import read_pictures
from dojo.finetune import lora, planned
from dojo.models import kolors
from tests.conftest import run_flags
from tests.models.test_kolors import INDICES, authors_layout
from tests.scripts.runs import family_flags, in_process, metrics

CAPTIONS = [
    "白色背景上的一颗红色星星",
    "两个蓝色圆形",
    "绿色的正方形在黄色的三角形上方",
    "一只猫的照片，高质量",
]
PROMPT = "一颗红色的星星"
SUBJECT = "一颗sks星星的照片"


@pytest.fixture(scope="module")
def pictures(scene_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with captions in Chinese."""
    folder = tmp_path_factory.mktemp("datas") / "chinese"
    folder.mkdir()
    rows = []
    for path, caption in zip(sorted(scene_data.glob("*.png")), CAPTIONS, strict=False):
        shutil.copy(path, folder)
        rows.append(json.dumps({"file_name": path.name, "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def train(folder: Path, model: Path, data: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    words = [*family_flags(folder, model, data), "--rank", "2", "--seed", "0"]
    in_process(train_lora_kolors, [*words, "--learning_rate", "1e-2", *flags])
    return folder / "run"


WATCHED = ("--validation_prompt", PROMPT, "--validation_inference_steps", "2")
WATCHED = (*WATCHED, "--validation_guidance_scale", "3", "--caption_dropout", "0.3")


@pytest.fixture(scope="module")
def trained(tiny_kolors: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run on them."""
    return train(tmp_path_factory.mktemp("trained"), tiny_kolors, pictures, *WATCHED)


def test_chinese_captions_are_learned_and_stay_chinese(trained: Path) -> None:
    assert [row["step"] for row in metrics(trained) if "loss" in row] == [1, 2, 3]
    drawn = sorted(path.name for path in (trained / "validation" / "step-3").glob("*.png"))
    assert len(drawn) == 1
    assert PROMPT in drawn[0]
    for name in ("report.html", "README.md", "validation/prompts.json", "args.json"):
        assert PROMPT in (trained / name).read_text(encoding="utf-8"), name
    # No caption was cut to nothing or taken for another one.
    report = json.loads((trained / "data_report.json").read_text(encoding="utf-8"))
    assert report["texts"]["tokens_of_ChatGLM"] == 256
    assert report["texts"]["cut_for_ChatGLM"] == 0


def test_validation_draws_what_the_demo_and_the_pipeline_draw(
    trained: Path, tiny_kolors: Path, tmp_path: Path
) -> None:
    (path,) = (trained / "validation" / "step-3").glob("*.png")
    (row,) = read_pictures(trained / "validation")
    seed = row["seed"]
    assert row["file"] == path.name
    flags = ["--pretrained_model_name_or_path", str(tiny_kolors), "--prompt", PROMPT]
    flags += ["--lora_weights_path", str(trained), "--seed", str(seed), "--height", "64"]
    flags += ["--width", "64", "--num_inference_steps", "2", "--guidance_scale", "3"]
    out = tmp_path / "drawn"
    demo.main(cli.parse(demo.Args, None, [*flags, "--dtype", "fp32", "--output_dir", str(out)]))
    (own,) = out.glob("*.png")
    assert PROMPT in own.name
    assert Image.open(own).tobytes() == Image.open(path).tobytes()

    pipeline: Any = KolorsPipeline.from_pretrained(tiny_kolors)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(trained))
    wish: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    wish |= {"height": 64, "width": 64, "generator": torch.Generator().manual_seed(seed)}
    assert pipeline(PROMPT, **wish).images[0].tobytes() == Image.open(path).tobytes()


@pytest.mark.parametrize("index", ["SDXL", "Kolors"])
def test_the_authors_folder_trains_the_same_bytes(
    trained: Path, tiny_kolors: Path, pictures: Path, tmp_path: Path, index: str
) -> None:
    folder = authors_layout(tiny_kolors, tmp_path / "authors", INDICES[index])
    again = train(tmp_path / "again", folder, pictures, *WATCHED)
    assert (again / lora.WEIGHTS).read_bytes() == (trained / lora.WEIGHTS).read_bytes()
    assert not list(tmp_path.rglob("*text_encoder*.safetensors"))  # copied nowhere


def test_without_a_cache_the_same_is_learned(
    trained: Path, tiny_kolors: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = (*WATCHED, "--no_cache_text_embeddings", "--no_cache_latents")
    again = train(tmp_path / "live", tiny_kolors, pictures, *flags)
    one, other = (load_file(folder / lora.WEIGHTS) for folder in (trained, again))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_a_file_for_other_programs_has_names_that_the_pipeline_reads(
    trained: Path, tiny_kolors: Path, pictures: Path, tmp_path: Path
) -> None:
    again = train(tmp_path / "kohya", tiny_kolors, pictures, *WATCHED, "--lora_format", "kohya")
    (path,) = [one for one in again.glob("*.safetensors") if one.name != lora.WEIGHTS] or [
        again / lora.WEIGHTS
    ]
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    pipeline: Any = KolorsPipeline.from_pretrained(tiny_kolors)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    assert pipeline.get_active_adapters()


def subject_flags(folder: Path, model: Path, data: Path) -> list[str]:
    """The command line of a short DreamBooth with two class pictures and a Chinese subject."""
    words = [*family_flags(folder, model, None), "--instance_data_dir", str(data), "--rank", "2"]
    words += ["--caption_strategy", "instance", "--instance_prompt", SUBJECT, "--seed", "0"]
    words += ["--with_prior_preservation", "--class_data_dir", str(folder / "class")]
    words += ["--class_prompt", PROMPT, "--num_class_images", "2", "--sample_batch_size", "2"]
    words += ["--prior_inference_steps", "2", "--max_train_steps", "2", "--learning_rate", "1e-2"]
    return [*words, "--validation_prompt", SUBJECT, "--validation_inference_steps", "2"]


def texts_of_batches(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[Tensor]:
    """The embeddings of every batch that a model is trained with from now on, [2 B, T, D]."""
    given: list[Tensor] = []
    ask = kind.conditions

    def conditions(self: Any, embeds: Any, geometry: Any) -> Any:
        if torch.is_grad_enabled():
            given.append(embeds["prompt_embeds"])
        return ask(self, embeds, geometry)

    monkeypatch.setattr(kind, "conditions", conditions)
    return given


def check_subject(run: Path, texts: list[Tensor]) -> None:
    """A subject was learned beside two pictures of its class, each half with its own text."""
    assert sorted(path.name for path in (run.parent / "class").iterdir()) == [
        "class-00000.png",
        "class-00001.png",
    ]
    assert [row["step"] for row in metrics(run) if "loss" in row] == [1, 2]
    assert len(texts) == 2
    for batch in texts:
        assert len(batch) == 4  # two pictures of the subject, and as many of the class
        different = {bytes(row.numpy().tobytes()) for row in batch}
        assert len(different) == 2
        assert torch.equal(batch[0], batch[1])
        assert torch.equal(batch[2], batch[3])
    assert f"Use `{SUBJECT}` in the prompt." in (run / "README.md").read_text(encoding="utf-8")
    assert any(SUBJECT in path.name for path in (run / "validation" / "step-2").glob("*.png"))
    up = {name: value for name, value in load_file(run / lora.WEIGHTS).items() if "lora_B" in name}
    assert up
    assert all(value.any() for value in up.values())


def test_a_subject_is_learned_beside_its_class_in_chinese(
    tiny_kolors: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of_batches(monkeypatch, kolors.Model)
    in_process(train_dreambooth_lora_kolors, subject_flags(tmp_path, tiny_kolors, pictures))
    check_subject(tmp_path / "run", texts)


@pytest.mark.parametrize("script", [train_lora_kolors, train_dreambooth_lora_kolors])
def test_the_text_encoder_is_not_trained(
    script: Any,
    tiny_kolors: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = run_flags(tmp_path, tiny_kolors, pictures)
    with pytest.raises(SystemExit):
        cli.parse(script.Args, None, [*words, "--train_text_encoder"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--train_text_encoder" in said
    assert "stay as they are" in said


@pytest.mark.slow
def test_a_plan_by_name_counts_six_billion_weights_of_text(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resolution", "1024", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    plan = train_lora_kolors.cli.parse(
        train_lora_kolors.Args,
        None,
        [*family_flags(tmp_path, Path("kolors"), pictures), *flags, "--dry_run"],
    )
    planned(train_lora_kolors.main)(plan)
    said = capsys.readouterr().out
    assert "text_encoder 11.63" in said
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_family_is_refused_by_its_script(
    tiny_sdxl: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"its scripts are train_\*_sdxl\.py"):
        train(tmp_path, tiny_sdxl, pictures)
