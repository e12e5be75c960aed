"""Claims about class pictures: those of the whole pipeline, one network on the device at a time."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from dojo import data, rng
from dojo.inputs import class_pictures, texts
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model
from dojo.run import OptimArgs, Run, RunArgs, residence, start

CPU = torch.device("cpu")
PROMPT, SIZE, STEPS = "a red circle", (64, 64), 2


@pytest.fixture(params=["sd15", "sd3", "sdxl", "kolors", "hunyuandit11"])
def model(request: pytest.FixtureRequest) -> Model:
    """An untrained model of a family."""
    folder = str(request.getfixturevalue(f"tiny_{request.param}"))
    opened = open_model(ModelArgs(pretrained_model_name_or_path=folder))
    short = {"max_sequence_length": 24} if hasattr(opened.args, "max_sequence_length") else {}
    return replace(opened, args=replace(opened.args, **short))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    args = RunArgs(output_dir=tmp_path / "run", report_to=("none",), mixed_precision="no")
    return start(args, OptimArgs(max_train_steps=1))


def asked(folder: Path, count: int) -> class_pictures.PriorArgs:
    """So many class pictures, two at a time."""
    return class_pictures.PriorArgs(
        with_prior_preservation=True,
        class_data_dir=folder,
        class_prompt=PROMPT,
        num_class_images=count,
        sample_batch_size=2,
        prior_inference_steps=STEPS,
    )


def drawn(
    run: Run, model: Model, folder: Path, precision: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, np.ndarray[Any, Any]]:
    """The class pictures that a run draws into an empty folder."""
    args = replace(asked(folder, 4), prior_generation_precision=precision)
    class_pictures.draw(run, args, model, data.DataArgs(dataset_name="nowhere"), SIZE)
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_class_pictures_are_those_of_the_whole_pipeline(
    tmp_path: Path, model: Model, run: Run, precision: Literal["fp32", "bf16"]
) -> None:
    found = drawn(run, model, tmp_path / "class", precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    pipeline = model.load_pipeline(dtype, CPU)
    pipeline.set_progress_bar_config(disable=True)
    expected: list[Image.Image] = []
    lengths = {"max_sequence_length": 24} if hasattr(model.args, "max_sequence_length") else {}
    every = [f"class-0000{k}.png" for k in range(4)]
    for names in (every[:2], every[2:]):
        expected += pipeline(
            [PROMPT] * 2,
            height=64,
            width=64,
            guidance_scale=7.0,
            num_inference_steps=STEPS,
            **lengths,
            **model.call_options,
            generator=[rng.generator("class picture", PROMPT, name) for name in names],
        ).images
    assert list(found) == every
    for picture, whole in zip(found.values(), expected, strict=True):
        assert (picture == np.asarray(whole)).all()


def test_one_network_is_on_the_device_at_a_time(
    tmp_path: Path, model: Model, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: set[int] = set()
    computed: list[str] = []
    move, begin = torch.nn.Module.to, residence.Turns.pre_forward

    def moves(module: Any, *args: Any, **options: Any) -> Any:
        there.discard(id(module))  # each is moved away, or to the device by its turn below
        return move(module, *args, **options)

    def begins(turns: Any, module: Any, *args: Any, **options: Any) -> Any:
        answer = begin(turns, module, *args, **options)
        there.add(id(module))
        assert len(there) == 1, "two networks are on the device"
        computed.append(type(module).__name__)
        return answer

    monkeypatch.setattr(residence.Turns, "pre_forward", begins)
    load = type(model).load_pipeline

    def loads(*args: Any, **options: Any) -> Any:
        pipeline = load(*args, **options)
        for one in pipeline.components.values():
            if isinstance(one, torch.nn.Module):
                monkeypatch.setattr(type(one), "to", moves)
        return pipeline

    monkeypatch.setattr(type(model), "load_pipeline", loads)
    drawn(run, model, tmp_path / "class")
    assert set(computed) == {model.network_class, "AutoencoderKL"}
    assert computed.count("AutoencoderKL") == 2
    assert computed.count(model.network_class) >= 2 * STEPS


@pytest.mark.parametrize("flag", [{}, {"text_encoder_precision": "int8"}], ids=str)
def test_prompts_are_encoded_as_in_training_each_encoder_once_and_alone(
    tmp_path: Path, model: Model, run: Run, monkeypatch: pytest.MonkeyPatch, flag: dict[str, Any]
) -> None:
    plain, model = model, replace(model, args=replace(model.args, **flag))
    load, loaded, alive = type(model).load_text, list[str](), list[Any]()
    monkeypatch.setattr(texts, "device_of", lambda *_: CPU)

    def loads(self: Any, dtype: torch.dtype, device: torch.device, *, only: str) -> Any:
        assert device is CPU
        assert not [one for one in alive if one() is not None]
        loaded.append(only)
        made = load(self, dtype, device, only=only)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(type(model), "load_text", loads)
    found = drawn(run, model, tmp_path / "class")
    assert loaded == list(model.text_encoders)
    assert not [one for one in alive if one() is not None]

    monkeypatch.setattr(type(model), "load_text", load)
    expected = drawn(run, plain, tmp_path / "plain")
    same = all((found[name] == picture).all() for name, picture in expected.items())
    assert same == (not flag)


def test_a_plan_draws_nothing_where_enough_pictures_are(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "class", data.DataArgs(dataset_name="nowhere")
    args = asked(folder, 3)
    assert class_pictures.at_a_time(args, pictures) == 2
    assert not folder.exists()
    folder.mkdir()
    for k, left in enumerate((2, 2, 0)):
        Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
        assert class_pictures.at_a_time(args, pictures) == left
    assert class_pictures.at_a_time(class_pictures.PriorArgs(), pictures) == 0
