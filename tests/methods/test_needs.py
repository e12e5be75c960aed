"""Claims about what methods other than plain training hold beside their network."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dojo import cli
from dojo.methods import dpo, refl, rl
from dojo.models import sd3
from dojo.run.phases import Needs
from tests.scripts.runs import SCRIPTS, mine

RUN: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
SIZE = (64, 64)
METHODS: dict[str, Callable[..., Needs]] = {
    "dpo_sd3": partial(dpo.needs, size=SIZE, drawn=False),
    "refl_sd3": partial(refl.needs, size=SIZE),
    "grpo_sd3": rl.needs,
}


@pytest.mark.parametrize("name", METHODS)
def test_encoders_without_a_cache_stay_on_the_device(
    tiny_sd3: Path, tmp_path: Path, name: str
) -> None:
    mine(tmp_path, "brightness")
    script = SCRIPTS[name]

    def needs(*more: str) -> Needs:
        flags, own = script.kind(tmp_path, tiny_sd3, tmp_path)
        words = own.replace("{inputs}", str(tmp_path)).replace("'a star'", "star").split()
        args = cli.parse(script.load().Args, None, [*flags, *words, *more])
        return METHODS[name](RUN, sd3.open_model(args.model, args.text), args)

    assert list(needs().live_text) == []
    assert list(needs("--no_cache_text_embeddings").live_text) == list(sd3.TEXT_ENCODERS)
    if name == "grpo_sd3":  # which reads no pictures
        return
    pictures = () if name == "dpo_sd3" else ("--pretrain_data_dir", str(tmp_path))
    assert needs(*pictures).encoded_in_training == 0
    batch = ("--train_batch_size", "3")
    found = needs(*pictures, "--no_cache_latents", *batch)
    count = 6 if name == "dpo_sd3" else 3  # a pair is two pictures
    assert (found.encoded, found.encoded_in_training) == (count, count)
