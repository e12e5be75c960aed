"""The pocket world's pairs, and the report of the proof of preference learning."""

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dojo.cli import UserError
from dojo.pocket import pairs, proof_preference, scenes, verifier
from dojo.pocket.proof_preference import CLIP, GRADED, STRICT, Args, Drawn, Studio
from tests.conftest import ROOT
from tests.pocket.proofs import bash, recorded, unspread

SCRIPT = ROOT / "scripts" / "prove_preference.sh"

SHORT = ("--num_captions", "6", "--num_images", "3", "--num_held_out", "6")


# -- pairs ---------------------------------------------------------------------------------------


def test_captions_are_distinct_balanced_and_apart_from_those_held_out() -> None:
    train, held_out = pairs.captions(300, 120)
    assert len({*train, *held_out}) == 420
    tasks = [scenes.parse(text).task for text in train]
    assert set(tasks) == set(scenes.TASKS)
    assert max(map(tasks.count, scenes.TASKS)) < 2 * 300 / 6
    assert pairs.captions(300, 120) == (train, held_out)
    assert set(pairs.captions(200, 120)[0]) < set(train)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    args = pairs.cli.parse(
        pairs.Args,
        None,
        [
            *("--pretrained_model_name_or_path", str(tiny_sd15), "--output_dir", str(folder)),
            *("--num_inference_steps", "2", *SHORT),
        ],
    )
    pairs.main(args)
    return folder


def test_every_caption_has_its_pictures_the_best_first(drawn: Path) -> None:
    rows = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == (drawn / "train.txt").read_text().splitlines()
    for row in rows:
        assert len(row["images"]) == 3
        assert row["scores"] == sorted(row["scores"], reverse=True)
        spec = scenes.parse(row["caption"])
        for name, score in zip(row["images"], row["scores"], strict=True):
            picture = np.asarray(Image.open(drawn / name))
            assert verifier.graded(picture, spec) == pytest.approx(score, abs=1e-5)


def test_the_scenes_show_what_the_captions_say(drawn: Path) -> None:
    rows = [
        json.loads(line) for line in (drawn / "scenes" / "metadata.jsonl").read_text().splitlines()
    ]
    assert [row["text"] for row in rows] == (drawn / "train.txt").read_text().splitlines()
    for row in rows:
        picture = np.asarray(Image.open(drawn / "scenes" / row["file_name"]))
        assert verifier.strict(picture, scenes.parse(row["text"]))


