"""Claims about class pictures: those of the whole pipeline, one network on the device at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dojo import data, rng
from dojo.inputs import class_pictures
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model
from dojo.run import OptimArgs, Run, RunArgs, residence, start

CPU = torch.device("cpu")
PROMPT, SIZE, STEPS = "a red circle", (64, 64), 2


@pytest.fixture(params=["sd15", "sd3", "sdxl"])
def model(request: pytest.FixtureRequest) -> Model:
    """An untrained model of a family."""
    folder = str(request.getfixturevalue(f"tiny_{request.param}"))
    opened = open_model(ModelArgs(pretrained_model_name_or_path=folder))
    short = {"max_sequence_length": 24} if hasattr(opened.args, "max_sequence_length") else {}
    return replace(opened, args=replace(opened.args, **short))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    args = RunArgs(output_dir=tmp_path / "run", report_to="none", mixed_precision="no")
    return start(args, OptimArgs(max_train_steps=1))


def drawn(run: Run, model: Model, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The class pictures that a run draws into an empty folder."""
    args = class_pictures.PriorArgs(
        with_prior_preservation=True,
        class_data_dir=folder,
        class_prompt=PROMPT,
        num_class_images=4,
        sample_batch_size=2,
        prior_inference_steps=STEPS,
    )
    class_pictures.draw(run, args, model, data.DataArgs(dataset_name="nowhere"), SIZE)
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_class_pictures_are_those_of_the_whole_pipeline(
    tmp_path: Path, model: Model, run: Run
) -> None:
    found = drawn(run, model, tmp_path / "class")
    pipeline = model.load_pipeline(torch.float32, CPU)
    pipeline.set_progress_bar_config(disable=True)
    expected: list[Image.Image] = []
    every = [f"class-0000{k}.png" for k in range(4)]
    for names in (every[:2], every[2:]):
        expected += pipeline(
            [PROMPT] * 2,
            height=64,
            width=64,
            guidance_scale=7.0,
            num_inference_steps=STEPS,
            **model.prompt_options,
            **model.call_options,
            generator=[rng.generator("class picture", PROMPT, name) for name in names],
        ).images
    assert list(found) == every
    for picture, whole in zip(found.values(), expected, strict=True):
        assert (picture == np.asarray(whole)).all()


def test_one_network_is_on_the_device_at_a_time_and_texts_are_encoded_once(
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

    def loads(*args: Any) -> Any:
        pipeline = load(*args)
        for one in pipeline.components.values():
            if isinstance(one, torch.nn.Module):
                monkeypatch.setattr(type(one), "to", moves)
        return pipeline

    monkeypatch.setattr(type(model), "load_pipeline", loads)
    drawn(run, model, tmp_path / "class")
    asked = 2 * len(model.text_encoders)  # for the prompt and for none; SDXL has zeros for none
    drawing = [name for name in computed if name in (model.network_class, "AutoencoderKL")]
    assert computed[-len(drawing) :] == drawing
    assert len(model.text_encoders) <= len(computed) - len(drawing) <= asked
    assert drawing.count("AutoencoderKL") == 2
    assert drawing.count(model.network_class) >= 2 * STEPS
