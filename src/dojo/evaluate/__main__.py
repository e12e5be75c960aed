"""The colours that a preview without a tiny autoencoder gives a model's latents.

    python -m dojo.evaluate --pretrained_model_name_or_path MODEL

A run fits the same map for itself; here it is printed, and how much of the colours it explains.
"""

from __future__ import annotations

from dataclasses import dataclass

from dojo import cli
from dojo.evaluate import preview
from dojo.lazy import torch
from dojo.models import opening
from dojo.models.family import ModelArgs


@dataclass(frozen=True, kw_only=True)
class FitArgs:
    """Whose map is printed."""

    pretrained_model_name_or_path: str
    """folder or hub id of a pipeline, or a single file"""


def main(args: FitArgs) -> None:
    """Fits and prints it."""
    name = args.pretrained_model_name_or_path
    model = opening.open_model(ModelArgs(pretrained_model_name_or_path=name))
    pair = preview.seen(model, model.load_vae(torch.device("cpu")), preview.charts())
    factors = preview.fitted(*pair)
    print("channel      red    green     blue")
    labels = [*map(str, range(len(factors) - 1)), "constant"]
    for label, row in zip(labels, factors.tolist(), strict=True):
        print(f"{label:8s}", *(f"{number:8.3f}" for number in row))
    print(f"it explains {preview.explained(factors, *pair):.0%} of the colours of smooth charts")


if __name__ == "__main__":
    cli.run(main, FitArgs, __doc__)
