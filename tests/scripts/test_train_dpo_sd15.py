"""train_dpo_sd15.py from end to end: its tie to the reference, what it learns, how it resumes."""

import csv
import json
import math
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

import train_dpo_sd15
from dojo.cli import TrainingStopped, UserError
from dojo.finetune import Adapters, AllWeights, Trained, lora
from dojo.inputs import pairs as paired
from dojo.maths import ddpm, preference
from dojo.models import sd15
from dojo.models.unet import networks
from dojo.pocket import scenes
from tests.conftest import ROOT
from tests.processes import Death, launch, spawn
from tests.scripts.runs import (
    SCRIPTS,
    agree,
    asked,
    draw,
    equal,
    family_flags,
    in_process,
    metrics,
    mine,
    one_thread,
    steps,
    timeless,
    with_loss,
    write_pairs,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
SCRIPT = "train_dpo_sd15.py"
LOG_TWO = torch.tensor(math.log(2)).item()  # in float32
LORA = ("--finetune", "lora", "--rank", "2")
ONE_STEP = ("--max_train_steps", "1")


def flags_of(folder: Path, model: Path, data: Path | None) -> list[str]:
    """The command line of a small run; all runs on this model share their caches."""
    cache = ["--latent_cache_dir", str(model.parent / "cache"), "--seed", "0"]
    return [*family_flags(folder, model, data), *cache]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs."""
    return write_pairs(tmp_path_factory.mktemp("datas") / "pairs", 6)


@pytest.fixture(scope="module")
def sharp_sd15(tmp_path_factory: pytest.TempPathFactory, pocket_sd15: Path) -> Path:
    """The same model with latents that show more of the picture than of the posterior's noise."""
    folder = tmp_path_factory.mktemp("models") / "sharp-sd15"
    shutil.copytree(pocket_sd15, folder)
    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.quant_conv.bias.data[4:] -= 12  # of the logarithm of the variance
    vae.register_to_config(scaling_factor=3.0)
    vae.save_pretrained(folder / "vae")
    return folder


def train(
    folder: Path,
    model: Path,
    data: Path | None,
    *flags: str,
    script: ModuleType = train_dpo_sd15,
) -> Path:
    """Trains in this process and returns the output folder."""
    in_process(script, [*flags_of(folder, model, data), *flags])
    return folder / "run"


def unet_of(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder)


def same_unet(one: Path, two: Path) -> bool:
    return equal(unet_of(one).state_dict(), unet_of(two).state_dict())


# -- the tie to the reference -------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        LORA,
        (),
        (*LORA, "--gradient_checkpointing", "--lora_layers", "all-linear"),
        ("--gradient_checkpointing", "--no_cache_latents", "--no_cache_text_embeddings"),
        (*LORA, "--mixed_precision", "bf16", "--gradient_checkpointing"),
        ("--mixed_precision", "bf16"),
        pytest.param(
            ("--mixed_precision", "bf16", "--train_dtype", "bf16"), marks=pytest.mark.slow
        ),
    ],
    ids=("lora", "full", "lora-checkpointed", "full-uncached", "lora-bf16", "full-bf16", "bf16"),
)
def test_before_the_first_update_the_loss_is_log_two_exactly(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, flags: tuple[str, ...]
) -> None:
    more = ("--max_train_steps", "2", "--learning_rate", "1e-3", "--eval_fraction", "0.3")
    folder = train(tmp_path, tiny_sd15, pairs, *more, *flags)
    first, second = steps(folder)
    before, after = with_loss(folder)
    assert first["loss"] == before["eval_loss"] == LOG_TWO
    assert first["accuracy"] == before["eval_accuracy"] == 0.5
    assert first["margin"] == first["winner_drift"] == first["loser_drift"] == 0
    assert before["eval_winner_drift"] == before["eval_loser_drift"] == 0
    assert first["grad_norm"] > 0  # it learns, though nothing has moved
    for row, names in ((second, ("margin", "winner_drift")), (after, ("eval_winner_drift",))):
        assert all(row[name] != 0 for name in names)


