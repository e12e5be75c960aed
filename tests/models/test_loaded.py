"""Nothing half-loaded is used: every part of a model, damaged in any way, is named and refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.cli import UserError
from dojo.evaluate import pipelines as inference
from dojo.files import tensors
from dojo.models import classic, loaded, sd3, sd15
from tests.conftest import ROOT, MakeArgs

CPU = torch.device("cpu")
State = dict[str, Tensor]
Damage = Callable[[Path], None]
Copied = Callable[[str], Path]

SD3 = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
SD15 = ("unet", "vae", "text_encoder")
PARTS = [*(("sd3", part) for part in SD3), *(("sd15", part) for part in SD15)]
TOKENIZERS = [
    *(("sd3", part) for part in ("tokenizer", "tokenizer_2", "tokenizer_3")),
    ("sd15", "tokenizer"),
]


# -- damages ----------------------------------------------------------------------------------


def weights(part: Path) -> Path:
    return next(part.glob("*.safetensors"))


def changed(change: Callable[[State, str], None]) -> Damage:
    """A damage that changes the tensors of a part, of which it is told one with two dimensions."""

    def damage(part: Path) -> None:
        path = weights(part)
        state = {name: value.clone() for name, value in load_file(path).items()}
        change(state, next(name for name in sorted(state) if state[name].dim() > 1))
        path.unlink()  # the file may be a link to the one that is whole
        save_file(state, path, {"format": "pt"})

    return damage


def drop(state: State, name: str) -> None:
    del state[name]


def add(state: State, name: str) -> None:
    state["foreign.weight"] = torch.zeros(2)


def rename(state: State, name: str) -> None:
    state[f"_orig_mod.{name}"] = state.pop(name)


def grow(state: State, name: str) -> None:
    state[name] = torch.cat([state[name], state[name]])


def spoil(state: State, name: str) -> None:
    state[name].view(-1)[-1] = torch.nan


def overflow(state: State, name: str) -> None:
    state[name].view(-1)[0] = -torch.inf


def quantise(state: State, name: str) -> None:
    state[name] = state[name].to(torch.int8)


def cut(part: Path) -> None:
    path = weights(part)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def no_weights(part: Path) -> None:
    weights(part).unlink()


def written(file: str, text: str) -> Damage:
    def damage(part: Path) -> None:
        (part / file).unlink()
        (part / file).write_text(text)

    return damage


def set_to(**values: object) -> Damage:
    def damage(part: Path) -> None:
        settings = json.loads((part / "config.json").read_text())
        written("config.json", json.dumps({**settings, **values}))(part)

    return damage


def no_config(part: Path) -> None:
    (part / "config.json").unlink()


def lost_shard(part: Path) -> None:
    """Two shards and their list; the second is not there."""
    path = weights(part)
    state = load_file(path)
    names = [f"{path.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    first = sorted(state)[:3]
    save_file({name: state[name] for name in first}, part / names[0], {"format": "pt"})
    listed = {name: names[name not in first] for name in state}
    (part / f"{path.name}.index.json").write_text(json.dumps({"weight_map": listed}))
    path.unlink()


# Each damage with what the sentence says about it.
EVERYWHERE: list[tuple[str, Damage, str]] = [
    ("a tensor less", changed(drop), "is incomplete: it has no "),
    ("a foreign name", changed(rename), "is incomplete: it has no "),
    ("not a number", changed(spoil), r"is damaged: \S+ is not finite"),
    ("half a file", cut, r"\S+\.safetensors is damaged"),
]
ANYWHERE: list[tuple[str, Damage, str]] = [
    ("a tensor more", changed(add), r"has no place for foreign\.weight"),
    ("infinity", changed(overflow), r"is damaged: \S+ is not finite"),
    ("other size", changed(grow), r"of \S+\.safetensors has the size \[.*config.json asks for \["),
    ("whole numbers", changed(quantise), r"\.safetensors holds \S+ as I8"),
    ("no weights", no_weights, "it has no weights"),
    ("a shard less", lost_shard, r"00002-of-00002\.safetensors is missing, which \S+index\.json"),
    ("no JSON", written("config.json", "{,"), r"/config\.json is damaged"),
    ("no object", written("config.json", "[1]"), r"/config\.json is damaged"),
    ("no configuration", no_config, r"/config\.json is missing"),
    ("layers", set_to(num_layers=10**6, num_hidden_layers=10**6), r"/config\.json says num_\S*lay"),
]
ONE_OF_EACH = [("sd3", "transformer"), ("sd3", "text_encoder_3"), ("sd15", "text_encoder")]


# -- loading ----------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_sd3: Path, tiny_sd15: Path, tmp_path: Path) -> Copied:
    """`copied(family)`: the folder of a whole model, whose files may be replaced."""

    def copy(family: str) -> Path:
        source = {"sd3": tiny_sd3, "sd15": tiny_sd15}[family]
        return Path(shutil.copytree(source, tmp_path / family, copy_function=os.link))

    return copy


def load_for_training(folder: Path, family: str, part: str, variant: str | None = None) -> None:
    """What every script does with a part."""
    name = str(folder)
    if family == "sd15":
        args = sd15.ModelArgs(pretrained_model_name_or_path=name, variant=variant)
        config = sd15.open_model(args)
        load: Any = {"unet": config.load_network, "vae": config.load_vae}.get(
            part, config.load_text
        )
    else:
        args = sd3.ModelArgs(pretrained_model_name_or_path=name, variant=variant)
        config = sd3.open_model(args)
        load = {"transformer": config.load_network, "vae": config.load_vae}.get(part)
        if load is None:
            sd3.load_text_pipeline(config, torch.float32)
            return
    load(*([] if part == "vae" else [torch.float32]), CPU)


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        load()
    return str(error.value)


def refused(load: Callable[[], object], folder: Path, part: str, says: str) -> None:
    """Asserts that a load ends in one sentence that names the part and says what is wrong."""
    with pytest.raises(UserError) as error:
        load()
    said = str(error.value)
    assert said.startswith(f"--pretrained_model_name_or_path: {folder / part}"), said
    assert re.search(says, said), f"{said!r} does not say {says!r}"
    assert "\n" not in said


def demo(folder: Path) -> object:
    """What demo.py, the pocket tools and the judges load."""
    return inference.load_pipeline(str(folder), torch.float32)


@pytest.mark.parametrize(("family", "part"), PARTS)
@pytest.mark.parametrize(("name", "damage", "says"), EVERYWHERE, ids=[row[0] for row in EVERYWHERE])
def test_a_damaged_part_is_named_and_refused(
    family: str, part: str, name: str, damage: Damage, says: str, copied: Copied
) -> None:
    folder = copied(family)
    damage(folder / part)
    refused(lambda: load_for_training(folder, family, part), folder, part, says)
    if name == "a tensor less":
        refused(lambda: demo(folder), folder, part, says)


@pytest.mark.parametrize(("family", "part"), ONE_OF_EACH)
@pytest.mark.parametrize(("name", "damage", "says"), ANYWHERE, ids=[row[0] for row in ANYWHERE])
def test_every_damage_is_said_of_either_librarys_networks(
    family: str, part: str, name: str, damage: Damage, says: str, copied: Copied
) -> None:
    folder = copied(family)
    damage(folder / part)
    refused(lambda: load_for_training(folder, family, part), folder, part, says)


def test_a_whole_model_is_loaded_by_every_way(tiny_sd3: Path, tiny_sd15: Path) -> None:
    for family, part in PARTS:
        load_for_training({"sd3": tiny_sd3, "sd15": tiny_sd15}[family], family, part)
    for folder in (tiny_sd3, tiny_sd15):
        assert demo(folder)


# -- tokenizers -------------------------------------------------------------------------------


def no_folder(part: Path) -> None:
    shutil.rmtree(part)


def no_vocabulary(part: Path) -> None:
    (part / "tokenizer.json").unlink()


def few_words(part: Path) -> None:
    """A tokenizer of another model: two hundred tokens."""
    content = json.loads((part / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda row: row[1])[:200])
        content["model"]["merges"] = []
        content["added_tokens"] = []
    else:
        content["model"]["vocab"] = vocabulary + [[f"word{i}", -9.0] for i in range(90)]
    written("tokenizer.json", json.dumps(content))(part)


@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_folder, "is incomplete: a tokenizer needs tokenizer.json"),
        (no_vocabulary, "is incomplete: a tokenizer needs tokenizer.json"),
        (written("tokenizer.json", '{"version'), "tokenizer.json is damaged"),
        (few_words, "another model's: it knows "),
    ],
)
def test_a_tokenizer_without_its_words_is_refused(
    family: str, part: str, damage: Damage, says: str, copied: Copied
) -> None:
    folder = copied(family)
    damage(folder / part)
    refused(lambda: load_for_training(folder, family, "text_encoder"), folder, part, says)
    refused(lambda: demo(folder), folder, part, says)


def test_a_table_may_be_larger_than_the_vocabulary(tiny_sd15: Path) -> None:
    """Tables are rounded up, and textual inversion adds rows."""
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(tiny_sd15))
    texts = sd15.open_model(args).load_text(torch.float32, CPU)
    (tokenizer,), (encoder,) = texts.tokenizers, texts.encoders
    size = len(tokenizer)
    for rows in (size, size + 1, size + 128):
        encoder.resize_token_embeddings(rows)
        loaded.check_vocabulary(tokenizer, encoder, "it")
    encoder.resize_token_embeddings(size - 1)
    with pytest.raises(UserError, match=f"it knows {size} tokens, the text encoder {size - 1}"):
        loaded.check_vocabulary(tokenizer, encoder, "it")


@pytest.mark.parametrize("damage", [no_folder, few_words])
def test_a_changed_tokenizer_is_another_cache(damage: Damage, copied: Copied) -> None:
    folder = copied("sd3")
    before = sd3.fingerprint(folder, sd3.TEXT_FOLDERS)
    damage(folder / "tokenizer_2")
    assert sd3.fingerprint(folder, sd3.TEXT_FOLDERS) != before


def test_nothing_is_cached_or_written_of_a_half_loaded_encoder(
    lora_args: MakeArgs, copied: Copied, tmp_path: Path
) -> None:
    import train_lora_sd3

    folder = copied("sd3")
    few_words(folder / "tokenizer_2")
    name = ("--pretrained_model_name_or_path", str(folder))
    with pytest.raises(UserError, match="/tokenizer_2 is incomplete or another model's"):
        train_lora_sd3.main(lora_args(tmp_path, *name))
    assert not list((tmp_path / "cache").glob("text*/*.safetensors"))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# -- what belongs together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "part", "values", "says"),
    [
        ("sd3", "transformer", {"in_channels": None}, "has no in_channels"),
        ("sd3", "transformer", {"patch_size": "2"}, "says '2' for patch_size"),
        ("sd3", "transformer", {"joint_attention_dim": 64}, "reads 64 .joint_attention_dim"),
        ("sd3", "transformer", {"pooled_projection_dim": 161}, "160 pooled numbers .* reads 161"),
        ("sd3", "text_encoder_3", {"d_model": 191}, "191 numbers per token from T5"),
        ("sd3", "text_encoder_2", {"projection_dim": 32}, "96 pooled numbers from the CLIPs"),
        ("sd3", "text_encoder_2", {"max_position_embeddings": 8}, "pads to 20 tokens .* has 8"),
        ("sd3", "vae", {"latent_channels": 4}, "has 4 channels, the transformer expects 16"),
        ("sd3", "vae", {"shift_factor": None}, "has no number for shift_factor"),
        ("sd3", "vae", {"block_out_channels": None}, "has no list of block_out_channels"),
        ("sd15", "unet", {"cross_attention_dim": 63}, "gives 64 numbers per token, .* reads 63"),
        ("sd15", "unet", {"sample_size": -1}, "says -1 for sample_size"),
        ("sd15", "unet", {"block_out_channels": 3}, "has no list of block_out_channels"),
        ("sd15", "vae", {"latent_channels": 3}, "has 3 channels, the UNet expects 4"),
    ],
)
def test_sizes_that_do_not_fit_are_said_before_anything_is_loaded(
    family: str, part: str, values: dict[str, Any], says: str, copied: Copied
) -> None:
    folder = copied(family)
    set_to(**values)(folder / part)
    kind: Any = {"sd3": sd3, "sd15": sd15}[family]
    with pytest.raises(UserError, match=says) as error:
        kind.open_model(kind.ModelArgs(pretrained_model_name_or_path=str(folder)))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "model_index.json is damaged"),
        ("{}", r"model_index.json is damaged \(_class_name"),
        ('{"_class_name": "StableDiffusion3Pipeline", "tokenizer": ["a"]}', "its entry tokenizer"),
    ],
)
def test_a_damaged_index_is_said(text: str, says: str, copied: Copied) -> None:
    folder = copied("sd3")
    written("model_index.json", text)(folder)
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(folder))
    for load in (lambda: sd3.open_model(args), lambda: demo(folder)):
        refused(load, folder, "", says)


def test_a_class_that_is_not_there_is_named(copied: Copied) -> None:
    folder = copied("sd3")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "NoSuchTokenizer"]
    written("model_index.json", json.dumps(index))(folder)
    for load in (lambda: load_for_training(folder, "sd3", "text_encoder"), lambda: demo(folder)):
        refused(load, folder, "", "names NoSuchTokenizer for tokenizer_2")


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_a_variant_that_is_not_there_is_said(
    family: str, part: str, tiny_sd3: Path, tiny_sd15: Path
) -> None:
    folder = {"sd3": tiny_sd3, "sd15": tiny_sd15}[family]
    says = "it has no weights of the variant fp16"
    refused(lambda: load_for_training(folder, family, part, variant="fp16"), folder, "", says)


# -- names ------------------------------------------------------------------------------------


def classic_names(folder: Path) -> set[bool]:
    path = folder / "model.safetensors"
    return {name.startswith("text_model.") for name in tensors.read_header(path)[0]}


def test_both_spellings_of_clip_are_read_and_the_classic_one_is_written(
    tiny_sd15: Path, copied: Copied, tmp_path: Path
) -> None:
    folder = copied("sd15")
    path = weights(folder / "text_encoder")
    state = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    path.unlink()
    save_file(state, path, {"format": "pt"})
    assert classic_names(folder / "text_encoder") == {False}
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(folder))
    config = sd15.open_model(args)
    newer = config.load_text(torch.float32, CPU)(["a red star"])
    sd15.copy_parts(config, tmp_path / "result", ("text_encoder", "tokenizer"))
    assert classic_names(tmp_path / "result" / "text_encoder") == {True}
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(tmp_path / "result" / "text_encoder", folder / "text_encoder")
    older = config.load_text(torch.float32, CPU)(["a red star"])
    assert torch.equal(newer["prompt_embeds"], older["prompt_embeds"])


def test_shards_and_their_list_are_renamed_together(tiny_sd15: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(tiny_sd15 / "text_encoder", tmp_path / "text_encoder"))
    state = {name.removeprefix("text_model."): t for name, t in load_file(weights(part)).items()}
    weights(part).unlink()
    first = sorted(state)[:9]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, some in zip(files, (first, state.keys() - first), strict=True):
        save_file({name: state[name] for name in some}, part / file, {"format": "pt"})
    listed = {name: files[name not in first] for name in state}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    classic.rewrite(part)
    renamed = json.loads((part / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        found = load_file(part / file)
        assert {name for name, place in renamed.items() if place == file} == set(found)
        assert all(torch.equal(t, state[n.removeprefix("text_model.")]) for n, t in found.items())
    assert all(name.startswith("text_model.") for name in renamed)


def test_the_pocket_models_carry_the_classic_names() -> None:
    for part in (
        "pocket-sd15/text_encoder",
        "pocket-sd3/text_encoder",
        "pocket-sd3/text_encoder_2",
    ):
        header, _ = tensors.read_header(ROOT / "models" / part / "model.safetensors")
        assert {name.split(".")[0] for name in header} <= {"text_model", "text_projection"}


@pytest.mark.parametrize("prefix", ["", "vision_model.vision_model."])
def test_a_safety_checker_gets_the_names_of_the_published_ones(prefix: str) -> None:
    kind = "StableDiffusionSafetyChecker"
    names = [f"{prefix or 'vision_model.'}pre_layrnorm.bias", "concept_embeds"]
    renamed = ["vision_model.vision_model.pre_layrnorm.bias", "concept_embeds"]
    assert list(classic.rename(dict.fromkeys(names, 0), kind)) == renamed


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_found_among_many(dtype: torch.dtype, value: float) -> None:
    state = {f"{i}": torch.randn(7, 5).to(dtype) for i in range(9)}
    state |= {
        "empty": torch.zeros(0),
        "whole": torch.arange(3),
        "largest": torch.full((2,), 65504.0),
    }
    assert loaded.not_finite(state) == []
    state["3"][6, 4] = value
    assert loaded.not_finite(state) == ["3"]
