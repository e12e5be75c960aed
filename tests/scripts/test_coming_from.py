"""Every training command of ours on the page for those who come from other trainers does run."""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dojo import cli
from dojo.configure import __main__ as configure
from dojo.files.records import read_pictures
from tests.conftest import ROOT, make_tiny
from tests.scripts import runs
from tests.scripts.test_readme import commands, options, text_of, words_of

PAGE = "docs/coming_from.md"
TRAINERS = ("DiffSynth", "Diffusion-DPO", "SimpleTuner", "diffusers", "kohya", "flow_grpo", "TRL")
# What a command is shortened by; the last of a flag counts.
SHORT = "--max_train_steps 1 --gradient_accumulation_steps 1 --prior_inference_steps 2"
SHORT += " --validation_inference_steps 2 --num_eval_prompts 1 --eval_sample_steps 2"

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread


def ours() -> list[str]:
    """The commands of the page that train or draw, but for those that read a file of options."""
    lines = dict.fromkeys(line.strip() for line in commands(text_of(PAGE)))
    return [one for one in lines if re.search(r"\w+\.py ", one) and "--config" not in one]


def test_every_trainer_has_a_row_and_every_row_a_command_of_ours() -> None:
    rows = [line.split(" | ") for line in text_of(PAGE).splitlines() if line.startswith("| ")][2:]
    for name in TRAINERS:
        assert any(name in row[0] for row in rows), name
    without = [row[0] for row in rows if not re.search(r"`(python|bash) |dojo\.", row[-1])]
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ours(), ids=lambda line: line.split("--output_dir ")[-1].split()[0]
)
def test_our_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, words = words_of(line)
    for name, family in (("models/Kolors", "kolors"), ("models/HunyuanDiT", "hunyuandit")):
        if name in words:
            words[words.index(name)] = str(make_tiny(tmp_path / "tiny", family))
    if "outputs/pocket-pairs" in words:
        pairs = runs.write_pairs(tmp_path / "pairs", 6)
        words[words.index("outputs/pocket-pairs")] = str(pairs)
    words = [re.sub("^outputs/", f"{tmp_path}/", word) for word in words]
    script = importlib.import_module(Path(words[1]).stem)
    if "train_ddpo_sd15.py" in words and "outputs/trl" in line:  # an epoch is not broken off
        words += ["--num_prompts_per_epoch", "6"]
    known = {flag.removeprefix("--") for flag in options(script.Args)}
    short = [*SHORT.split(), "--latent_cache_dir", str(tmp_path / "cache")]
    for flag, value in zip(short[::2], short[1::2], strict=True):
        words += [flag, value] if flag[2:] in known else []
    words += ["--max_train_steps", "2"] if "6" in words else []
    runs.in_process(script, words[2:])
    folder = Path(words[words.index("--output_dir") + 1])
    assert any((folder / name).exists() for name in ("finished.json", "versus.json")), folder


# Of SimpleTuner's quick start for SD3, with names and sizes of the pocket world.
SIMPLETUNER: dict[str, Any] = {
    "--data_backend_config": "config/multidatabackend.json",
    "--aspect_bucket_rounding": 2,
    "--caption_dropout_probability": 0.1,
    "--checkpoint_step_interval": 50,
    "--disable_benchmark": "false",
    "--gradient_checkpointing": "true",
    "--hub_model_id": "simpletuner-lora",
    "--learning_rate": "1e-4",
    "--lora_rank": 4,
    "--lora_type": "standard",
    "--lr_scheduler": "polynomial",
    "--max_train_steps": 1,
    "--minimum_image_size": 0,
    "--mixed_precision": "bf16",
    "--model_family": "sd3",
    "--model_type": "lora",
    "--num_train_epochs": 0,
    "--optimizer": "adamw_bf16",
    "--output_dir": "output/models",
    "--push_to_hub": "false",
    "--report_to": "none",
    "--resolution": 64,
    "--resume_from_checkpoint": "latest",
    "--seed": 42,
    "--tokenizer_max_length": 24,
    "--tracker_run_name": "simpletuner-lora",
    "--train_batch_size": 1,
    "--use_ema": "false",
    "--user_prompt_library": "config/user_prompt_library.json",
    "--validation_num_inference_steps": 2,
    "--validation_prompt": "a red heart",
    "--validation_resolution": "64",
}
BACKENDS = [
    {
        "id": "hearts",
        "type": "local",
        "instance_data_dir": "hearts",
        "caption_strategy": "textfile",
        "cache_dir_vae": "cache/vae/sd3/hearts",
        "crop": True,
        "crop_aspect": "square",
        "crop_style": "center",
        "metadata_backend": "discovery",
        "repeats": 0,
        "resolution": 64,
        "resolution_type": "pixel_area",
    },
    {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True},
]


def write_simpletuners(folder: Path) -> None:
    """A working folder of SimpleTuner's: three files of options, and pictures with captions."""
    (folder / "config").mkdir()
    model = {"--pretrained_model_name_or_path": str(ROOT / "models" / "pocket-sd3")}
    for name, content in (
        ("config", {**SIMPLETUNER, **model}),
        ("multidatabackend", BACKENDS),
        ("user_prompt_library", {"blue": "a blue heart"}),
    ):
        (folder / "config" / f"{name}.json").write_text(json.dumps(content))
    (folder / "hearts").mkdir()
    source = ROOT / "datas" / "pocket-hearts"
    for line in (source / "metadata.jsonl").read_text().splitlines()[:12]:
        row = json.loads(line)
        picture = Path(shutil.copy(source / row["file_name"], folder / "hearts"))
        picture.with_suffix(".txt").write_text(row["text"])


def test_simpletuners_files_are_translated_and_trained_by_the_words_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_simpletuners(tmp_path)
    monkeypatch.chdir(tmp_path)
    (row,) = [line for line in text_of(PAGE).splitlines() if "--from_simpletuner" in line]
    translate, train = [words_of(line)[1] for line in commands(row)]
    assert translate[:3] == ["python", "-m", "dojo.configure"]
    configure.main(cli.parse(configure.ConfigureArgs, None, translate[3:]))
    said = capsys.readouterr().out
    left = said.split("no counterpart, left out:")[1].split("not quite the same:")[0]
    assert {line.split()[0].strip(":") for line in left.splitlines() if line} == {
        "disable_benchmark",
        "minimum_image_size",
    }
    assert f"python {train[1]} --config run.yaml" in said
    runs.in_process(importlib.import_module(Path(train[1]).stem), train[2:])
    run = tmp_path / "output" / "models"
    assert json.loads((run / "finished.json").read_text())["step"] == 1
    prompts = [row["prompt"] for row in read_pictures(run / "validation")]
    assert prompts == ["a red heart", "a blue heart"]
    assert len(list((run / "validation" / "step-1").glob("*.png"))) == 2
