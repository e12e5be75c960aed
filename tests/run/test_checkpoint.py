"""Claims about checkpoints: whole or absent, found in order, refused when they do not fit."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dojo.cli import UserError
from dojo.run import checkpoint

STATE = checkpoint.State(
    step=3, samples=12, seed=11, batch_size=4, data="abc", loss_sum=0.5, loss_count=2
)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(name)


# Written whole


def test_a_checkpoint_appears_complete(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoint-3"

    def write(inside: Path) -> None:
        assert not folder.exists()
        (inside / "weights").write_text("w")
        (inside / "sub").mkdir()
        (inside / "sub" / "config").write_text("c")

    checkpoint.write_whole(folder, write)
    assert (folder / "weights").read_text() == "w"
    assert (folder / "sub" / "config").read_text() == "c"
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]


def test_a_writer_that_fails_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def write(inside: Path) -> None:
        (inside / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(tmp_path / "checkpoint-3", write)
    assert not (tmp_path / "checkpoint-3").exists()
    assert checkpoint.choose(tmp_path, "latest") is None


def test_a_writer_that_fails_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-3")

    def write(inside: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(tmp_path / "checkpoint-3", write)
    assert (tmp_path / "checkpoint-3" / "content").read_text() == "checkpoint-3"


def test_what_a_kill_left_is_neither_chosen_nor_mixed_in(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-2", ".checkpoint-4.partial", ".checkpoint-1.removed")
    (tmp_path / ".checkpoint-4.partial" / "old").write_text("from the killed run")
    assert checkpoint.choose(tmp_path, "latest") == tmp_path / "checkpoint-2"
    checkpoint.write_whole(tmp_path / "checkpoint-4", lambda inside: make(inside, "new"))
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["new"]
    make(tmp_path, ".checkpoint-6.partial")
    checkpoint.rotate(tmp_path, None)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-2", "checkpoint-4"]


def test_an_existing_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-3")
    checkpoint.write_whole(tmp_path / "checkpoint-3", lambda inside: make(inside, "new"))
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_every_byte_is_flushed_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-3"
    flushed: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, folder.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.write_whole(folder, lambda inside: make(inside, "sub"))
    before = {name for name, named in flushed if not named}
    assert {"content", "sub", ".checkpoint-3.partial"} <= before
    assert flushed[-1] == (tmp_path.name, True)


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    checkpoint.write_file(path, "old")
    checkpoint.write_file(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert [found.name for found in tmp_path.iterdir()] == ["args.json"]


# Found in order


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    make(tmp_path, *(f"checkpoint-{n}" for n in (10, 9, 100, 2)))
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [2, 9, 10, 100]
    assert checkpoint.choose(tmp_path, "latest") == tmp_path / "checkpoint-100"


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    make(tmp_path, *(f"checkpoint-{n}" for n in (8, 9, 10, 11)))
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.existing(tmp_path)) == 4
    checkpoint.rotate(tmp_path, 2)
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [10, 11]
    checkpoint.rotate(tmp_path, 2)
    checkpoint.rotate(tmp_path, 5)
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [10, 11]


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    # diffusers' scripts crash on these: int("checkpoint-final".split("-")[1]).
    odd = ["checkpoint-final", "checkpoint-3-old", "checkpoint-", "checkpoint-4.bak", "checkpoint"]
    make(tmp_path, "checkpoint-3", *odd)
    (tmp_path / "checkpoint-9").write_text("a file")
    assert checkpoint.existing(tmp_path) == [(3, tmp_path / "checkpoint-3")]
    assert checkpoint.choose(tmp_path, "latest") == tmp_path / "checkpoint-3"
    checkpoint.rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-9", *odd}
    for name in [*odd, "checkpoint-9"]:
        with pytest.raises(UserError, match="--resume_from_checkpoint"):
            checkpoint.choose(tmp_path, name)


def test_a_checkpoint_is_chosen_by_name_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "run/checkpoint-3", "run/checkpoint-4", "other/checkpoint-7")
    run = tmp_path / "run"
    assert checkpoint.choose(run, None) is None
    assert checkpoint.choose(run, "checkpoint-3") == run / "checkpoint-3"
    assert checkpoint.choose(run, f"{run}/checkpoint-3/") == run / "checkpoint-3"
    other = tmp_path / "other" / "checkpoint-7"
    assert checkpoint.choose(run, str(other)) == other
    monkeypatch.chdir(tmp_path)
    assert checkpoint.choose(run, "other/checkpoint-7") == Path("other/checkpoint-7")


def test_a_missing_checkpoint_is_refused_and_the_others_named(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "none", "latest") is None
    with pytest.raises(UserError, match=r"no checkpoint-5 in .*\(none\)"):
        checkpoint.choose(tmp_path, "checkpoint-5")
    make(tmp_path, "checkpoint-3")
    with pytest.raises(UserError, match=r"no checkpoint-5 in .*\(checkpoint-3\)"):
        checkpoint.choose(tmp_path, "checkpoint-5")


# Put back


def training() -> tuple[nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, schedule


def save(folder: Path, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    """All but the weights."""
    checkpoint.save_optimizer(folder, optimizer.state_dict())
    checkpoint.save_training(folder, STATE, schedule, scaler)


def load(folder: Path, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    optimizer.load_state_dict(checkpoint.load_optimizer(folder))
    checkpoint.load_training(folder, schedule, scaler)


def step(
    model: nn.Linear,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    number: int,
) -> None:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def test_optimizer_and_schedule_go_on_exactly(tmp_path: Path) -> None:
    first = training()
    for number in range(3):
        step(*first, number)
    save(tmp_path, first[1], first[2])
    weights = {name: value.clone() for name, value in first[0].state_dict().items()}
    for number in range(3, 6):
        step(*first, number)

    second = training()
    second[0].load_state_dict(weights)
    load(tmp_path, second[1], second[2])
    for number in range(3, 6):
        step(*second, number)
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[2].get_last_lr() == second[2].get_last_lr()
    assert checkpoint.read_state(tmp_path) == STATE


@pytest.mark.parametrize(
    ("part", "read"),
    [
        ("state.json", checkpoint.read_state),
        ("schedule.pt", checkpoint.read_state),
        ("optimizer.pt", checkpoint.load_optimizer),
    ],
)
def test_a_missing_part_is_named_by_who_reads_it(
    tmp_path: Path, part: str, read: Callable[[Path], object]
) -> None:
    _, optimizer, schedule = training()
    save(tmp_path, optimizer, schedule)
    (tmp_path / part).unlink()
    with pytest.raises(UserError, match=f"{part} is missing"):
        read(tmp_path)


def test_a_checkpoint_stands_somewhere_without_an_optimizer_file(tmp_path: Path) -> None:
    _, _, schedule = training()
    checkpoint.save_training(tmp_path, STATE, schedule, None)
    assert checkpoint.read_state(tmp_path) == STATE


def test_the_gradient_scaler_goes_on_exactly(tmp_path: Path) -> None:
    _, optimizer, schedule = training()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=7)
    scaler.scale(torch.zeros(()))
    scaler.update(2.0)
    save(tmp_path, optimizer, schedule, scaler)
    again = torch.amp.GradScaler("cpu")
    load(tmp_path, optimizer, schedule, again)
    assert again.state_dict() == scaler.state_dict()
    with pytest.raises(UserError, match="fp16"):
        load(tmp_path, optimizer, schedule)
    (tmp_path / "scaler.json").unlink()
    with pytest.raises(UserError, match="fp16"):
        load(tmp_path, optimizer, schedule, again)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 12}, "--seed"),
        ({"batch_size": 8}, "samples per step"),
        ({"data": "xyz"}, "data"),
    ],
)
def test_another_run_is_not_continued(change: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        checkpoint.check_same_run(Path("checkpoint-3"), STATE, replace(STATE, **change))


def test_the_same_run_is_continued_wherever_it_stands() -> None:
    now = replace(STATE, step=0, samples=0, loss_sum=0.0, loss_count=0)
    checkpoint.check_same_run(Path("checkpoint-3"), STATE, now)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("part", ["optimizer.pt", "schedule.pt"])
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, part: str) -> None:
    _, optimizer, schedule = training()
    save(tmp_path, optimizer, schedule)
    torch.save({"state": Malice(tmp_path / "harm"), "param_groups": []}, tmp_path / part)
    with pytest.raises((pickle.UnpicklingError, UserError)):
        load(tmp_path, optimizer, schedule)
    assert not (tmp_path / "harm").exists()


def test_the_state_is_readable_text(tmp_path: Path) -> None:
    _, optimizer, schedule = training()
    save(tmp_path, optimizer, schedule)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3
