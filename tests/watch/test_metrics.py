"""Curves that are read while they grow: exact where it counts, in a fixed room."""

import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dojo.files.records import parse_row
from dojo.watch.metrics import MAX_KEYS, MetricsFile, seconds_left
from dojo.watch.thinned import COUNT, HIGH, LOW, ROOM, SUM, Thinned
from tests.watch import fake_run


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 300, ROOM, 5000])
def test_a_thinned_curve_keeps_extremes_totals_and_ends_however_it_comes(
    count: int, piece: int
) -> None:
    values = np.random.default_rng(0).normal(size=count)
    curve = Thinned()
    for i in range(0, count, piece):
        curve.add(range(i, min(count, i + piece)), [*values[i : i + piece]])
    assert len(curve) == count
    assert len(curve.records) <= ROOM
    assert curve.total == pytest.approx(values.sum())
    assert curve.extremes() == (values.min(), values.max())
    assert (curve.first, curve.last) == (values[0], values[-1])
    for part in np.split(np.arange(count), range(curve.size, count, curve.size)):
        record = curve.records[part[0] // curve.size]
        own = values[part]
        expected = [len(own), own.sum(), own.min(), own.max()]
        assert record[[COUNT, SUM, LOW, HIGH]] == pytest.approx(expected)


def test_a_drawn_line_has_few_points_in_order_and_no_peak_is_lost() -> None:
    curve = Thinned()
    values = [math.sin(i / 500) for i in range(20_000)]
    values[12_345] = 9.0
    curve.add(range(20_000), values)
    line = curve.line(140)
    assert len(line) <= 140
    assert (12_345, 9.0) in line
    assert [step for step, _ in line] == sorted(step for step, _ in line)


def test_a_short_curve_is_drawn_as_it_is() -> None:
    curve = Thinned()
    curve.add([1, 2, 3], [5.0, 4.0, 6.0])
    assert curve.line(300) == curve.means() == [(1, 5), (2, 4), (3, 6)]


def read(file: MetricsFile) -> dict[str, list[float]]:
    file.read(time.monotonic() + 60)
    return {key: [value for _, value in curve.means()] for key, curve in file.curves.items()}


def test_rows_are_read_as_they_come_and_a_half_line_when_its_end_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert read(file) == {}
    path.write_text('{"step": 1, "loss": 3.0}\nnonsense\n{"step": 2, "lo')
    assert read(file) == {"loss": [3]}
    version = file.version
    read(file)
    assert file.version == version
    with path.open("a") as more:
        more.write('ss": 2.0, "eval_loss": NaN, "x": "y", "z": true}\n')
    assert read(file) == {"loss": [3, 2]}
    assert file.version > version


@pytest.mark.parametrize("how", ["renamed", "in place", "shorter"])
def test_a_file_that_was_written_anew_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    file = MetricsFile(path)
    read(file)
    new = '{"step": 1, "loss": 7.0}\n' + '{"step": 2, "loss": 6.0}\n' * (how != "shorter")
    if how == "renamed":
        (tmp_path / "new").write_text(new)
        (tmp_path / "new").replace(path)
    else:
        path.write_text(new)
    assert read(file)["loss"] == ([7] if how == "shorter" else [7, 6])


def test_reading_takes_a_piece_at_a_time_and_ends_at_the_end(tmp_path: Path) -> None:
    folder = fake_run.make(tmp_path / "run", last=8000)
    file = MetricsFile(folder / "metrics.jsonl")
    file.read(0)  # the time is over already: one piece
    assert 0 < file.share < 1
    calls = 1
    while not file.whole:
        file.read(0)
        calls += 1
    assert calls > 2
    assert len(file.curves["loss"]) == 8000


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    folder = fake_run.make(tmp_path / "run", last=4000)
    file = MetricsFile(folder / "metrics.jsonl")
    tracemalloc.start()
    read(file)
    before = tracemalloc.get_traced_memory()[0]
    fake_run.append(folder, fake_run.rows(4001, 12_000))
    read(file)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(file.curves["loss"]) == 12_000
    assert grown < 200_000  # the rows have 1 MB


def test_a_flood_of_keys_and_huge_numbers_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row: dict[str, Any] = {f"k{i}": 1.0 for i in range(2 * MAX_KEYS)}
    lines = [json.dumps({"step": 1, **row}), '{"step": 1e400, "loss": 1}']
    path.write_text("\n".join([*lines, f'{{"step": 2, "k0": 1{"0" * 400}}}', ""]))
    found = read(MetricsFile(path))
    assert len(found) == MAX_KEYS
    assert found["k0"] == [1]


def test_the_time_left_counts_validations_but_no_caches() -> None:
    rows = fake_run.rows(11, 20)
    rows[0]["seconds_validation"] = 99.0  # before the steps that are counted
    rows[3] |= {"seconds_cache": 1000.0, "seconds_validation": 9.0}
    assert seconds_left(rows, 100) == pytest.approx(80 * (9 * 2.5 + 9) / 9)
    assert seconds_left(rows, 20) == 0


def test_the_time_left_is_what_the_run_says_itself() -> None:
    rows = fake_run.rows(11, 20)
    rows[-1]["eta_s"] = 77.5
    rows.append({"step": 20, "eval_loss": 0.5})
    assert seconds_left(rows, 100) == 77.5
    rows[-2]["eta_s"] = -1.0  # damaged
    assert seconds_left(rows, 100) == pytest.approx(80 * 2.5)


@pytest.mark.parametrize(("count", "num_steps"), [(0, 100), (1, 100), (5, None)])
def test_nothing_is_said_of_the_time_left_where_nothing_is_known(
    count: int, num_steps: int | None
) -> None:
    assert seconds_left(fake_run.rows(1, count), num_steps) is None


def test_a_step_that_is_no_number_makes_no_row() -> None:
    assert [parse_row(line) for line in (b'{"step": NaN}', b'{"step": 1e999}')] == [None, None]
    assert parse_row(b'{"step": 2, "loss": NaN}') is not None
