"""The comparison on several rewards: units, what is said of each run, and the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dojo.cli import UserError
from dojo.pocket import proof_rewards
from tests.pocket.test_proof_arms import write_grpo, write_nft
from tests.pocket.test_proof_rl import BEFORE, LIFTED, graded


def report(folder: Path) -> dict[str, Any]:
    proof_rewards.main(proof_rewards.Args(output_dir=folder))
    return json.loads((folder / "rewards.json").read_text())


def test_gains_are_in_standard_deviations_of_the_base_for_a_thousand_forward_passes(
    tmp_path: Path,
) -> None:
    write_grpo(tmp_path / "rewards" / "pocket" / "grpo", BEFORE, LIFTED, LIFTED)
    write_nft(tmp_path / "rewards" / "clip" / "nft", BEFORE, LIFTED)
    found = report(tmp_path)
    assert list(found) == ["pocket", "clip"]
    grpo = found["pocket"]["grpo"]
    thousands = 2 * 24 * 2.625 / 1000
    assert grpo["forward_passes"] == pytest.approx(1000 * thousands)
    before, after = (graded(one)["reward"] for one in (BEFORE, LIFTED))
    rise, spread = np.mean(after) - np.mean(before), np.std(before, ddof=1)
    assert grpo["held_out"] == pytest.approx(rise / spread / thousands)
    assert grpo["held_out_low"] < grpo["held_out"] < grpo["held_out_high"]
    # Of the sampled pictures the reward is 0.6 and 0.7, the diversity 0.25 and 0.2.
    assert grpo["sampled"] == pytest.approx(0.1 / spread / thousands)
    assert grpo["diversity"] == pytest.approx(-0.2 / thousands)
    assert grpo["distance"] == pytest.approx(0.02 / thousands)
    assert grpo["strict"] == pytest.approx(0.25)
    assert found["clip"]["nft"]["held_out"] == pytest.approx(rise / spread / 0.264)


def test_the_table_has_a_row_for_every_run_and_the_picture_a_panel_for_every_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[Path, Any] = {}
    figure = proof_rewards.figures.Figure
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.update({path: self}))
    write_nft(tmp_path / "rewards" / "jpeg" / "nft", BEFORE, LIFTED)
    write_grpo(tmp_path / "rewards" / "jpeg" / "grpo", BEFORE, LIFTED)
    write_grpo(tmp_path / "rewards" / "pocket" / "grpo", BEFORE, BEFORE)
    report(tmp_path)
    lines = (tmp_path / "rewards.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    assert [row.split(" | ")[1] for row in rows[2:]] == ["GRPO", "GRPO", "NFT"]
    assert "verifier" in rows[2]
    panels = drawn[tmp_path / "rewards.png"].axes
    assert [axes.get_title() for axes in panels] == list(proof_rewards.TITLES.values())[:2]
    curve = panels[1].containers[0].lines[0]
    assert list(curve.get_xdata()) == pytest.approx([0, 0.063])
    assert curve.get_ydata()[0] == 0


def test_pictures_that_all_score_the_same_have_no_unit(tmp_path: Path) -> None:
    write_grpo(tmp_path / "rewards" / "jpeg" / "grpo", [0.5] * 60, [0.5] * 60)
    assert np.isnan(report(tmp_path)["jpeg"]["grpo"]["held_out"])


def test_an_empty_folder_is_refused_by_the_command_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scripts/prove_rl\.sh --rewards"):
        report(tmp_path)
