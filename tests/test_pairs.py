"""Claims about `python -m dojo.pairs`: what it writes is what is read, to the byte after a kill."""

import itertools
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from dojo import cli, pairs, rewards
from dojo.cli import UserError
from dojo.data import PairArgs, check_pairs, open_pairs
from dojo.inputs.prompts import read_file
from dojo.models import folders
from dojo.rewards import wire
from dojo.rewards.reward import Component
from dojo.rewards.scorer import Metadata, Place, Scorer
from dojo.rewards.server import Limits, Server
from tests.processes import spawn
from tests.scripts.runs import one_thread

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

# Scores of what is drawn; it can kill, refuse and tie, and writes down how often it was asked.
REWARD = """
import os
import signal

import torch

def score(images, prompts, metadata):
    with open(__file__ + ".log", "a") as file:
        print(len(images), file=file)
    with open(__file__ + ".log") as file:
        calls = len(file.readlines())
    if calls == int(os.environ.get("DIE_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    scores = images.mean(dim=(1, 2, 3))
    if "flat" in prompts[0]:
        return scores * 0
    return torch.where(torch.tensor(["blank" in one for one in prompts]), torch.nan, scores)
"""
PROMPTS = ["a red star", "a flat ring", "a blank cross", "a blue ring", "a green cross"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a reward and prompts."""
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a held-out star"]))
    (tmp_path / "held.txt").write_text("a held-out star")
    return tmp_path


def words(place: Path, model: Path, folder: str, *more: str) -> list[str]:
    """The command line of a small run."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--max_sequence_length", "16"),
        *("--prompt_file", str(place / "prompts.txt"), "--reward", f"{place}/mine.py:score"),
        *("--eval_prompt_file", str(place / "held.txt"), "--num_inference_steps", "2"),
        *("--num_images", "3", "--output_dir", str(place / folder), *more),
    ]


def run(place: Path, model: Path, folder: str, *more: str) -> Path:
    pairs.main(cli.parse(pairs.Args, None, words(place, model, folder, *more)))
    return place / folder


