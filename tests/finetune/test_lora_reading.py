"""Claims about the LoRA files of every trainer: read at their own strength, or refused by name."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora import __main__ as command_line
from dojo.finetune.lora import formats, reading
from dojo.finetune.lora.layers import Factors, Lora

State = dict[str, Tensor]
Name = Callable[[str, str], str]
"""A layer's part, and its name in diffusers, to the name in a file."""

RANK = 3
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "text_model.encoder.layers.0"
SD15 = {
    "unet": (
        *(f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_out.0")),
        *(f"{BLOCK}.attn2.to_v", f"{BLOCK}.ff.net.0.proj", "mid_block.resnets.0.time_emb_proj"),
    ),
    "text_encoder": (f"{CLIP}.self_attn.q_proj", f"{CLIP}.self_attn.out_proj", f"{CLIP}.mlp.fc1"),
}
CONVOLUTIONS = (
    *("down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"),
    *("down_blocks.0.downsamplers.0.conv", "conv_in"),
)
MMDIT = (
    *(f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("transformer_blocks.2.ff.net.0.proj", "transformer_blocks.3.norm1_context.linear"),
)
SD3 = {
    "transformer": MMDIT,
    "text_encoder": (f"{CLIP}.self_attn.k_proj", f"{CLIP}.mlp.fc2", "text_projection"),
    "text_encoder_2": (f"{CLIP}.self_attn.v_proj",),
}


@pytest.fixture(scope="module")
def sd15_parts(tiny_sd15: Path) -> dict[str, nn.Module]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd15, subfolder="text_encoder"),
    }


@pytest.fixture(scope="module")
def sd3_parts(tiny_sd3: Path) -> dict[str, nn.Module]:
    clip: Any = CLIPTextModelWithProjection
    return {
        "transformer": SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer"),
        "text_encoder": clip.from_pretrained(tiny_sd3, subfolder="text_encoder"),
        "text_encoder_2": clip.from_pretrained(tiny_sd3, subfolder="text_encoder_2"),
    }


def fresh(parts: dict[str, nn.Module]) -> Any:
    """What `lora.load` needs of a pipeline."""
    return SimpleNamespace(**copy.deepcopy(parts))


@torch.no_grad()
def outputs(models: Any) -> dict[str, Tensor]:
    """What each part computes."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {}
    if hasattr(models, "unet"):
        time, text = torch.tensor([100, 900]), draw(2, 20, 64)
        found["unet"] = models.unet(draw(2, 4, 8, 8), time, encoder_hidden_states=text)[0]
    else:
        found["transformer"] = models.transformer(
            hidden_states=draw(2, 16, 4, 4),
            encoder_hidden_states=draw(2, 20, 192),
            pooled_projections=draw(2, 160),
            timestep=torch.tensor([100.0, 900.0]),
        )[0]
    for part in ("text_encoder", "text_encoder_2"):
        if hasattr(models, part):
            output = getattr(models, part)(torch.arange(20)[None] % 7, output_hidden_states=True)
            found[part] = torch.cat([output.hidden_states[-1].flatten(), output[0].flatten()])
    return found


def module_of(models: Any, part: str, name: str) -> Any:
    modules = dict(getattr(models, part).named_modules())
    return modules.get(name) or modules[name.removeprefix("text_model.")]


def update(parts: dict[str, nn.Module], layers: dict[str, tuple[str, ...]], alphas: str) -> Lora:
    """Random factors of some layers; alphas as the rank, as another number, or mixed."""
    generator = torch.Generator().manual_seed(3)
    models, found = SimpleNamespace(**parts), {}
    for part, names in layers.items():
        for i, name in enumerate(names):
            shape = module_of(models, part, name).weight.shape
            up = 0.2 * torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator)
            down = 0.2 * torch.randn(RANK, *shape[1:], generator=generator)
            alpha = {"rank": RANK, "other": 1.5, "mixed": (0.75, 3.0, 12.0)[i % 3]}[alphas]
            found.setdefault(part, {})[name] = Factors(down, up, float(alpha))
    return found


def merged(parts: dict[str, nn.Module], lora_: Lora) -> dict[str, Tensor]:
    """The reference: what the models compute with the updates in their weights."""
    models = fresh(parts)
    for part, layers in lora_.items():
        for name, factors in layers.items():
            weight = module_of(models, part, name).weight
            product = factors.up.flatten(1) @ factors.down.flatten(1)
            weight.data += factors.alpha / RANK * product.reshape(weight.shape)
    return outputs(models)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=0, atol=atol)


def moved(parts: dict[str, nn.Module], expected: dict[str, Tensor], lora_: Lora) -> None:
    """The reference differs from the base wherever there is an update: else nothing is shown."""
    base = outputs(SimpleNamespace(**parts))
    assert all((expected[part] - base[part]).abs().max() > 1e-3 for part in lora_)


# Every trainer's names


def flat(prefixes: dict[str, str]) -> Name:
    return lambda part, name: prefixes[part] + name.replace(".", "_")


def dotted(prefix: str = "") -> Name:
    return lambda part, name: f"{part}.{prefix}{name}"


def state_of(lora_: Lora, name: Name, factors: str = "lora_down lora_up") -> State:
    """A file's tensors; alphas as tensors where they are not the rank."""
    down, up = factors.split()
    state = {}
    for part, layers in lora_.items():
        for layer, one in layers.items():
            key = name(part, layer)
            state |= {f"{key}.{down}.weight": one.down, f"{key}.{up}.weight": one.up}
            if one.alpha != RANK:
                state[f"{key}.alpha"] = torch.tensor(one.alpha)
    return {key: value.clone() for key, value in state.items()}


