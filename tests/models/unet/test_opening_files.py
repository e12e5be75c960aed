"""Claims about models that are opened from one file, and about what is written of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.files import tensors
from dojo.models import opening, sd3, sd15, sdxl
from dojo.models.family import ModelArgs, Saving
from dojo.models.unet import single_file

from . import tiny
from .tiny import Source, picture

CPU = torch.device("cpu")
FAMILIES: dict[str, Any] = {"sd1": sd15, "sd2": sd15, "sdxl": sdxl}


def opened(source: Source, path: Path | None = None, **options: Any) -> Any:
    family = FAMILIES[source.family]
    name = str(path or source.path)
    return family.open_model(family.ModelArgs(pretrained_model_name_or_path=name, **options))


def test_a_file_opens_without_any_folder(source: Source) -> None:
    model = opened(source)
    model.check_weights(model.needed)
    assert tiny.equal(source.pipeline.unet, model.load_network(torch.float32, CPU))
    assert tiny.equal(source.pipeline.vae, model.load_vae(CPU))
    whole = model.load_pipeline(torch.float32, CPU)
    whole.scheduler = source.pipeline.scheduler
    assert torch.equal(picture(whole), picture(source.pipeline))
    assert model.load_text(torch.float32, CPU)(["a star"]).keys() == set(model.embed_names)


def test_a_folder_of_configurations_may_be_named(source: Source) -> None:
    model = opened(source, single_file_config=str(source.folder))
    assert model.folder == source.folder
    assert model.flag == "--single_file_config"
    with pytest.raises(ValueError, match="goes with one file"):
        opened(source, source.folder, single_file_config=str(source.folder))


def test_the_header_says_the_family(source: Source) -> None:
    args = ModelArgs(pretrained_model_name_or_path=str(source.path))
    assert opening.family_of(args) is FAMILIES[source.family]
    assert isinstance(opening.open_model(args), FAMILIES[source.family].Model)
    other: Any = sd15 if source.family == "sdxl" else sdxl
    with pytest.raises(UserError, match=r"holds .*, no Stable Diffusion"):
        other.open_model(other.ModelArgs(pretrained_model_name_or_path=str(source.path)))
    with pytest.raises(UserError, match="no Stable Diffusion 3"):
        sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(source.path)))


def test_demo_draws_from_the_file(source: Source) -> None:
    pipeline = pipelines.load_pipeline(str(source.path), torch.float32)
    pipeline.scheduler = source.pipeline.scheduler
    assert torch.equal(picture(pipeline), picture(source.pipeline))


def test_the_marks_of_a_file_decide_what_is_trained(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    options: Any = {"prediction_type": "v_prediction", "zero_snr": True}
    single_file.save(path, source.pipeline, family=source.family, **options)
    for config in (None, str(source.folder)):
        model = opened(source, path, single_file_config=config)
        assert model.prediction_type == "v_prediction"
        assert model.schedule.ends_without_signal
        drawn = model.make_scheduler(model.objective((16, 16)))  # whatever class the folder names
        assert drawn.config.prediction_type == "v_prediction"
        assert drawn.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_result_is_a_folder_and_a_file(
    source: Source, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, result = opened(source), tmp_path / "result"
    unet = model.load_network(torch.float32, CPU)
    saving = Saving(dtype=dtype, single_file=True)
    model.save_whole(result, unet, saving, model.objective((16, 16)))
    kind: Any = type(source.pipeline)
    whole = kind.from_pretrained(result)
    exact = dtype == torch.float32
    for part in source.parts:
        rounded = dtype if part == "unet" else torch.float32
        read = getattr(whole, part).to(rounded)
        assert tiny.equal(getattr(source.pipeline, part), read, rounded)
    tiny.same_parts(source, result / "model.safetensors", None if exact else dtype)
    header, metadata = tensors.read_header(result / "model.safetensors")
    assert metadata["modelspec.title"] == "result"
    assert {entry["dtype"] for entry in header.values()} == {"F32" if exact else "F16"}


def test_a_half_precision_file_stays_half_in_the_folder(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    single_file.save(path, source.pipeline, family=source.family, dtype=torch.float16)
    model = opened(source, path)
    model.save_whole(
        tmp_path / "result",
        model.load_network(torch.float32, CPU),
        Saving(),
        model.objective((16, 16)),
    )
    for part in source.parts:
        saved = next((tmp_path / "result" / part).glob("*.safetensors"))
        kinds = {x.dtype for x in load_file(saved).values()}
        assert kinds == {torch.float32 if part == "unet" else torch.float16}


def test_a_missing_autoencoder_may_come_from_elsewhere(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    state = {n: x for n, x in load_file(source.path).items() if not n.startswith("first_stage")}
    save_file(state, path)
    with pytest.raises(UserError, match="--pretrained_vae_model_name_or_path"):
        opened(source, path).check_weights(["vae"])
    autoencoder: Any = AutoencoderKL
    other = autoencoder(  # a pixel in its latents is as large as in the public ones
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    other.save_pretrained(tmp_path / "vae")
    model = opened(source, path, pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    model.check_weights(model.needed)
    assert tiny.equal(other, model.load_vae(CPU))


def test_fingerprints_of_a_file_follow_the_part(source: Source, tmp_path: Path) -> None:
    model, state = opened(source), load_file(source.path)
    name = "model.diffusion_model.out.2.bias"
    save_file(state | {name: state[name] + 1}, tmp_path / "tuned.safetensors")
    tuned = opened(source, tmp_path / "tuned.safetensors")
    for part in source.parts:
        same = model.fingerprint([part]) == tuned.fingerprint([part])
        assert same == (part != "unet")
