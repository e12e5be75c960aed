"""Claims about SD1, SD2 and SDXL in one file: what is read, what is written, what is refused."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dojo.cli import UserError
from dojo.files import tensors
from dojo.models.unet import ldm, single_file
from dojo.models.unet.single_file import constants
from dojo.models.unet.single_file.header import SingleFile, identify
from dojo.models.unet.single_file.reading import Contents, Entry

from . import tiny
from .tiny import Source, picture, same_parts

FAMILIES = list(tiny.PARTS)
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def stub(path: Path, shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> Path:
    """A file of zeros."""
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(made, path, {key.replace("__", "."): value for key, value in metadata.items()})
    return path


def unet_stub(width: int, channels: int = 4, label: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors by which a UNet is known."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{UNET}input_blocks.0.0.weight": (8, channels, 3, 3),
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, width),
    }
    return shapes | ({f"{UNET}label_emb.0.0.weight": (8, label)} if label else {})


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        single_file.inspect(path)
    message = str(refused.value)
    assert message.startswith("--pretrained_model_name_or_path: ")
    assert "\n" not in message
    assert path.name in message
    return message


# Reading and writing


def test_a_model_comes_back_to_the_bit(source: Source) -> None:
    same_parts(source, source.path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_is_read_as_it_is(
    source: Source, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "half.safetensors"
    single_file.save(path, source.pipeline, family=source.family, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    assert single_file.inspect(path).dtype("unet") == dtype
    same_parts(source, path, dtype)


def test_an_8_bit_file_is_widened(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "eight.safetensors"
    save_file({n: x.to(torch.float8_e4m3fn) for n, x in load_file(source.path).items()}, path)
    assert single_file.inspect(path).dtype("unet") == torch.bfloat16
    same_parts(source, path, torch.float8_e4m3fn)


def test_plain_diffusers_draws_the_same_picture_from_the_file(source: Source) -> None:
    kind: Any = type(source.pipeline)
    read = kind.from_single_file(str(source.path), config=str(source.folder), local_files_only=True)
    assert torch.equal(picture(source.pipeline), picture(read))


def test_equal_weights_give_equal_bytes_whatever_they_come_as(
    source: Source, tmp_path: Path
) -> None:
    again = tmp_path / "whole.safetensors"
    parts = {p: getattr(source.pipeline, p).state_dict() for p in reversed(source.parts)}
    single_file.save(again, parts, family=source.family)
    assert again.read_bytes() == source.path.read_bytes()


def test_a_part_is_nobody_elses_memory(source: Source, tmp_path: Path) -> None:
    # A query matrix cut out of OpenCLIP's one for three would be saved with all of it, or refused.
    file = single_file.inspect(source.path)
    part = source.parts[-1]
    read = single_file.load(file, part, source.folder, torch.float32)
    read.save_pretrained(tmp_path)
    assert tiny.equal(read, type(read).from_pretrained(tmp_path))


def test_the_encoders_matrices_have_their_closed_form(source: Source) -> None:
    written = load_file(source.path)
    if source.family == "sd1":
        encoder = source.pipeline.text_encoder.state_dict()
        name = "encoder.layers.1.self_attn.q_proj.weight"
        ours = encoder.get(name, encoder.get(f"text_model.{name}"))
        assert torch.equal(written[f"cond_stage_model.transformer.text_model.{name}"], ours)
        return
    part, prefix = source.parts[-1], ldm.PREFIXES[source.family][source.parts[-1]][0]
    state = {
        name.removeprefix("text_model."): value
        for name, value in getattr(source.pipeline, part).state_dict().items()
    }
    qkv = [state[f"encoder.layers.1.self_attn.{x}_proj.bias"] for x in "qkv"]
    fused = written[f"{prefix}transformer.resblocks.1.attn.in_proj_bias"]
    assert torch.equal(fused, torch.cat(qkv))
    table = state["embeddings.position_embedding.weight"]
    assert torch.equal(written[f"{prefix}positional_embedding"], table)
    if source.family == "sdxl":
        transposed = state["text_projection.weight"].T
        assert torch.equal(written[f"{prefix}text_projection"], transposed)
    attention = written[f"{VAE}encoder.mid.attn_1.q.weight"]
    assert list(attention.shape) == [64, 64, 1, 1]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors_are_read(
    sd1: Source, tmp_path: Path, inside: bool, zipped: bool
) -> None:
    path = tmp_path / "old.ckpt"
    state = load_file(sd1.path)
    held = {"epoch": 3, "state_dict": state} if inside else state
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    same_parts(sd1, path)
    prints = [single_file.inspect(one).fingerprint("unet") for one in (path, sd1.path)]
    assert prints[0] == prints[1]


class _Runs:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callbacks": _Runs()}, path)
    assert "holds more than tensors" in refusal(path)
    path.write_bytes(pickle.dumps(_Runs()))
    assert "holds more than tensors" in refusal(path)
    assert [one.name for one in tmp_path.iterdir()] == ["bad.ckpt"]
    path.write_bytes(b"PK\x03\x04 and then nothing")
    assert "no whole file of weights" in refusal(path)
    torch.save([torch.zeros(1)], path)
    assert "no table of tensors" in refusal(path)


def test_old_merges_that_leave_text_model_out_are_read(sd1: Source, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    state = {
        name.replace("transformer.text_model.", "transformer."): value
        for name, value in load_file(sd1.path).items()
    }
    assert "cond_stage_model.transformer.final_layer_norm.bias" in state
    save_file(state, path)
    same_parts(sd1, path)


def test_what_no_reader_takes_is_left_aside(source: Source, tmp_path: Path) -> None:
    path, state = tmp_path / "more.safetensors", load_file(source.path)
    text = ldm.PREFIXES[source.family][source.parts[-1]][0]
    inner = "text_model." if source.family == "sd1" else ""
    extra = {
        f"{text}{inner}embeddings.position_ids": torch.arange(77)[None],
        f"{text}logit_scale": torch.tensor(4.6),
        f"{VAE}loss.logvar": torch.zeros(1),
        "alphas_cumprod": torch.zeros(1000),
    }
    if source.family == "sd2":
        extra |= {
            name.replace("resblocks.1.", "resblocks.2."): value.clone()
            for name, value in state.items()
            if "resblocks.1." in name
        }
        extra[f"{text}text_projection"] = torch.ones(128, 128)
    save_file(state | extra, path)
    same_parts(source, path)


def test_the_plain_half_of_a_training_file_is_taken(sd1: Source, tmp_path: Path) -> None:
    path, state = tmp_path / "full.safetensors", load_file(sd1.path)
    state |= {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in state.items()
        if name.startswith(UNET)
    }
    save_file(state, path)
    assert not single_file.inspect(sd1.path).remarks
    assert "the plain one is taken" in single_file.inspect(path).remarks[0]
    same_parts(sd1, path)


def test_a_unet_alone_is_read_with_and_without_its_prefix(source: Source, tmp_path: Path) -> None:
    state = {n: x for n, x in load_file(source.path).items() if n.startswith(UNET)}
    for name, prefix in (("with", UNET), ("without", "")):
        path = tmp_path / f"{name}.safetensors"
        save_file({prefix + n.removeprefix(UNET): x for n, x in state.items()}, path)
        file = single_file.inspect(path)
        assert [part for part in source.parts if part in file] == ["unet"]
        read = single_file.load(file, "unet", source.folder, torch.float32)
        assert tiny.equal(source.pipeline.unet, read)
        with pytest.raises(UserError, match="no text_encoder: name a folder"):
            single_file.load(file, "text_encoder", source.folder, torch.float32)


def test_a_file_without_autoencoder_asks_for_one(sd1: Source, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_file({n: x for n, x in load_file(sd1.path).items() if not n.startswith(VAE)}, path)
    file = single_file.inspect(path)
    assert "vae" not in file
    assert (single_file.configurations(file) / "vae" / "config.json").is_file()
    with pytest.raises(UserError, match="--pretrained_vae_model_name_or_path"):
        single_file.load(file, "vae", sd1.folder, torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_part_is_refused_by_name(source: Source, tmp_path: Path, part: str) -> None:
    path, state = tmp_path / "broken.safetensors", load_file(source.path)
    prefix = ldm.PREFIXES[source.family][part][0]
    name = [n for n, x in state.items() if n.startswith(prefix) and x.ndim > 1][-1]
    state[name].view(-1)[0] = torch.nan
    save_file(state, path)
    with pytest.raises(UserError, match=f"{part} of .*broken.* is damaged: .*not finite"):
        single_file.load(single_file.inspect(path), part, source.folder, torch.float32)
    whole = state.pop(name)
    save_file(state, path)
    with pytest.raises(UserError, match=r"1 tensors differ, such as .*in the file None"):
        single_file.check(single_file.inspect(path), source.folder)
    save_file(state | {name: torch.zeros(whole.shape, dtype=torch.int8)}, path)
    with pytest.raises(UserError, match="as whole numbers"):
        single_file.check(single_file.inspect(path), source.folder)
    save_file(state | {name: whole, f"{prefix}more.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"such as more\.weight .*configured None"):
        single_file.check(single_file.inspect(path), source.folder)


def test_fingerprints_follow_the_part(source: Source, tmp_path: Path) -> None:
    path, state = tmp_path / "other.safetensors", load_file(source.path)
    state[f"{VAE}quant_conv.bias"] += 1
    save_file(state, path)
    first, second = single_file.inspect(source.path), single_file.inspect(path)
    for part in source.parts:
        assert (first.fingerprint(part) == second.fingerprint(part)) == (part != "vae")


# Marks


@pytest.mark.parametrize(
    ("shapes", "metadata", "prediction", "zero"),
    [
        ({}, {}, "epsilon", False),
        ({"v_pred": (0,)}, {}, "v_prediction", False),
        ({"v_pred": (0,), "ztsnr": (0,)}, {}, "v_prediction", True),
        ({"v_pred": (0,)}, {"modelspec__prediction_type": "epsilon"}, "v_prediction", False),
        ({}, {"modelspec__prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec__predict_key": "v"}, "v_prediction", False),
        ({}, {"modelspec__prediction_type": "epsilon"}, "epsilon", False),
        ({}, {"modelspec__architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
        ({}, {"ss_base_model_version": "sd_v1_v"}, "v_prediction", False),
        ({}, {"ss_v_parameterization": "True"}, "v_prediction", False),
        ({"v_pred": (0,)}, {"ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ({}, {"ss_zero_terminal_snr": "False"}, "epsilon", False),
    ],
)
def test_marks_say_what_a_file_predicts(
    shapes: dict[str, tuple[int, ...]],
    metadata: dict[str, str],
    prediction: str,
    zero: bool,
    tmp_path: Path,
) -> None:
    path = stub(tmp_path / "x.safetensors", unet_stub(768) | shapes, **metadata)
    file = single_file.inspect(path)
    assert (file.prediction_type, file.zero_snr) == (prediction, zero)
    assert file.prediction_known == bool(
        shapes or prediction == "v_prediction" or "spec" in "".join(metadata)
    )


@pytest.mark.parametrize(("spread", "kind"), [(0.05, "noise"), (0.12, "v")])
def test_sd2_without_a_mark_is_told_by_its_last_norm_and_says_so(
    spread: float, kind: str, tmp_path: Path
) -> None:
    bias = torch.tensor([spread, -spread] * 4)
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    made = {n: torch.zeros(shape) for n, shape in unet_stub(1024).items()}
    save_file(made | {name: bias}, tmp_path / "x.safetensors")
    file = single_file.inspect(tmp_path / "x.safetensors")
    assert (file.family, file.prediction_known) == ("sd2", False)
    assert file.prediction_type == {"noise": "epsilon", "v": "v_prediction"}[kind]
    assert f"look like {kind};" in file.remarks[0]


@pytest.mark.parametrize(
    ("prediction", "zero"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
def test_what_is_written_says_what_was_trained(
    source: Source, tmp_path: Path, prediction: Any, zero: bool
) -> None:
    path = tmp_path / "marked.safetensors"
    single_file.save(
        path,
        source.pipeline,
        family=source.family,
        prediction_type=prediction,
        zero_snr=zero,
        title="A title",
        resolution=(768, 512),
    )
    header, metadata = tensors.read_header(path)
    v = prediction == "v_prediction"
    assert ("v_pred" in header, "ztsnr" in header) == (v, zero)
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[source.family]
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "A title",
        "modelspec.resolution": "512x768",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }
    file = single_file.inspect(path)
    assert (file.prediction_type, file.prediction_known, file.zero_snr) == (prediction, True, zero)
    same_parts(source, path)
    folder = single_file.configurations(file)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert settings["prediction_type"] == prediction
    assert bool(settings.get("rescale_betas_zero_snr")) == zero
    assert settings["timestep_spacing"] == ("trailing" if zero else "leading")
    kinds = {"sd1": "PNDM", "sd2": "PNDM", "sdxl": "EulerDiscrete"}
    kind = "DDIM" if v and source.family != "sdxl" else kinds[source.family]
    assert settings["_class_name"] == f"{kind}Scheduler"


def test_a_mark_outweighs_a_folders_scheduler_and_a_guess_does_not(tmp_path: Path) -> None:
    given = {"prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading"}
    marks = {"v_pred": (0,), "ztsnr": (0,)}
    path = stub(tmp_path / "a.safetensors", unet_stub(2048, label=9) | marks)
    assert single_file.marked(single_file.inspect(path), given) == {
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    plain = single_file.inspect(stub(tmp_path / "b.safetensors", unet_stub(1024)))
    for kind in ("epsilon", "v_prediction"):
        assert single_file.marked(plain, {"prediction_type": kind}) == {"prediction_type": kind}


# What is no model of ours


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (unet_stub(768, channels=9), "inpainting model"),
        (unet_stub(2048, channels=9, label=2816), "inpainting model"),
        (unet_stub(768, channels=8), "instruct-pix2pix"),
        (unet_stub(1024, channels=5), "depth model"),
        (unet_stub(1024, channels=7), "upscaler"),
        (unet_stub(768, channels=6), "6 channels"),
        (unet_stub(1280, label=2560), "refiner"),
        (unet_stub(1024, label=2048), "unCLIP"),
        (unet_stub(2048, label=2816) | {"edm_mean": (4,), "edm_std": (4,)}, "Playground"),
        (unet_stub(2048, label=2816) | {"edm_vpred.sigma_max": ()}, "CosXL"),
        (unet_stub(2048, label=5632), "Kolors"),
        (unet_stub(2048, label=5632) | {f"{UNET}encoder_hid_proj.weight": (2, 2)}, "Kolors"),
        (unet_stub(768) | {f"{UNET}input_blocks.1.1.x.scale_weight": ()}, "quantised"),
        (unet_stub(768) | {"control_model.zero_convs.0.0.weight": (1,)}, "ControlNet"),
        ({"lora_unet_down_blocks_0_x.lora_down.weight": (1,)}, "is a LoRA"),
        ({"unet.down_blocks.0.x.lora_A.weight": (1,)}, "is a LoRA"),
        ({"lora_unet_input_blocks_4_1_x.hada_w1_a": (1,)}, "is a LoRA"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (1,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "Flux"),
        ({"emb_params": (1, 768)}, "learned embedding"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "put it into the unet/"),
        ({"decoder.conv_in.weight": (1,)}, "--pretrained_vae_model_name_or_path"),
        ({f"{VAE}decoder.conv_in.weight": (1,)}, "--pretrained_vae_model_name_or_path"),
        ({"bert.weight": (1,)}, "holds no Stable Diffusion"),
    ],
)
def test_other_models_are_refused_by_name(
    shapes: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    assert says in refusal(stub(tmp_path / "x.safetensors", shapes))


def test_no_file_and_no_whole_file_are_refused(source: Source, tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "none.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(source.path.read_bytes()[:5000])
    assert "no whole safetensors file" in refusal(half)


# Configurations


def test_configurations_are_made_once_and_make_the_same_model(source: Source) -> None:
    file = single_file.inspect(source.path)
    folder = single_file.configurations(file)
    assert folder == single_file.configurations(file)
    assert {path.name for path in folder.parent.iterdir()} >= {folder.name}
    assert not list(folder.parent.glob(".*"))
    single_file.check(file, folder)
    read: Any = {part: single_file.load(file, part, folder, torch.float32) for part in source.parts}
    given: Any = source.pipeline.unet.config
    for name in ("attention_head_dim", "transformer_layers_per_block", "cross_attention_dim"):
        ours, theirs = read["unet"].config[name], given[name]
        assert (list(ours) if isinstance(ours, tuple | list) else ours) == (
            list(theirs) if isinstance(theirs, tuple | list) else theirs
        )
    pipeline: Any = type(source.pipeline).from_pretrained(folder, **read)
    pipeline.scheduler = source.pipeline.scheduler
    assert torch.equal(picture(pipeline), picture(source.pipeline))


def test_a_small_vocabulary_asks_for_a_folder(sd1: Source, tmp_path: Path) -> None:
    path, state = tmp_path / "small.safetensors", load_file(sd1.path)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[name] = state[name][:100].clone()
    save_file(state, path)
    with pytest.raises(UserError, match=r"knows 100 tokens.*--single_file_config"):
        single_file.configurations(single_file.inspect(path))


def test_the_folder_of_a_pocket_model_goes_with_its_file(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[3] / "models" / "pocket-sd15"
    pocket: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    path = tmp_path / "pocket.safetensors"
    single_file.save(path, pocket, family="sd1")
    file = single_file.inspect(path)
    single_file.check(file, folder)
    for part in tiny.PARTS["sd1"]:
        read = single_file.load(file, part, folder, torch.float32)
        assert tiny.equal(getattr(pocket, part), read)
    with pytest.raises(UserError, match="--single_file_config"):
        single_file.configurations(file)


def test_a_cache_that_cannot_be_written_is_named(
    sd1: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        single_file.configurations(single_file.inspect(sd1.path))


# The public models' sizes, as their folders say them

PUBLIC: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
WEIGHTS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
# How many tensors the public files have of each part, position ids and logit scales not counted.
COUNTS = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 4 + 23 * 12},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 5 + 32 * 12},
}
ENCODERS: dict[str, dict[str, tuple[Any, int, int, int]]] = {
    "sd1": {"text_encoder": (CLIPTextModel, 768, 12, 768)},
    "sd2": {"text_encoder": (CLIPTextModel, 1024, 23, 512)},
    "sdxl": {
        "text_encoder": (CLIPTextModel, 768, 12, 768),
        "text_encoder_2": (CLIPTextModelWithProjection, 1280, 32, 1280),
    },
}


def public(family: str) -> dict[str, dict[str, Tensor]]:
    """The parts of a public model without memory."""
    autoencoder: Any = AutoencoderKL
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**PUBLIC[family]),
            "vae": autoencoder(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
        }
        for part, (kind, hidden, layers, projection) in ENCODERS[family].items():
            config = CLIPTextConfig(
                vocab_size=49408,
                hidden_size=hidden,
                intermediate_size=4 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                projection_dim=projection,
            )
            parts[part] = kind(config)
    return {part: network.state_dict() for part, network in parts.items()}


def as_file(family: str, parts: Mapping[str, Mapping[str, Tensor]]) -> SingleFile:
    """The header that a file of these parts has."""
    entries = {}
    for part, state in parts.items():
        for name, origin in ldm.origins(family, part, state).items():
            made = origin.join([state[one] for one in origin.names])
            full = ldm.PREFIXES[family][part][0] + name
            entries[full] = Entry(tuple(made.shape), torch.float16)
    known = {"modelspec.prediction_type": "epsilon"}
    return identify(Contents(Path("public.safetensors"), entries, known))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_public_models_follow_from_their_files_headers(family: str) -> None:
    parts = public(family)
    file = as_file(family, parts)
    assert file.family == family
    assert {part: len(file.names(part)) for part in parts} == COUNTS[family]
    folder = single_file.configurations(file)
    single_file.check(file, folder)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            json.loads((folder / "unet" / "config.json").read_text())
        )
    assert sum(param.numel() for param in unet.parameters()) == WEIGHTS[family]
    for name, value in PUBLIC[family].items():
        assert unet.config[name] == value, name
    for part, (_, hidden, layers, projection) in ENCODERS[family].items():
        clip = CLIPTextConfig.from_pretrained(folder, subfolder=part)
        found = clip.hidden_size, clip.num_hidden_layers, clip.projection_dim
        assert found == (hidden, layers, projection)
        assert clip.num_attention_heads == hidden // 64
        assert clip.hidden_act == ("quick_gelu" if hidden == 768 else "gelu")
    vae = json.loads((folder / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)
    assert (vae["block_out_channels"], vae["layers_per_block"]) == ([128, 256, 512, 512], 2)


def test_a_real_sd2_file_has_a_layer_that_is_not_read() -> None:
    parts = public("sd2")
    layer = {n: x for n, x in parts["text_encoder"].items() if "layers.22." in n}
    parts["text_encoder"] |= {n.replace(".22.", ".23."): x for n, x in layer.items()}
    file = as_file("sd2", parts)
    settings = constants.text_encoder(file, "text_encoder")
    assert settings["num_hidden_layers"] == 23
    single_file.check(file, single_file.configurations(file))


def test_sd2_is_written_with_all_layers_that_readers_expect(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=23,
        num_attention_heads=1,
    )
    path = tmp_path / "x.safetensors"
    single_file.save(path, {"text_encoder": CLIPTextModel(config).state_dict()}, family="sd2")
    written = load_file(path)
    block = "cond_stage_model.model.transformer.resblocks"
    last = {n for n in written if n.startswith(f"{block}.23.")}
    assert len(last) == 12
    for name in last:
        assert torch.equal(written[name], written[name.replace(".23.", ".22.")])


# Tokenizers

CAPTIONS = [
    "",
    "a photo of a cat",
    "Hello, WORLD - it's 2024, naïve café",
    "日本語 テキスト",
    "emoji 😀 👍🏽",
    "  many   spaces\n\tand tabs ",
    "don't we'll I've",
    "1girl, solo, (masterpiece:1.2), best_quality",
    "a long one " * 60,
    "e\u0301 and é",
    "#hash @user http://x.y/z?a=b",
    "Ünïcödé İstanbul ß",
    "…ellipsis… \u00a0nbsp\u00a0here",
]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_the_tokenizer_gives_open_clips_ids(name: str, tokenizers: Path) -> None:
    ours: Any = CLIPTokenizer.from_pretrained(tokenizers / name)
    theirs: Any = open_clip.get_tokenizer("ViT-B-32")
    found = ours(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    wanted = theirs(CAPTIONS)  # filled up with zeros
    if name == "tokenizer":
        behind = (wanted == 49407).cumsum(1).bool()
        wanted = wanted.masked_fill(behind, 49407)
    assert torch.equal(found, wanted)
    assert (len(ours), ours.model_max_length) == (49_408, 77)
    assert ours.pad_token_id == (49407 if name == "tokenizer" else 0)
