"""Claims about adapters: which layers, which precision, what is saved and what is loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.models import sd3
from tests.processes import together

CLIP_TOKENS = 20


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(batch, 16, 8, 8),
        "encoder_hidden_states": draw(batch, CLIP_TOKENS + 24, 192),
        "pooled_projections": draw(batch, 160),
        "timestep": torch.linspace(100, 900, batch),
    }


def predict(model: Any) -> Tensor:
    return model(**inputs(), return_dict=False)[0]


@pytest.fixture
def base(tiny_sd3: Path) -> SD3Transformer2DModel:
    """The frozen MMDiT."""
    return load(tiny_sd3)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(folder))
    return sd3.open_model(args).load_network(dtype, torch.device("cpu"))


def trained(model: SD3Transformer2DModel, args: lora.LoraArgs) -> SD3Transformer2DModel:
    """The model with an adapter that does something."""
    params = lora.add(model, args)
    generator = torch.Generator().manual_seed(3)
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        # DoRA's magnitudes are one-dimensional and must stay near the norms of the weights.
        param.data = param.data * (1 + 0.1 * noise) if param.ndim == 1 else 0.1 * noise
    return model.eval()


# Which layers


def layers(model: SD3Transformer2DModel, *choice: str) -> set[str]:
    return set(lora.target_layers(model, choice))


def test_the_default_adapts_both_attentions_and_the_text_stream(
    base: SD3Transformer2DModel,
) -> None:
    # diffusers' list of names misses attn2, the second attention of SD3.5-Medium.
    found = layers(base, *lora.LoraArgs().lora_layers)
    four, added = ["to_q", "to_k", "to_v", "to_out.0"], ["add_q_proj", "add_k_proj", "add_v_proj"]
    expected = {f"transformer_blocks.{i}.attn.{name}" for i in range(4) for name in four + added}
    expected |= {f"transformer_blocks.{i}.attn.to_add_out" for i in range(3)}
    expected |= {f"transformer_blocks.{i}.attn2.{name}" for i in (0, 1) for name in four}
    assert found == expected - {"transformer_blocks.3.attn.add_q_proj"}


@pytest.mark.parametrize("choice", [("attn",), ("attn+ff",), ("all-linear",)])
def test_every_adapter_of_a_preset_gets_a_gradient(
    base: SD3Transformer2DModel, choice: tuple[str, ...]
) -> None:
    chosen = layers(base, *choice)
    lora.add(base, lora.LoraArgs(rank=2, lora_layers=choice))
    predict(base).square().mean().backward()
    ups = {name: p.grad for name, p in base.named_parameters() if "lora_B" in name}
    assert len(ups) == len(chosen)
    dead = [name for name, grad in ups.items() if grad is None or not grad.any()]
    assert dead == []


def test_presets_grow(base: SD3Transformer2DModel) -> None:
    attn, ff, every = layers(base, "attn"), layers(base, "attn+ff"), layers(base, "all-linear")
    assert attn < ff < every
    assert {name.split(".", 2)[2] for name in ff - attn} == {
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    }
    assert "transformer_blocks.0.norm1.linear" in every
    assert all(name.startswith("transformer_blocks.") for name in every)


def test_names_come_as_words_or_as_a_comma_list(base: SD3Transformer2DModel) -> None:
    both = layers(base, "attn.to_k", "attn.to_q")
    assert layers(base, "attn.to_k,attn.to_q") == layers(base, "attn.to_k, attn.to_q") == both
    assert both == {f"transformer_blocks.{i}.attn.to_{x}" for i in range(4) for x in "kq"}
    assert layers(base, "attn", "ff.net.2") == layers(base, "attn") | layers(base, "ff.net.2")


def test_a_dot_in_a_name_is_a_dot(base: SD3Transformer2DModel) -> None:
    with pytest.raises(UserError):
        lora.target_layers(base, ["attn_to.k"])
    with pytest.raises(UserError):
        lora.target_layers(base, ["tn.to_k"])  # the end of attn.to_k, but no whole part of it


def test_an_expression_is_matched_against_full_names(base: SD3Transformer2DModel) -> None:
    found = layers(base, r"re:transformer_blocks\.[12]\.attn\.to_(q|k)")
    assert found == {f"transformer_blocks.{i}.attn.to_{x}" for i in (1, 2) for x in "kq"}
    assert len(layers(base, r"re:.*\.attn\.to_q.{0,1}")) == 4  # a comma belongs to it


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["to_qq"], "'to_qq' matches no linear layer"),
        (["attn", "ff.net.9"], "'ff.net.9' matches no linear layer"),
        (["re:to_q"], "'re:to_q' matches no linear layer"),
        (["re:(to_q"], "no regular expression"),
        (["attn,"], "--lora_layers"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(
    base: SD3Transformer2DModel, choice: list[str], message: str
) -> None:
    with pytest.raises(UserError, match="--lora_layers") as refused:
        lora.target_layers(base, choice)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_choice_that_leaves_only_dead_layers_is_refused(base: SD3Transformer2DModel) -> None:
    with pytest.raises(UserError, match="--lora_layers"):
        lora.add(base, lora.LoraArgs(lora_layers=(r"re:transformer_blocks\.3\.attn\.add_q_proj",)))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"lora_alpha": 0.0}, {"lora_dropout": 1.0}, {"lora_layers": ()}]
)
def test_impossible_options_name_their_flag(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
        lora.LoraArgs(**options)


# Precision and the start


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_float32_on_a_bfloat16_base(tiny_sd3: Path, dora: bool) -> None:
    model = load(tiny_sd3, torch.bfloat16)
    params = lora.add(model, lora.LoraArgs(rank=2, use_dora=dora))
    assert {param.dtype for param in params} == {torch.float32}
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs(dtype=torch.bfloat16), return_dict=False)[0]
    out.float().square().mean().backward()
    assert {param.grad.dtype for param in params if param.grad is not None} == {torch.float32}
    # A step of Adam's usual size arrives: in bfloat16 it would be rounded away.
    before = [param.detach().clone() for param in params]
    torch.optim.AdamW(params, lr=1e-5, weight_decay=0).step()
    ups = [i for i, (name, _) in enumerate(named_trainable(model)) if "lora_B" in name]
    assert all((params[i] != before[i]).any() for i in ups)


def named_trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(base: SD3Transformer2DModel, dora: bool) -> None:
    with torch.no_grad():
        before = predict(base)
        lora.add(base, lora.LoraArgs(rank=4, use_dora=dora))
        torch.testing.assert_close(predict(base), before, rtol=0, atol=1e-5 if dora else 0)


def test_disabled_gives_the_base_model_back(base: SD3Transformer2DModel) -> None:
    with torch.no_grad():
        before = predict(base)
        trained(base, lora.LoraArgs(rank=4))
        after = predict(base)
        with lora.disabled(base):
            assert torch.equal(predict(base), before)
        assert torch.equal(predict(base), after)
        with pytest.raises(KeyError), lora.disabled(base):
            raise KeyError
        assert torch.equal(predict(base), after)  # also after an error
    assert not torch.allclose(before, after)


# Saving and loading


CHOICES = {
    "alpha above rank": lora.LoraArgs(rank=4, lora_alpha=10.0),
    "alpha below rank": lora.LoraArgs(rank=4, lora_alpha=1.0),
    "dora": lora.LoraArgs(rank=2, lora_alpha=6.0, use_dora=True),
    "regex": lora.LoraArgs(
        rank=3, lora_alpha=5.0, lora_layers=(r"re:transformer_blocks\.[02]\.(attn\.to_q|ff\..*)",)
    ),
    "all": lora.LoraArgs(rank=2, lora_alpha=7.0, lora_layers=("all-linear",)),
}


@pytest.mark.parametrize("args", CHOICES.values(), ids=CHOICES)
def test_plain_diffusers_computes_what_was_trained(
    base: SD3Transformer2DModel, tiny_sd3: Path, tmp_path: Path, args: lora.LoraArgs
) -> None:
    with torch.no_grad():
        plain = predict(base)
        expected = predict(trained(base, args))
        lora.save(tmp_path, base)
        pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            tiny_sd3, text_encoder=None, text_encoder_2=None, text_encoder_3=None, vae=None
        )
        pipeline.load_lora_weights(tmp_path)
        found = predict(pipeline.transformer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-3  # else nothing was shown


def test_the_saved_names_are_those_that_diffusers_writes(
    base: SD3Transformer2DModel, tmp_path: Path
) -> None:
    lora.add(base, lora.LoraArgs(rank=2))
    lora.save(tmp_path, base)
    saved = load_file(tmp_path / lora.WEIGHTS)
    assert {path.name for path in tmp_path.iterdir()} == {lora.WEIGHTS}
    assert "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight" in saved
    assert all(name.startswith("transformer.transformer_blocks.") for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def _save(folder: Path, model: Path) -> None:
    """Writes an adapter that hangs on the model alone, and this process's hash of a word."""
    network = load(model)
    torch.manual_seed(0)
    lora.add(network, lora.LoraArgs(rank=2, lora_alpha=3.0, lora_layers=("all-linear",)))
    lora.save(folder, network)
    (folder / "hash").write_text(str(hash("rank")))


