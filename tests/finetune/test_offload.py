"""Claims about weights and activations that lie in CPU memory: same bits, nothing kept, next ones
brought beforehand. The CPU plays both devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dojo import finetune, rng
from dojo.cli import UserError
from dojo.finetune import Adapters, lora, offload
from dojo.finetune.offload import Belt, Storage
from dojo.models import opening
from dojo.models.family import Model, ModelArgs
from dojo.models.quantised import FrozenLinear, Precision

CPU = torch.device("cpu")
EACH = [("sd3", "bf16"), ("sd3", "int8"), ("sd15", "bf16"), ("sdxl", "nf4")]


@cache
def opened(folder: str) -> Model:
    return opening.open_model(ModelArgs(pretrained_model_name_or_path=folder))


def load(model: Model, storage: Storage) -> Any:
    """A network with adapters of which every factor learns."""
    store = storage.prepare if storage else None
    network = model.load_network(torch.float32, CPU, prepare=store)
    rng.seed_global(0, "adapter")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in lora.add(network, lora.LoraArgs(rank=4)):
            if not param.any():
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
    return network.train()


def gradients(model: Model, network: Any) -> list[Tensor]:
    params = [param for param in network.parameters() if param.requires_grad]
    for param in params:
        param.grad = None
    loss(model, network).backward()
    return [cast("Tensor", param.grad).clone() for param in params]


def loss(model: Model, network: Any) -> Tensor:
    """Of two samples, with numbers in all that the network reads."""
    noisy, level, conditions = model.meta_inputs(2, model.latent_shape(64, 64), torch.float32)
    generator = torch.Generator().manual_seed(3)

    def filled(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    known = {name: filled(tensor) for name, tensor in sorted(conditions.items())}
    levels = [200, 900] if level.dtype == torch.int64 else [0.2, 0.9]
    at = torch.tensor(levels, dtype=level.dtype)
    return model.predict(network, filled(noisy), at, known, torch.float32).square().mean()


def belt_of(network: nn.Module) -> Belt:
    (belt,) = offload.belts(network)
    return belt


@pytest.fixture(scope="module", params=EACH, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Model, Precision, list[Tensor]]:
    """A model, how its weights are stored, and the gradients with all of them on the device."""
    family, precision = request.param
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    model = opened(str(request.getfixturevalue(f"tiny_{family}")))
    return model, precision, gradients(model, load(model, Storage(precision)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [1, "all"])
def test_gradients_keep_their_bits_wherever_the_weights_lie(
    case: tuple[Model, Precision, list[Tensor]], count: Any, checkpointing: bool
) -> None:
    model, precision, expected = case
    number = len(offload.blocks_of(model.meta_network())) if count == "all" else count
    network = load(model, Storage(precision, number))
    if checkpointing:
        network.enable_gradient_checkpointing()
    for _ in range(3):  # the first pass guesses nothing, later ones bring weights beforehand
        found = gradients(model, network)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        with torch.no_grad():
            loss(model, network)


def test_no_weight_in_cpu_memory_is_kept_by_a_graph_or_is_a_parameter(tiny_sd3: Path) -> None:
    model = opened(str(tiny_sd3))
    plain, network = load(model, Storage()), load(model, Storage("bf16", 4))
    belt = belt_of(network)
    layers = [m for m in network.modules() if isinstance(m, FrozenLinear)]
    shapes = {layer.shape for layer in layers} | {layer.shape[::-1] for layer in layers}
    weights = {param.untyped_storage().data_ptr() for param in network.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, network)
    assert saved
    assert not any(tensor.shape in shapes for tensor in saved)
    there = sum(param.nbytes for param in network.parameters())
    assert there + belt.nbytes == sum(param.nbytes for param in plain.parameters())
    assert belt.nbytes > 0.5 * there
    adapted = [name for name, param in network.named_parameters() if param.requires_grad]
    assert adapted == [name for name, param in plain.named_parameters() if param.requires_grad]


class Told(Belt):
    """A belt that writes down what it does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[tuple[FrozenLinear, bool]] = []
        self.most = 0

    def fetch(self, layer: FrozenLinear, *, backward: bool) -> Any:
        self.asked.append((layer, layer in self._coming))
        found = super().fetch(layer, backward=backward)
        self.most = max(self.most, len(self._coming) + len(self._used))
        return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_from_the_second_step_on_every_weight_is_there_beforehand(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(offload, "Belt", Told)
    model = opened(str(tiny_sd3))
    network = load(model, Storage("bf16", 3))
    if checkpointing:
        network.enable_gradient_checkpointing()
    belt = cast("Told", belt_of(network))
    gradients(model, network)
    assert not any(beforehand for _, beforehand in belt.asked[: len(belt.asked) // 3])
    first, belt.asked, before = belt.asked, [], belt.count
    gradients(model, network)
    assert [layer for layer, _ in belt.asked] == [layer for layer, _ in first]
    assert all(beforehand for _, beforehand in belt.asked[1:])
    # A layer that is asked twice in a row, at the turn of the passes, is brought once.
    turns = sum(one is two for (one, _), (two, _) in pairwise(belt.asked))
    assert belt.count - before <= len(belt.asked) + belt.ahead
    assert turns >= 1
    # Never more on the device than a block's layers that come and what is computed with.
    assert belt.most <= belt.ahead + 1 + turns


def test_a_wrong_guess_costs_a_copy_and_no_bits(tiny_sd3: Path) -> None:
    model = opened(str(tiny_sd3))
    network = load(model, Storage("int8", 4))
    expected = gradients(model, network)
    layers = [m for m in network.modules() if isinstance(m, FrozenLinear)]
    for layer in (layers[7], layers[2], layers[2], layers[11]):
        layer(torch.zeros(1, layer.in_features))
    found = gradients(model, network)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_blocks_are_spread_evenly_and_counted() -> None:
    names = [f"transformer_blocks.{i}" for i in range(8)]
    assert offload.spread(names, 0) == []
    assert offload.spread(names, 8) == names
    for count in range(1, 8):
        chosen = [names.index(name) for name in offload.spread(names, count)]
        assert len(chosen) == count
        gaps = [two - one for one, two in pairwise(chosen)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    with pytest.raises(UserError, match="--blocks_on_cpu 9: this network has 8 blocks"):
        offload.spread(names, 9)


@pytest.mark.parametrize("storage", [Storage("bf16", 2), Storage("int8", 3)])
def test_what_a_dry_run_counts_is_what_stays_and_two_blocks_on_their_way(
    tiny_sd3: Path, storage: Storage
) -> None:
    model = opened(str(tiny_sd3))
    network = load(model, storage)
    there = sum(param.nbytes for param in network.parameters() if not param.requires_grad)
    meta = model.meta_network().requires_grad_(False)
    lora.add(meta, lora.LoraArgs(rank=4))
    counted, _ = storage.bytes_of(meta)
    assert there < counted <= there + belt_of(network).nbytes


# ---- activations ----


def kept(model: Model, network: Any, act: Callable[[], Any] | None = None) -> int:
    """Bytes in the storages that a forward pass leaves alive on the device."""
    alive: dict[int, int] = {}
    held: list[Tensor] = []
    weights = {param.untyped_storage().data_ptr() for param in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, network)
    return sum(alive.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_activations_in_cpu_memory_give_the_same_bits(
    request: pytest.FixtureRequest, family: str, checkpointing: bool
) -> None:
    model = opened(str(request.getfixturevalue(f"tiny_{family}")))
    network = load(model, Storage())
    expected = gradients(model, network)
    before = kept(model, network)
    offload.keep_activations_on_cpu(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    found = gradients(model, network)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    # Nothing inside of the network reaches hooks that were there before: it has its own.
    assert kept(model, network) < 0.05 * before


def test_weights_are_not_copied_with_the_activations(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(str(tiny_sd3))
    network = load(model, Storage())
    copied: list[Tensor] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **more: copied.append(t) or empty_like(t, **more)
    )
    offload.keep_activations_on_cpu(network)
    loss(model, network)
    weights = {param.untyped_storage().data_ptr() for param in network.parameters()}
    moved = [t for t in copied if t.untyped_storage().data_ptr() in weights]
    assert copied
    assert not moved


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_counts_what_stays_on_the_device(tiny_sd3: Path, checkpointing: bool) -> None:
    run: Any = SimpleNamespace(dtype=torch.bfloat16)
    plain = opened(str(tiny_sd3))
    away = replace(plain, args=replace(plain.args, activations_on_cpu=True))
    trained = Adapters(run, lora.LoraArgs(rank=4))
    shape = plain.latent_shape(256, 256)
    near, far = (
        finetune.cost_of(run, trained, model, 1, shape, checkpointing=checkpointing)[1]
        for model in (plain, away)
    )
    assert far.flops == near.flops
    assert far.saved_bytes < 0.02 * near.saved_bytes
    # What a moment needs stays; of a block that is computed again that is all of it.
    share = 0.1 if checkpointing else 0.7
    assert far.peak_bytes < near.peak_bytes - share * near.saved_bytes


def test_an_error_in_a_forward_pass_leaves_no_hook_behind(tiny_sd3: Path) -> None:
    model = opened(str(tiny_sd3))
    network = load(model, Storage())
    offload.keep_activations_on_cpu(network)
    with pytest.raises(TypeError):
        network(nothing=1)
    weight = torch.ones(3, requires_grad=True)
    product = weight * weight
    assert cast("Any", product.grad_fn)._saved_self is weight
