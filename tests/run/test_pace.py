"""Claims about the time that is left of a run: steps, and pauses to come."""

from types import SimpleNamespace
from typing import Any

import pytest

from dojo.run.pace import Pace, pauses, to_come


@pytest.mark.parametrize("every", [1, 3, 4, 10, 20])
@pytest.mark.parametrize("num_steps", [1, 9, 10, 12])
def test_pauses_to_come_are_those_that_are_due(every: int, num_steps: int) -> None:
    for step in range(num_steps + 1):
        due = [at for at in range(step + 1, num_steps + 1) if at % every == 0 or at == num_steps]
        assert to_come(step, num_steps, every) == len(due)


def test_validations_and_checkpoints_count_by_their_own_means() -> None:
    pace = Pace()
    pace.every = {"validation": 10, "checkpoint": 25}
    assert pace.seconds_left(0, 50) is None
    pace.add_pause("validation", 0, 20.0)
    for _ in range(10):
        pace.add_steps(1, 2.0)
    # 40 steps, validations at 20, 30, 40, 50; how long a checkpoint takes is not known.
    assert pace.seconds_left(10, 50) == pytest.approx(80 + 4 * 20)
    pace.add_pause("validation", 10, 25.0)
    pace.add_pause("validation", 10, 5.0)  # a second part of the same one: 30 together
    pace.add_pause("checkpoint", 25, 3.0)
    pace.add_pause("cache", 0, 1000.0)  # comes no more
    assert pace.seconds_left(25, 50) == pytest.approx(50 + 3 * 25 + 3)
    assert pace.seconds_left(50, 50) == 0


def test_the_last_steps_count_most() -> None:
    pace = Pace()
    pace.add_steps(1, 1000.0)  # it compiles
    for _ in range(500):
        pace.add_steps(1, 1.0)
    assert pace.seconds_left(501, 601) == pytest.approx(100, rel=0.01)
    pace = Pace()
    pace.add_steps(8, 16.0)  # several at a time
    assert pace.seconds_left(8, 16) == pytest.approx(16)


@pytest.mark.parametrize(
    ("group", "every"),
    [
        ({"validation_steps": 200}, 200),
        ({"eval_every": 10, "validation_steps": 100}, 40),
        ({}, None),
    ],
)
def test_what_is_to_come_follows_from_the_options(group: dict[str, int], every: int | None) -> None:
    groups: dict[str, Any] = {
        "run": SimpleNamespace(checkpointing_steps=500),
        "validation": SimpleNamespace(**group),
    }
    found = dict(pauses(groups, 4.0))
    assert found == {"checkpoint": 500} | ({} if every is None else {"validation": every})