KOHYA_SD1 = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
ONETRAINER = {
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
PEFT = "lora_A lora_B"


def flat_clip(part: str, name: str) -> str:
    """kohya's names, of a text encoder without its head."""
    return flat(KOHYA_SD1)(part, name.removeprefix("text_model."))


# By name: the alphas that it can say, the layers' names, the factors' names.
SPELLINGS_SD15: dict[str, tuple[str, Name, str]] = {
    "kohya": ("mixed", flat(KOHYA_SD1), "lora_down lora_up"),
    "kohya of a flat text encoder": ("mixed", flat_clip, "lora_down lora_up"),
    "kohya of a compiled model": (
        *("mixed", lambda p, n: KOHYA_SD1[p] + "_orig_mod_" + n.replace(".", "_")),
        "lora_down lora_up",
    ),
    "diffusers with alphas": ("mixed", dotted(), PEFT),
    "diffusers' names, kohya's ends": ("mixed", dotted(), "lora_down lora_up"),
    "old diffusers": ("rank", dotted(), "lora.down lora.up"),
    "a compiled model's": ("mixed", dotted("_orig_mod."), PEFT),
    "peft's in a part": ("rank", dotted("base_model.model."), PEFT),
    "with the adapter's name": ("rank", dotted(), "lora_A.default lora_B.default"),
}
SPELLINGS_SD3: dict[str, tuple[str, Name, str]] = {
    "OneTrainer": ("mixed", flat(ONETRAINER), "lora_down lora_up"),
    "LyCORIS": ("mixed", flat({**ONETRAINER, "transformer": "lycoris_"}), "lora_down lora_up"),
    "diffusers with alphas": ("mixed", dotted(), PEFT),
    "diffusers' names, kohya's ends": ("mixed", dotted(), "lora_down lora_up"),
    "a compiled block's": (
        *("mixed", lambda p, n: f"{p}.{n.replace('.attn.', '._orig_mod.attn.')}"),
        PEFT,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS_SD15)
def test_names_for_sd1_are_read_at_their_strength(
    sd15_parts: dict[str, nn.Module], tmp_path: Path, spelling: str
) -> None:
    alphas, name, factors = SPELLINGS_SD15[spelling]
    wanted = update(sd15_parts, {**SD15, "unet": SD15["unet"] + CONVOLUTIONS}, alphas)
    check_spelling(sd15_parts, wanted, state_of(wanted, name, factors), tmp_path)


@pytest.mark.parametrize("spelling", SPELLINGS_SD3)
def test_names_for_sd3_are_read_at_their_strength(
    sd3_parts: dict[str, nn.Module], tmp_path: Path, spelling: str
) -> None:
    alphas, name, factors = SPELLINGS_SD3[spelling]
    wanted = update(sd3_parts, SD3, alphas)
    check_spelling(sd3_parts, wanted, state_of(wanted, name, factors), tmp_path)


def check_spelling(
    parts: dict[str, nn.Module], wanted: Lora, state: State, folder: Path, name: str = "x"
) -> None:
    """Loaded, all is there, as strong as it was meant, and nothing else has happened."""
    save_file(state, folder / f"{name}.safetensors")
    expected, models = merged(parts, wanted), fresh(parts)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    count = lora.load(models, folder / f"{name}.safetensors", "mine")
    assert torch.equal(torch.get_rng_state(), before)
    assert count == 2 * sum(map(len, wanted.values()))
    close(outputs(models), expected)
    moved(parts, expected, wanted)
    for model in vars(models).values():
        assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_the_oldest_names_of_diffusers_are_read(
    sd15_parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    names = tuple(name for name in SD15["unet"] if ".attn" in name)
    wanted = update(sd15_parts, {"unet": names, "text_encoder": SD15["text_encoder"][:2]}, "rank")
    state = {}
    for part, layers in wanted.items():
        for layer, factors in layers.items():
            inside, _, kind = layer.removesuffix(".0").rpartition(".")
            kind = kind.removesuffix("_proj").removeprefix("to_")
            processor = ".processor" if part == "unet" else ""
            key = f"{part}.{inside}{processor}.to_{kind}_lora"
            state |= {f"{key}.down.weight": factors.down, f"{key}.up.weight": factors.up}
    check_spelling(sd15_parts, wanted, state, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_has_its_alpha_in_the_configuration(
    sd3_parts: dict[str, nn.Module], tmp_path: Path, rslora: bool
) -> None:
    wanted = update(sd3_parts, {"transformer": MMDIT}, "other")
    rank_only = {n: Factors(f.down, f.up, RANK) for n, f in wanted["transformer"].items()}
    state = state_of({"transformer": rank_only}, lambda _, name: f"base_model.model.{name}", PEFT)
    alpha = 1.5 / RANK**0.5 if rslora else 1.5
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_rslora": rslora}
    (tmp_path / reading.PEFT_CONFIG).write_text(json.dumps(config))
    check_spelling(sd3_parts, wanted, state, tmp_path, "adapter_model")
    folder = fresh(sd3_parts)
    lora.load(folder, tmp_path, "mine")
    close(outputs(folder), merged(sd3_parts, wanted))


def test_half_precision_is_read_as_it_was_rounded(
    sd15_parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    wanted = update(sd15_parts, SD15, "mixed")
    for dtype in (torch.float16, torch.bfloat16):
        state = {n: x.to(dtype) for n, x in state_of(wanted, flat(KOHYA_SD1)).items()}
        rounded = {
            part: {
                name: Factors(f.down.to(dtype).float(), f.up.to(dtype).float(), f.alpha)
                for name, f in layers.items()
            }
            for part, layers in wanted.items()
        }
        check_spelling(sd15_parts, rounded, state, tmp_path)


def test_a_core_between_the_factors_is_contracted(
    sd15_parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    name = "down_blocks.0.downsamplers.0.conv"
    models, tuned = fresh(sd15_parts), fresh(sd15_parts)
    layer = models.unet.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(2, layer.in_channels, 1, 1, generator=generator)
    core = torch.randn(3, 2, 3, 3, generator=generator)
    up = torch.randn(layer.out_channels, 3, 1, 1, generator=generator)

    def add(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The three convolutions one after another, as LyCORIS computes them."""
        narrow = nn.functional.conv2d(inputs[0], down)
        inside = nn.functional.conv2d(narrow, core, None, module.stride, module.padding)
        return output + 0.5 * nn.functional.conv2d(inside, up)

    layer.register_forward_hook(add)
    key = f"lora_unet_{name.replace('.', '_')}"
    parts = {"lora_down": down, "lora_mid": core, "lora_up": up}
    state = {f"{key}.{part}.weight": value for part, value in parts.items()}
    save_file({**state, f"{key}.alpha": torch.tensor(1.5)}, tmp_path / "x.safetensors")
    lora.load(tuned, tmp_path / "x.safetensors", "mine")
    close(outputs(tuned), outputs(models))


def test_a_dora_of_kohya_is_applied_exactly(
    sd15_parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    wanted = update(sd15_parts, {"unet": SD15["unet"] + CONVOLUTIONS}, "mixed")
    state = state_of(wanted, flat(KOHYA_SD1))
    models, tuned = fresh(sd15_parts), fresh(sd15_parts)
    generator = torch.Generator().manual_seed(1)
    for name, factors in wanted["unet"].items():
        weight = models.unet.get_submodule(name).weight
        norms = torch.rand(len(weight), *(1 for _ in weight.shape[1:]), generator=generator) + 0.5
        state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = norms
        product = factors.up.flatten(1) @ factors.down.flatten(1)
        new = weight.data + factors.scale * product.reshape(weight.shape)
        weight.data = norms * new / new.flatten(1).norm(dim=1).reshape(norms.shape)
    save_file(state, tmp_path / "x.safetensors")
    lora.load(tuned, tmp_path / "x.safetensors", "mine")
    close(outputs(tuned), outputs(models), 1e-4)
    # In diffusers' format it is the same; the others have no form for it.
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    again = fresh(sd15_parts)
    lora.load(again, tmp_path / "y.safetensors", "mine")
    close(outputs(again), outputs(tuned), 0)
    with pytest.raises(UserError, match="DoRA"):
        convert(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "kohya")


# From format to format


def convert(source: Path, target: Path, form: formats.Format, *, partial: bool = False) -> None:
    command_line.main(
        command_line.Args(input=str(source), output=target, lora_format=form, partial=partial)
    )


@pytest.mark.parametrize("alphas", ["rank", "other", "mixed"])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_way_through_all_formats_changes_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, alphas: str
) -> None:
    parts: dict[str, nn.Module] = request.getfixturevalue(f"{family}_parts")
    layers = {**SD15, "unet": SD15["unet"] + CONVOLUTIONS} if family == "sd15" else SD3
    wanted = update(parts, layers, alphas)
    formats.write(tmp_path / "0.safetensors", wanted, "diffusers")
    expected = merged(parts, wanted)
    way: tuple[formats.Format, ...] = ("kohya", "diffusers", "comfyui", "kohya", "comfyui")
    for i, form in enumerate((*way, "diffusers")):
        target = tmp_path / f"{i + 1}.safetensors"
        convert(tmp_path / f"{i}.safetensors", target, form)
        models = fresh(parts)
        lora.load(models, target, "mine")
        close(outputs(models), expected)
    moved(parts, expected, wanted)
    names = {name.rpartition(".lora")[0] for name in load_file(tmp_path / "1.safetensors")}
    encoder = "lora_te_" if family == "sd15" else "lora_te1_"
    assert any(name.startswith(f"{encoder}text_model_encoder_layers_0_mlp") for name in names)
    # What the last step wrote, plain diffusers reads.
    folder = request.getfixturevalue(f"tiny_{family}")
    if family == "sd15":
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, vae=None)
    else:
        without_t5: Any = {"vae": None, "text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without_t5)
    pipeline.load_lora_weights(str(tmp_path), weight_name="6.safetensors")
    close(outputs(SimpleNamespace(**{part: getattr(pipeline, part) for part in parts})), expected)


# What cannot be taken over


@pytest.fixture
def good(sd15_parts: dict[str, nn.Module]) -> State:
    """A file of kohya for SD1 that everything can be done with: six layers of the UNet."""
    return state_of(update(sd15_parts, {"unet": SD15["unet"]}, "other"), flat(KOHYA_SD1))


KEYS = [f"lora_unet_{name.replace('.', '_')}" for name in SD15["unet"]]
FIRST = KEYS[0]


def without(state: State, *ends: str) -> State:
    return {name: value for name, value in state.items() if not name.endswith(ends)}


def replaced(state: State, name: str, value: Tensor) -> State:
    return {**state, name: value}


def loha(state: State, keys: list[str]) -> State:
    kept = {n: v for n, v in state.items() if not n.startswith(tuple(f"{k}." for k in keys))}
    ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
    return kept | {f"{key}.{end}": torch.ones(1) for key in keys for end in ends}


# A file made from the good one, and what is said of it.
BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "broken LoHa": (
        lambda s: loha(s, KEYS),
        r"6 of 6 layers .* (LoHa, such as|shapes that do not)",
    ),
    "half broken": (lambda s: loha(s, KEYS[:3]), r"3 of 6 .* 3 are .*convert --partial"),
    "half a LoKr": (lambda _: {f"{k}.lokr_w1": torch.ones(1) for k in KEYS}, r"6 are .*LoKr, such"),
    "unknown LoKr": (lambda _: {"x.y.lokr_w1": torch.ones(1)}, r"LoKr, such as x.y.lokr_w1"),
    "bias": (lambda s: replaced(s, f"{FIRST}.diff_b", torch.ones(1)), r"1 of 6 .* \S+\.diff_b"),
    "peft's bias": (lambda s: replaced(s, f"{FIRST}.lora_up.bias", torch.ones(1)), "a bias of"),
    "without up": (lambda s: without(s, f"{FIRST}.lora_up.weight"), r"1 of 6 .* without lora_B"),
    "without down": (lambda s: without(s, f"{FIRST}.lora_down.weight"), "without lora_A"),
    "NaN": (
        lambda s: replaced(s, f"{FIRST}.lora_up.weight", s[f"{FIRST}.lora_up.weight"] / 0),
        "1 of 6 .* not finite",
    ),
    "rank 0": (
        lambda s: replaced(
            replaced(s, f"{FIRST}.lora_up.weight", torch.ones(64, 0)),
            *(f"{FIRST}.lora_down.weight", torch.ones(0, 64)),
        ),
        "of rank 0",
    ),
    "two ranks": (
        lambda s: replaced(s, f"{FIRST}.lora_up.weight", torch.ones(64, 9)),
        "shapes that do not belong together",
    ),
    "alpha 0": (
        lambda s: {n: v * 0 if n.endswith("alpha") else v for n, v in s.items()},
        "does nothing: its alpha is 0",
    ),
    "DoRA over columns": (
        lambda s: s | {f"{key}.dora_scale": torch.ones(1, 64) for key in KEYS},
        r"6 are a DoRA over the columns \(dora_scale \[1, in\]\)",
    ),
    "half DoRA": (
        lambda s: replaced(s, f"{FIRST}.dora_scale", torch.ones(64, 1)),
        "some layers of the unet as a DoRA and some as a plain LoRA",
    ),
    "twice": (
        lambda s: s | {n.replace(FIRST, f"unet.{SD15['unet'][0]}"): v for n, v in s.items()},
        "there twice",
    ),
    "SDXL": (
        lambda s: {
            n.replace("down_blocks_0_attentions_0", "input_blocks_4_1"): v for n, v in s.items()
        },
        r"5 of 6 layers have no place .* unet.down_blocks.1.attentions.1.transformer_blocks.0",
    ),
    "FLUX": (
        lambda s: {n.replace("down_blocks_0", "double_blocks_0"): v for n, v in s.items()},
        "is a LoRA for FLUX",
    ),
    "no LoRA": (lambda _: {"unet.conv_in.weight": torch.ones(1)}, r"no LoRA .*'unet.conv_in.weig"),
    "empty": (lambda _: {}, "there is no tensor in it"),
    "larger": (
        lambda s: {n: v.repeat(1, 2) if "lora_down" in n else v for n, v in s.items()},
        r"to_k has another size in this model \(\[64, 64\], not \[64, 128\]\)",
    ),
    "mostly lost": (
        lambda s: {n.replace("blocks_0_att", "blocks_9_att"): v for n, v in s.items()},
        r"5 of 6 layers have no place in this model's network, such as unet.down_blocks.9",
    ),
    "all lost": (
        lambda s: {n.replace("lora_unet_", "lora_unet_my_"): v for n, v in s.items()},
        "not one layer fits this model, such as lora_unet_my_",
    ),
}


def refusals(path: Path, parts: dict[str, nn.Module], *, to_convert: bool) -> Iterator[str]:
    """What demo, the start of a training and the conversion say of a file."""
    with pytest.raises(UserError, match="--lora_weights_path") as refused:
        lora.load(fresh(parts), path, "mine")
    yield str(refused.value)
    unet: Any = fresh(parts).unet
    args = lora.LoraArgs(rank=8, lora_layers=("attn+ff",), init_lora_weights_path=str(path))
    lora.add(unet, args)
    with pytest.raises(UserError, match="--init_lora_weights_path") as refused:
        lora.start_from(args, unet)
    yield str(refused.value)
    if to_convert:
        with pytest.raises(UserError, match="--input") as refused:
            convert(path, path.with_name("out.safetensors"), "diffusers")
        yield str(refused.value)
        assert not path.with_name("out.safetensors").exists()


@pytest.mark.parametrize("case", BAD)
def test_one_file_has_one_answer(
    sd15_parts: dict[str, nn.Module], good: State, tmp_path: Path, case: str
) -> None:
    make, said = BAD[case]
    save_file(
        {name: value.clone() for name, value in make(good).items()}, tmp_path / "x.safetensors"
    )
    # The conversion has no model: it cannot know that the UNet has no tenth block.
    to_convert = case not in ("larger", "mostly lost", "SDXL")
    for message in refusals(tmp_path / "x.safetensors", sd15_parts, to_convert=to_convert):
        assert re.search(said, message), message
        assert "x.safetensors" in message
        assert "\n" not in message


@pytest.mark.parametrize("case", ["x.pt", "zero bytes", "peft alone", "IA3", "PiSSA", "header"])
def test_files_that_are_not_what_they_seem_get_one_sentence(
    sd15_parts: dict[str, nn.Module], good: State, tmp_path: Path, case: str
) -> None:
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / reading.PEFT_CONFIG
    if case == "x.pt":
        path = tmp_path / "x.pt"
    save_file(good, path, {reading.METADATA: "{" if case == "header" else "{}"})
    if case == "zero bytes":
        path.write_bytes(b"")
    elif case in ("peft alone", "IA3", "PiSSA"):
        save_file(good, path)
    if case in ("IA3", "PiSSA"):
        settings = {"peft_type": "LORA" if case == "PiSSA" else case}
        config.write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))
    said = {
        "x.pt": "is a pickle",
        "zero bytes": "cannot be read",
        "peft alone": "adapter_config.json, which has its alpha, is not beside it",
        "IA3": "is no LoRA: adapter_config.json calls it IA3",
        "PiSSA": "began from pissa",
        "header": "settings of its adapter are broken",
    }
    for message in refusals(path, sd15_parts, to_convert=True):
        assert said[case] in message


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_asked_for_the_rest_is_written_without_the_whole_layer(
    sd15_parts: dict[str, nn.Module],
    good: State,
    tmp_path: Path,
    form: formats.Format,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = replaced(loha(good, KEYS[1:2]), f"{FIRST}.diff_b", torch.ones(64))
    save_file(state, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", form, partial=True)
    said = capsys.readouterr().out
    assert f"left out: {FIRST}" in said
    assert f"left out: {KEYS[1]}" in said
    wanted = update(sd15_parts, {"unet": SD15["unet"]}, "other")
    for name in SD15["unet"][:2]:
        del wanted["unet"][name]
    models = fresh(sd15_parts)
    lora.load(models, tmp_path / "y.safetensors", "mine")
    close(outputs(models), merged(sd15_parts, wanted))
    save_file(loha(good, KEYS), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="LoHa"):
        convert(tmp_path / "x.safetensors", tmp_path / "z.safetensors", form, partial=True)


@pytest.mark.parametrize("name", [flat(KOHYA_SD1), dotted()])
def test_layers_without_a_place_are_counted(
    sd15_parts: dict[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: Name,
) -> None:
    wanted = update(sd15_parts, {"unet": SD15["unet"]}, "other")
    layers = wanted["unet"]
    renamed = {layer.replace("attn1", "attn7"): factors for layer, factors in layers.items()}
    save_file(state_of({"unet": renamed}, name), tmp_path / "x.safetensors")
    models = fresh(sd15_parts)
    assert lora.load(models, tmp_path / "x.safetensors", "mine") == 2 * 3
    assert "3 layers have no place in this model, such as unet." in capsys.readouterr().out
    kept = {layer: factors for layer, factors in layers.items() if "attn1" not in layer}
    close(outputs(models), merged(sd15_parts, {"unet": kept}))


# Text encoders of both spellings


def test_what_is_saved_of_a_flat_text_encoder_has_the_classic_names(
    sd15_parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    models = fresh(sd15_parts)
    args = lora.LoraArgs(rank=2)
    for param in [*lora.add(models.unet, args), *lora.add_text(models.text_encoder, args)]:
        param.data = 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3))
    lora.save(tmp_path, models.unet, models.text_encoder)
    saved = load_file(tmp_path / lora.WEIGHTS)
    names = [name for name in saved if name.startswith("text_encoder.")]
    assert names
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)
    other = fresh(sd15_parts)
    lora.add(other.unet, args)
    lora.add_text(other.text_encoder, args)
    lora.restore(tmp_path, other.unet, other.text_encoder)
    loaded = fresh(sd15_parts)
    lora.load(loaded, tmp_path, "mine")
    for found in (other, loaded):
        close(outputs(found), outputs(models), 1e-6)
