"""Claims about shards: whole or absent, each sample in its place, little disturbed by a change."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dojo import files
from dojo.cli import UserError
from dojo.data import shards as disk
from dojo.data.shards import Shards

IDS = [f"{i}.png|v1" for i in range(10)]
MANY = [f"{i:05d}.png|{i}" for i in range(2000)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten samples then make several shards."""
    monkeypatch.setattr(disk, "SHARD_SIZE", 4)


def make(indices: Sequence[int]) -> dict[str, Tensor]:
    return {"value": torch.tensor([[float(i), -float(i)] for i in indices])}


def values(shards: Shards, count: int = 10) -> list[float]:
    return [shards.read(i)["value"][0].item() for i in range(count)]


def test_every_sample_is_read_back_from_its_place(tmp_path: Path) -> None:
    shards = Shards(tmp_path, IDS)
    assert len(shards.members) > 2
    shards.fill(make, title="test")
    assert values(shards) == list(range(10))
    assert shards.read(7, 1)["value"].item() == -7  # a view of the sample, not all of it
    assert (shards.missing(), shards.num_missing()) == ([], 0)


@pytest.mark.parametrize("views", [1, 2, 100])
def test_shards_divide_the_samples_and_stay_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    monkeypatch.undo()
    shards = Shards(tmp_path, MANY, views=(views, 1))
    assert [i for members in shards.members for i in members] == list(range(2000))
    lengths = [len(members) for members in shards.members]
    assert max(lengths) <= max(1, disk.SHARD_SIZE // views)
    assert min(lengths) >= 1
    if views == 1:
        assert 8 < sum(lengths) / len(lengths) < 24
    assert len(set(shards.names)) == len(shards.names)


def test_equal_ids_do_not_make_one_endless_shard(tmp_path: Path) -> None:
    # No id ends a shard here, or each does: the size is bounded all the same.
    for sample_id in ("a", "b", "c", "d"):
        assert max(map(len, Shards(tmp_path, [sample_id] * 50).members)) <= 4


def test_a_sample_more_or_less_disturbs_its_own_surroundings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    before = set(Shards(tmp_path, MANY).names)
    rng = random.Random(0)
    for _ in range(20):
        i = rng.randrange(2000)
        changes = (
            MANY[:i] + MANY[i + 1 :],  # left out
            [*MANY[:i], "new.png|1", *MANY[i:]],  # added
            [*MANY[:i], MANY[i] + "0", *MANY[i + 1 :]],  # written anew
        )
        for ids in changes:
            new = Shards(tmp_path, ids)
            changed = [k for k, name in enumerate(new.names) if name not in before]
            # A shard that is cut at its full length moves the next ones until an id ends one.
            assert 0 <= sum(len(new.members[k]) for k in changed) <= 4 * disk.SHARD_SIZE


def test_a_changed_id_is_never_found_under_the_old_name(tmp_path: Path) -> None:
    Shards(tmp_path, IDS).fill(make, title="test")
    changed = Shards(tmp_path, [*IDS[:5], "5.png|v2", *IDS[6:]])
    (shard,) = (k for k, members in enumerate(changed.members) if 5 in members)
    assert shard in changed.missing()


def test_ids_cannot_run_into_each_other(tmp_path: Path) -> None:
    names = {name for ids in (["ab", "c"], ["a", "bc"]) for name in Shards(tmp_path, ids).names}
    assert disk.digest(["ab", "c"]) != disk.digest(["a", "bc"])
    assert len(names) >= 2


def test_odd_names_of_files_are_ids_too(tmp_path: Path) -> None:
    ids = ["caf\udce9.png|1", "ba\nd|1", "", "\x00"]
    shards = Shards(tmp_path, ids)
    shards.fill(make, title="test")
    assert values(shards, 4) == [0, 1, 2, 3]


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    def stop(indices: Sequence[int]) -> dict[str, Tensor]:
        if 9 in indices:
            raise KeyboardInterrupt
        return make(indices)

    shards = Shards(tmp_path, IDS)
    with pytest.raises(KeyboardInterrupt):
        shards.fill(stop, title="test")
    last = len(shards.names) - 1
    assert shards.missing() == [last]
    assert len(list(tmp_path.iterdir())) == last


def test_a_half_written_file_is_not_taken_for_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError("disk full")

    shards = Shards(tmp_path, IDS)
    with monkeypatch.context() as patch:
        patch.setattr("dojo.files.tensors.os.fsync", refuse)
        with pytest.raises(OSError, match="disk full"):
            shards.fill(make, title="test")
    assert list(tmp_path.iterdir()) == []
    assert shards.missing() == list(range(len(shards.names)))
    shards.fill(make, title="test")
    assert values(shards) == list(range(10))


DEADLY = """
import os, signal, sys
from pathlib import Path
import torch
from dojo.data import shards

shards.SHARD_SIZE = 4
calls = iter(range(1, 100))

def deadly(descriptor):  # called for each file, then for its folder
    if next(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = deadly
ids = [f"{i}.png|v1" for i in range(10)]
shards.Shards(Path(sys.argv[1]), ids).fill(
    lambda members: {"value": torch.tensor([[float(i), -float(i)] for i in members])}, title="test"
)
"""


def test_a_killed_process_is_completed_with_the_same_bytes(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", DEADLY, str(tmp_path / "killed")], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards, whole = Shards(tmp_path / "killed", IDS), Shards(tmp_path / "whole", IDS)
    assert 0 < len(shards.missing()) == len(shards.names) - 2  # written, but not renamed
    shards.fill(make, title="test")
    whole.fill(make, title="test")
    assert values(shards) == list(range(10))
    for k in range(len(whole.names)):
        assert shards.path(k).read_bytes() == whole.path(k).read_bytes()


def test_processes_fill_disjoint_shards(tmp_path: Path) -> None:
    done: list[list[int]] = [[], []]

    def remember(process: int) -> None:
        def make_and_tell(indices: Sequence[int]) -> dict[str, Tensor]:
            done[process] += indices
            return make(indices)

        Shards(tmp_path, IDS).fill(make_and_tell, title="test", process=process, num_processes=2)

    remember(1)
    assert Shards(tmp_path, IDS).missing() == list(range(0, len(Shards(tmp_path, IDS).names), 2))
    remember(0)
    assert sorted(done[0] + done[1]) == list(range(10))
    assert Shards(tmp_path, IDS).missing() == []


def test_short_lists_are_dealt_to_all_processes(tmp_path: Path) -> None:
    made = [0, 0]
    for process in (0, 1):
        for number in range(6):  # six lists of one shard
            one = Shards(tmp_path / str(process), [f"only {number}"])
            missing = len(one.missing())
            one.fill(make, title="test", process=process, num_processes=2, first=number)
            made[process] += missing - len(one.missing())
    assert made == [3, 3]


def test_leftovers_of_a_killed_process_are_harmless(tmp_path: Path) -> None:
    shards = Shards(tmp_path, IDS)
    for k in range(len(shards.names)):
        path = shards.path(k)
        path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"half")
    assert shards.missing() == list(range(len(shards.names)))
    shards.fill(make, title="test")
    assert values(shards) == list(range(10))
    assert all(load_file(shards.path(k)) for k in range(len(shards.names)))


def test_shards_are_small_to_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shards = Shards(tmp_path, MANY)
    assert len(pickle.dumps(shards)) < 20 * len(MANY)
    copied = pickle.loads(pickle.dumps(shards))
    copied.fill(make, title="test")
    assert shards.read(1234)["value"][0].item() == 1234


# Folders


def spoil(path: Path, how: str) -> None:
    """Damages a file as a full disk or a failing one would."""
    content = path.read_bytes()
    spoiled = {
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "cut by a byte": content[:-1],
        "zeros": bytes(len(content)),
        "garbage": random.Random(0).randbytes(len(content)),
    }
    path.write_bytes(spoiled[how])


@pytest.mark.parametrize("how", ["empty", "cut off", "cut by a byte", "zeros", "garbage"])
def test_a_damaged_shard_is_made_again_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    shards = Shards(tmp_path, IDS)
    shards.fill(make, title="test")
    spoil(shards.path(1), how)
    again = Shards(tmp_path, IDS)
    assert again.missing() == [1]
    again.fill(make, title="test")
    assert f"1 damaged files are made again ({shards.path(1).name})" in capsys.readouterr().out
    assert values(again) == list(range(10))


def test_a_shard_with_other_rows_than_its_samples_is_made_again(tmp_path: Path) -> None:
    shards = Shards(tmp_path, IDS)
    shards.fill(make, title="test")
    disk.tensors.save(shards.path(0), {"value": torch.zeros(len(shards.members[0]) + 1, 2)})
    assert Shards(tmp_path, IDS).missing() == [0]


def test_a_shard_that_is_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    shards = Shards(tmp_path, IDS)
    shards.fill(make, title="test")
    spoil(shards.path(1), "cut off")
    with pytest.raises(UserError, match=f"{shards.names[1]}.*--resume_from_checkpoint latest"):
        shards.read(shards.members[1][0])


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def two_views(members: Sequence[int]) -> dict[str, Tensor]:
    rows = [[[i + 0.25, -i], [i + 0.5, i]] for i in members]
    return {"value": torch.tensor(rows), "half": torch.tensor(rows).bfloat16()}


def test_a_view_of_which_a_byte_changed_is_not_read_and_its_shard_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "SHARD_SIZE", 8)
    shards = Shards(tmp_path, IDS, views=(2,))
    shards.fill(two_views, title="test")
    k = max(range(len(shards.names)), key=lambda k: len(shards.members[k]))
    path, (first, *_, last) = shards.path(k), shards.members[k]
    flip_last_byte(path)  # of the last sample's second view
    assert Shards(tmp_path, IDS, views=(2,)).missing() == []  # its header is as ever
    assert shards.read(first)["value"].tolist() == two_views([first])["value"][0].tolist()
    assert shards.read(last, 0)["value"].tolist() == [last + 0.25, -last]
    assert shards.read(last, 0, 1)["value"].item() == -last
    for view in ((), (1,), (1, 0)):
        content = path.read_bytes()
        with pytest.raises(UserError, match="numbers are not those that were written"):
            shards.read(last, *view)
        assert Shards(tmp_path, IDS, views=(2,)).missing() == [k]
        path.write_bytes(content)
    path.unlink()
    again = Shards(tmp_path, IDS, views=(2,))
    again.fill(two_views, title="test")
    assert again.read(last, 1)["value"].tolist() == [last + 0.5, last]


