"""The comparison at equal work: what is counted, what is claimed, and the control's reward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dojo.cli import UserError
from dojo.maths import passes
from dojo.methods import rl
from dojo.pocket import control, proof_arms, scenes, verifier
from tests.pocket.test_proof_rl import BEFORE, LIFTED, first_of_ten, graded, write_run

HALF = first_of_ten(7, 7, 6, 6, 6, 6)


def write_arm(folder: Path, *scores: list[float], minutes: float = 1.0, **groups: Any) -> None:
    """A run of the comparison: `write_run` with the options that say what a picture costs."""
    write_run(folder, [graded(one) for one in scores], seconds=60 * minutes / (len(scores) - 1))
    path = folder / "args.json"
    record = json.loads(path.read_text())
    sample = record["args"]["sample"]
    for name in ("sampler", "noise_level", "train_timesteps", "window_size", "sample_steps"):
        del sample[name]
    sample |= {"sample_batch_size": None, "branch": True, **groups.pop("sample", {})}
    optim = {"train_batch_size": 24, "gradient_accumulation_steps": 1}
    record["args"] |= {"optim": optim, "run": {"seed": 0}, **groups}
    path.write_text(json.dumps({**record, "num_processes": 1}))


def write_grpo(folder: Path, *scores: list[float], **more: Any) -> None:
    way = {"sample_steps": 4, "window_size": 1, "window_first": 1, "window_range": 0.5}
    write_arm(folder, *scores, rollout=way, grpo={"num_inner_epochs": 1}, **more)


def write_nft(folder: Path, *scores: list[float], **more: Any) -> None:
    nft = {"kl_beta": 0.0, "old_decay_max": 0.0}
    levels = {"sample_steps": 4, "num_train_timesteps": 2}
    write_arm(folder, *scores, nft=nft, levels=levels, **more)


def report(folder: Path, *, no_goals: bool = False) -> int:
    try:
        proof_arms.main(proof_arms.Args(output_dir=folder, no_goals=no_goals))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ---- What a picture costs ----


def test_pictures_that_share_their_way_share_its_cost() -> None:
    plain = passes.of_way(10, range(2, 5))
    assert plain == 10 + 3 * 3
    # Steps 0 to 2 and the training of step 2 once for eight.
    assert passes.of_way(10, range(2, 5), copies=8) == 3 / 8 + 7 + 3 * (1 / 8 + 2)
    assert passes.of_way(10, range(2, 5), branches=2, tied=True) == 2 * (10 + 4 * 3)
    assert passes.of_way(10, range(9), uses=2, again=True) == 10 + 9 + 2 * 9 * 3
    assert passes.of_way(4, range(1, 2), copies=8) == 2.625  # the proof's GRPO


def test_finished_pictures_cost_their_steps_their_levels_and_who_is_asked() -> None:
    assert passes.of_finished(14, 4, 8) == 34  # the defaults, see docs/nft.md
    assert passes.of_finished(14, 4, 8, branches=2, uses=2) == 28 + 8 + 24


# ---- The report ----


def test_the_report_counts_the_work_of_every_arm(tmp_path: Path) -> None:
    write_grpo(tmp_path / "compare" / "grpo", BEFORE, HALF, LIFTED)
    write_nft(tmp_path / "compare" / "nft", BEFORE, LIFTED)
    write_nft(tmp_path / "compare" / "nft-seed1", BEFORE, HALF)
    assert report(tmp_path) == 0
    found = json.loads((tmp_path / "arms.json").read_text())
    assert list(found) == ["grpo", "nft", "nft-seed1", "goals"]
    assert found["grpo"]["forward_passes"] == 2 * 24 * 2.625
    assert found["nft"]["forward_passes"] == 24 * (4 + 6 + 1)
    assert [one["forward_passes"] for one in found["grpo"]["evaluations"]] == [0, 63, 126]
    assert found["nft"]["strict"]["difference"]["mean"] == pytest.approx(0.25)
    text = (tmp_path / "arms.md").read_text()
    assert "| NFT, seed 1 | 264 | 24 | 1.0 |" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "arms.png").is_file()


def test_every_arm_has_a_curve_and_a_further_seed_the_colour_of_its_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[Path, Any] = {}
    figure = proof_arms.figures.Figure
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.update({path: self}))
    write_grpo(tmp_path / "grpo", BEFORE, LIFTED, minutes=2.0)
    names = [*proof_arms.TITLES, "grpo-seed1", "nft-seed1"]
    for name in names:
        write = write_grpo if name.startswith("grpo") else write_nft
        write(tmp_path / "compare" / name, BEFORE, LIFTED)
    report(tmp_path, no_goals=True)
    figure = drawn[tmp_path / "arms.png"]
    curves = {bars.get_label(): bars.lines[0] for bars in figure.axes[0].containers}
    assert len(curves) == 1 + len(names)
    assert curves["NFT, seed 1"].get_color() == curves["NFT"].get_color()
    assert curves["NFT, seed 1"].get_linestyle() == "--"
    alone = [curve for title, curve in curves.items() if "seed" not in title]
    assert len({curve.get_color() for curve in alone}) == len(alone)
    assert all(curve.get_linestyle() == "-" for curve in alone)
    assert len(figure.axes[3].lines) == 1 + len(names)


@pytest.mark.parametrize(
    ("after", "minutes", "epochs", "code"),
    [(LIFTED, 2.0, 9, 0), (HALF, 2.0, 9, 1), (LIFTED, 4.0, 9, 1), (LIFTED, 2.0, 8, 1)],
)
def test_the_target_is_the_proofs_own_end_in_half_of_the_work_and_the_time(
    tmp_path: Path, after: list[float], minutes: float, epochs: int, code: int
) -> None:
    whole = [BEFORE, *[LIFTED] * epochs]  # epochs of 63 forward passes, and of NFT's one of 264
    write_grpo(tmp_path / "grpo", *whole, minutes=5.0)
    write_nft(tmp_path / "compare" / "nft", BEFORE, after, minutes=minutes)
    assert report(tmp_path) == code
    text = (tmp_path / "arms.md").read_text()
    assert f"{264 / (63 * epochs):.0%} of the forward passes" in text
    assert ("MISSED" in text) == bool(code)
    assert report(tmp_path, no_goals=True) == 0
    assert "Nothing is claimed" in (tmp_path / "arms.md").read_text()


def test_the_target_is_judged_by_the_arm_that_gained_most(tmp_path: Path) -> None:
    write_grpo(tmp_path / "grpo", BEFORE, *[LIFTED] * 9, minutes=5.0)
    write_nft(tmp_path / "compare" / "nft", BEFORE, HALF)
    write_grpo(tmp_path / "compare" / "grpo-divergence", BEFORE, LIFTED)
    write_nft(tmp_path / "compare" / "control", BEFORE, BEFORE)
    assert report(tmp_path) == 0
    goal = json.loads((tmp_path / "arms.json").read_text())["goals"][-1]
    assert (
        "the best arm, GRPO, pictures used twice, bound on the divergence, reaches" in goal["claim"]
    )
    assert "+0.000 [+0.000, +0.000]" in goal["found"]
    assert "11% of the forward passes and 20% of the minutes" in goal["found"]


def test_the_target_is_not_judged_by_other_pictures(tmp_path: Path) -> None:
    write_grpo(tmp_path / "grpo", BEFORE, LIFTED)
    write_nft(tmp_path / "compare" / "nft", BEFORE, LIFTED)
    for path in (tmp_path / "compare" / "nft" / "validation").glob("*/scores.csv"):
        first, *rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join([first, *reversed(rows)]))
    with pytest.raises(UserError, match="show other prompts"):
        report(tmp_path)


def test_the_best_arms_are_named_for_other_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nft(tmp_path / "compare" / "nft", BEFORE, HALF)
    write_grpo(tmp_path / "compare" / "grpo", BEFORE, LIFTED)
    for name in ("control", "nft-seed1"):
        write_nft(tmp_path / "compare" / name, BEFORE, LIFTED)
    proof_arms.main(proof_arms.Args(output_dir=tmp_path, best=2))
    assert capsys.readouterr().out.split() == ["grpo", "nft"]
    with pytest.raises(UserError, match="2 of the arms are over"):
        proof_arms.main(proof_arms.Args(output_dir=tmp_path, best=3))


def test_a_control_that_gains_is_a_missed_goal(tmp_path: Path) -> None:
    write_nft(tmp_path / "a" / "compare" / "control", BEFORE, BEFORE)
    write_nft(tmp_path / "b" / "compare" / "control", BEFORE, LIFTED)
    assert report(tmp_path / "a") == 0
    assert report(tmp_path / "b") == 1


def test_an_empty_folder_is_refused_by_the_command_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scripts/prove_rl\.sh --compare"):
        report(tmp_path)


def test_the_cost_of_a_record_is_that_of_its_options() -> None:
    sample = {"guidance_scale": 3.0, "group_size": 4, "branch": False, "sample_batch_size": 8}
    way: dict[str, Any] = {"sample_steps": 10, "window_size": 3}
    record = {
        "num_processes": 1,
        "args": {
            **{"sample": sample, "rollout": way, "run": {"seed": 3}},
            **{"grpo": {"num_inner_epochs": 2, "beta": 0.1}, "optim": {"train_batch_size": 4}},
        },
    }
    assert rl.passes_of(record) == 2 * (10 + 3 + 2 * 3 * 4)
    assert len(rl.RolloutArgs(**way).trained_steps(3, 0)) == 3


# ---- The control ----


def drawn(caption: str, count: int) -> torch.Tensor:
    """Pictures of other scenes than the caption's, and one of it."""
    import random

    draw = random.Random(caption)
    specs = [scenes.random_spec(draw, "counting") for _ in range(count - 1)]
    pictures = [scenes.draw(scenes.realise(one, draw)) for one in [scenes.parse(caption), *specs]]
    return torch.stack([torch.from_numpy(one) for one in pictures]).permute(0, 3, 1, 2) / 255


