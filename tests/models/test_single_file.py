"""Claims about checkpoints in one file: what is written, what is read, which files are refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.cli import UserError
from dojo.files import tensors
from dojo.models import folders, sd3
from dojo.models.sd3 import keys
from dojo.models.sd3.single_file import SingleFile, inspect

CPU = torch.device("cpu")
WEIGHTS = ("transformer", "vae", *sd3.TEXT_ENCODERS)


@pytest.fixture(scope="module")
def source() -> Any:
    """A pocket SD3 of which no two tensors are equal and none is zero."""
    from dojo.pocket import models

    pipeline = models.sd3_pipeline()
    generator = torch.Generator().manual_seed(0)
    for part in WEIGHTS:
        for name, param in getattr(pipeline, part).named_parameters():
            if (part, name) != ("text_encoder", "text_projection.weight"):
                param.data = 0.1 * torch.randn(param.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def folder(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in parts."""
    path = tmp_path_factory.mktemp("model") / "parts"
    source.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file."""
    path = tmp_path_factory.mktemp("model") / "whole.safetensors"
    sd3.save_single_file(path, source)
    return path


def args_of(path: Path, config: Path | None, **options: Any) -> sd3.ModelArgs:
    return sd3.ModelArgs(
        pretrained_model_name_or_path=str(path),
        single_file_config=str(config) if config else None,
        **options,
    )


def equal(first: Any, second: Any, dtype: torch.dtype | None = None) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].to(dtype or ours[name].dtype), theirs[name]) for name in ours
    )


def without(folder: Path, place: Path, *parts: str) -> Path:
    """A copy of the folder without the weights of some parts."""
    copy = Path(shutil.copytree(folder, place))
    for part in parts:
        (copy / part / "model.safetensors").unlink()
    return copy


# Writing


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_diffusers_reads_every_tensor_back(
    source: Any, folder: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    path = tmp_path / "whole.safetensors"
    sd3.save_single_file(path, source, dtype)
    read: Any = StableDiffusion3Pipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, dtype=dtype or torch.float32
    )
    for part in WEIGHTS:
        assert equal(getattr(source, part), getattr(read, part), dtype), part
    if dtype:
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}


# From the listings of Stability's sd3.5_medium and sd3_medium_incl_clips_t5xxl files.
PUBLIC_NAMES = {
    "model.diffusion_model.pos_embed",
    "model.diffusion_model.x_embedder.proj.weight",
    "model.diffusion_model.t_embedder.mlp.0.bias",
    "model.diffusion_model.t_embedder.mlp.2.weight",
    "model.diffusion_model.y_embedder.mlp.0.weight",
    "model.diffusion_model.context_embedder.weight",
    "model.diffusion_model.final_layer.adaLN_modulation.1.weight",
    "model.diffusion_model.final_layer.linear.bias",
    "model.diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.ln_q.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias",
    "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.bias",
    "model.diffusion_model.joint_blocks.0.x_block.attn2.ln_k.weight",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight",
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight",
    "model.diffusion_model.joint_blocks.0.context_block.mlp.fc2.bias",
    "model.diffusion_model.joint_blocks.3.context_block.adaLN_modulation.1.bias",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.down.0.block.0.norm1.weight",
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
    "first_stage_model.encoder.down.0.downsample.conv.bias",
    "first_stage_model.encoder.mid.block_1.conv1.weight",
    "first_stage_model.encoder.mid.attn_1.q.weight",
    "first_stage_model.encoder.norm_out.weight",
    "first_stage_model.decoder.mid.attn_1.proj_out.weight",
    "first_stage_model.decoder.mid.attn_1.norm.bias",
    "first_stage_model.decoder.up.3.block.1.conv2.weight",
    "first_stage_model.decoder.up.1.upsample.conv.weight",
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight",
    "text_encoders.clip_g.transformer.text_projection.weight",
    "text_encoders.t5xxl.transformer.shared.weight",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
}


def test_the_names_are_those_of_the_public_files(file: Path) -> None:
    header, metadata = tensors.read_header(file)
    assert header.keys() >= PUBLIC_NAMES
    assert metadata["modelspec.architecture"] == "stable-diffusion-3.5-medium"
    assert metadata["modelspec.title"] == "whole"
    # The last block does nothing more with the text, and has no second attention here.
    last = {name for name in header if ".joint_blocks.3.context_block." in name}
    assert not [name for name in last if "proj" in name or "mlp" in name]
    assert header["first_stage_model.encoder.mid.attn_1.q.weight"]["shape"] == [96, 96, 1, 1]


def test_the_fused_and_the_swapped_layers_have_their_closed_form(source: Any, file: Path) -> None:
    written = load_file(file)
    state = source.transformer.state_dict()
    qkv = torch.cat([state[f"transformer_blocks.1.attn2.to_{x}.weight"] for x in "qkv"])
    block = "model.diffusion_model.joint_blocks"
    assert torch.equal(written[f"{block}.1.x_block.attn2.qkv.weight"], qkv)
    scale, shift = state["norm_out.linear.bias"].chunk(2)
    final = written["model.diffusion_model.final_layer.adaLN_modulation.1.bias"]
    assert torch.equal(final, torch.cat([shift, scale]))
    scale, shift = state["transformer_blocks.3.norm1_context.linear.weight"].chunk(2)
    last = written[f"{block}.3.context_block.adaLN_modulation.1.weight"]
    assert torch.equal(last, torch.cat([shift, scale]))
    first = state["transformer_blocks.0.norm1_context.linear.weight"]
    assert torch.equal(written[f"{block}.0.context_block.adaLN_modulation.1.weight"], first)


@pytest.mark.parametrize("name", ["pos_embed.proj", "transformer_blocks.7.attn.add_k_proj"])
def test_the_two_vocabularies_are_inverse(name: str) -> None:
    original, place = keys.original_module(name)
    assert keys.diffusers_modules(original)[place] == name


def test_equal_weights_give_equal_bytes(source: Any, file: Path, tmp_path: Path) -> None:
    again = tmp_path / "whole.safetensors"
    parts = {part: getattr(source, part).state_dict() for part in reversed(WEIGHTS)}
    sd3.save_single_file(again, parts)
    assert again.read_bytes() == file.read_bytes()


def test_a_projection_that_is_not_the_identity_is_said(
    source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = source.text_encoder.state_dict()
    parts = {"transformer": source.transformer.state_dict(), "text_encoder": clip}
    sd3.save_single_file(tmp_path / "x.safetensors", parts)
    assert capsys.readouterr().out == ""
    clip["text_projection.weight"] = torch.ones(64, 64)
    sd3.save_single_file(tmp_path / "x.safetensors", parts)
    assert "not the identity" in capsys.readouterr().out


def test_tensors_are_made_one_at_a_time_and_a_broken_file_never_appears(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("what was there before")
    alive: list[str] = []

    def make(name: str, fail: bool = False) -> Callable[[str], Tensor]:
        def source(device: str) -> Tensor:
            if device == "cpu":
                alive.append(name)
                if fail:
                    raise KeyboardInterrupt
            return torch.full((3, 2), 7.0, dtype=torch.bfloat16, device=device)

        return source

    with pytest.raises(KeyboardInterrupt):
        tensors.save(path, {"a": make("a"), "b": make("b", fail=True), "c": make("c")})
    assert alive == ["a", "b"]
    assert path.read_text() == "what was there before"
    tensors.save(path, {"a": make("a"), "b": make("b")}, {"z": "1", "a": "2"})
    assert [name.name for name in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(path)["b"], torch.full((3, 2), 7.0, dtype=torch.bfloat16))


def test_all_kinds_of_numbers_come_back(tmp_path: Path) -> None:
    wanted = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "eight": torch.tensor([1.5, -448.0, 0.0]).to(torch.float8_e4m3fn),
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 3).bfloat16().T,
        "single": torch.tensor(3.25),
        "double": torch.randn(1).double(),
        "whole": torch.arange(5),
        "empty": torch.zeros(0, 4),
    }
    tensors.save(tmp_path / "x.safetensors", wanted)
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double())


# Reading


def test_every_part_of_the_file_is_loaded_bit_for_bit(
    source: Any, folder: Path, file: Path, tmp_path: Path
) -> None:
    # A configuration folder whose own weights are all other weights.
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for path in other.glob("*/*.safetensors"):
        save_file({name: x + 1 for name, x in load_file(path).items()}, path, {"format": "pt"})
    args = args_of(file, other)
    config = sd3.open_model(args)
    texts = sd3.load_text_pipeline(config, torch.float32)
    assert equal(source.transformer, config.load_network(torch.float32, CPU))
    assert equal(source.vae, config.load_vae(CPU))
    for part in sd3.TEXT_ENCODERS:
        assert equal(getattr(source, part), getattr(texts, part)), part
    assert config.clip_tokens == 20
    assert config.latent_shape(64, 64) == (16, 8, 8)


def test_options_hold_for_a_single_file_too(folder: Path, file: Path, tmp_path: Path) -> None:
    # transformers would take half precision from this configuration, whatever is asked.
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for part in sd3.TEXT_ENCODERS:
        path = half / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16"}))
    args = args_of(file, half, gradient_checkpointing=True, vae_dtype="fp16")
    config = sd3.open_model(args)
    transformer = config.load_network(torch.bfloat16, CPU)
    assert transformer.dtype == torch.bfloat16
    assert transformer.is_gradient_checkpointing
    assert not any(param.requires_grad for param in transformer.parameters())
    assert config.load_vae(CPU).dtype == torch.float16
    for dtype in (torch.float32, torch.bfloat16):
        texts: Any = sd3.load_text_pipeline(config, dtype)
        assert [getattr(texts, part).dtype for part in sd3.TEXT_ENCODERS] == [dtype] * 3


def test_parts_that_the_file_lacks_come_from_the_folder(
    source: Any, folder: Path, tmp_path: Path
) -> None:
    # The bare transformer, as ComfyUI keeps it: without a prefix too.
    path = tmp_path / "bare.safetensors"
    sd3.save_single_file(path, {"transformer": source.transformer.state_dict()})
    prefix = keys.PREFIXES["transformer"]
    bare = {name.removeprefix(prefix): x for name, x in load_file(path).items()}
    save_file(bare, path)
    args = args_of(path, folder)
    config = sd3.open_model(args)
    texts = sd3.load_text_pipeline(config, torch.float32)
    assert equal(source.transformer, config.load_network(torch.float32, CPU))
    assert equal(source.vae, config.load_vae(CPU))
    assert equal(source.text_encoder_3, texts.text_encoder_3)


def test_a_file_without_t5_uses_the_folders_or_none(
    source: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.safetensors"
    sd3.save_single_file(path, source, with_t5=False)
    assert "text_encoder_3" not in inspect(path)
    args = args_of(path, folder)
    texts = sd3.load_text_pipeline(sd3.open_model(args), torch.float32)
    assert equal(source.text_encoder_3, texts.text_encoder_3)
    args = args_of(path, without(folder, tmp_path / "none", "text_encoder_3"))
    config = sd3.open_model(args)
    texts = sd3.load_text_pipeline(config, torch.float32)
    assert texts.text_encoder_3 is None
    assert capsys.readouterr().out.count("no T5") == 1
    found = config.load_text(torch.float32, CPU)(["a star"])
    assert not found["prompt_embeds"][:, 20:].any()
    assert found["prompt_embeds"].shape == (1, 20 + 256, 192)


def test_an_8_bit_t5_is_read_and_kept_exactly(source: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "eight.safetensors"
    sd3.save_single_file(path, source)
    mixed = {
        name: x.to(torch.float8_e4m3fn) if ".t5xxl." in name else x
        for name, x in load_file(path).items()
    }
    save_file(mixed, path)
    args = args_of(path, folder)
    config = sd3.open_model(args)
    texts: Any = sd3.load_text_pipeline(config, torch.bfloat16)
    expected = source.text_encoder_3.shared.weight.to(torch.float8_e4m3fn).float()
    assert torch.equal(texts.text_encoder_3.shared.weight.float(), expected)
    sd3.copy_parts(config, tmp_path / "copy", ["text_encoder_3", "tokenizer_3"])
    saved = load_file(tmp_path / "copy" / "text_encoder_3" / "model.safetensors")
    assert torch.equal(saved["shared.weight"].float(), expected)


def test_a_model_without_clip_is_refused(source: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    sd3.save_single_file(path, {"transformer": source.transformer.state_dict()})
    args = args_of(path, without(folder, tmp_path / "none", "text_encoder_2"))
    with pytest.raises(UserError, match="CLIP"):
        sd3.load_text_pipeline(sd3.open_model(args), torch.float32)


# Which configuration


@pytest.mark.parametrize(
    ("width", "positions", "blocks", "name"),
    [
        (1536, 192, 24, "stable-diffusion-3-medium-diffusers"),
        (1536, 384, 24, "stable-diffusion-3.5-medium"),
        (2432, 192, 38, "stable-diffusion-3.5-large"),
        (192, 16, 4, None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_public_models_are_told_apart_by_their_sizes(
    width: int, positions: int, blocks: int, name: str | None, prefix: str
) -> None:
    header = {
        f"{prefix}pos_embed": {"shape": [1, positions**2, width]},
        f"{prefix}joint_blocks.0.context_block.adaLN_modulation.1.bias": {"shape": [6 * width]},
        f"{prefix}joint_blocks.{blocks - 1}.x_block.mlp.fc1.weight": {"shape": [4, 1]},
    }
    found = SingleFile(Path("x.safetensors"), header).hub_id
    assert found == (name and f"stabilityai/{name}")


def test_what_the_file_has_is_not_downloaded_again(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    fetched: list[tuple[str, ...]] = []
    monkeypatch.setattr(folders.diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(folders, "hf_hub_download", lambda *a, **_: fetched.append(a))
    args = sd3.ModelArgs(
        pretrained_model_name_or_path=str(file), single_file_config="someone/sd3", revision="v2"
    )
    assert sd3.open_model(args).folder == folder
    assert asked == {
        "name": "someone/sd3",
        "revision": "v2",
        "variant": None,
        **dict.fromkeys(WEIGHTS),
    }
    # diffusers leaves out the configurations of the parts that it is told to leave out.
    assert set(fetched) == {("someone/sd3", f"{part}/config.json") for part in WEIGHTS}


def refusal(path: Path, config: Path | None) -> str:
    with pytest.raises(UserError) as refused:
        sd3.open_model(args_of(path, config))
    message = str(refused.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_files_that_are_no_sd3_are_refused(folder: Path, file: Path, tmp_path: Path) -> None:
    flag = "--pretrained_model_name_or_path"
    assert f"{flag}: there is no file" in refusal(tmp_path / "none.safetensors", folder)
    half = tmp_path / "half.safetensors"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{flag}: " in (message := refusal(half, folder))
    assert "no whole safetensors file" in message
    page = tmp_path / "page.safetensors"
    page.write_text("<html>404</html>")
    assert "no whole safetensors file" in refusal(page, folder)
    adapter = tmp_path / "adapter.safetensors"
    save_file(
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}, adapter
    )
    assert "is a LoRA" in refusal(adapter, folder)
    unet = tmp_path / "unet.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, unet)
    assert "no Stable Diffusion 3" in refusal(unet, folder)


def test_a_configuration_that_does_not_fit_is_refused(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    assert "--single_file_config: name a folder" in refusal(file, None)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "transformer" / "config.json"
    settings = json.loads(path.read_text())
    for change in ({"num_layers": 3}, {"dual_attention_layers": [0]}, {"pos_embed_max_size": 8}):
        path.write_text(json.dumps({**settings, **change}))
        assert "another model than this configuration" in refusal(file, other)
    path.write_text(json.dumps(settings))
    clip = other / "text_encoder_2" / "config.json"
    clip.write_text(json.dumps({**json.loads(clip.read_text()), "num_hidden_layers": 2}))
    args = args_of(file, other)
    with pytest.raises(UserError, match="text_encoder_2 of whole"):
        sd3.load_text_pipeline(sd3.open_model(args), torch.float32)
    with pytest.raises(UserError, match="--single_file_config: there is no folder"):
        sd3.open_model(args_of(file, tmp_path / "none"))


VAE, CLIP_L = "first_stage_model.", "text_encoders.clip_l.transformer."


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("model.diffusion_model.", "transformer of .* is damaged: .* not finite"),
        (VAE, "vae of .* is damaged: .* not finite"),
        (CLIP_L, "text_encoder of .* is damaged: .* not finite"),
        ("text_encoders.t5xxl.transformer.", "text_encoder_3 of .* is damaged: .* not finite"),
    ],
)
def test_a_single_file_with_numbers_that_are_none_is_refused(
    prefix: str, says: str, folder: Path, file: Path, tmp_path: Path
) -> None:
    state = load_file(file)
    name = next(name for name in state if name.startswith(prefix) and state[name].dim() > 1)
    state[name].view(-1)[0] = torch.nan
    save_file(state, tmp_path / "broken.safetensors")
    args = args_of(tmp_path / "broken.safetensors", folder)
    with pytest.raises(UserError, match=says):
        sd3.open_model(args).load_pipeline(torch.float32, CPU)


def test_the_autoencoder_of_a_single_file_is_whole_or_refused(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    state = load_file(file)
    del state[f"{VAE}decoder.conv_in.bias"]
    save_file(state, tmp_path / "broken.safetensors")
    assert "1 tensors differ, such as decoder.conv_in.bias" in refusal(
        tmp_path / "broken.safetensors", folder
    )


def test_old_merges_that_leave_text_model_out_are_read(
    source: Any, folder: Path, file: Path, tmp_path: Path
) -> None:
    state = {
        name.replace("clip_l.transformer.text_model.", "clip_l.transformer."): value
        for name, value in load_file(file).items()
    }
    assert f"{CLIP_L}embeddings.position_embedding.weight" in state
    save_file(state, tmp_path / "old.safetensors")
    args = args_of(tmp_path / "old.safetensors", folder)
    texts = sd3.load_text_pipeline(sd3.open_model(args), torch.float32)
    assert equal(source.text_encoder, texts.text_encoder)


def test_a_configuration_without_a_file_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--single_file_config"):
        args_of(folder, folder)


# Fingerprints


def test_fingerprints_follow_the_part_and_not_the_file(
    source: Any, folder: Path, file: Path, tmp_path: Path
) -> None:
    texts = list(sd3.TEXT_FOLDERS)

    def prints(path: Path, config: Path = folder) -> tuple[str, str]:
        found = sd3.open_model(args_of(path, config))
        return found.fingerprint(["vae"]), found.fingerprint(texts)

    vae, text = prints(file)

    def changed(part: str) -> tuple[str, str]:
        parts = {name: getattr(source, name).state_dict() for name in WEIGHTS}
        name = next(name for name in parts[part] if name.endswith("weight"))
        parts[part][name] = parts[part][name] + 1
        sd3.save_single_file(tmp_path / f"{part}.safetensors", parts)
        return prints(tmp_path / f"{part}.safetensors")

    assert changed("transformer") == (vae, text)  # tuned transformers share their caches
    assert (changed("vae")[0] != vae, changed("vae")[1]) == (True, text)
    assert (changed("text_encoder_3")[0], changed("text_encoder_3")[1] != text) == (vae, True)
    plain = sd3.open_model(args_of(folder, None))
    assert plain.fingerprint(["vae"]) == sd3.fingerprint(folder, ["vae"]) != vae
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = other / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert prints(file, other)[1] != text


# Result folders


FROZEN = ("vae", *sd3.TEXT_FOLDERS)


def finish(folder: Path, source: Any, **parts: None) -> Any:
    """Adds what training writes and loads the folder with one plain call."""
    source.transformer.save_pretrained(folder / "transformer")
    source.scheduler.save_pretrained(folder / "scheduler")
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {module.dtype for module in modules} == {torch.float32}
    return pipeline


def halved(source: Any, folder: Path, variant: str | None, shards: bool = False) -> Path:
    """The model in half precision, with configurations that say so, as Stability's are."""
    pipeline = copy.deepcopy(source).to(torch.float16)
    size = "200KB" if shards else "10GB"
    pipeline.save_pretrained(folder, variant=variant, max_shard_size=size)
    written = json.loads((folder / "text_encoder_3" / "config.json").read_text())
    assert written["dtype"] == "float16"
    return folder


