"""The drawing of held-out prompts, beside the loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dojo.inputs.prompts import Prompt
from dojo.methods import drawing


@pytest.mark.parametrize("texts", [(), ("a red star",)])
def test_a_run_that_draws_nothing_makes_no_schedule(texts: tuple[str, ...], tmp_path: Path) -> None:
    # A start of SD1.5's DPO took half a second longer, for what diffusers imports with one.
    made: list[Any] = []
    model = SimpleNamespace(latent_shape=lambda *_: (4, 8, 8), make_scheduler=made.append)
    steering: Any = SimpleNamespace(model=model, size=(64, 64))
    trained: Any = SimpleNamespace(objective="diffusion", has_reference=False)
    run: Any = SimpleNamespace(output_dir=tmp_path, main=True)
    prompts = [Prompt(text=text) for text in texts]
    vae: Any = None
    drawing.evaluator(run, drawing.PromptEvalArgs(), prompts, [], steering, trained, vae, 2)
    assert made == ["diffusion"] * len(texts)