def test_the_controls_scores_are_the_captions_own_in_an_order_of_chance() -> None:
    caption = "two red stars"
    images, prompts = drawn(caption, 8).double(), [caption] * 8
    real = verifier.score(images, prompts, strict=False)
    assert real.unique().numel() > 2
    # The order hangs on the pictures: a hair of light more is another one, with the same scores.
    dealt = [control.shuffled(images + 1e-9 * i, prompts, None) for i in range(40)]
    assert all(torch.equal(one.sort().values, real.sort().values) for one in dealt)
    assert torch.equal(control.shuffled(images, prompts, None), dealt[0])  # a resumed run's
    assert len({tuple(one.tolist()) for one in dealt}) > 10
    # The best picture fares as the others do.
    best = int(real.argmax())
    mean = torch.stack([one[best] for one in dealt]).mean().item()
    spread = real.std(correction=0).item() / 40**0.5
    assert abs(mean - real.mean().item()) < 4 * spread


def test_the_control_deals_within_captions_and_knows_nothing_of_a_single_picture() -> None:
    one, other = "two red stars", "three blue rings"
    images = torch.cat([drawn(one, 4), drawn(other, 4), drawn("a red star", 2)[:1]])
    prompts = [one] * 4 + [other] * 4 + ["a red star"]
    real = verifier.score(images, prompts, strict=False)
    found = control.shuffled(images, prompts, None)
    for part in (slice(0, 4), slice(4, 8)):
        assert torch.equal(found[part].sort().values, real[part].sort().values)
    assert found[8] != real[8]
    assert 0 <= found[8] <= 1
