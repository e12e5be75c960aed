"""Claims about text encoders in int8: which layers, how far embeddings move, how many bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dojo.bench.models import POCKETS
from dojo.models import int8, quantised
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model
from dojo.models.quantised import FrozenLinear

CPU = torch.device("cpu")
CAPTIONS = ["a red star", "two blue circles above a green square"]


@pytest.fixture(params=list(POCKETS.values()), ids=list(POCKETS))
def folder(request: pytest.FixtureRequest) -> Path:
    """A trained model of a family."""
    return request.param


def opened(folder: Path, **options: Any) -> Model:
    return open_model(ModelArgs(pretrained_model_name_or_path=str(folder), **options))


def test_every_encoder_has_blocks_that_are_known(tiny_hunyuandit: Path, tiny_kolors: Path) -> None:
    for folder in (tiny_hunyuandit, tiny_kolors):
        model: Any = opened(folder)
        for part in model.text_encoders:
            encoders = model.load_text(torch.float32, CPU, only=part).encoders
            (encoder,) = [one for one in encoders if one is not None]
            inside = {name for name, _ in quantised.linears(encoder, int8.inside)}
            assert len(inside) >= 4, part
            assert not any(name.endswith((".wo", "pooler.dense")) for name in inside)


def test_int8_moves_the_embeddings_by_little(folder: Path) -> None:
    plain = opened(folder).load_text(torch.bfloat16, CPU)(CAPTIONS)
    found = opened(folder, text_encoder_precision="int8").load_text(torch.bfloat16, CPU)(CAPTIONS)
    for name, value in plain.items():
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert 0 < error < 0.01, name
        assert found[name].dtype == value.dtype


def test_the_linear_layers_inside_the_blocks_are_int8_and_no_other(folder: Path) -> None:
    for part in opened(folder).text_encoders:
        plain, found = (
            _loaded(opened(folder, text_encoder_precision=choice), part)
            for choice in ("auto", "int8")
        )
        expected = {name for name, _ in quantised.linears(plain, int8.inside)}
        changed = {name for name, one in found.named_modules() if isinstance(one, FrozenLinear)}
        assert changed == expected
        assert changed
        assert not any("projection" in name or name.endswith(".wo") for name in changed)
        left = [n for n, one in found.named_modules() if type(one) is nn.Linear and "." in n]
        assert all(name.endswith(".wo") for name in left), left
        # A byte for each of their weights, and what is counted is what there is.
        for name in changed:
            codes: Any = found.get_submodule(name).codes
            assert codes.dtype == torch.int8
        size = sum(param.nbytes for param in found.parameters())
        assert size == int8.bytes_of(plain, torch.bfloat16)


def _loaded(model: Model, part: str) -> nn.Module:
    texts: Any = model.load_text(torch.bfloat16, CPU, only=part)
    every = [*texts.trainable, getattr(texts, "t5", None)]
    (one,) = [encoder for encoder in every if encoder is not None]
    return one


def test_an_embedding_in_int8_hangs_on_no_other_caption(folder: Path) -> None:
    texts = opened(folder, text_encoder_precision="int8").load_text(torch.float32, CPU)
    together, alone = texts(CAPTIONS), texts(CAPTIONS[1:])
    for name, rows in together.items():
        torch.testing.assert_close(rows[1:], alone[name])
