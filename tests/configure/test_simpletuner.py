"""Claims about SimpleTuner's configurations: translated, or named; nothing dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from dojo import cli
from dojo.cli import UserError, scripts
from dojo.configure import recipe, simpletuner
from tests.conftest import ROOT

CONFIG: dict[str, Any] = {
    "--data_backend_config": "config/multidatabackend.json",
    "--model_family": "sd3",
    "--model_type": "lora",
    "--lora_type": "standard",
    "pretrained_model_name_or_path": "models/pocket-sd3",
    "output_dir": "out",
    "base_model_precision": "int8-quanto",
    "caption_dropout_probability": 0.1,
    "checkpoint_step_interval": 50,
    "checkpoints_total_limit": 5,
    "flow_schedule_auto_shift": "true",
    "flow_schedule_shift": 3,
    "gradient_checkpointing": "true",
    "learning_rate": "1e-4",
    "lora_rank": 64,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 10,
    "max_train_steps": 100,
    "num_train_epochs": 0,
    "mixed_precision": "bf16",
    "optimizer": "adamw_bf16",
    "sd3_t5_uncond_behaviour": "zero",
    "seed": 42,
    "t5_padding": "zero",
    "tracker_run_name": "simpletuner-lora",
    "train_batch_size": 3,
    "use_ema": False,
    "validation_guidance": 4.0,
    "validation_guidance_skip_layers": [7, 8],
    "validation_num_inference_steps": "20",
    "validation_prompt": "a heart",
    "validation_resolution": "1024x512,64",
    "webhook_config": "hook.json",
    "grad_clip_method": "value",
}
PICTURES: dict[str, Any] = {
    "id": "mine",
    "type": "local",
    "instance_data_dir": "datas/pocket-hearts",
    "caption_strategy": "textfile",
    "crop": True,
    "crop_style": "random",
    "crop_aspect": "square",
    "resolution": 64,
    "repeats": 4,
    "cache_dir_vae": "cache/vae",
    "caption_shuffle": {"enable": True},
}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "type": "local", "default": True}
MASKS = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "type": "local",
    "instance_data_dir": "datas/masks",
    "source_dataset_id": "mine",
}


def translated(
    folder: Path, backends: list[dict[str, Any]], **changed: Any
) -> tuple[str, recipe.Options, list[dict[str, Any]]]:
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "multidatabackend.json").write_text(json.dumps(backends))
    file = folder / "config" / "config.json"
    file.write_text(json.dumps({**CONFIG, **changed}))
    return simpletuner.translate(file, folder / "data.yaml")


def test_a_configuration_becomes_options_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, entries = translated(tmp_path, [PICTURES, TEXTS])
    args = cli.parse(scripts.load(ROOT / name).Args, None, recipe.to_words(options))
    assert name == "train_lora_sd3.py"
    assert not entries
    assert args.lora.rank == 64
    assert args.lora.base_precision == "int8"
    assert args.run.run_name == "simpletuner-lora"
    assert args.captions.caption_dropout == 0.1
    assert args.noise.flow_shift == "auto"
    assert args.text.t5_padding == "zero"
    assert args.text.uncond == "zeros"
    assert args.model.gradient_checkpointing
    assert (args.optim.lr_scheduler, args.optim.lr_warmup_steps) == ("constant_with_warmup", 10)
    assert args.validation.validation_resolution == ("1024x512", "64x64")
    assert args.validation.validation_skip_guidance_layers == (7, 8)
    assert args.data.train_data_dir == str(Path("datas/pocket-hearts").absolute())
    assert args.data.repeats == 5  # theirs counts from 0
    assert args.data.random_crop
    assert args.data.caption_strategy == "sidecar"
    said = capsys.readouterr().out
    for left in ("webhook_config", "grad_clip_method = value", "mine: caption_shuffle"):
        assert left in said
    assert "optimizer adamw_bf16: bfloat16 weights there" in said


@pytest.mark.parametrize("key", ["crepa_enabled", "tread_config", "some_new_option"])
def test_a_key_that_is_not_known_is_named(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translated(tmp_path, [PICTURES], **{key: "something"})
    assert f"{key} = " in capsys.readouterr().out


def test_several_backends_become_entries_with_their_masks(tmp_path: Path) -> None:
    other = {**PICTURES, "id": "other", "instance_data_dir": "b", "is_regularisation_data": True}
    square = {**PICTURES, "crop": False, "caption_strategy": "instanceprompt"}
    square["instance_prompt"] = "a heart"
    _, options, entries = translated(tmp_path, [square, MASKS, other, TEXTS])
    assert options["data_config"] == str(tmp_path / "data.yaml")
    assert entries == [
        {
            "path": str(Path("datas/pocket-hearts").absolute()),
            "instance_prompt": "a heart",
            "repeats": 5,
            "resolution": 64,
            "aspect_buckets": True,
            "mask_dir": str(Path("datas/masks").absolute()),
        },
        {
            "path": str(Path("b").absolute()),
            "caption_strategy": "sidecar",
            "repeats": 5,
            "resolution": 64,
            "random_crop": True,
            "is_regularisation": True,
        },
    ]


def test_a_backend_that_is_not_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = {"id": "far", "type": "aws", "aws_bucket_name": "b"}
    translated(tmp_path, [PICTURES, bucket, {**PICTURES, "id": "off", "disabled": True}])
    said = capsys.readouterr().out
    assert "data backend far: image of type aws: not read" in said
    assert "data backend off: disabled there" in said


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--model_family": "flux"}, "model_family flux"),
        ({"--lora_type": "lycoris"}, "lora_type lycoris"),
        ({"--data_backend_config": "nowhere.json"}, "nowhere.json is not there"),
    ],
)
def test_what_nothing_here_trains_is_refused(
    changed: dict[str, str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        translated(tmp_path, [PICTURES], **changed)
