"""Claims about networks that come and go: they are whole, and nobody loses a parameter."""

import pytest
import torch
from torch import nn

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
    class Packed(nn.Parameter):
        """As a quantised weight: it has more beside it than its data."""

    network = nn.Linear(2, 2)
    network.bias = Packed(torch.zeros(2))
    places: list[tuple[torch.device, torch.Size]] = []
    move = torch.Tensor.to

    def moves(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        places.append((place, tensor.shape))
        return move(tensor, place)

    monkeypatch.setattr(torch.Tensor, "to", moves)
    with pytest.raises(KeyError), residence.away(network, CPU, ELSEWHERE):
        raise KeyError
    assert places == [(ELSEWHERE, (2, 2)), (CPU, (2, 2))]


def test_on_a_cpu_nothing_moves() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.data_ptr()
    with residence.away(network, CPU), residence.at_work(network, CPU):
        assert network.weight.data_ptr() == before
    assert network.weight.data_ptr() == before
