"""Counted costs against hand counts and a count made elsewhere."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dojo.finetune import lora
from dojo.models import sd3
from dojo.run import autocast, cost, machine


def test_a_linear_layer_costs_two_operations_per_weight_and_pass() -> None:
    layer = nn.Linear(8, 16, bias=False, device="meta")
    inputs = torch.empty(4, 8, device="meta")
    counted = cost.count_cost(lambda: layer(inputs).sum(), layer)
    assert counted.flops == 2 * (2 * 4 * 8 * 16)  # forward, and the weight's gradient
    assert counted.saved_bytes == 4 * 8 * 4  # the input; the weight is not an activation
    inputs.requires_grad_()
    counted = cost.count_cost(lambda: layer(inputs).sum(), layer)
    assert counted.flops == 3 * (2 * 4 * 8 * 16)  # and the input's gradient


def test_attention_keeps_no_matrix_of_weights() -> None:
    tokens, width = 100, 16
    layer = nn.Linear(width, width, bias=False, device="meta")
    states = torch.empty(1, 2, tokens, width, device="meta")

    def loss() -> torch.Tensor:
        hidden = layer(states)
        return F.scaled_dot_product_attention(hidden, hidden, hidden).sum()

    original = F.scaled_dot_product_attention
    counted = cost.count_cost(loss, layer)
    assert F.scaled_dot_product_attention is original
    row = 2 * tokens * width * 4
    assert counted.saved_bytes == 3 * row  # the layer's input, the hidden states, the output
    products = 2 * 2 * tokens * tokens * width
    assert counted.flops == 6 * products + 2 * (2 * 2 * tokens * width * width)


def test_operations_are_those_that_torch_counts() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2))
    layers = layers.append(nn.Linear(36, 16)).append(nn.Bilinear(16, 16, 4)).to("meta")
    pixels = torch.empty(2, 3, 8, 8, device="meta")

    def loss() -> torch.Tensor:
        hidden = layers[:5](pixels)
        return layers[5](hidden, hidden).mean()

    with FlopCounterMode(display=False) as torchs:
        loss().backward()
    assert cost.count_cost(loss, layers).flops == torchs.get_total_flops() > 0


def test_the_peak_is_what_lives_at_a_time_without_weights_and_gradients() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).to("meta")
    inputs = torch.empty(16, 64, device="meta")
    counted = cost.count_cost(lambda: layers(inputs).sum(), layers)
    row, weight = 16 * 64 * 4, 64 * 64 * 4
    assert counted.saved_bytes == 3 * row  # the inputs of the layers
    # Behind the first layer's input, which was there before: two hidden states and a gradient of
    # each, and one weight's gradient, which goes when it is there.
    assert 2 * row + weight <= counted.peak_bytes <= 5 * row + weight + 8
    assert all(param.grad is None for param in layers.parameters())
    assert counted.held_bytes == max(counted.saved_bytes, counted.peak_bytes)


def test_weights_that_are_looked_at_in_another_form_are_not_alive_anew() -> None:
    weight = nn.Parameter(torch.empty(512, 512, device="meta"))
    inputs = torch.empty(2, 512, device="meta")
    assert cost.live_bytes(lambda: inputs @ weight.t()) == 2 * 512 * 4


def test_the_lists_of_autocast_are_those_of_torch() -> None:
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()

    def listed(*macros: str) -> set[str]:
        blocks = [header.split(f"#define {macro}(_)")[1].split("\n\n")[0] for macro in macros]
        return {name for block in blocks for name in re.findall(r"_\((\w+)", block)}

    assert listed("AT_FORALL_LOWER_PRECISION_FP") >= autocast.LOWER
    in_float32 = listed("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE")
    later = {"rms_norm"} if Version(torch.__version__) < Version("2.14") else set[str]()
    assert in_float32 | later >= autocast.FLOAT32
    # And what our networks call is among them.
    assert {"linear", "conv2d", "bmm", "scaled_dot_product_attention"} <= autocast.LOWER
    assert {"layer_norm", "group_norm", "softmax"} <= autocast.FLOAT32


def test_activations_have_the_precisions_that_autocast_gives_them() -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to("meta")
    inputs = torch.empty(4, 8, device="meta")
    seen: list[torch.dtype] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    cost.count_cost(lambda: layers(inputs).float().sum(), layers, torch.bfloat16)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    # Copies of the weights are autocast's, and counted with the weights.
    small = cost.count_cost(lambda: layers(inputs).float().sum(), layers, torch.bfloat16)
    assert small.saved_bytes < 8 * 8 * 2 + 6 * 4 * 8 * 4


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_copies_a_frozen_weight_at_every_use(trained: bool) -> None:
    """A weight of 64 x 64 that is used three times, each time behind something that is trained."""
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.requires_grad_(trained)

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return second(second(second(first(inputs)))).float().sum()

    kept: dict[int, int] = {}  # on a CPU, which has an autocast

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 64 * 64 and tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        value = loss(torch.ones(1, 64))
    del value
    assert len(kept) == (1 if trained else 3)
    layers = nn.ModuleList([first, second]).to("meta")
    inputs = torch.empty(1, 64, device="meta")
    counted = cost.count_cost(lambda: loss(inputs), layers, torch.bfloat16).saved_bytes
    # Beside the rows that the layers are given; the one copy of a trained weight is its weight's.
    assert counted - (0 if trained else sum(kept.values())) < 4 * 64 * 4


def test_recomputation_holds_one_block_at_a_time() -> None:
    def network(blocks: int, *, again: bool) -> cost.Cost:
        layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(blocks)
        ).to("meta")
        inputs = torch.empty(100, 32, device="meta", requires_grad=True)

        def loss() -> torch.Tensor:
            hidden = inputs
            for layer in layers:
                hidden = checkpoint(layer, hidden, use_reentrant=False) if again else layer(hidden)
            return hidden.sum()

        return cost.count_cost(loss, layers, torch.bfloat16)

    four, eight = network(4, again=True), network(8, again=True)
    one_block = network(1, again=False)
    row = 100 * 32 * 2
    assert eight.saved_bytes - four.saved_bytes == 4 * row  # each block's input
    assert eight.peak_bytes - four.peak_bytes == 4 * row
    assert four.peak_bytes - four.saved_bytes < 2 * one_block.peak_bytes
    assert network(8, again=False).peak_bytes > 2 * eight.peak_bytes


@pytest.mark.parametrize(
    ("size", "length", "checkpointing", "teraflops"),
    [(1024, 256, False, 26.7), (1024, 256, True, 38.0), (512, 77, False, 4.56)],
)
def test_sd35_medium_costs_what_was_counted_elsewhere(
    size: int, length: int, checkpointing: bool, teraflops: float
) -> None:
    """TFLOP per picture of LoRA training, counted without adapters: rank 4 adds little."""
    transformer: dict[str, Any] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }

    class Medium(sd3.Model):
        clip_tokens = 77  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    config = Medium(
        args=sd3.ModelArgs(pretrained_model_name_or_path="-", max_sequence_length=length),
        folder=Path(),
        transformer=transformer,
        vae={"block_out_channels": [1] * 4},
        scheduler={"shift": 3.0},
    )
    model, counted = config.training_cost(
        torch.bfloat16,
        partial(lora.add, args=lora.LoraArgs(rank=4)),
        1,
        config.latent_shape(size, size),
        checkpointing=checkpointing,
    )
    assert counted.flops / 1e12 == pytest.approx(teraflops, rel=0.02)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen / 1e9 == pytest.approx(2.2432, abs=1e-4)
    if size == 1024 and not checkpointing:  # peers measure about 10 GiB a picture
        assert 5 < counted.saved_bytes / 2**30 < 12
        # SimpleTuner publishes 34.59 GiB for three pictures with rank 128 (docs/benchmarks.md), of
        # which weights and the adapters' state take 6.0.
        assert counted.held_bytes / 2**30 == pytest.approx((34.59 - 6.0) / 3, rel=0.1)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        # Less than the card of that name, or another one.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int | None
) -> None:
    monkeypatch.setattr(machine, "device_name", lambda _: name)
    peak = machine.device_peak_flops(torch.device("cuda"))
    assert peak == (None if teraflops is None else teraflops * 1e12)
