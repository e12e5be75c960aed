"""Claims about `python -m dojo.lora` merge, resize and info: what they do to a network's output."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora import __main__ as command_line
from dojo.finetune.lora import formats, info, merging, reading, resizing
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors, Lora
from tests.finetune import sdxl
from tests.finetune.test_lora_sdxl import everything, merged

SDXL = Base(family="sdxl")


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return sdxl.parts()


@pytest.fixture
def base(parts: dict[str, nn.Module], tmp_path: Path) -> Path:
    """A model's folder with a stale variant and a file of its owner's."""
    folder = tmp_path / "base"
    for name, model in parts.items():
        model.save_pretrained(folder / name)  # pyright: ignore
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("mine")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"stale")
    return folder


def write(path: Path, updates: Lora, form: formats.Format = "kohya") -> Path:
    formats.write(path, updates, form, SDXL)
    return path


def outputs_of(folder: Path) -> dict[str, Tensor]:
    kind: Any = CLIPTextModel
    models = sdxl.parts()
    models["unet"] = type(models["unet"]).from_pretrained(folder / "unet").eval()  # pyright: ignore
    models["text_encoder"] = kind.from_pretrained(folder / "text_encoder").eval()
    second: Any = type(models["text_encoder_2"])
    models["text_encoder_2"] = second.from_pretrained(folder / "text_encoder_2").eval()
    return sdxl.outputs(sdxl.namespace(models))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=0, atol=atol)


def scaled(updates: Lora, strength: float) -> Lora:
    return {
        part: {name: Factors(f.down, f.up * strength, f.alpha) for name, f in layers.items()}
        for part, layers in updates.items()
    }


# merge


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_merged_model_computes_what_base_and_lora_do(
    parts: dict[str, nn.Module], base: Path, tmp_path: Path, form: formats.Format
) -> None:
    updates = everything(parts)
    path = write(tmp_path / "x.safetensors", updates, form)
    target = tmp_path / "merged"
    merging.main(merging.Args(input=(str(path),), output=target, base=str(base), scales=(0.5,)))
    close(outputs_of(target), merged(parts, scaled(updates, 0.5)))
    assert (target / "README.md").read_text() == "mine"
    weights = [file.name for file in (target / "unet").glob("*.safetensors")]
    assert weights == ["diffusion_pytorch_model.safetensors"]  # the variant was the base's
    close(outputs_of(base), sdxl.outputs(sdxl.namespace(parts)), 0)


def test_what_no_lora_touches_stays_to_the_bit(
    parts: dict[str, nn.Module], base: Path, tmp_path: Path
) -> None:
    half = copy.deepcopy(parts["unet"]).half()
    half.save_pretrained(base / "unet")  # pyright: ignore
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    updates: Lora = {"unet": {name: everything(parts)["unet"][name]}}
    path = write(tmp_path / "x.safetensors", updates)
    target = tmp_path / "merged"
    merging.main(merging.Args(input=(str(path),), output=target, base=str(base)))
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{name}.weight"}
    for part in ("text_encoder", "text_encoder_2"):
        file = f"{part}/model.safetensors"
        assert (target / file).read_bytes() == (base / file).read_bytes()


def test_loras_into_one_do_what_they_do_together(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    first = everything(parts)
    second: Lora = {"unet": {n: f for n, f in everything(parts, ranks=2)["unet"].items()}}
    paths = [
        str(write(tmp_path / f"{i}.safetensors", updates))
        for i, updates in enumerate((first, second))
    ]
    target = tmp_path / "both.safetensors"
    merging.main(merging.Args(input=tuple(paths), output=target, scales=(1.0, -0.5)))
    models = sdxl.namespace(copy.deepcopy(parts))
    lora.load(models, target, "mine")
    both = copy.deepcopy(parts)
    for updates in (first, scaled(second, -0.5)):
        for part, layers in updates.items():
            modules: dict[str, Any] = dict(both[part].named_modules())
            for name, factors in layers.items():
                module = modules.get(name) or modules[name.removeprefix("text_model.")]
                product = factors.up.flatten(1) @ factors.down.flatten(1)
                module.weight.data += factors.scale * product.reshape(module.weight.shape)
    close(sdxl.outputs(models), sdxl.outputs(sdxl.namespace(both)))


def test_loras_of_one_scale_are_stacked_without_rounding(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    updates = everything({"unet": parts["unet"]}, ranks=1)
    paths = tuple(str(write(tmp_path / f"{i}.safetensors", updates)) for i in range(2))
    target = tmp_path / "both.safetensors"
    merging.main(merging.Args(input=paths, output=target, lora_format="kohya"))
    found = reading.read(target)[0]["unet"]
    for name, factors in updates["unet"].items():
        assert torch.equal(found[name].up[:, :1], factors.up)
        assert found[name].scale == factors.scale


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": ()}, "--input needs at least one"),
        ({"scales": (1.0, 2.0, 3.0)}, "--scales needs one number, or 2"),
        ({"output": Path("x.bin")}, "--output must end in .safetensors"),
        ({"input": ("a",)}, "one LoRA alone"),
        ({"base": "b"}, "--output is a folder with a folder as --base"),
        ({"base": "b.ckpt", "output": Path("x")}, "--output must end in .safetensors, as --base"),
        (
            {"base": "b", "output": Path("x"), "single_file_config": "c"},
            "--single_file_config goes with a single file",
        ),
        (
            {"base": "b", "output": Path("x"), "lora_format": "kohya"},
            "--lora_format is of a LoRA",
        ),
    ],
)
def test_merges_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merging.Args(**{"input": ("a", "b"), "output": Path("x.safetensors"), **options})


def test_merge_refuses_in_a_sentence(
    parts: dict[str, nn.Module], base: Path, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "x.safetensors", everything(parts)))

    def refused(**options: Any) -> str:
        args = {"input": (path,), "output": tmp_path / "out", "base": str(base), **options}
        with pytest.raises(UserError) as error:
            merging.main(merging.Args(**args))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "--output: " in refused(output=base)
    file = tmp_path / "out.safetensors"
    assert "is a LoRA; name its base model here" in refused(base=path, output=file)
    assert not file.exists()
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert "has no .safetensors" in refused()
    other = sdxl.unet(layers=2, block_out_channels=(8, 16, 24))
    other.save_pretrained(base / "unet")
    assert "has another size in --base" in refused()
    sd3: Lora = {"transformer": {"proj_out": everything(parts)["unet"]["conv_in"]}}
    linear = everything(parts, nn.Linear)["unet"]
    sd3["transformer"]["proj_out"] = next(iter(linear.values()))
    formats.write(tmp_path / "sd3.safetensors", sd3, "diffusers")
    said = refused(
        input=(path, str(tmp_path / "sd3.safetensors")),
        output=tmp_path / "y.safetensors",
        base=None,
    )
    assert "are for different models, sd3 and sdxl" in said


# resize


def test_a_resized_lora_of_full_rank_is_the_same_and_keeps_its_scale(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    updates = everything(parts)
    path = write(tmp_path / "x.safetensors", updates)
    target = tmp_path / "y.safetensors"
    resizing.main(
        resizing.Args(input=str(path), output=target, rank=64, lora_format="kohya", base="sdxl")
    )
    models = sdxl.namespace(copy.deepcopy(parts))
    lora.load(models, target, "mine")
    close(sdxl.outputs(models), merged(parts, updates))
    found = reading.read(target)[0]
    for part, layers in updates.items():
        for name, factors in layers.items():
            assert found[part][name].rank <= factors.rank
            assert found[part][name].scale == pytest.approx(factors.scale)


def test_a_smaller_rank_is_the_best_there_is(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, generator=generator), torch.randn(12, 6, generator=generator)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "x.safetensors"
    formats.write(path, {"unet": {name: Factors(down, up, 3.0)}}, "diffusers")
    target = tmp_path / "y.safetensors"
    resizing.main(resizing.Args(input=str(path), output=target, rank=2))
    found = reading.read(target)[0]["unet"][name]
    assert (found.rank, found.alpha) == (2, 1.0)  # 3 / 6 as 1 / 2
    product = 0.5 * up @ down
    values = torch.linalg.svdvals(product)
    error = (found.scale * found.up @ found.down - product).norm()
    torch.testing.assert_close(error, values[2:].norm())
    # By energy: as many ranks as the share needs, and no more.
    energy = float(values[:3].square().sum() / values.square().sum()) - 1e-4
    resizing.main(
        resizing.Args(input=str(path), output=target, rank=6, dynamic=energy, overwrite=True)
    )
    assert reading.read(target)[0]["unet"][name].rank == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "--rank must be at least 1"),
        ({"dynamic": 1.5}, "--dynamic must lie in"),
        ({"output": Path("x.bin")}, "--output must end in"),
    ],
)
def test_resizes_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resizing.Args(**{"input": "a", "output": Path("x.safetensors"), "rank": 2, **options})


def test_resize_refuses_a_dora_and_an_unknown_base(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    path = tmp_path / "x.safetensors"
    formats.write(path, {"unet": {name: factors}}, "diffusers")
    args = {"input": str(path), "output": tmp_path / "y.safetensors", "rank": 1}
    with pytest.raises(UserError, match="--base x: known are sd1, sd2, sdxl"):
        resizing.main(resizing.Args(**args, base="x"))
    with pytest.raises(UserError, match="--base sd3 does not fit: the file adapts unet"):
        resizing.main(resizing.Args(**args, base="sd3"))
    dora = Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0, torch.ones(4))
    formats.write(path, {"unet": {name: dora}}, "diffusers")
    with pytest.raises(UserError, match="is a DoRA"):
        resizing.main(resizing.Args(**args))


# info


def test_info_says_what_a_file_is(
    parts: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.safetensors", everything(parts))
    state = load_file(path)
    save_file(
        {**state, "lora_unet_strange.lora_down.weight": torch.ones(1, 1)},
        path,
        {"ss_training_comment": "for you", "ss_base_model_version": "sdxl_base_v1-0", "a": "b"},
    )
    info.main(info.Args(input=str(path)))
    said = capsys.readouterr().out
    for line in (
        "method: ",
        "x LoRA of convolutions (LoCon)",
        "format: kohya's",
        "base: sdxl (its header says ss_base_model_version sdxl_base_v1-0)",
        "base predicts: the noise",
        "text_encoder_2: 8 layers, rank ",
        "ss_training_comment: for you",
        "other entries of its header: 1",
        "not understood: 1 layers, such as lora_unet_strange",
    ):
        assert line in said


# convert


def test_convert_takes_the_base_from_a_folder(
    parts: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = sdxl.parts(layers=1)
    updates = everything(shallow)
    path = tmp_path / "x.safetensors"
    formats.write(path, updates, "diffusers")
    args = {"output": tmp_path / "y.safetensors", "lora_format": "kohya"}
    command_line.main(command_line.Args(input=str(path), **args))
    assert "written for sdxl: it adapts two text encoders" in capsys.readouterr().out
    models = sdxl.namespace(copy.deepcopy(shallow))
    lora.load(models, tmp_path / "y.safetensors", "mine")
    close(sdxl.outputs(models), merged(shallow, updates))
    command_line.main(
        command_line.Args(
            input=str(tmp_path / "y.safetensors"),
            output=tmp_path / "z.safetensors",
            lora_format="diffusers",
        )
    )
    assert reading.read(tmp_path / "z.safetensors")[0]["unet"].keys() == updates["unet"].keys()


@pytest.mark.parametrize("name", ["merge", "resize", "info", "convert"])
def test_every_command_has_a_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lora", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command_line.command()
    assert ended.value.code == 0
    assert "--input" in capsys.readouterr().out
