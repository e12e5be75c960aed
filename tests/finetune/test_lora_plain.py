"""Claims about adapters in a network that knows nothing of peft: plain modules, no mixin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora.injected import inject

ARGS = lora.LoraArgs(rank=2, lora_alpha=3.0, lora_layers=(r"re:blocks\.\d+\.attn[12]\.to_(q|v)",))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def network() -> HunyuanDiT2DModel:
    """A HunyuanDiT of two blocks, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = HunyuanDiT2DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16},
            **{"in_channels": 4, "patch_size": 2, "sample_size": 8, "num_layers": 2},
            **{"cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 8},
            **{"text_len": 3, "text_len_t5": 5, "use_style_cond_and_image_meta_size": False},
        )
        for param in made.parameters():
            if not param.any():  # zeros at the end would hide what is adapted
                nn.init.normal_(param, std=0.2)
    return made.requires_grad_(False).eval()


def predict(network: Any) -> Tensor:
    rotary = (torch.ones(16, 8), torch.zeros(16, 8))  # nothing is turned
    return network(
        draw(2, 4, 8, 8),
        torch.tensor([100.0, 700.0]),
        encoder_hidden_states=draw(2, 3, 12),
        text_embedding_mask=torch.ones(2, 3),
        encoder_hidden_states_t5=draw(2, 5, 16),
        text_embedding_mask_t5=torch.ones(2, 5),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]


def step(network: nn.Module, params: list[nn.Parameter]) -> None:
    """Two steps of training: B is zero at first, so A moves with the second."""
    optimizer = torch.optim.SGD(params, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        predict(network).square().mean().backward()
        optimizer.step()


def test_this_network_has_no_mixin(network: HunyuanDiT2DModel) -> None:
    assert not hasattr(network, "add_adapter")
    assert not hasattr(network, "disable_adapters")


def test_the_layers_that_an_expression_names_are_adapted(network: HunyuanDiT2DModel) -> None:
    before = predict(network)
    lora.add(network, ARGS)
    names = {name.rsplit(".", 2)[0] for name in lora.state(network)}
    assert names == {f"blocks.{i}.attn{j}.to_{x}" for i in (0, 1) for j in (1, 2) for x in "qv"}
    assert torch.equal(predict(network), before)  # B is zero
    with pytest.raises(UserError, match="--lora_layers: 'to_x' matches no linear layer"):
        lora.target_layers(network, ["to_x"])


def test_adapters_learn_and_nothing_else_does(network: HunyuanDiT2DModel) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = predict(network)
    params = lora.add(network, ARGS)
    start = [param.detach().clone() for param in params]
    step(network, params)
    assert all((a != b).any() for a, b in zip(params, start, strict=True))
    assert not torch.allclose(predict(network), plain)
    after = network.state_dict()
    for name, value in before.items():
        inside = name if name in after else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(after[inside], value), name


def test_switched_off_they_leave_the_base_to_the_bit(network: HunyuanDiT2DModel) -> None:
    with torch.no_grad():
        before = predict(network)
    params = lora.add(network, ARGS)
    step(network, params)
    with torch.no_grad():
        after = predict(network)
        with lora.disabled(network):
            assert torch.equal(predict(network), before)
        with pytest.raises(KeyError), lora.disabled(network):
            raise KeyError
        assert torch.equal(predict(network), after)  # also after an error
    assert all(param.requires_grad for param in params)


def test_they_are_saved_and_read_back_to_the_bit(
    network: HunyuanDiT2DModel, tmp_path: Path
) -> None:
    other: Any = HunyuanDiT2DModel.from_config(network.config)
    other.load_state_dict(network.state_dict())
    other.requires_grad_(False).eval()
    step(network, lora.add(network, ARGS))
    lora.save(tmp_path, network)
    lora.add(other, ARGS)
    with torch.no_grad():
        assert not torch.equal(predict(other), predict(network))
        lora.restore(tmp_path, other)
        assert torch.equal(predict(other), predict(network))
    with safe_open(tmp_path / lora.WEIGHTS, framework="pt") as file:
        assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in set(file.keys())
        assert '"transformer.lora_alpha": 3' in file.metadata()["lora_adapter_metadata"]


def test_one_name_is_given_once(network: HunyuanDiT2DModel) -> None:
    lora.add(network, ARGS)
    with pytest.raises(ValueError, match="there is an adapter default already"):
        inject(network, LoraConfig(target_modules=["to_k"]))
