"""Claims about folders of results: a user's files stay, one process at a time, kills leave nothing
that cannot be told apart."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dojo import files
from dojo.cli import TrainingStopped, UserError
from dojo.files import outputs
from dojo.run import checkpoint


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """No test leaves a folder taken."""
    yield
    outputs._release_all()


def names(folder: Path) -> set[str]:
    """Every file below a folder, but for the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix() for path in found} - {outputs.LOCK}


def again(folder: Path, *, overwrite: bool = False) -> outputs.Claim:
    """What the next process gets."""
    outputs.release(folder)
    return outputs.claim(folder, "run", overwrite=overwrite)


def write(path: Path, text: str = "ours") -> None:
    """As a run writes a file."""
    outputs.own(path).parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# Which folders are taken


def test_a_folder_with_a_users_files_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"--output_dir .* is not empty.*README\.md"):
            outputs.claim(tmp_path, "run", overwrite=overwrite)
    assert list(tmp_path.iterdir()) == [tmp_path / "README.md"]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._x", ".gitkeep", outputs.LOCK])
def test_what_systems_leave_does_not_make_a_folder_full(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    outputs.claim(tmp_path, "run")


def test_a_cache_does_not_make_a_folder_full_and_is_nobodys_to_remove(tmp_path: Path) -> None:
    cache = tmp_path / "run" / "cache"
    files.cache_root(cache)
    (cache / "latents-1").mkdir()
    (cache / "latents-1" / "shard").touch()
    held = outputs.claim(tmp_path / "run", "run")
    write(tmp_path / "run" / "args.json")
    held.remove()
    assert (cache / "latents-1" / "shard").is_file()


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        outputs.claim(tmp_path / "file", "run")
    with pytest.raises(UserError, match=r"--output_dir .*a file is in the way"):
        outputs.claim(tmp_path / "file" / "run", "run")


def test_a_manifest_of_another_program_is_a_users_file(tmp_path: Path) -> None:
    (tmp_path / outputs.MANIFEST).write_text('{"audio": "a.wav"}\n')
    with pytest.raises(UserError, match="is not empty"):
        outputs.claim(tmp_path, "run")


def test_a_run_and_pictures_do_not_share_a_folder(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    write(tmp_path / "args.json")
    outputs.release(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        outputs.claim(tmp_path, "pictures")


def test_a_start_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    outputs.claim(folder, "run")
    outputs.release(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").mkdir()
    outputs.claim(tmp_path / "own" / "run", "run")
    outputs.release(tmp_path / "own" / "run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "own"]


def test_a_start_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / outputs.LOCK).touch()
    (folder / f".{outputs.MANIFEST}.partial").write_text('{"sd_')
    outputs.claim(folder, "run")
    again(folder)
    assert names(folder) == {outputs.MANIFEST}


# What is removed


def test_overwriting_removes_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    outputs.own_pattern(tmp_path, "logs/*events.out.*")
    for name in ("args.json", "validation/step-1/a.png", "logs/p/events.out.1", "vae/config.json"):
        write(tmp_path / name)
    (tmp_path / "logs" / "p" / "events.out.2").write_text("a tracker's, after a kill")
    mine = ["notes.txt", "validation/step-1/mine.png", "logs/mine.txt", "validation/b/c.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    held = again(tmp_path, overwrite=True)
    assert set(outputs.others(tmp_path)) == set(mine)
    held.remove()
    held.start_list()
    assert names(tmp_path) == {*mine, outputs.MANIFEST}
    assert not (tmp_path / "vae").exists()
    assert not (tmp_path / "logs" / "p").exists()
    assert not again(tmp_path).listed


def test_a_file_is_listed_before_it_is_written(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    path = outputs.own(tmp_path / "model.safetensors")  # and killed
    assert not path.exists()
    path.write_text("as if it had been written")
    again(tmp_path, overwrite=True).remove()
    assert not path.exists()


def test_a_line_that_a_kill_cut_off_lists_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    write(tmp_path / "args.json")
    with (tmp_path / outputs.MANIFEST).open("a") as file:
        file.write('"README')
    held = again(tmp_path)
    assert held.listed == {"args.json"}
    write(tmp_path / "metrics.jsonl")
    assert again(tmp_path).listed == {"args.json", "metrics.jsonl"}


def test_a_users_file_under_a_runs_name_gets_another_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs.claim(tmp_path, "run")
    (tmp_path / "README.md").write_text("mine")
    checkpoint.write_file(tmp_path / "README.md", "the card")
    checkpoint.write_file(tmp_path / "README.md", "the card again")
    assert (tmp_path / "README.kept.md").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "the card again"
    assert "README.kept.md" in capsys.readouterr().out


def test_what_a_command_adds_to_a_run_later_is_the_runs(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    write(tmp_path / "args.json")
    outputs.release(tmp_path)
    outputs.join(tmp_path)  # as dojo.publish and dojo.report do
    checkpoint.write_file(tmp_path / "README.md", "the card")
    assert again(tmp_path).listed == {"args.json", "README.md"}


def test_a_part_of_the_result_is_made_anew_around_a_users_files(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")

    def make(*shards: str) -> None:
        def save(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for shard in shards:
                (folder / shard).write_text(shard)

        assert outputs.fill(tmp_path / "transformer", save)

    make("1-of-2", "2-of-2")
    (tmp_path / "transformer" / "mine.txt").write_text("mine")
    make("whole")
    assert names(tmp_path / "transformer") == {"whole", "mine.txt"}
    assert {"transformer/", "transformer/whole"} <= again(tmp_path).listed


def test_a_checkpoint_that_goes_leaves_a_users_files(tmp_path: Path) -> None:
    outputs.claim(tmp_path, "run")
    for step in (1, 2):
        checkpoint.write_whole(
            tmp_path / f"checkpoint-{step}", lambda inside: (inside / "state.json").touch()
        )
    (tmp_path / "checkpoint-1" / "converted.bin").write_text("mine")
    checkpoint.rotate(tmp_path, 1)
    assert [step for step, _ in checkpoint.existing(tmp_path)] == [2]
    assert (tmp_path / "checkpoint-1.kept" / "converted.bin").read_text() == "mine"
    checkpoint.forget_after(tmp_path, 0)
    assert names(tmp_path) == {outputs.MANIFEST, "checkpoint-1.kept/converted.bin"}


def test_halves_that_a_kill_left_are_removed_and_a_users_hidden_files_are_not(
    tmp_path: Path,
) -> None:
    outputs.claim(tmp_path, "run")
    outputs.own_folder(tmp_path / "checkpoint-7")
    write(tmp_path / "validation" / "prompts.json")
    outputs.own(tmp_path / "model.safetensors")
    halves = [".checkpoint-7.partial/a", "validation/.prompts.json.partial"]
    halves += [".model.safetensors.123", ".checkpoint-7.removed/b"]
    mine = [".notes.partial", ".git/x", ".secret.5", "validation/.mine.partial"]
    for name in [*halves, *mine]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    again(tmp_path)
    assert names(tmp_path) == {outputs.MANIFEST, "validation/prompts.json", *mine}


# Folders of earlier versions


def earlier(folder: Path) -> None:
    for name in ("args.json", "README.md", "checkpoint-2/state.json", "checkpoint-2/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"script": "train.py", "args": {}, "seed": 0}')


def test_a_run_of_an_earlier_version_goes_on_and_is_not_overwritten(tmp_path: Path) -> None:
    earlier(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UserError, match="earlier version"):
        outputs.claim(tmp_path, "run", overwrite=True)
    outputs.claim(tmp_path, "run")
    outputs.release(tmp_path)  # nothing was written
    assert names(tmp_path) == before
    outputs.claim(tmp_path, "run")
    checkpoint.write_file(tmp_path / "README.md", "the card")
    checkpoint.rotate(tmp_path, 1)
    again(tmp_path, overwrite=True).remove()
    assert names(tmp_path) == {outputs.MANIFEST, "checkpoint-2/notes.txt"}


# One process at a time

HOLDER = """
import sys
from pathlib import Path
from dojo.files import outputs
sys.argv = ["train_x.py"]
outputs.claim(Path(sys.stdin.readline().strip()), "run")
print("held", flush=True)
if sys.stdin.readline() == "fork\\n":
    import os
    if (child := os.fork()) == 0:
        sys.stdin.readline()  # lives on
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has taken `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{tmp_path / 'run'}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_in_use_until_its_process_ends_in_whatever_way(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    run = tmp_path / "run"
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match=rf"in use by train_x\.py \(process {holder.pid} on .*, since 20"
        ):
            outputs.claim(run, "run", overwrite=overwrite)
    # A data loader's worker outlives its parent for a while and must not keep the folder.
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("fork\n")
    holder.stdin.flush()
    child = int(holder.stdout.readline())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path(f"/proc/{child}").exists()
    assert (run / outputs.LOCK).is_file()
    deadline = time.monotonic() + 60  # the child closes its copy as its first act
    while True:
        try:
            outputs.claim(run, "run")
            break
        except UserError:
            assert time.monotonic() < deadline
    assert json.loads((run / outputs.LOCK).read_text())["pid"] == os.getpid()
    os.kill(child, signal.SIGKILL)


def test_a_lock_that_changes_hands_while_one_waits_is_not_taken_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = files.open_locked(path)
    with pytest.raises(BlockingIOError):
        files.open_locked(path)
    path.unlink()
    second = files.open_locked(path)  # another file of that name
    assert files.is_at(path, second)
    assert not files.is_at(path, first)
    os.close(first)
    os.close(second)


# Whole files


def test_what_a_kill_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    dead = [tmp_path / ".a.safetensors.123", tmp_path / ".checked-1.json.7"]
    others = [tmp_path / "a.safetensors", tmp_path / ".hidden", tmp_path / ".a.partial"]
    for path in [*dead, *others]:
        path.write_text("half")
    with files.whole(tmp_path / "b.safetensors") as file:
        file.write(b"half")
        files.sweep(tmp_path.iterdir())
        file.write(b" and whole")
    assert (tmp_path / "b.safetensors").read_text() == "half and whole"
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in others),
        "b.safetensors",
    }


def test_where_nothing_can_be_locked_only_old_files_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    dead = tmp_path / ".a.safetensors.123"
    dead.write_text("half")
    os.utime(dead, (0, 0))
    with files.whole(tmp_path / "b.safetensors") as file:
        file.write(b"whole")
        files.sweep(tmp_path.iterdir())
    assert names(tmp_path) == {"b.safetensors"}


def test_a_full_disk_is_said_in_whichever_librarys_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with pytest.raises(RuntimeError):
        checkpoint.write_whole(tmp_path / "checkpoint-1", fail)
    usage = type(files.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with pytest.raises(TrainingStopped, match=r"no room left.*--resume_from_checkpoint latest"):
        checkpoint.write_whole(tmp_path / "checkpoint-1", fail)
    assert checkpoint.existing(tmp_path) == []


def test_an_output_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"

    def is_ours(text: str) -> bool:
        return text.startswith("file_name")

    files.check_output(path, "--output", is_ours=is_ours)
    path.write_text("file_name,prompt\n")
    files.check_output(path, "--output", is_ours=is_ours)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"--output: .*scores\.csv is there already"):
        files.check_output(path, "--output", is_ours=is_ours)
    files.check_output(path, "--output", is_ours=is_ours, overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        files.check_output(tmp_path, "--output", is_ours=is_ours, overwrite=True)
