"""What text encoders take that learn, or through which a new word does, as a dry run counts it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dojo import finetune
from dojo.finetune import Adapters, Inversion, Trained, lora
from dojo.finetune.tokens import PivotalArgs
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import open_model

ARGS = lora.LoraArgs(rank=4)
ROWS = 3
RUN: Any = SimpleNamespace(dtype=torch.float32)


def kept_by(model: Model, *, adapters: bool) -> tuple[int, int]:
    """Bytes that the loaded CLIPs keep of so many captions, and the numbers that learn in them."""
    encoders = model.load_text(torch.float32, torch.device("cpu"))
    numbers = 0
    for clip in encoders.trainable:
        params = lora.add_text(clip, ARGS) if adapters else []
        numbers += sum(param.numel() for param in params)
        for module in clip.modules():
            if type(module).__name__ == "NewRows":
                module.rows.requires_grad = True
                numbers += module.rows.numel()
    weights = {
        param.untyped_storage().data_ptr()
        for clip in encoders.trainable
        for param in clip.parameters()
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    captions = ["a <thing>", "a star", "a ring"]
    zeros = {name: torch.zeros(ROWS, 1) for name in model.embed_names}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        said = encoders.refresh(zeros, captions)
    total = sum(kept.values())
    del said
    return total, numbers


@pytest.mark.parametrize("how", ["adapters", "words", "both", "inversion"])
def test_text_encoders_that_learn_are_counted(
    tiny_sdxl: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(tiny_sdxl)))
    text = how in ("adapters", "both")
    tokens = PivotalArgs(new_tokens=() if how == "adapters" else ("<thing>:2",))
    model = tokens.taught(model, 0)
    trained: Trained = Adapters(RUN, ARGS, model=model, tokens=tokens, text=text)
    if how == "inversion":
        trained = Inversion(RUN, model)
    kept, numbers = kept_by(model, adapters=text)
    assert trained.beside == numbers > 0

    def cost(of: Trained) -> Any:
        shape = model.latent_shape(64, 64)
        return finetune.cost_of(RUN, of, model, ROWS, shape, checkpointing=False)[1]

    found = cost(trained)
    monkeypatch.setattr(type(trained), "text_networks", lambda _: {})
    alone = cost(trained)
    assert found.saved_bytes - alone.saved_bytes == pytest.approx(kept, rel=0.1)
    assert found.peak_bytes - alone.peak_bytes == found.saved_bytes - alone.saved_bytes
    assert found.flops == alone.flops