def test_winner_and_loser_are_noised_alike_and_drawn_apart(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs", 4, alike=True)
    noised: list[tuple[Tensor, ...]] = []
    asked_for: list[tuple[Any, ...]] = []
    add, ask = ddpm.add_noise, networks.prediction

    def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, schedule: Any) -> Tensor:
        noisy = add(clean, noise, timestep, schedule)
        noised.append((clean, noise, timestep, noisy))
        return noisy

    def epsilon(unet: Any, noisy: Tensor, timestep: Tensor, **more: Any) -> Tensor:
        asked_for.append((noisy, timestep, more["prompt_embeds"]))
        return ask(unet, noisy, timestep, **more)

    monkeypatch.setattr(ddpm, "add_noise", add_noise)
    monkeypatch.setattr(networks, "prediction", epsilon)
    train(tmp_path, tiny_sd15, data, *LORA, "--train_batch_size", "4", "--no_hflip")
    assert len(noised) == 3
    for i, (clean, noise, timestep, noisy) in enumerate(noised):
        assert len(noisy) == 8
        assert torch.equal(*noise.chunk(2))
        assert torch.equal(*timestep.chunk(2))
        assert len(timestep.unique()) > 1  # each pair has its own
        assert len(noise[:4].flatten(1).unique(dim=0)) == 4
        # The same pixels, so the same posterior: two draws of it.
        winners, losers = clean.chunk(2)
        far = (winners - losers).flatten(1).std(1)
        assert (far > 0.01).all()
        # The policy, and then the reference, are asked about this and nothing else.
        for seen in asked_for[2 * i : 2 * i + 2]:
            assert torch.equal(seen[0], noisy)
            assert torch.equal(seen[1], timestep)
            assert torch.equal(*seen[2].chunk(2))
    assert len(asked_for) == 6
    assert not torch.equal(noised[0][1], noised[1][1])


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[Trained]:
    """What was loaded for training, of either kind, from here on."""
    made: list[Trained] = []
    for kind in (Adapters, AllWeights):
        load = kind.load

        def watched(self: Any, *given: Any, load: Any = load, **options: Any) -> None:
            load(self, *given, **options)
            made.append(self)

        monkeypatch.setattr(kind, "load", watched)
    return made


@pytest.mark.parametrize("flags", [LORA, ()], ids=["lora", "full"])
def test_the_reference_does_not_move(
    tmp_path: Path,
    tiny_sd15: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    made = watch_loads(monkeypatch)
    train(tmp_path, tiny_sd15, pairs, *flags, "--learning_rate", "1e-3")
    base = unet_of(tiny_sd15 / "unet").eval()
    (policy,) = made
    if isinstance(policy, AllWeights):
        assert policy._copy is not None
        assert equal(policy._copy.state_dict(), base.state_dict())
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 20, 64))

    def predicted(unet: Any) -> Tensor:
        with torch.no_grad():
            return sd15.prediction(unet, *inputs, torch.float32)

    with policy.reference() as before:
        assert torch.equal(predicted(before), predicted(base))
    assert (predicted(policy.network) - predicted(base)).abs().max() > 1e-4


# -- what it learns -----------------------------------------------------------------------------


