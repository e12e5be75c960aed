"""Claims about frozen layers that are stored packed: how near, how small, how exact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dojo import finetune, rng
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.offload import Storage
from dojo.models import opening, quantised, sd3
from dojo.models.family import Model, ModelArgs
from dojo.models.quantised import FrozenLinear, Precision
from dojo.run import cost
from tests.conftest import make_tiny
from tests.processes import together

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
PACKED: tuple[Precision, ...] = ("int8", "fp8", "nf4")
# Relative errors of a prediction. A UNet's convolutions are not packed, so it is nearer.
BOUNDS = {"int8": 0.02, "fp8": 0.03, "nf4": 0.08}
FAMILIES = ("sd3", "sd15", "sdxl")


def bitsandbytes(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")


@cache
def opened(folder: str) -> Model:
    return opening.open_model(ModelArgs(pretrained_model_name_or_path=folder))


def load(model: Model, precision: Precision = "bf16", dtype: Any = torch.float32) -> Any:
    store = Storage(precision)
    return model.load_network(dtype, CPU, prepare=store.prepare if store else None)


def predict(model: Model, network: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of two samples, with numbers in all that the network reads."""
    shape = model.latent_shape(64, 64)
    noisy, level, conditions = model.meta_inputs(2, shape, dtype)
    generator = torch.Generator().manual_seed(3)

    def filled(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    levels = [200, 900] if level.dtype == torch.int64 else [0.2, 0.9]
    known = {name: filled(tensor) for name, tensor in sorted(conditions.items())}
    at = torch.tensor(levels, dtype=level.dtype)
    return model.predict(network, filled(noisy), at, known, dtype)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    """A family's small model."""
    return opened(str(request.getfixturevalue(f"tiny_{request.param}")))


def learning(network: Any, **more: Any) -> list[nn.Parameter]:
    """Adapters of which every factor learns."""
    rng.seed_global(0, "adapter")
    params = lora.add(network, lora.LoraArgs(rank=4, **more))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in params:
            if not param.any():
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
    return params


def gradients(model: Model, network: Any) -> list[Tensor]:
    params = [param for param in network.parameters() if param.requires_grad]
    for param in params:
        param.grad = None
    predict(model, network).square().mean().backward()
    return [cast("Tensor", param.grad).clone() for param in params]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---- the formats ----


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_within_half_a_step_of_its_scale(
    precision: Precision, dtype: torch.dtype
) -> None:
    bitsandbytes(precision)
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-3
    packed = quantised.pack(weight, precision)
    size = sum(tensor.nbytes for tensor in packed)
    assert size == quantised.packed_bytes(weight.shape, precision, dtype)
    whole = quantised.unpack(packed, precision, weight.shape, dtype)
    assert whole.dtype == dtype
    assert not whole[3].any()
    largest = weight.float().abs().amax(1, keepdim=True)
    if precision == "nf4":  # 64 weights to a scale, the largest gap between two codes is 0.3039
        blocks = weight.float().view(192, 2, 64).abs().amax(2, keepdim=True)
        largest = blocks.expand(192, 2, 64).reshape(192, 128)
    half = {"int8": 0.5 / 127, "fp8": 2.0**-4, "nf4": 0.3039 / 2}[precision]
    rounded = 2 * torch.finfo(dtype).eps
    assert ((whole.float() - weight.float()).abs() <= (half + rounded) * largest).all()


def test_rows_are_packed_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(150, 32)
    for precision in PACKED:
        bitsandbytes(precision)
        expected = quantised.pack(weight, precision)
        with monkeypatch.context() as patch:
            patch.setattr(quantised, "_AT_A_TIME", 96)
            found = quantised.pack(weight, precision)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def averages() -> None:
    """In each of two processes: gradients behind a packed layer that both have from the first."""
    accelerator = accelerate.Accelerator(cpu=True)
    for precision in ("bf16", "int8", "fp8"):
        torch.manual_seed(accelerator.process_index)
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        network[1].requires_grad_(False)
        quantised.replace(network, "1", precision)
        wrapped: Any = accelerator.prepare(network)
        wrapped(torch.randn(2, 8)).square().mean().backward()
        gradient = cast("Tensor", network[0].weight.grad)
        for own in (*network.parameters(), gradient):
            everyones: Any = accelerator.gather(own.detach().flatten())
            assert torch.equal(*everyones.chunk(2)), precision
    accelerator.end_training()


def test_processes_have_the_same_packed_weights(tmp_path: Path) -> None:
    code, said = together(averages, (), tmp_path, None, 2)
    assert code == 0, said


# ---- a network ----


@dataclass
class Pair:
    """A network with adapters that have learned something, as it is and packed."""

    model: Model
    precision: Precision
    plain: Any
    packed: Any
    bases: tuple[Tensor, Tensor]
    """the predictions before they had adapters"""
    gradients: tuple[list[Tensor], list[Tensor]]


@pytest.fixture(
    scope="module",
    params=["sd3-int8", "sd3-fp8", "sd3-nf4", "sd15-int8", "sd15-nf4", "sdxl-nf4"],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    family, _, precision = request.param.partition("-")
    bitsandbytes(precision)
    model = opened(str(request.getfixturevalue(f"tiny_{family}")))
    networks = load(model), load(model, precision)
    with torch.no_grad():
        bases = predict(model, networks[0]), predict(model, networks[1])
    for network in networks:
        learning(network)
        network.train()
    found = gradients(model, networks[0]), gradients(model, networks[1])
    return Pair(model, precision, *networks, bases, found)


def test_a_prediction_stays_near_and_only_layers_of_blocks_are_packed(pair: Pair) -> None:
    error = apart(pair.bases[1], pair.bases[0])
    assert 1e-4 < error < BOUNDS[pair.precision]
    inside = {
        name
        for name, module in pair.plain.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and "lora" not in name
    }
    layers = {name: m for name, m in pair.packed.named_modules() if isinstance(m, FrozenLinear)}
    assert layers.keys() == inside
    kept = dict(pair.packed.named_parameters())
    for name, param in pair.plain.named_parameters():
        if name.rpartition(".")[0] not in inside or name.endswith("bias"):
            assert torch.equal(kept[name], param), name
    frozen = [param for param in pair.packed.parameters() if not param.requires_grad]
    there = sum(param.nbytes for param in frozen)
    assert Storage(pair.precision).bytes_of(pair.plain) == (there, 0)


def test_gradients_are_as_large_as_those_of_the_plain_network(pair: Pair) -> None:
    plain, packed = (float(torch.stack([g.norm() for g in one]).norm()) for one in pair.gradients)
    assert packed == pytest.approx(plain, rel=0.1)
    assert all(grad.any() and grad.isfinite().all() for grad in pair.gradients[1])


def test_the_backward_pass_keeps_no_whole_weight(pair: Pair) -> None:
    plain, packed = kept_bytes(pair.model, pair.plain), kept_bytes(pair.model, pair.packed)
    assert packed == plain


def test_recomputed_activations_give_the_same_bits(pair: Pair) -> None:
    pair.packed.enable_gradient_checkpointing()
    found = gradients(pair.model, pair.packed)
    pair.packed.disable_gradient_checkpointing()
    assert all(torch.equal(*both) for both in zip(found, pair.gradients[1], strict=True))


def test_gradients_are_the_derivative_of_the_packed_network(pair: Pair) -> None:
    """Those of a plain network that has the rounded weights, to the bit."""
    rounded = load(pair.model)
    with torch.no_grad():
        for name, module in pair.packed.named_modules():
            if isinstance(module, FrozenLinear):
                layer: Any = rounded.get_submodule(name.removesuffix(".base_layer"))
                layer.weight.copy_(module.weight)
    learning(rounded)
    found = gradients(pair.model, rounded)
    assert all(torch.equal(*both) for both in zip(found, pair.gradients[1], strict=True))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("folder", ["pocket-sd3", "pocket-sd15", "pocket-sdxl"])
def test_a_trained_model_stays_near_too(folder: str, precision: Precision) -> None:
    bitsandbytes(precision)
    model = opened(str(ROOT / "models" / folder))
    with torch.no_grad():
        plain = predict(model, load(model, "bf16", torch.bfloat16), torch.bfloat16)
        packed = predict(model, load(model, precision, torch.bfloat16), torch.bfloat16)
    assert apart(packed, plain) < BOUNDS[precision]


def kept_bytes(model: Model, network: Any) -> int:
    """Bytes that one forward pass keeps for the backward pass, weights not among them."""
    weights = {param.untyped_storage().data_ptr() for param in network.parameters()}
    seen: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(model, network)
    return sum(seen.values())


# ---- reading ----


def test_a_network_is_read_in_pieces_as_it_is_read_whole(model: Model) -> None:
    whole = model.load_network(torch.bfloat16, CPU).state_dict()
    asked = []
    pieces = model.load_network(
        torch.bfloat16, CPU, prepare=lambda network, _: asked.append(network.device.type)
    )
    assert asked == ["meta"]
    assert not pieces.training
    found = pieces.state_dict()
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_reading_never_holds_the_whole_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = {"num_layers": 12, "attention_head_dim": 16, "num_attention_heads": 4}
    folder = make_tiny(tmp_path / "deep", "sd3", {**deep, "caption_projection_dim": 64})
    model = opened(str(folder))
    meet = cost._Live._meet

    def counted(live: Any, tensor: Tensor, *, counts: bool) -> None:
        if tensor.device.type != "meta":  # there nothing takes anything
            meet(live, tensor, counts=counts)

    monkeypatch.setattr(cost._Live, "_meet", counted)
    for precision in ("int8", "nf4"):
        bitsandbytes(precision)
        peak = cost.live_bytes(partial(load, model, precision, torch.bfloat16))
        whole = sum(param.nbytes for param in load(model, "bf16", torch.bfloat16).parameters())
        kept = sum(param.nbytes for param in load(model, precision, torch.bfloat16).parameters())
        largest = 4 * max(param.numel() for param in model.meta_network().parameters())
        assert kept < 0.7 * whole
        assert kept <= peak < kept + 4 * largest < whole, (precision, peak, kept, largest, whole)


@pytest.mark.parametrize("damage", ["missing", "not finite", "other size"])
def test_a_damaged_network_is_refused_in_the_same_words(
    tiny_sd3: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3, folder)
    path = next((folder / "transformer").glob("*.safetensors"))
    state = load_file(path)
    name = "transformer_blocks.0.attn.to_q.weight"
    if damage == "missing":
        del state[name]
    elif damage == "not finite":
        state[name][0, 0] = torch.nan
    else:
        state[name] = state[name][:-1].clone()
    save_file(state, path)
    model = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(folder)))
    with pytest.raises(UserError) as whole:
        model.load_network(torch.float32, CPU)
    with pytest.raises(UserError) as pieces:
        load(model, "int8")
    assert str(pieces.value) == str(whole.value)
    assert "to_q" in str(whole.value)