@pytest.mark.parametrize(
    ("variant", "shards"), [(None, False), ("fp16", False), ("fp16", True), (None, True)]
)
def test_a_copied_half_precision_folder_is_whole_in_a_plain_call(
    source: Any, tmp_path: Path, variant: str | None, shards: bool
) -> None:
    base = halved(source, tmp_path / "base", variant, shards)
    assert bool(list(base.glob("*/*00001-of*"))) == shards
    args = args_of(base, None, variant=variant)
    sd3.copy_parts(sd3.open_model(args), tmp_path / "result", FROZEN)
    assert not list((tmp_path / "result").glob("transformer*"))
    assert not list((tmp_path / "result").glob("scheduler*"))
    assert not list((tmp_path / "result").glob("*/*fp16*"))
    pipeline = finish(tmp_path / "result", source)
    for part in ("vae", *sd3.TEXT_ENCODERS):
        loaded = getattr(pipeline, part).to(torch.float16)
        assert equal(getattr(source, part), loaded, torch.float16), part


def test_only_one_set_of_weights_is_copied(source: Any, tmp_path: Path) -> None:
    base = halved(source, tmp_path / "base", "fp16")
    source.save_pretrained(base)  # both sets lie there now, as in a repository
    for variant, size in ((None, 4), ("fp16", 2)):
        args = args_of(base, None, variant=variant)
        result = tmp_path / f"result-{variant}"
        sd3.copy_parts(sd3.open_model(args), result, FROZEN)
        weights = list((result / "text_encoder_3").glob("*.safetensors"))
        assert [path.name for path in weights] == ["model.safetensors"]
        assert {x.itemsize for x in load_file(weights[0]).values()} == {size}


