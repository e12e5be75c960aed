"""What each phase of a run holds: counted on the meta device, against files and hand counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dojo.models import sd3
from dojo.run import cost, phases


def test_the_most_that_is_alive_at_a_time_is_counted() -> None:
    def chain() -> torch.Tensor:
        values = torch.empty(1000, device="meta")  # float32: 4,000 bytes each
        for _ in range(5):
            values = values + 1  # the one before goes when the next is there
        return values

    assert cost.live_bytes(chain) == 2 * 4000


def test_a_convolution_keeps_its_input_and_output() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1, bias=False, device="meta")
    pixels = torch.empty(2, 4, 16, 16, device="meta")
    # The input and the weights were there before.
    assert cost.live_bytes(lambda: layer(pixels)) == 2 * 8 * 16 * 16 * 4


def stored(folder: Path) -> int:
    """Numbers in the safetensors of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return total


def test_phases_are_what_lies_in_memory_together(tiny_sd3: Path) -> None:
    config = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    alone = phases.Needs(
        config=config,
        text=sd3.TEXT_ENCODERS,
        dtype=torch.bfloat16,
        vae_dtype=torch.float32,
        size=(64, 64),
    )
    scorer = nn.Linear(100, 100, bias=False)
    needs = replace(alone, encoded=2, decoded=3, class_pictures=3, scorers=(scorer,))
    found = phases.memory(needs, network=1000, kept=5000, training=9000)
    text = 2 * sum(stored(tiny_sd3 / part) for part in sd3.TEXT_ENCODERS)
    vae = 4 * stored(tiny_sd3 / "vae")
    gib = 2**30
    assert found["text embeddings"] * gib == pytest.approx(text, rel=1e-3)
    assert found["training"] * gib == pytest.approx(9000 + vae + 40_000)
    drawing = found["drawing"] * gib - 5000 - vae - 40_000
    assert drawing > 3 * 3 * 64 * 64 * 4  # the pictures at the least
    assert found["class pictures"] * gib == pytest.approx(text + 1000 + vae + drawing, rel=1e-3)
    assert found["latents"] * gib > vae
    assert phases.memory(alone, 1000, 5000, 9000).keys() == {"text embeddings", "training"}


def test_the_largest_phase_decides_which_cards_are_large_enough() -> None:
    said = phases.told({"text embeddings": 10.4, "training": 4.7})
    assert said["peak over all phases"] == "10.40 GiB (text embeddings)"
    # 1.1 times 10.4 GiB and one for the context: 12.4.
    assert said["fits on a card of so many GB"].startswith("8 no, 12 no, 16 yes, 24 yes")
