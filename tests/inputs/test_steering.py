"""Claims about steering: what a model that is told sizes is told of given and of drawn pictures."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dojo.data import Geometry
from dojo.inputs.pairs import Inputs
from dojo.inputs.steering import Steering

NETWORK = nn.Identity()


@dataclass
class Sized:
    """A model that keeps what it is told, and predicts the number of its captions' letters."""

    sized: bool = True
    told: list[Geometry | None] = field(default_factory=list)

    def conditions(self, embeds: dict[str, Tensor], geometry: Geometry | None) -> dict[str, Tensor]:
        self.told.append(geometry)
        return embeds

    def predict(self, network: nn.Module, noisy: Tensor, level: Tensor, *rest: Any) -> Tensor:
        conditions = rest[0]
        return noisy * 0 + conditions["letters"].view(-1, 1, 1, 1)


def texts(captions: Any) -> dict[str, Tensor]:
    return {"letters": torch.tensor([[float(len(caption))] for caption in captions])}


def steering(model: Any, **more: Any) -> Steering:
    made: Any = Steering(model=model, texts=texts, size=(64, 48), dtype=torch.float32, **more)  # pyright: ignore[reportArgumentType]
    return made


def geometry(count: int) -> Geometry:
    sizes = torch.arange(2.0 * count).view(count, 2)
    return Geometry(original=sizes, crop=sizes + 100, target=sizes + 200)


def asked(predict: Any, count: int) -> Tensor:
    return predict(torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.int64))[:, 0, 0, 0]


def test_pictures_that_are_given_are_told_as_they_are() -> None:
    model, known = Sized(), geometry(2)
    found = asked(steering(model)(NETWORK, ["ab", "abc"], known), 2)
    assert found.tolist() == [2, 3]
    assert model.told == [known]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pictures_that_are_drawn_are_told_as_whole_for_every_row(scale: float) -> None:
    model = Sized()
    found = asked(steering(model, guidance_scale=scale)(NETWORK, ["ab", "abc"]), 2)
    assert found.tolist() == [2 * scale, 3 * scale]
    (told,) = model.told
    assert told is not None
    rows = 2 if scale == 1 else 4  # both branches of guidance
    assert told.original.tolist() == told.target.tolist() == [[64, 48]] * rows
    assert told.crop.tolist() == [[0, 0]] * rows


def test_a_model_that_is_told_no_sizes_gets_none() -> None:
    model = Sized(sized=False)
    asked(steering(model)(NETWORK, ["ab"]), 1)
    assert model.told == [None]


@pytest.mark.parametrize(("sides", "expected"), [(2, [1, 3, 2, 4]), (1, [1, 3])])
def test_pairs_are_told_winners_first_or_alone(sides: int, expected: list[int]) -> None:
    absent: Any = None
    model: Any = Sized()
    inputs = Inputs(absent, None, absent, model, absent)
    sizes = torch.tensor([[[1.0, 1], [2, 2]], [[3, 3], [4, 4]]])  # pair, side, axis
    rows = {"caption": ["a", "b"], "size": [(64, 48)] * 2, "original": sizes, "crop": sizes}
    found = inputs.geometry(rows, sides=sides)
    assert found is not None
    assert found.original[:, 0].tolist() == expected
    assert found.target.tolist() == [[64, 48]] * len(expected)
    model.sized = False
    assert inputs.geometry(rows, sides=sides) is None