def asked(place: Path) -> int:
    log = place / "mine.py.log"
    return len(log.read_text().split()) if log.exists() else 0


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the list of them, which says when it was begun."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.jsonl"
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read_as_pairs_of_the_best_and_the_worst(
    place: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(place, tiny_sd3, "out")
    found, left_out = check_pairs(
        open_pairs(PairArgs(dataset_name=str(folder), resolution=64)),
        *(place / "cache",),
        on_bad_sample="error",
        num_threads=1,
    )
    assert not left_out
    assert [pair.caption for pair in found.pairs] == ["a red star", "a blue ring", "a green cross"]
    drawn = {row["caption"]: row for row in rows(folder / "drawn.jsonl")}
    assert list(drawn) == PROMPTS
    for pair in found.pairs:
        bright = [np.asarray(found.pictures.read(place)).mean() / 255 for place in pair[:2]]
        scores = drawn[pair.caption]["scores"]
        assert len(scores) == len(set(scores)) == 3
        assert bright == pytest.approx([max(scores), min(scores)], abs=1e-6)
    assert drawn["a blank cross"]["scores"] == [None] * 3
    assert drawn["a blank cross"]["images"] == []
    seeds = [seed for row in drawn.values() for seed in row["seeds"]]
    assert len(set(seeds)) == 15
    said = capsys.readouterr().out
    assert "3 pairs of 5 prompts" in said
    assert "left out: 1 with scores equal" in said
    assert "1 without two valid scores (3 of 15 pictures have none)" in said
    summary = json.loads((folder / "pairs.json").read_text())
    assert (summary["pairs"], summary["too_close"], summary["without_two_scores"]) == (3, 1, 1)
    assert summary["mean_of_the_better"] > summary["mean"] > 0
    held_out = read_file(folder / "held_out.jsonl", "--validation_prompts_file")
    assert [prompt.text for prompt in held_out] == ["a held-out star"]
    assert str(place) not in (folder / "metadata.jsonl").read_text()


def test_another_margin_chooses_anew_and_draws_nothing(place: Path, tiny_sd3: Path) -> None:
    folder = run(place, tiny_sd3, "out")
    before, calls = content(folder), asked(place)
    run(place, tiny_sd3, "out")
    assert content(folder) == before
    gaps = sorted(best - worst for best, worst in (r["scores"] for r in rows(folder / pairs.PAIRS)))
    run(place, tiny_sd3, "out", "--min_margin", str((gaps[0] + gaps[1]) / 2))
    kept = rows(folder / pairs.PAIRS)
    assert len(kept) == 2
    assert all(row["scores"][0] - row["scores"][1] > gaps[0] for row in kept)
    with pytest.raises(UserError, match=r"prefers nothing: 0 pairs of 5 prompts.*margin 9"):
        run(place, tiny_sd3, "out", "--min_margin", "9")
    assert not (folder / pairs.PAIRS).exists()
    run(place, tiny_sd3, "out")
    assert content(folder) == before
    assert asked(place) == calls


def test_a_command_that_is_killed_goes_on_to_the_same_bytes(place: Path, tiny_sd3: Path) -> None:
    whole = content(run(place, tiny_sd3, "whole"))
    (place / "mine.py.log").unlink()
    flags = words(place, tiny_sd3, "broken")
    code, said = spawn("dojo.pairs", flags, place / "process", DIE_AT="4")
    assert code == -signal.SIGKILL, said
    broken = place / "broken"
    log = broken / "drawn.jsonl"
    assert len(rows(log)) == 3
    assert not (broken / pairs.PAIRS).exists()  # nobody takes it for whole
    with log.open("ab") as file:
        file.write(b'{"caption": "a bl')  # a line that was cut off
    (broken / ".0003-half.png.1234").write_bytes(b"half")  # not listed, so it is left alone
    run(place, tiny_sd3, "broken")
    found = content(broken)
    assert found.pop(".0003-half.png.1234") == b"half"
    assert found == whole
    assert asked(place) == 4 + 2


def test_pictures_of_other_options_are_not_mixed(place: Path, tiny_sd3: Path) -> None:
    folder = run(place, tiny_sd3, "out")
    before = content(folder)
    for flags, said in (
        (("--seed", "1"), "seed was 0, now 1"),
        (("--guidance_scale", "2"), r"guidance_scale was 5.0, now 2.0"),
        (("--max_prompts", "2"), "prompts changed"),
    ):
        with pytest.raises(UserError, match=f"drawn otherwise .{said}.: choose another folder"):
            run(place, tiny_sd3, "out", *flags)
    (place / "mine.py").write_text(REWARD.replace("images.mean", "-images.mean"))
    with pytest.raises(UserError, match="files of reward changed"):
        run(place, tiny_sd3, "out")
    assert content(folder) == before
    (place / "mine.py").write_text(REWARD)
    # More prompts for evaluation are no other pairs, and are taken.
    (place / "held.txt").write_text("a held-out star\na green diamond\n")
    found = [row["prompt"] for row in rows(run(place, tiny_sd3, "out") / "held_out.jsonl")]
    assert found == ["a held-out star", "a green diamond"]
    other = run(place, tiny_sd3, "other", "--seed", "1")
    assert rows(other / "drawn.jsonl")[0]["seeds"] != rows(folder / "drawn.jsonl")[0]["seeds"]


class Brightness(Scorer):
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """A server of brightness in this process; it may be ended before."""
    reward = rewards.Reward(
        [Component(name="bright", scorer=Brightness(Place()), weight=1.0)], batch_size=4
    )
    server = Server(reward, ("127.0.0.1", port), Limits())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_command_whose_server_is_lost_stops_and_goes_on_when_it_is_back(
    place: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "time", SimpleNamespace(sleep=lambda seconds: None))
    whole, one = pairs._scores, itertools.count(1)
    with serving() as server:
        port = server.server_address[1]
        reward = ("--reward", f"http://127.0.0.1:{port}#bright", "--max_prompts", "4")
        expected = content(run(place, tiny_sd3, "whole", *reward))

        def scored(*given: Any) -> Any:
            if next(one) == 3:
                server.shutdown()
                server.server_close()
            return whole(*given)

        monkeypatch.setattr(pairs, "_scores", scored)
        with pytest.raises((UserError, cli.TrainingStopped), match=rf"127\.0\.0\.1:{port}"):
            run(place, tiny_sd3, "broken", *reward)
    kept = rows(place / "broken" / "drawn.jsonl")
    assert len(kept) == 2
    assert not (place / "broken" / pairs.PAIRS).exists()
    with serving(port):
        found = content(run(place, tiny_sd3, "broken", *reward))
    # The picture that had no score yet was not kept, and is drawn again.
    assert found == expected


def test_what_the_hub_holds_by_now_is_another_model(
    place: Path, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = run(place, tiny_sd3, "out")
    read = [f"{place}/mine.py", "openai/clip-vit-large-patch14"]
    monkeypatch.setattr(rewards, "places", lambda text: read)
    run(place, tiny_sd3, "out")  # a commit that is not known says nothing
    ref.write_text("a" * 40 + "\n")
    run(place, tiny_sd3, "out")
    made = json.loads((folder / "pairs.json").read_text())["made_with"]
    assert made["commits of the hub"] == {"openai/clip-vit-large-patch14": "a" * 40}
    ref.write_text("b" * 40)
    with pytest.raises(UserError, match="commits of the hub changed"):
        run(place, tiny_sd3, "out")
    for name in ("openai/clip-vit-large-patch14/model.pt", "openai/other", "/openai/x", "clip"):
        found = folders.hub_commit(name)
        assert found == ("b" * 40 if name.endswith("model.pt") else "")


def test_a_folder_of_somebody_elses_is_left_alone(place: Path, tiny_sd3: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "metadata.jsonl").write_text("my own\n")
    with pytest.raises(UserError, match=r"--output_dir .* is not empty"):
        run(place, tiny_sd3, "mine")
    assert content(place / "mine") == {"metadata.jsonl": b"my own\n"}
    folder = run(place, tiny_sd3, "out", "--max_prompts", "1")
    (folder / "notes.txt").write_text("of my own")
    run(place, tiny_sd3, "out", "--max_prompts", "1")
    assert (folder / "notes.txt").read_text() == "of my own"


def test_how_many_are_drawn_at_a_time_changes_no_picture_but_by_rounding(
    place: Path, tiny_sd3: Path
) -> None:
    found = []
    for name, size in (("a", "3"), ("b", "2")):
        folder = run(place, tiny_sd3, name, "--max_prompts", "1", "--sample_batch_size", size)
        (row,) = rows(folder / "drawn.jsonl")
        found.append([np.asarray(Image.open(folder / file), int) for file in row["images"]])
    assert np.abs(np.subtract(*found)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num_images", "1"), "--num_images must be at least 2"),
        (("--min_margin", "-1"), "--min_margin"),
        (("--lora_weights_path", "x", "--lora_scale", "1", "2"), "--lora_scale takes one number"),
        (("--lora_scale", "0.5"), "--lora_scale does nothing without --lora_weights_path"),
        (("--sample_batch_size", "0"), "--sample_batch_size"),
        (("--prompt_set", "pocket"), "give one of them"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_by_its_flag(
    place: Path, tiny_sd3: Path, flags: tuple[str, ...], said: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        run(place, tiny_sd3, "out", *flags)
    assert said in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_reward_or_a_lora_that_is_not_there_leaves_no_folder(place: Path, tiny_sd3: Path) -> None:
    for flags, said in (
        (("--reward", "no_such_reward"), "no_such_reward"),
        (("--lora_weights_path", str(place / "none")), "--lora_weights_path"),
    ):
        with pytest.raises(UserError, match=said):
            run(place, tiny_sd3, "out", *flags)
        assert not (place / "out").exists()


def test_only_places_of_models_are_looked_into_and_no_secret_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("one")
    named = [pairs._reward_files("jpeg_compressibility[name=docs]")]
    inside = [pairs._reward_files("clip[model=docs]")]
    (tmp_path / "docs" / "a.txt").write_text("another")
    named.append(pairs._reward_files("jpeg_compressibility[name=docs]"))
    inside.append(pairs._reward_files("clip[model=docs]"))
    assert named[0] == named[1]
    assert inside[0] != inside[1]
    first, second = (f"http://me:{word}@localhost:8000#clip" for word in ("secret", "other"))
    assert pairs._reward_files(first) == pairs._reward_files(second)