def test_the_header_of_a_shard_is_read_once_for_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(tmp_path, IDS)
    shards.fill(make, title="test")
    opened: list[Path] = []
    read_header = disk.tensors.read_header

    def counted(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        opened.append(path)
        return read_header(path)

    monkeypatch.setattr(disk.tensors, "read_header", counted)
    assert values(shards) == values(shards) == list(range(10))
    assert sorted(opened) == sorted(shards.path(k) for k in range(len(shards.names)))
    # A file that is another one by now is looked at again.
    path, members = shards.path(1), shards.members[1]
    path.unlink()
    disk.tensors.save(path, {"other": torch.zeros(len(members), 3, dtype=torch.bfloat16)})
    assert shards.read(members[-1])["other"].tolist() == [0, 0, 0]


def test_shards_from_before_there_were_checksums_are_read(tmp_path: Path) -> None:
    shards = Shards(tmp_path, IDS)
    for k, members in enumerate(shards.members):
        disk.tensors.save(shards.path(k), make(members))
    assert shards.missing() == []
    assert values(shards) == list(range(10))


def test_other_settings_lie_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"vae": "v1", "dtype": "no"}
    others = [settings, {**settings, "vae": "v2"}, {**settings, "dtype": "bf16"}, {}]
    folders = {disk.cache_folder(tmp_path, "latents", each) for each in others}
    folders.add(disk.cache_folder(tmp_path, "text", settings))
    turned = dict(reversed(settings.items()))
    assert disk.cache_folder(tmp_path, "latents", turned) in folders
    monkeypatch.setattr(disk, "FORMAT", disk.FORMAT + 1)
    folders.add(disk.cache_folder(tmp_path, "latents", settings))
    assert len(folders) == 6


def test_the_disk_is_asked_before_a_cache_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(free: int) -> None:
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    leave(3 * 2**30)
    disk.announce("the latents of 7 pictures", tmp_path / "new", 2 * 2**30)
    assert "7 pictures: 2.00 GiB in " in capsys.readouterr().out
    leave(2 * 2**30)  # no margin
    with pytest.raises(UserError, match=r"7 pictures needs 2\.00 GiB.*--latent_cache_dir"):
        disk.announce("the latents of 7 pictures", tmp_path / "new", 2 * 2**30)


def test_what_a_kill_left_in_any_cache_is_removed_by_the_next_one(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "latents-1", IDS)
    other = tmp_path / "text-2"
    other.mkdir()
    dead, live = other / ".a.safetensors.123", other / ".b.safetensors.7"
    for path in (dead, live):
        path.write_text("half")
    lock = files.open_locked(live)  # another run is writing it
    shards.fill(make, title="test")
    assert not dead.exists()
    assert live.exists()
    os.close(lock)
    shards.fill(make, title="test")
    assert not live.exists()