# ---- what goes together ----


def test_merging_into_a_packed_network_is_refused(tiny_sd3: Path) -> None:
    model = opened(str(tiny_sd3))
    network = load(model, "int8")
    learning(network)
    with pytest.raises(UserError, match="cannot be merged"):
        network.fuse_lora()
    layer: Any = next(m for m in network.modules() if hasattr(m, "lora_A"))
    with pytest.raises(UserError, match=r"python -m dojo\.lora merge"):
        layer.merge()


def lycoris_shapes(kind: str, width: int) -> dict[str, tuple[int, int]]:
    """The tensors of a layer [width, width], as LyCORIS names and shapes them."""
    if kind == "LoKr":
        whole = {"lokr_w1": (4, 4)}
        return {**whole, "lokr_w2_a": (width // 4, 2), "lokr_w2_b": (2, width // 4)}
    halves = {"a": (width, 2), "b": (2, width)}
    return {f"hada_w{i}_{half}": size for i in (1, 2) for half, size in halves.items()}


def write_lycoris(kind: str, path: Path, width: int) -> Path:
    """A file with two layers of a small SD1.5."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    for layer in ("attn1_to_q", "attn1_to_out_0"):
        name = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{layer}"
        state[f"{name}.alpha"] = torch.tensor(1.0)
        for part, size in lycoris_shapes(kind, width).items():
            state[f"{name}.{part}"] = 0.3 * torch.randn(*size, generator=generator)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(("DoRA", "nf4"), ("LoHa", "int8"), ("LoKr", "nf4")),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("DoRA", "int8"), ("LoHa", "nf4"), ("LoKr", "int8"))
        ),
    ],
)
def test_other_adapters_learn_on_a_packed_network_too(
    kind: str, precision: Precision, tiny_sd15: Path, tmp_path: Path
) -> None:
    """As on a plain network that has the rounded weights, to the bit; a DoRA by their norms."""
    bitsandbytes(precision)
    model = opened(str(tiny_sd15))
    plain, packed, rounded = load(model), load(model, precision), load(model)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, FrozenLinear):
                layer: Any = rounded.get_submodule(name)
                layer.weight.copy_(module.weight)
        base = predict(model, packed)
    for network in (plain, packed, rounded):
        if kind == "DoRA":
            learning(network, use_dora=True)
        else:
            path = write_lycoris(kind, tmp_path / "start.safetensors", 80)
            args = lora.LoraArgs(init_lora_weights_path=str(path))
            lora.add_lycoris(path, network, args, "unet")
        network.train()
    assert not torch.equal(predict(model, packed), base)
    with lora.disabled(packed), torch.no_grad():
        assert torch.equal(predict(model, packed), base)

    found = {name: gradients(model, one) for name, one in (("plain", plain), ("packed", packed))}
    pairs = zip(found["packed"], gradients(model, rounded), strict=True)
    assert all(one.any() and torch.equal(one, other) for one, other in pairs)
    norms = {name: torch.cat([g.flatten() for g in one]).norm() for name, one in found.items()}
    assert float(norms["packed"]) == pytest.approx(float(norms["plain"]), rel=0.1)
    assert kept_bytes(model, packed) == kept_bytes(model, plain)
    packed.enable_gradient_checkpointing()
    pairs = zip(found["packed"], gradients(model, packed), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)

    for name, network in (("packed", packed), ("rounded", rounded)):
        lora.save(tmp_path / name, network)
    packed_file, file = (
        load_file(tmp_path / name / lora.WEIGHTS) for name in ("packed", "rounded")
    )
    assert packed_file.keys() == file.keys()
    assert all(torch.equal(packed_file[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_adapters_of_a_packed_network_are_files_like_any_others(
    tiny_sd3: Path, tmp_path: Path, precision: Precision
) -> None:
    bitsandbytes(precision)
    model = opened(str(tiny_sd3))
    states = []
    for kind in ("bf16", precision):
        network = load(model, kind)
        learning(network)
        lora.save(tmp_path / kind, network)
        states.append(load_file(tmp_path / kind / lora.WEIGHTS))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_a_dry_run_counts_is_what_is_stored(tiny_sd3: Path) -> None:
    model = opened(str(tiny_sd3))
    for storage in (Storage(), Storage("int8")):
        network = load(model, storage.precision, torch.bfloat16)
        stored = sum(param.nbytes for param in network.parameters())
        meta = nn.Module.to(model.meta_network().requires_grad_(False), torch.bfloat16)
        lora.add(meta, lora.LoraArgs(rank=4))
        assert storage.bytes_of(meta) == (stored, 0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"base_precision": "int8"}, "--base_precision int8.*--finetune lora.*--train_dtype bf16"),
        ({"blocks_on_cpu": 2}, "--blocks_on_cpu 2.*--finetune lora.*--activations_on_cpu"),
    ],
)
def test_weights_that_are_trained_are_not_stored_so(given: dict[str, Any], named: str) -> None:
    args = replace(lora.LoraArgs(), **given)
    with pytest.raises(UserError, match=named):
        finetune.choose(
            finetune.FinetuneArgs(finetune="full"),
            cast("Any", None),
            lora=args,
            full=finetune.WholeArgs(),
        )


def test_what_cannot_be_compiled_is_refused(tiny_sd3: Path) -> None:
    folder = str(tiny_sd3)
    compiled = sd3.ModelArgs(pretrained_model_name_or_path=folder, torch_compile=True)
    for args, flag in (
        (lora.LoraArgs(base_precision="int8"), "--base_precision"),
        (lora.LoraArgs(blocks_on_cpu=1), "--blocks_on_cpu"),
    ):
        with pytest.raises(UserError, match=f"--torch_compile does not go with {flag}"):
            finetune.Adapters(cast("Any", None), args).check_model(compiled)
    finetune.Adapters(cast("Any", None), lora.LoraArgs()).check_model(compiled)
    with pytest.raises(ValueError, match="--activations_on_cpu"):
        replace(compiled, activations_on_cpu=True)


def test_the_package_for_four_bits_is_asked_for_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dojo.finetune.lora.adapter.find_spec", lambda name: None)
    lora.LoraArgs(base_precision="int8").check_package()
    with pytest.raises(UserError, match="--base_precision nf4 needs the package bitsandbytes"):
        lora.LoraArgs(base_precision="nf4").check_package()