def test_a_folder_that_is_complete_is_left_as_it_is(drawn: Path, tiny_sd15: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    pairs.main(pairs.Args(pretrained_model_name_or_path=str(tiny_sd15), output_dir=drawn))
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_one_picture_makes_no_pair() -> None:
    with pytest.raises(ValueError, match="--num_images"):
        pairs.Args(num_images=1)


# -- the report ----------------------------------------------------------------------------------

CAPTIONS = scenes.evaluation_captions(40, seed=3)
COUNT = len(CAPTIONS)


def shown(gain: float, *, clip: float = 0.0, seed: int = 0) -> Drawn:
    """Pictures whose scores lie `gain` above the base's, give or take."""
    draw = np.random.default_rng(seed)
    spread = draw.normal(0, 0.02, COUNT) if gain else np.zeros(COUNT)
    base = np.random.default_rng(99).uniform(0.3, 0.7, COUNT)
    return Drawn(
        pictures=np.full((COUNT, 64, 64, 3), 255, dtype=np.uint8),
        scores={
            GRADED: (base + gain + spread).tolist(),
            STRICT: (base + gain > 0.5).astype(float).tolist(),
            CLIP: (0.2 + clip + spread).tolist(),
        },
    )


Write = Callable[..., Path]


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`proof(dpo=shown(...), ...)`: a folder with these trainings, whose pictures are given."""

    def write(**trained: Drawn) -> Path:
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / "held_out.txt").write_text("\n".join(CAPTIONS) + "\n")
        for name in trained:
            run = tmp_path / name.replace("_", "-")
            run.mkdir(exist_ok=True)
            (run / "finished.json").write_text('{"step": 20}')
            rows: list[dict[str, Any]] = [
                {"step": 0, "eval_accuracy": 0.5, "eval_reward/clip": 0.1},
                {"step": 20, "seconds_train": 90.0, "accuracy": 0.7, "eval_accuracy": 0.6},
            ]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

        def draw(self: Studio, base: str, adapter: Path | None) -> Drawn:
            if adapter is None:
                return shown(0.2 if base == "sdxl" else 0)
            assert base == ("sdxl" if "sdxl" in adapter.name else "sd15")
            return trained[adapter.name.replace("-", "_")]

        monkeypatch.setattr(Studio, "draw", draw)
        return tmp_path

    return write


def test_a_model_that_draws_better_reaches_the_goals(proof: Write) -> None:
    folder = proof(dpo=shown(0.05), refl=shown(0.05, clip=0.1), refl_pretrain=shown(0.04, clip=0.1))
    proof_preference.main(Args(output_dir=folder))
    text = (folder / "preference.md").read_text()
    assert "MISSED" not in text
    assert text.count("- reached") == 5
    content = json.loads((folder / "preference.json").read_text())
    found = content["dpo"]["against_the_base"][GRADED]
    assert found["win_rate"]["value"] > 0.9
    assert content["dpo"]["seconds"] == 90
    for name in ("curves.png", "pictures.png"):
        assert Image.open(folder / name).width > 300


def test_a_goal_that_is_missed_ends_with_exit_code_1(proof: Write) -> None:
    folder = proof(dpo=shown(0.001), refl=shown(0.0, clip=0.1))
    with pytest.raises(SystemExit) as ended:
        proof_preference.main(Args(output_dir=folder))
    assert ended.value.code == 1
    text = (folder / "preference.md").read_text()
    assert "MISSED: DPO wins at least 70 %" in text
    assert "MISSED: ReFL raises the verifier's score" in text
    assert "reached: ReFL raises its reward" in text


def test_what_began_from_sdxl_is_compared_with_sdxl(proof: Write) -> None:
    # Better than SD1.5, and no better than its own base.
    folder = proof(dpo=shown(0.1), dpo_sdxl=shown(0.2))
    with pytest.raises(SystemExit):
        proof_preference.main(Args(output_dir=folder))
    text = (folder / "preference.md").read_text()
    assert "reached: DPO wins" in text
    assert "MISSED: DPO of SDXL wins" in text
    found = json.loads((folder / "preference.json").read_text())
    rates = [found[name]["against_the_base"][GRADED]["win_rate"] for name in ("dpo", "dpo-sdxl")]
    assert rates[0]["value"] > 0.9
    assert rates[1]["value"] == 0.5


def test_sft_claims_nothing(proof: Write) -> None:
    folder = proof(sft=shown(-0.3))
    proof_preference.main(Args(output_dir=folder))
    assert "MISSED" not in (folder / "preference.md").read_text()


def test_without_goals_a_bad_run_ends_well(proof: Write) -> None:
    folder = proof(dpo=shown(-0.3))
    proof_preference.main(Args(output_dir=folder, no_goals=True))
    assert "Nothing is claimed" in (folder / "preference.md").read_text()


def test_a_folder_without_trainings_is_refused(proof: Write) -> None:
    with pytest.raises(UserError, match=r"prove_preference\.sh"):
        proof_preference.main(Args(output_dir=proof()))


def test_the_scores_are_those_of_the_rewards(tmp_path: Path) -> None:
    from dojo import rewards

    studio = Studio(args=Args(output_dir=tmp_path, clip=ROOT / "models" / "pocket-clip"),
                    captions=tuple(CAPTIONS[:6]))  # fmt: skip
    drawn = np.stack([
        scenes.draw(scenes.realise(scenes.parse(text), random.Random(i)))
        for i, text in enumerate(CAPTIONS[:6])
    ])  # fmt: skip
    found = studio._scores(drawn)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255
    clip = f"clip[model={ROOT / 'models' / 'pocket-clip'}]"
    expected = rewards.load(f"pocket,pocket_strict,{clip}")(images, CAPTIONS[:6]).components
    for name, scores in expected.items():
        assert torch.allclose(torch.tensor(found[name]), scores, atol=2e-3), name


# -- the script ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("--shorter",), ("--only",), ("--only", "full")])
def test_the_script_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    result = bash(SCRIPT, *arguments)
    assert result.returncode == 2
    assert "--only" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ((), ["dpo", "sft", "refl", "refl-pretrain", "dpo-sdxl"]),
        (("--only", "dpo-sdxl", "--only", "sft"), ["dpo-sdxl", "sft"]),
        (("--short",), ["dpo", "sft", "refl", "refl-pretrain", "dpo-sdxl"]),
    ],
    ids=["all", "some", "short"],
)
def test_the_script_starts_what_is_asked_for_in_words_that_the_methods_know(
    tmp_path: Path, arguments: tuple[str, ...], folders: list[str]
) -> None:
    draws, *started, last = recorded(SCRIPT, tmp_path, *arguments)
    assert draws[:2] == ["-m", "dojo.pocket.pairs"]
    drawn = pairs.cli.parse(pairs.Args, None, draws[2:])
    made = [part.folder for part in proof_preference.PARTS]
    for words, name in zip(started, folders, strict=True):
        processes, (script, *flags) = unspread(words)
        base = "sdxl" if name.endswith("-sdxl") else "sd15"
        method = "refl" if name.startswith("refl") else "dpo"
        assert script == f"train_{method}_{base}.py"
        assert name in made
        args: Any = pairs.cli.parse(importlib.import_module(script[:-3]).Args, None, flags)
        assert args.run.output_dir.name == name
        assert args.model.pretrained_model_name_or_path == f"models/pocket-{base}"
        assert args.run.resume_from_checkpoint == "latest"
        if method == "dpo":
            assert args.dpo.sft == (name == "sft")
            assert Path(args.data.dataset_name) == drawn.output_dir
            size = args.optim.train_batch_size * processes
            assert size == (2 if "--short" in arguments else 32)
    assert last[:2] == ["-m", "dojo.pocket.proof_preference"]
    assert pairs.cli.parse(Args, None, last[2:]).no_goals == ("--short" in arguments)


@pytest.mark.slow
def test_the_script_runs_through(tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    done = bash(SCRIPT, "--short", OUTPUT_DIR=str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing is claimed" in done.stdout
    for name in ("preference.md", "preference.json", "curves.png", "pictures.png"):
        assert (folder / name).is_file()
