"""Claims about networks that come and go: they are whole, and nobody loses a parameter."""

import pytest
import torch
from torch import nn

from dojo.models import quantised
from dojo.models.quantised import Precision
from dojo.run import residence

CPU, ELSEWHERE = torch.device("cpu"), torch.device("cpu", 0)  # one place under two names


def test_a_network_that_was_away_is_the_same_with_the_same_parameters() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    params = list(network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with residence.away(network, CPU, ELSEWHERE):
        pass
    assert all(a is b for a, b in zip(params, network.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(network.state_dict()["1.bias"], before["1.bias"])


def test_plain_weights_leave_and_come_back_however_the_work_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Owned(nn.Parameter):
        """As a shard: it has more beside it than its data."""

    network = nn.Linear(2, 2)
    network.bias = Owned(torch.zeros(2))
    places: list[tuple[torch.device, torch.Size]] = []
    move = torch.Tensor.to

    def moves(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        places.append((place, tensor.shape))
        return move(tensor, place)

    monkeypatch.setattr(torch.Tensor, "to", moves)
    with pytest.raises(KeyError), residence.away(network, CPU, ELSEWHERE):
        raise KeyError
    assert places == [(ELSEWHERE, (2, 2)), (CPU, (2, 2))]


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_packed_weights_leave_too(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    quantised.replace(network, "0", precision)
    before = network(torch.ones(1, 8))
    moved: list[int] = []
    move = torch.Tensor.to

    def moves(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        moved.append(tensor.nbytes)
        return move(tensor, place)

    monkeypatch.setattr(torch.Tensor, "to", moves)
    with residence.away(network, CPU, ELSEWHERE):
        assert sum(moved) == sum(param.nbytes for param in network.parameters())
    monkeypatch.undo()
    assert torch.equal(network(torch.ones(1, 8)), before)


def test_on_a_cpu_nothing_moves() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.data_ptr()
    with residence.away(network, CPU), residence.at_work(network, CPU):
        assert network.weight.data_ptr() == before
    assert network.weight.data_ptr() == before