def test_a_single_files_parts_become_folders(
    source: Any, folder: Path, file: Path, tmp_path: Path
) -> None:
    args = args_of(file, without(folder, tmp_path / "base", *sd3.TEXT_ENCODERS))
    sd3.copy_parts(sd3.open_model(args), tmp_path / "result", FROZEN)
    pipeline = finish(tmp_path / "result", source)
    for part in ("vae", *sd3.TEXT_ENCODERS):
        assert equal(getattr(source, part), getattr(pipeline, part)), part
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a star", num_inference_steps=1, height=32, width=32).images[0]
    assert picture.size == (32, 32)


def test_a_half_precision_file_stays_half_on_disk(
    source: Any, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "half.safetensors"
    sd3.save_single_file(path, source, torch.float16)
    args = args_of(path, folder)
    sd3.copy_parts(sd3.open_model(args), tmp_path / "result", FROZEN)
    for saved in (tmp_path / "result").glob("*/*.safetensors"):
        assert {x.dtype for x in load_file(saved).values()} == {torch.float16}, saved
    pipeline = finish(tmp_path / "result", source)
    for part in ("vae", *sd3.TEXT_ENCODERS):
        halved_part = getattr(pipeline, part).half()
        assert equal(getattr(source, part), halved_part, torch.float16), part


def test_a_missing_t5_is_null_in_the_result(source: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    sd3.save_single_file(path, source, with_t5=False)
    base = without(folder, tmp_path / "base", "text_encoder_3")
    args = args_of(path, base)
    sd3.copy_parts(sd3.open_model(args), tmp_path / "result", FROZEN)
    index = json.loads((tmp_path / "result" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    assert not (tmp_path / "result" / "text_encoder_3").exists()
    # diffusers does not take null for an answer: a plain call must say it too.
    pipeline = finish(tmp_path / "result", source, text_encoder_3=None)
    assert pipeline.text_encoder_3 is None
    args = args_of(tmp_path / "result", None)
    texts = sd3.load_text_pipeline(sd3.open_model(args), torch.float32)
    assert texts.text_encoder_3 is None
