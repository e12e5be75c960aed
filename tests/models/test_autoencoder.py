"""Claims about `--pretrained_vae_model_name_or_path`: found in every form, used in every place."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.cli import UserError
from dojo.models.family import ModelArgs, Saving
from dojo.models.opening import family_of
from dojo.models.unet import autoencoder

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an autoencoder with other weights, and another scale, than the model's."""
    torch.manual_seed(1)
    settings: Any = AutoencoderKL.load_config(tiny_sd15 / "vae")
    vae: Any = AutoencoderKL.from_config(settings)
    vae.register_to_config(scaling_factor=0.25)
    folder = tmp_path_factory.mktemp("vaes") / "other"
    vae.save_pretrained(folder)
    return folder


def opened(model: Path, vae: Path | str | None, **options: Any) -> Any:
    plain = ModelArgs(pretrained_model_name_or_path=str(model))
    family = family_of(plain)
    return family.open_model(
        family.ModelArgs(
            pretrained_model_name_or_path=str(model),
            pretrained_vae_model_name_or_path=None if vae is None else str(vae),
            **options,
        )
    )


def state(vae: Any) -> dict[str, Tensor]:
    return dict(vae.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def original_names(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """An autoencoder's tensors under the names that CompVis' code has for them."""
    levels = 1 + max(int(found) for found in re.findall(r"up_blocks\.(\d+)", " ".join(tensors)))
    words = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ]
    found = {}
    for name, value in tensors.items():
        renamed = name
        for pattern, word in words:
            renamed = re.sub(pattern, word, renamed)
        renamed = re.sub(r"up\.(\d+)", lambda hit: f"up.{levels - 1 - int(hit[1])}", renamed)
        square = ".mid.attn_1." in renamed and value.dim() == 2
        found[prefix + renamed] = (value[:, :, None, None] if square else value).contiguous()
    return found


def written(folder: Path, form: str, source: Path) -> Path:
    """The autoencoder of `source` in one of the forms that the option takes."""
    tensors = load_file(source / WEIGHTS)
    path = folder / "vae.safetensors"
    if form == "folder":
        return source
    if form == "pipeline":
        return Path(shutil.copytree(source, folder / "pipeline" / "vae")).parent
    if form == "diffusers' names":
        save_file(tensors, path)
    elif form == "diffusers' former names":  # as the file in SD 1.5's own repository
        former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in former.items():
            tensors = {
                name.replace(f".{new}.", f".{old}."): value for name, value in tensors.items()
            }
        save_file(tensors, path)
    elif form == "original names":
        save_file(original_names(tensors), path)
    elif form == "original names with a prefix":
        save_file(original_names(tensors, "first_stage_model."), path)
    else:  # a whole checkpoint
        whole = original_names(tensors, "first_stage_model.")
        save_file({**whole, "model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    return path


FORMS = [
    "folder",
    "pipeline",
    "diffusers' names",
    "diffusers' former names",
    "original names",
    "original names with a prefix",
    "a checkpoint",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(
    tmp_path: Path, tiny_sd15: Path, other: Path, form: str
) -> None:
    model = opened(tiny_sd15, written(tmp_path, form, other))
    vae = model.load_vae(CPU)
    assert same(state(vae), state(AutoencoderKL.from_pretrained(other)))
    assert not same(state(vae), state(opened(tiny_sd15, None).load_vae(CPU)))
    # A file does not say how its latents are scaled: as the model's own.
    assert model.scaling_factor == (0.25 if form in FORMS[:2] else 0.18215)


def test_a_hub_id_is_fetched_without_what_is_not_read(
    tiny_sd15: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, allow_patterns))
        return str(other)

    monkeypatch.setattr(autoencoder, "snapshot_download", snapshot_download)
    model = opened(tiny_sd15, "stabilityai/sd-vae-ft-mse")
    assert same(state(model.load_vae(CPU)), state(AutoencoderKL.from_pretrained(other)))
    assert asked[0][0] == "stabilityai/sd-vae-ft-mse"
    assert all("config.json" in name or "safetensors" in name for name in asked[0][1])


@pytest.mark.parametrize("form", FORMS)
def test_latents_are_cached_under_the_autoencoder_that_made_them(
    tmp_path: Path, tiny_sd15: Path, other: Path, form: str
) -> None:
    own = opened(tiny_sd15, None)
    model = opened(tiny_sd15, written(tmp_path, form, other))
    assert model.fingerprint(["vae"]) != own.fingerprint(["vae"])
    assert model.fingerprint(own.text_folders) == own.fingerprint(own.text_folders)
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    tensors = {name: value + 1 for name, value in load_file(copy / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS)
    (tmp_path / "changed").mkdir()
    changed = opened(tiny_sd15, written(tmp_path / "changed", form, copy))
    assert changed.fingerprint(["vae"]) != model.fingerprint(["vae"])


def test_a_moved_folder_is_the_same_autoencoder(
    tmp_path: Path, tiny_sd15: Path, other: Path
) -> None:
    moved = shutil.copytree(other, tmp_path / "moved")
    found = [opened(tiny_sd15, place).fingerprint(["vae"]) for place in (other, moved)]
    assert found[0] == found[1]


@pytest.mark.parametrize("form", ["folder", "original names"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_are_drawn_with_it_and_the_result_carries_it(
    tmp_path: Path, other: Path, form: str, family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    model = opened(folder, written(tmp_path, form, other))
    expected = state(AutoencoderKL.from_pretrained(other))
    assert same(state(model.load_pipeline(torch.float32, CPU).vae), expected)
    unet = model.load_network(torch.float32, CPU)
    model.save_whole(tmp_path / "result", unet, Saving(), model.objective((64, 64)))
    result: Any = DiffusionPipeline.from_pretrained(tmp_path / "result", safety_checker=None)
    assert same(state(result.vae), expected)
    assert result.vae.config.scaling_factor == model.vae["scaling_factor"]
    assert same(state(opened(tmp_path / "result", None).load_vae(CPU)), expected)


def test_the_models_own_is_not_needed_then(tmp_path: Path, tiny_sd15: Path, other: Path) -> None:
    bare = Path(shutil.copytree(tiny_sd15, tmp_path / "bare"))
    (bare / "vae" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="vae holds no weights"):
        opened(bare, None).check_weights(["vae"])
    model = opened(bare, other)
    model.check_weights(model.needed)  # as the dry run does
    assert model.load_vae(CPU) is not None


# What it is not


def refusal(model: Path, vae: Path | str) -> str:
    with pytest.raises(UserError) as refused:
        opened(model, vae).load_vae(CPU)
    message = str(refused.value)
    assert message.startswith("--pretrained_vae_model_name_or_path: ")
    assert str(vae) in message
    assert "\n" not in message
    return message


def test_what_is_not_there_is_refused(tmp_path: Path, tiny_sd15: Path) -> None:
    assert "no folder or file" in refusal(tiny_sd15, tmp_path / "none")
    assert "reachable hub repository" in refusal(tiny_sd15, "nobody/no-such-vae")
    assert "config.json is missing" in refusal(tiny_sd15, tmp_path)
    pickled = tmp_path / "vae.ckpt"
    pickled.write_bytes(b"")
    assert "is no .safetensors file" in refusal(tiny_sd15, pickled)
    broken = tmp_path / "vae.safetensors"
    broken.write_bytes(b"no tensors")
    assert "no whole safetensors file" in refusal(tiny_sd15, broken)


def test_what_does_not_fit_the_model_is_refused(
    tmp_path: Path, tiny_sd15: Path, tiny_sd3: Path, other: Path
) -> None:
    assert "16 channels, the UNet expects 4" in refusal(tiny_sd15, tiny_sd3 / "vae")
    own: Any = AutoencoderKL.load_config(other)
    config = {**own, "block_out_channels": [16, 32]}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    shallow: Any = AutoencoderKL.from_config(config)
    shallow.save_pretrained(tmp_path / "shallow")
    said = refusal(tiny_sd15, tmp_path / "shallow")
    assert "a latent stands for 2 pixels a side, in the model for 8" in said
    assert "holds a UNet2DConditionModel, no AutoencoderKL" in refusal(
        tiny_sd15, tiny_sd15 / "unet"
    )


@pytest.mark.parametrize("named", ["diffusers", "original"])
@pytest.mark.parametrize("damage", ["less", "sizes", "nan", "foreign"])
def test_a_damaged_file_is_refused(
    tmp_path: Path, tiny_sd15: Path, other: Path, named: str, damage: str
) -> None:
    tensors = load_file(other / WEIGHTS)
    name = "decoder.conv_in.bias"
    if damage == "less":
        del tensors[name]
    elif damage == "sizes":
        tensors[name] = torch.zeros(3)
    elif damage == "nan":
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    else:
        tensors = {"unet.lora_A.weight": torch.zeros(2, 2)}
    path = tmp_path / "vae.safetensors"
    if named == "original" and damage != "foreign":
        tensors = original_names(tensors)
    save_file(tensors, path)
    refusal(tiny_sd15, path)