def test_equal_weights_give_equal_bytes_in_any_process(tiny_sd3: Path, tmp_path: Path) -> None:
    _save(tmp_path / "here", tiny_sd3)
    code, said = together(_save, (tmp_path / "there", tiny_sd3), tmp_path)
    assert code == 0, said
    hashes = {(tmp_path / name / "hash").read_text() for name in ("here", "there")}
    assert len(hashes) == 2, "both processes have their names in one order"
    first, second = ((tmp_path / name / lora.WEIGHTS).read_bytes() for name in ("here", "there"))
    assert first == second


def test_restore_brings_every_bit_back(
    base: SD3Transformer2DModel, tiny_sd3: Path, tmp_path: Path
) -> None:
    args = lora.LoraArgs(rank=2, lora_alpha=3.0)
    lora.save(tmp_path, trained(base, args))
    other = load(tiny_sd3)
    lora.add(other, args)
    lora.restore(tmp_path, other)
    expected = lora.state(base)
    found = lora.state(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(param.requires_grad for _, param in named_trainable(other))


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"lora_layers": ("attn+ff",)}, {"lora_layers": ("to_q",)}]
)
def test_restore_refuses_another_adapter(
    base: SD3Transformer2DModel, tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    lora.add(base, lora.LoraArgs(rank=2))
    lora.save(tmp_path, base)
    other = load(tiny_sd3)
    lora.add(other, lora.LoraArgs(**{"rank": 2, **options}))
    with pytest.raises(UserError, match="does not fit"):
        lora.restore(tmp_path, other)


@pytest.fixture
def pipeline(tiny_sd3: Path) -> Any:
    """A pipeline to load files into."""
    return load_pipeline(tiny_sd3)


def load_pipeline(folder: Path) -> Any:
    """The parts that may be adapted, frozen, with both CLIPs' tokenizers."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        folder, vae=None, text_encoder_3=None, tokenizer_3=None
    )
    for model in adapted(pipeline):
        model.requires_grad_(False)
    return pipeline


def adapted(pipeline: Any) -> list[Any]:
    return [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]


def test_load_counts_what_arrived(
    base: SD3Transformer2DModel, pipeline: Any, tmp_path: Path
) -> None:
    trained(base, lora.LoraArgs(rank=2))
    lora.save(tmp_path, base)
    assert lora.load(pipeline, tmp_path, "mine") == len(lora.state(base))
    assert pipeline.get_list_adapters() == {"transformer": ["mine"]}


def test_a_file_without_metadata_is_loaded_too(
    base: SD3Transformer2DModel, pipeline: Any, tmp_path: Path
) -> None:
    trained(base, lora.LoraArgs(rank=2, lora_layers=("attn.to_k",)))
    lora.save(tmp_path, base)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    file = tmp_path / "mine.safetensors"
    save_file(tensors, file)  # no metadata, another name
    assert lora.load(pipeline, file, "mine") == len(tensors)


ALIEN = {
    "kohya": ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", (2, 192)),
    "comfy": ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", (2, 192)),
    "peft": ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", (2, 192)),
    "unet": ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", (2, 64)),
    "flux": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (2, 192)),
    "wider": ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (2, 1536)),
    "nonsense": ("hello", (2, 2)),
}


@pytest.mark.parametrize("name", ALIEN)
def test_a_file_of_which_nothing_fits_is_refused(pipeline: Any, tmp_path: Path, name: str) -> None:
    key, shape = ALIEN[name]
    up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    tensors = {key: torch.ones(shape), up: torch.ones(shape[1], shape[0])}
    save_file(tensors, tmp_path / "alien.safetensors")
    with pytest.raises(UserError, match="--lora_weights_path") as refused:
        lora.load(pipeline, tmp_path / "alien.safetensors", "alien")
    assert "alien.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_missing_or_broken_are_refused(
    base: SD3Transformer2DModel, pipeline: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    lora.add(base, lora.LoraArgs(rank=2))
    lora.save(tmp_path / "good", base)
    content = (tmp_path / "good" / lora.WEIGHTS).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    (tmp_path / "zero.safetensors").write_bytes(b"")
    names = ["none.safetensors", "no/such/folder", "empty", "half.safetensors", "text.safetensors"]
    for name in [*names, "zero.safetensors"]:
        with pytest.raises(UserError, match="--lora_weights_path") as refused:
            lora.load(pipeline, tmp_path / name, "mine")
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_hub_id_without_a_network_is_refused(pipeline: Any) -> None:
    with pytest.raises(UserError, match="someone/lora is neither"):
        lora.load(pipeline, "someone/lora", "mine")


# Text encoders


TOKENS = (torch.arange(40) % 11).reshape(2, 20)


def embed(model: Any) -> Tensor:
    output = model(TOKENS, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(), output[0].flatten()])


def three(pipeline: Any, args: lora.LoraArgs) -> list[torch.nn.Parameter]:
    """Adapters on the transformer and on both CLIPs."""
    transformer, clip_l, clip_g = adapted(pipeline)
    return [
        *lora.add(transformer, args),
        *lora.add_text(clip_l, args, 2),
        *lora.add_text(clip_g, args, 3),
    ]


def randomize(params: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    for param in params:
        param.data = 0.1 * torch.randn(param.shape, generator=generator)


def test_a_clip_adapts_its_attention_and_nothing_else(pipeline: Any) -> None:
    before = embed(pipeline.text_encoder)
    args = lora.LoraArgs(rank=4, lora_alpha=6.0)
    params = lora.add_text(pipeline.text_encoder.to(torch.bfloat16), args, 2)
    names = {name.rsplit(".", 2)[0] for name in lora.state(pipeline.text_encoder)}
    assert names == {
        f"text_model.encoder.layers.{i}.self_attn.{name}"
        for i in range(2)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert {param.dtype for param in params} == {torch.float32}
    trainable = {id(p) for p in pipeline.text_encoder.parameters() if p.requires_grad}
    assert trainable == {id(param) for param in params}
    # The scale is the transformer's: 6 / 4, whatever the rank.
    config = pipeline.text_encoder.peft_config[lora.ADAPTER]
    assert (config.r, config.lora_alpha) == (2, 3.0)
    torch.testing.assert_close(embed(pipeline.text_encoder.float()), before, rtol=0, atol=0.02)


@pytest.mark.parametrize("alpha", [1.0, 9.0])
def test_plain_diffusers_loads_all_three_parts(
    pipeline: Any, tiny_sd3: Path, tmp_path: Path, alpha: float
) -> None:
    randomize(three(pipeline, lora.LoraArgs(rank=4, lora_alpha=alpha)))
    lora.save(tmp_path, *adapted(pipeline))
    fresh = load_pipeline(tiny_sd3)
    with torch.no_grad():
        before = embed(fresh.text_encoder), embed(fresh.text_encoder_2)
        fresh.load_lora_weights(tmp_path)
        torch.testing.assert_close(
            predict(fresh.transformer), predict(pipeline.transformer), rtol=0, atol=1e-6
        )
        for i, part in enumerate(("text_encoder", "text_encoder_2")):
            found, expected = embed(getattr(fresh, part)), embed(getattr(pipeline, part))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert (found - before[i]).abs().max() > 1e-3
    assert fresh.get_list_adapters().keys() == {"transformer", "text_encoder", "text_encoder_2"}
    assert lora.load(load_pipeline(tiny_sd3), tmp_path, "mine") == len(
        load_file(tmp_path / lora.WEIGHTS)
    )


def test_the_two_clips_are_not_taken_for_each_other(
    pipeline: Any, tiny_sd3: Path, tmp_path: Path
) -> None:
    # Both have one class: a loader that asks for the class finds the first one twice.
    randomize(three(pipeline, lora.LoraArgs(rank=4)))
    lora.save(tmp_path, *adapted(pipeline))
    saved = load_file(tmp_path / lora.WEIGHTS)
    shapes = {
        part: {tuple(x.shape) for n, x in saved.items() if n.startswith(f"{part}.") and "A" in n}
        for part in ("text_encoder", "text_encoder_2")
    }
    assert shapes == {"text_encoder": {(2, 64)}, "text_encoder_2": {(3, 96)}}
    other = load_pipeline(tiny_sd3)
    three(other, lora.LoraArgs(rank=4))
    assert not torch.equal(embed(other.text_encoder_2), embed(pipeline.text_encoder_2))
    lora.restore(tmp_path, *adapted(other))
    for ours, theirs in zip(adapted(pipeline), adapted(other), strict=True):
        first, second = lora.state(ours), lora.state(theirs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_restored_run_goes_on_bit_for_bit(tiny_sd3: Path, tmp_path: Path) -> None:
    def begin() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        pipeline = load_pipeline(tiny_sd3)
        return pipeline, torch.optim.AdamW(three(pipeline, lora.LoraArgs(rank=2)), lr=1e-2)

    def train(pipeline: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            _, *clips = adapted(pipeline)
            loss = sum(embed(clip).square().mean() for clip in clips)
            (loss + predict(pipeline.transformer).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = begin()
    train(whole, optimizer, 2)
    lora.save(tmp_path, *adapted(whole))
    moments = copy.deepcopy(optimizer.state_dict())
    resumed, second = begin()
    lora.restore(tmp_path, *adapted(resumed))
    second.load_state_dict(moments)
    train(whole, optimizer, 2)
    train(resumed, second, 2)
    for ours, theirs in zip(adapted(whole), adapted(resumed), strict=True):
        first, found = lora.state(ours), lora.state(theirs)
        assert all(torch.equal(first[name], found[name]) for name in first)


def test_restore_wants_every_part_and_no_more(
    pipeline: Any, tiny_sd3: Path, tmp_path: Path
) -> None:
    args = lora.LoraArgs(rank=2)
    three(pipeline, args)
    lora.save(tmp_path / "three", *adapted(pipeline))
    lora.save(tmp_path / "one", pipeline.transformer)
    with pytest.raises(UserError, match="text_encoder"):
        lora.restore(tmp_path / "three", pipeline.transformer)
    with pytest.raises(UserError, match="text_encoder"):
        lora.restore(tmp_path / "one", *adapted(pipeline))
    lora.restore(tmp_path / "one", pipeline.transformer)
