"""Claims about LoRAs merged into a single file: it is what the folder with the same LoRAs is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dojo.finetune.lora import formats, merging
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors, Layers, Lora
from dojo.finetune.lora.placing import in_file
from dojo.models.unet import single_file
from dojo.models.unet.sgm import Blocks
from dojo.models.unet.single_file import vocabulary
from tests.models.unet import tiny


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Source:
    place = tmp_path_factory.mktemp(request.param)
    for number, pad in (("", vocabulary.END), ("_2", "!")):
        vocabulary.write(place / f"tokenizer{number}", pad=pad)
    return tiny.Source(request.param, place, place)


def updates_of(source: tiny.Source, *kinds: type[nn.Module]) -> Lora:
    """An update for every layer of the UNet and the text encoders."""
    torch.manual_seed(1)
    found: Lora = {}
    for part in source.parts:
        layers: Layers = {}
        for name, module in getattr(source.pipeline, part).named_modules():
            if part == "vae" or not isinstance(module, kinds) or not hasattr(module, "weight"):
                continue
            weight: Any = module.weight
            rows, *columns = weight.shape
            down = torch.randn(2, *columns)
            up = torch.randn(rows, 2, *(1 for _ in columns[1:]))
            layers[in_file(part, name)] = Factors(down, 0.02 * up, alpha=1.0)
        if layers:
            found[part] = layers
    return found


def write(source: tiny.Source, folder: Path, updates: Lora) -> Path:
    unet: Any = source.pipeline.unet.config
    path = folder / "lora.safetensors"
    family: Any = source.family
    formats.write(path, updates, "kohya", Base(family=family, blocks=Blocks.of(unet)))
    return path


def merge(base: Path, config: Path | None, path: Path, output: Path) -> None:
    more: dict[str, Any] = {} if config is None else {"single_file_config": str(config)}
    merging.main(
        merging.Args(input=(str(path),), base=str(base), output=output, scales=(0.5,), **more)
    )


def test_a_merged_file_holds_what_the_merged_folder_holds(
    source: tiny.Source, tmp_path: Path
) -> None:
    updates = updates_of(source, nn.Linear, nn.Conv2d)
    path = write(source, tmp_path, updates)
    merge(source.folder, None, path, tmp_path / "folder")
    merge(source.path, source.folder, path, tmp_path / "one.safetensors")
    file = single_file.inspect(tmp_path / "one.safetensors")
    changed = 0
    for part in source.parts:
        read = single_file.load(file, part, source.folder, torch.float32).state_dict()
        (weights,) = (tmp_path / "folder" / part).glob("*.safetensors")
        wanted = load_file(weights)
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[name], wanted[name]) for name in wanted), part
        before = getattr(source.pipeline, part).state_dict()
        changed += sum(not torch.equal(read[name], before[name]) for name in before)
    assert changed == sum(map(len, updates.values())) > 50


def test_what_changes_nothing_leaves_the_file_as_it_was(
    source: tiny.Source, tmp_path: Path
) -> None:
    """Types, marks and other tensors too: v-prediction would be lost without a trace."""
    base = tmp_path / "base.safetensors"
    single_file.save(
        base,
        source.pipeline,
        family=source.family,
        dtype=torch.float16,
        prediction_type="v_prediction",
        zero_snr=True,
    )
    header = {"modelspec.hash_sha256": "0x12", "modelspec.prediction_type": "v", "mine": "too"}
    state = {**load_file(base), "position_ids": torch.arange(3)}
    save_file(state, base, header)
    updates = updates_of(source, nn.Linear)
    name = next(iter(updates["unet"]))
    few: Lora = {"unet": {name: updates["unet"][name]}}
    merge(base, source.folder, write(source, tmp_path, few), tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    assert after.keys() == state.keys()
    assert all(after[key].dtype == state[key].dtype for key in state)
    assert len([key for key in state if not torch.equal(after[key], state[key])]) == 1
    found = single_file.inspect(tmp_path / "out.safetensors")
    assert (found.prediction_type, found.zero_snr) == ("v_prediction", True)
    assert found.contents.metadata["mine"] == "too"
    assert "modelspec.hash_sha256" not in found.contents.metadata


def test_an_averaged_unet_of_the_base_is_left_out(
    source: tiny.Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.ckpt"
    state = load_file(source.path)
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    assert len(averaged) > 100
    torch.save({"state_dict": {**state, **averaged}}, base)
    path = write(source, tmp_path, updates_of(source, nn.Linear))
    merge(base, source.folder, path, tmp_path / "out.safetensors")
    assert "left out: the averaged UNet of base.ckpt" in capsys.readouterr().out
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()
