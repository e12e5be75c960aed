"""Claims about an autoencoder in tiles and picture by picture: what changes, what is kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dojo.inputs.pictures import latent_settings
from dojo.models.family import Model, ModelArgs
from dojo.models.folders import posterior
from dojo.models.opening import open_model

CPU = torch.device("cpu")


def opened(request: pytest.FixtureRequest, family: str, **options: Any) -> Model:
    folder = str(request.getfixturevalue(f"tiny_{family}"))
    return open_model(ModelArgs(pretrained_model_name_or_path=folder, **options))


def pixels(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("family", ["sd15", "sd3", "sdxl"])
def test_tiles_change_pictures_larger_than_the_autoencoders_own_size_alone(
    request: pytest.FixtureRequest, family: str
) -> None:
    plain = opened(request, family).load_vae(CPU)
    tiled = opened(request, family, enable_vae_tiling=True).load_vae(CPU)
    own = int(plain.config["sample_size"])
    for side in (own, 2 * own):
        one, two = (posterior(vae, pixels(side))[0] for vae in (plain, tiled))
        assert one.shape == two.shape
        assert torch.equal(one, two) == (side == own)


@pytest.mark.parametrize("family", ["sd15", "sd3", "sdxl"])
def test_slices_are_single_pictures(request: pytest.FixtureRequest, family: str) -> None:
    plain = opened(request, family).load_vae(CPU)
    sliced = opened(request, family, enable_vae_slicing=True).load_vae(CPU)
    seen = pixels(64)
    singles = torch.cat([posterior(plain, one[None])[0] for one in seen])
    assert torch.equal(posterior(sliced, seen)[0], singles)


@pytest.mark.parametrize("family", ["sd15", "sd3", "sdxl"])
def test_the_whole_pipelines_autoencoder_is_as_frugal(
    request: pytest.FixtureRequest, family: str
) -> None:
    model = opened(request, family, enable_vae_tiling=True, enable_vae_slicing=True)
    vae = model.load_pipeline(torch.float32, CPU).vae
    assert vae.use_tiling
    assert vae.use_slicing


def test_the_cache_of_latents_is_another_one_with_each_of_them(
    request: pytest.FixtureRequest,
) -> None:
    run: Any = SimpleNamespace(device=CPU)
    plain = latent_settings(run, opened(request, "sd15"))
    tiled = latent_settings(run, opened(request, "sd15", enable_vae_tiling=True))
    sliced = latent_settings(run, opened(request, "sd15", enable_vae_slicing=True))
    assert tiled == {**plain, "tiling": "yes"}
    assert sliced == {**plain, "slicing": "yes"}
