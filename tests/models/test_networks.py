"""Claims about what is known of networks by their class."""

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from dojo.models.facts import NetworkFacts
from dojo.models.opening import facts_of


def meta(kind: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(**options)


SMALL = {"num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
SMALL |= {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}


@pytest.mark.parametrize(
    ("kind", "part"), [(SD3Transformer2DModel, "transformer"), (UNet2DConditionModel, "unet")]
)
def test_a_network_is_known_by_its_class_and_by_what_that_comes_from(kind: Any, part: str) -> None:
    class Own(kind):
        pass

    for one in (kind, Own):
        assert facts_of(one.__new__(one)).part == part
    assert facts_of(nn.Linear(1, 1)) == NetworkFacts(part="transformer")


@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_what_nothing_reads_is_what_gets_no_gradient(norm: Any) -> None:
    """Held against a backward pass, and not against a list of names."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(**SMALL, qk_norm=norm)  # pyright: ignore[reportArgumentType]
    for param in network.parameters():
        nn.init.normal_(param, std=0.3)
    made = network(
        torch.randn(1, 16, 4, 4),
        encoder_hidden_states=torch.randn(1, 3, 8),
        pooled_projections=torch.randn(1, 8),
        timestep=torch.tensor([300.0]),
        return_dict=False,
    )[0]
    made.square().mean().backward()
    params = dict(network.named_parameters())
    still = {name for name, param in params.items() if param.grad is None or not param.grad.any()}
    unread = facts_of(network).unread(list(params))
    assert unread <= still
    # A bias of keys shifts all logits of a row alike: its gradient is rounding, if that.
    assert {name.rsplit(".", 2)[-2] for name in still - unread} <= {"to_k", "add_k_proj"}


def test_a_linear_layer_that_nothing_reads_is_named_like_its_weights() -> None:
    network = meta(SD3Transformer2DModel, **SMALL, qk_norm="rms_norm")
    facts = facts_of(network)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    assert facts.unread(linear) == {"transformer_blocks.2.attn.add_q_proj"}
    weights = {"add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight"}
    names = [name for name, _ in network.named_parameters()]
    assert facts.unread(names) == {f"transformer_blocks.2.attn.{name}" for name in weights}
    assert facts.unread([]) == set()


def test_a_unet_reads_all_of_it() -> None:
    network = meta(UNet2DConditionModel, block_out_channels=(32, 32, 32, 32), norm_num_groups=8)
    assert facts_of(network).unread([name for name, _ in network.named_parameters()]) == set()
