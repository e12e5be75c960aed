"""The shipped configurations: numbers of weights as published, opened without files or network."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dojo.bench.models import on_meta
from dojo.cli import UserError
from dojo.models import family, folders, opening, published, sd3, sdxl
from dojo.models.unet.single_file import constants

# Of the models' cards and papers, in millions; tables of positions are no weights.
MILLIONS = {
    "sd15": {"unet": 859.521, "vae": 83.654, "text_encoder": 123.060},
    "sdxl": {"unet": 2567.464, "vae": 83.654, "text_encoder_2": 694.660},
    "kolors": {"unet": 2579.459, "vae": 83.654},
    "hunyuandit": {"transformer": 1499.952, "vae": 83.654},
    "sd3-medium": {"transformer": 2028.3, "vae": 83.820, "text_encoder": 123.650},
    "sd35-medium": {"transformer": 2243.2, "text_encoder_2": 694.660, "text_encoder_3": 4762.311},
    "sd35-large": {"transformer": 8056.6, "vae": 83.820, "text_encoder_3": 4762.311},
}


@pytest.mark.parametrize("name", published.MODELS)
def test_every_part_has_the_published_number_of_weights(name: str) -> None:
    for part, millions in MILLIONS[name].items():
        made = on_meta(dict(published.MODELS[name].parts[part]))
        count = sum(param.numel() for param in made.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.1 if part == "transformer" else 1e-3)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may even try to reach the network, or read what an earlier run has downloaded."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("somebody asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(folders.diffusers.DiffusionPipeline, "download", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", published.MODELS)
def test_a_known_model_opens_by_its_hub_id_and_its_short_name_without_a_network(name: str) -> None:
    with published.planning():
        for word in (name, *published.MODELS[name].hub_ids, name.upper()):
            args = family.ModelArgs(pretrained_model_name_or_path=word)
            model = opening.open_model(args)
            assert model.native_size == (512 if name == "sd15" else 1024)
            assert model.pixels_per_latent == 8
            numbers = {"sd15": 77 * 768, "sdxl": 77 * 2048 + 1280, "kolors": 257 * 4096}
            numbers["hunyuandit"] = 77 * 1025 + 256 * 2049
            assert model.text_numbers == numbers.get(name, 333 * 4096 + 2048)
            model.check_weights(model.needed)  # there are none, and a plan needs none
            assert model.objective((1024, 1024)) is not None


def test_without_a_plan_a_short_name_is_refused_with_the_hub_id() -> None:
    args = family.ModelArgs(pretrained_model_name_or_path="sd35-large")
    with pytest.raises(UserError, match=r"stabilityai/stable-diffusion-3\.5-large"):
        opening.open_model(args)


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sdxl").mkdir()
    monkeypatch.chdir(tmp_path)
    with published.planning(), pytest.raises(UserError, match=r"sdxl has no model_index\.json"):
        opening.open_model(family.ModelArgs(pretrained_model_name_or_path="sdxl"))


def test_planning_ends_with_its_block() -> None:
    with published.planning():
        assert published.planned_folder("sd15") is not None
    assert published.planned_folder("sd15") is None
    with published.planning(on=False):
        assert published.planned_folder("sd15") is None


def test_a_plan_of_the_wrong_family_is_refused() -> None:
    args = sd3.ModelArgs(pretrained_model_name_or_path="sdxl")
    with published.planning(), pytest.raises(UserError, match="holds a StableDiffusionXLPipeline"):
        opening.open_model(args)


def test_the_configurations_are_those_of_the_single_files() -> None:
    clip = published.MODELS["sdxl"].parts["text_encoder_2"]
    assert clip["hidden_size"] == constants.TEXTS["sdxl"]["text_encoder_2"].hidden == 1280
    with published.planning():
        model = opening.open_model(family.ModelArgs(pretrained_model_name_or_path="sdxl"))
    assert isinstance(model, sdxl.Model)
    assert model.zeros  # force_zeros_for_empty_prompt
    signal = model.schedule
    assert signal.num_timesteps == 1000
    assert isinstance(model.meta_network(), torch.nn.Module)