def standing(model: Path, result: Path, data: Path) -> tuple[float, float, float]:
    """How far a result's errors on white and black pictures are from the base model's, and the
    share of cases in which the white picture has gained: with diffusers alone."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(model)
    scheduler: Any = DDPMScheduler.from_pretrained(model / "scheduler")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    sides = []
    for side in ("white", "black"):
        pixels = [
            torch.from_numpy(scenes.np.array(Image.open(data / f"{i}-{side}.png")))
            for i in range(len(rows))
        ]
        images = torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipeline.vae.encode(images).latent_dist.mean
        sides.append(latents * pipeline.vae.config.scaling_factor)
    captions = [row["caption"] for row in rows]
    text = pipeline.encode_prompt(captions, "cpu", 1, False)[0].repeat(2, 1, 1)
    clean = torch.cat(sides)
    drifts = []
    for timestep in (100, 300, 500, 700):
        noise = torch.randn(sides[0].shape, generator=torch.Generator().manual_seed(timestep))
        noise, at = noise.repeat(2, 1, 1, 1), torch.full((len(clean),), timestep)
        noisy = scheduler.add_noise(clean, noise, at)

        def errors(unet: Any, noisy: Tensor, at: Tensor, noise: Tensor) -> Tensor:
            return (unet(noisy, at, text).sample - noise).square().mean((1, 2, 3))

        own, base = (errors(u, noisy, at, noise) for u in (unet_of(result / "unet"), pipeline.unet))
        drifts.append(own - base)
    white, black = torch.stack(drifts).chunk(2, dim=1)
    return white.mean().item(), black.mean().item(), (white < black).float().mean().item()


@torch.no_grad()
def test_what_is_preferred_becomes_likelier_and_with_swapped_labels_less_likely(
    tmp_path: Path, sharp_sd15: Path
) -> None:
    right, swapped = (
        write_pairs(tmp_path / name, 8, swapped=name == "swapped") for name in ("right", "swapped")
    )
    learn = ("--max_train_steps", "12", "--train_batch_size", "4", "--learning_rate", "1e-4")
    learn += ("--eval_fraction", "0.25", "--beta_dpo", "500")
    found = []
    for name, data in (("a", right), ("b", swapped)):
        with torch.enable_grad():
            folder = train(tmp_path / name, sharp_sd15, data, *learn)
        rows = steps(folder)
        assert sum(row["accuracy"] for row in rows[-4:]) / 4 > 0.8
        assert sum(row["margin"] for row in rows[-4:]) > 0
        before, after = with_loss(folder)
        assert before["eval_loss"] == LOG_TWO > 1.1 * after["eval_loss"]
        assert after["eval_accuracy"] > 0.8  # captions that it was not trained on
        found.append(standing(sharp_sd15, folder, right))
    (white, black, gained), (other_white, other_black, lost) = found
    assert white < black
    assert gained > 0.9
    assert other_white > other_black
    assert lost < 0.1


@pytest.mark.parametrize(
    "flags",
    [LORA, (), (*LORA, "--winner_preserving_mu", "0.9")],
    ids=["lora", "full", "lora-guarded"],
)
def test_drifts_say_how_far_the_errors_have_moved_from_the_references(
    tmp_path: Path,
    tiny_sd15: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    calls: list[tuple[Tensor, ...]] = []
    own = preference.dpo

    def dpo(*errors: Tensor, beta: float) -> preference.Preference:
        calls.append(errors)
        return own(*errors, beta=beta)

    monkeypatch.setattr(preference, "dpo", dpo)
    folder = train(tmp_path, tiny_sd15, pairs, *flags, "--learning_rate", "1e-3")
    rows = steps(folder)
    assert len(rows) == len(calls) == 3
    for row, (winner, loser, usual_winner, usual_loser) in zip(rows, calls, strict=True):
        for name, moved in (
            ("winner_drift", winner - usual_winner),
            ("loser_drift", loser - usual_loser),
        ):
            assert row[name] == pytest.approx(moved.mean().item(), rel=1e-4, abs=1e-9)
        half = -0.5 * 5000 * (row["winner_drift"] - row["loser_drift"])
        assert row["margin"] == pytest.approx(half, rel=1e-2, abs=1e-3)
        assert winner.requires_grad
        assert not usual_winner.requires_grad
        assert ("loser_pull" in row) == ("--winner_preserving_mu" in flags)
        assert 0 <= row.get("loser_pull", 0.5) < 1  # one noise: the residuals point the same way
    assert rows[2]["winner_drift"] != 0


def test_sft_learns_the_winners_alone_without_a_reference(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "pairs"
    shutil.copytree(pairs, other)
    for path in other.glob("*-black.png"):
        Image.new("RGB", (64, 64), "purple").save(path)
    errors: list[Tensor] = []
    measure = ddpm.squared_error
    made = watch_loads(monkeypatch)
    asked_for: list[Trained] = []
    keep = AllWeights.reference

    def squared_error(epsilon: Tensor, noise: Tensor) -> Tensor:
        errors.append(measure(epsilon, noise))
        return errors[-1]

    def reference(self: AllWeights) -> Any:
        asked_for.append(self)
        return keep(self)

    monkeypatch.setattr(ddpm, "squared_error", squared_error)
    monkeypatch.setattr(AllWeights, "reference", reference)
    sft = ("--sft", "--learning_rate", "1e-3", "--eval_fraction", "0.2", "--no_cache_latents")
    one = train(tmp_path / "a", tiny_sd15, pairs, *sft)
    assert [len(losses) for losses in errors] == [2, 2, 2]
    losses = [row["loss"] for row in steps(one)]
    assert losses == pytest.approx([some.mean().item() for some in errors])
    assert not {"margin", "accuracy", "winner_drift"} & steps(one)[0].keys()
    two = train(tmp_path / "b", tiny_sd15, other, *sft)
    assert same_unet(one / "unet", two / "unet")
    assert not same_unet(one / "unet", tiny_sd15 / "unet")
    assert not asked_for
    assert [policy.has_reference for policy in made] == [False, False]
    assert all(isinstance(policy, AllWeights) and policy._copy is None for policy in made)


def test_sft_keeps_no_copy_and_says_so_in_the_plan(
    tmp_path: Path, pocket_sd15: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = {}
    for name, flags in {"dpo": (), "sft": ("--sft",), "lora": LORA}.items():
        train(tmp_path, pocket_sd15, pairs, "--dry_run", *flags, "--train_batch_size", "64")
        plans[name] = capsys.readouterr().out

    def number(name: str, before: str, after: str) -> float:
        return float(plans[name].split(before)[1].split(after)[0].replace(",", ""))

    state = {name: number(name, "weights and state ", " +") for name in plans}
    assert state["dpo"] - state["sft"] == pytest.approx(4 * 1_771_876 / 2**30, abs=0.01)
    flops = {name: number(name, "process and step: ", " TFLOP") for name in plans}
    # Both pictures forward and backward (3), and the reference's forward pass: (3 + 1) x 2 / 3.
    assert flops["dpo"] / flops["sft"] == pytest.approx(8 / 3, rel=0.02)
    assert flops["lora"] < flops["dpo"]
    assert number("lora", "trainable parameters: ", "\n") < 100_000
    assert "effective batch size: 64\n" in plans["dpo"]
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


# -- held-out pairs -----------------------------------------------------------------------------


def test_every_evaluation_of_one_model_says_the_same_whatever_the_seed(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = train(tmp_path, tiny_sd15, pairs, *LORA, "--learning_rate", "1e-2", "--no_hflip")
    noises: list[Tensor] = []
    own = paired.Inputs.noise

    def noise(self: paired.Inputs, keys: Sequence[Any], like: Tensor) -> Tensor:
        found = own(self, keys, like)
        if keys[0][0] == "held-out pairs":
            noises.append(found)
        return found

    monkeypatch.setattr(paired.Inputs, "noise", noise)
    still = (*LORA, "--init_lora_weights_path", str(moved / lora.WEIGHTS), "--validation_steps")
    still += ("1", "--learning_rate", "1e-30", "--eval_fraction", "0.3", "--max_train_steps", "2")
    rows: list[dict[str, float]] = []
    for seed in ("1", "2"):
        folder = train(tmp_path / seed, tiny_sd15, pairs, *still, "--seed", seed)
        rows += with_loss(folder)
    assert [row.pop("step") for row in rows] == [0, 1, 2, 0, 1, 2]
    assert all(row == rows[0] for row in rows)
    assert rows[0]["eval_loss"] != LOG_TWO
    # Two held-out pairs in a batch, at four timesteps, six times.
    assert [len(one) for one in noises] == [4] * 24
    for i, one in enumerate(noises):
        assert torch.equal(one, noises[i % 4])
        assert not torch.equal(one, noises[(i + 1) % 4])


def test_pictures_for_prompts_are_drawn_and_scored(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["a star", {"text": "a ring"}]))
    flags = ("--validation_prompts_file", str(prompts), "--validation_prompt", "a cross")
    flags += ("--eval_reward", mine(tmp_path, "brightness"), "--eval_sample_steps", "2")
    folder = train(tmp_path, tiny_sd15, pairs, *LORA, *ONE_STEP, *flags)
    rows = [row for row in metrics(folder) if "eval_reward" in row]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["eval_kl"] == 0 < rows[1]["eval_kl"]
    for step in (0, 1):
        with (folder / "validation" / f"step-{step}" / "scores.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [row["prompt"] for row in table] == ["a cross", "a star", "a ring"]
        for row in table:
            picture = scenes.np.asarray(
                Image.open(folder / f"validation/step-{step}/{row['file']}")
            )
            assert float(row["brightness"]) == pytest.approx(picture.mean() / 255, abs=2e-3)
    for name in ("args.json", "README.md", "report.html", "contact_sheet.png", "data_report.json"):
        assert (folder / name).is_file(), name
    assert str(ROOT) not in (folder / "README.md").read_text()


# -- winners by a model -------------------------------------------------------------------------


def test_a_model_chooses_the_winners_once(tmp_path: Path, tiny_sd15: Path, pairs: Path) -> None:
    own = ("--latent_cache_dir", str(tmp_path / "cache"), "--eval_fraction", "0.3", *ONE_STEP)
    own += ("--learning_rate", "1e-3")
    # The labels prefer white as brightness does, and darkness chooses the others.
    plain = train(tmp_path / "plain", tiny_sd15, pairs, *own)
    folder = train(
        tmp_path / "a", tiny_sd15, pairs, *own, "--choice_model", mine(tmp_path, "brightness")
    )
    assert asked(tmp_path) == 12
    assert same_unet(folder / "unet", plain / "unet")
    tables = {}
    for name, count in (("choices.csv", 4), ("eval_choices.csv", 2)):
        with (folder / name).open() as file:
            tables[name] = list(csv.DictReader(file))
        assert len(tables[name]) == count
        for row in tables[name]:
            assert (float(row["score_0"]) > float(row["score_1"])) == (row["label_0"] == "1")
            assert "white" in row["image_0" if row["label_0"] == "1" else "image_1"]
    dark = ("--choice_model", mine(tmp_path, "darkness"))
    other = train(tmp_path / "b", tiny_sd15, pairs, *own, *dark)
    swapped = write_pairs(tmp_path / "swapped", 6, swapped=True)
    by_label = train(tmp_path / "c", tiny_sd15, swapped, *own)
    assert same_unet(other / "unet", by_label / "unet")
    assert not same_unet(other / "unet", plain / "unet")

    assert asked(tmp_path) == 24
    again = train(tmp_path / "d", tiny_sd15, pairs, *own, *dark)
    assert asked(tmp_path) == 24
    assert (again / "choices.csv").read_bytes() == (other / "choices.csv").read_bytes()
    # A function that was changed is another model.
    file = tmp_path / "mine.py"
    file.write_text(file.read_text().replace("return -images", "return images"))
    changed = train(tmp_path / "e", tiny_sd15, pairs, *own, *dark)
    assert asked(tmp_path) == 36
    assert same_unet(changed / "unet", plain / "unet")


def test_weights_that_a_reward_names_are_known_by_what_they_hold(tmp_path: Path) -> None:
    model, root = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")

    def known(folder: Path, text: str = "clip[model={}]") -> dict[str, str]:
        return paired._own_weights(text.format(folder), root)

    first = known(model)
    assert first
    assert known(Path(shutil.copytree(model, tmp_path / "copy"))) == first
    (model / "model.safetensors").write_bytes(b"two")
    assert known(model) != first
    assert known(model, "clip") == known(tmp_path / "absent") == {}


def test_a_model_that_prefers_nothing_is_told(tmp_path: Path, tiny_sd15: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match="--choice_model prefers no picture of 6 pairs"):
        train(tmp_path, tiny_sd15, pairs, "--choice_model", mine(tmp_path, "never"))
    with pytest.raises(UserError, match=r"--choice_model: .*not of the form"):
        train(tmp_path, tiny_sd15, pairs, "--choice_model", "clip[")


# -- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [LORA, ()], ids=["lora", "full"])
def test_result_and_checkpoints_load_in_plain_diffusers(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, flags: tuple[str, ...]
) -> None:
    more = ("--learning_rate", "1e-2", "--checkpointing_steps", "2", "--use_ema", "--ema_decay")
    folder = train(tmp_path, tiny_sd15, pairs, *flags, *more, "0.5")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    pictures = [draw(pipeline)]
    if flags:
        places = [
            folder,
            folder / "checkpoint-3" / "ema",
            *(folder / f"checkpoint-{n}" for n in (2, 3)),
        ]
        for place in places:
            pipeline.load_lora_weights(str(place))
            pictures.append(draw(pipeline))
            pipeline.unload_lora_weights()
    else:
        whole: Any = StableDiffusionPipeline.from_pretrained(folder)
        assert whole.unet.dtype == torch.float32
        pictures.append(draw(whole))
        for name in ("checkpoint-3/unet_ema", "checkpoint-2/unet", "checkpoint-3/unet"):
            pipeline.unet = unet_of(folder / name)
            pictures.append(draw(pipeline))
    # The result is the average; the others differ from it, and from each other.
    assert torch.equal(pictures[1], pictures[2])
    others = [*pictures[:1], *pictures[2:]]
    assert all(not torch.equal(one, two) for i, one in enumerate(others) for two in others[i + 1 :])


# -- what the seed of this repository got wrong -------------------------------------------------


def test_the_learning_rate_is_scaled_by_the_effective_batch(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # it starts without
    scaled = ("--learning_rate", "1e-8", "--scale_lr", "--gradient_accumulation_steps", "3")
    warm = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2")
    folder = train(tmp_path, tiny_sd15, pairs, *LORA, *scaled, *warm, "--max_train_steps", "3")
    rates = [row["lr"] for row in steps(folder)]
    assert rates == pytest.approx([0.5 * 6e-8, 6e-8, 6e-8]) or rates == pytest.approx(
        [0, 0.5 * 6e-8, 6e-8]
    )


def test_no_place_of_somebody_elses_is_written_into_the_options() -> None:
    words = ["--pretrained_model_name_or_path", "a", "--dataset_name", "b", "--output_dir", "c"]
    args = train_dpo_sd15.cli.parse(train_dpo_sd15.Args, None, words)
    assert args.data.cache_dir is None
    assert args.data.choice_model is None
    assert args.dpo.beta_dpo == 5000


def test_a_beta_that_ties_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="--beta_dpo must be positive"):
        train_dpo_sd15.DpoArgs(beta_dpo=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_dtype", "bf16"), "--mixed_precision bf16"),
        (("--random_crop",), "--random_crop"),
        (("--resolution", "60"), "60"),
        (("--use_ema", "--ema_update_every", "9"), "--ema_update_every 9"),
        (("--max_train_samples", "2", "--eval_reward", "no_such_reward"), "no_such_reward"),
        (("--validation_prompts_file", "missing.txt"), "--validation_prompts_file"),
        (("--finetune", "lora", "--lora_layers", "nothing"), "--lora_layers"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_what_would_not_work_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_sd15: Path, pairs: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        train(tmp_path, tiny_sd15, pairs, *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# -- stopping and resuming ----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    wild = ("--learning_rate", "1e30", "--checkpointing_steps", "1")
    with pytest.raises(TrainingStopped, match=r"step 2 is not finite.*checkpoint-1.*--learning"):
        train(tmp_path, tiny_sd15, pairs, *wild)
    assert len(steps(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "finished.json").exists()


def test_a_run_of_before_finetune_goes_on_as_what_it_was(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    folder = train(tmp_path, tiny_sd15, pairs, *LORA, "--max_train_steps", "1")
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["finetune"] == {"finetune": "lora"}
    record["args"]["finetune"] = {"use_lora": True}
    (folder / "args.json").write_text(json.dumps(record))
    resume = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match="--finetune was lora, now full"):
        train(tmp_path, tiny_sd15, pairs, *resume, "--rank", "2")
    train(tmp_path, tiny_sd15, pairs, *resume, *LORA)
    assert [row["step"] for row in steps(folder)] == [1, 2]


def test_a_run_that_goes_on_between_two_rows_logs_the_same_averages(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    own = (*LORA, "--learning_rate", "1e-3", "--max_train_steps", "4", "--logging_steps", "4")
    own += ("--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")
    whole = train(tmp_path / "whole", tiny_sd15, pairs, *own)
    broken = tmp_path / "broken" / "run"
    for name in ("args.json", "metrics.jsonl", "checkpoint-2"):
        copy: Any = shutil.copytree if name == "checkpoint-2" else shutil.copyfile
        broken.mkdir(parents=True, exist_ok=True)
        copy(whole / name, broken / name)
    train(tmp_path / "broken", tiny_sd15, pairs, *own)
    assert [row["step"] for row in steps(broken)] == [1, 4]
    assert timeless(broken) == timeless(whole)


LONG = ("--max_train_steps", "6", "--checkpointing_steps", "2", "--resume_from_checkpoint")
LONG += ("latest", "--logging_steps", "3", "--use_ema", "--learning_rate", "1e-3")
LONG += ("--lr_scheduler", "cosine", "--eval_fraction", "0.3", "--validation_steps", "3")


def test_a_run_killed_in_its_cache_in_a_step_and_in_a_checkpoint_ends_with_the_same_bytes(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = {
        folder: [
            *(*flags_of(folder, tiny_sd15, pairs), *LONG, *LORA),
            *("--latent_cache_dir", str(folder / "cache")),
            *("--choice_model", mine(folder, "brightness")),
        ]
        for folder in (whole, broken)
    }
    code, said = spawn(SCRIPT, flags[whole], whole)
    assert code == 0, said
    deaths = [
        # Scores of choices, then latents, then texts.
        Death(place="cache", count=random.randint(1, 4)),
        Death(place="step", count=random.randint(3, 6)),
        Death(place="checkpoint", count=random.randint(1, 6)),  # of its files
    ]
    for death in deaths:
        code, said = spawn(SCRIPT, flags[broken], broken, death)
        assert code == -signal.SIGKILL, (death, said)
        assert not (broken / "run" / lora.WEIGHTS).exists()
    code, said = spawn(SCRIPT, flags[broken], broken)
    assert code == 0, (deaths, said)
    assert "resuming from" in said
    for place in (".", "checkpoint-6", "checkpoint-6/ema"):
        ours, theirs = (folder / "run" / place / lora.WEIGHTS for folder in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes(), (place, deaths)
    assert timeless(broken / "run") == timeless(whole / "run"), deaths
    assert not list((broken / "run").glob(".checkpoint-*")), "leftovers of the kill"


def test_two_processes_do_what_one_does_and_resume_after_a_kill(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    # Adam would blow the rounding of gradients near zero up to whole steps.
    own = ("--adam_epsilon", "1e-3", "--max_train_steps", "4", "--checkpointing_steps", "1")
    own += ("--eval_fraction", "0.3", "--resume_from_checkpoint", "latest", "--beta_dpo", "500")
    half = [*own, "--train_batch_size", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, [*flags_of(whole, tiny_sd15, pairs), *half], whole, processes=2)
    assert code == 0, said
    assert json.loads((whole / "run" / "args.json").read_text())["num_processes"] == 2

    death = Death(place="step", count=random.randint(2, 4))
    flags = [*flags_of(broken, tiny_sd15, pairs), *half]
    code, said = spawn(SCRIPT, flags, broken, death, processes=2)
    assert code != 0, (death, said)
    assert not (broken / "run" / "finished.json").exists()
    code, said = spawn(SCRIPT, flags, broken, processes=2)
    assert code == 0, (death, said)
    assert "resuming from" in said
    assert same_unet(broken / "run" / "unet", whole / "run" / "unet"), death
    assert timeless(broken / "run") == timeless(whole / "run"), death

    alone = train(tmp_path / "alone", tiny_sd15, pairs, *own, "--train_batch_size", "2")
    agree(SCRIPTS["dpo_sd15"], alone, whole / "run")


@pytest.mark.slow
def test_a_run_as_a_user_starts_it_is_killed_and_goes_on(
    tmp_path: Path, tiny_sd15: Path, pairs: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    own = [*LONG, *LORA, "--gradient_checkpointing", "--train_batch_size", "1"]
    flags = {
        folder: [
            *(*flags_of(folder, tiny_sd15, pairs), *own),
            *("--latent_cache_dir", str(folder / "cache")),
        ]
        for folder in (whole, broken)
    }
    done = launch(SCRIPT, flags[whole], whole, 2, SHARD_SIZE="2")
    assert done.returncode == 0, done.stderr
    for place, count in (("cache", 3), ("step", 5), ("checkpoint", 9)):
        killed = launch(
            SCRIPT, flags[broken], broken, 2, DIE_AT=place, DIE_COUNT=str(count), SHARD_SIZE="2"
        )
        assert killed.returncode != 0, (place, killed.stderr)
        assert not (broken / "run" / "finished.json").exists()
    done = launch(SCRIPT, flags[broken], broken, 2, SHARD_SIZE="2")
    assert done.returncode == 0, done.stderr
    ours, theirs = ((folder / "run" / lora.WEIGHTS).read_bytes() for folder in (broken, whole))
    assert ours == theirs
    # A row that began before the kill has sums that were averaged over the processes already.
    agree(SCRIPTS["dpo_sd15"], broken / "run", whole / "run")
