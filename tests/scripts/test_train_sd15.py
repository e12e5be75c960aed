"""train_lora_sd15.py, train_full_sd15.py and train_dreambooth_lora_sd15.py from end to end: what is
particular to them, which is the objective and the scheduler that says what was trained."""

import importlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import demo
from dojo import cli
from dojo.cli import TrainingStopped, UserError
from dojo.evaluate import pipelines
from dojo.finetune import lora
from dojo.maths import ddpm, denoising
from dojo.maths.objective import Diffusion
from tests.conftest import reset_accelerate, run_flags
from tests.scripts.runs import policy_flags
from tests.scripts.test_train_dpo_sd15 import LOG_TWO, mine, write_pairs
from tests.scripts.test_train_refl_sd15 import PROMPTS

METHODS = ("lora", "full", "dreambooth_lora")
DARK = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for busy cores would take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tiny_sd15: Path, scene_data: Path, tmp_path: Path) -> Any:
    """`train(method, name, *flags)`: a run of three small steps in a folder of that name."""

    def run(method: str, name: str = "out", *flags: str, model: Path = tiny_sd15) -> Path:
        script = importlib.import_module(f"train_{method}_sd15")
        data = scene_data if method in ("lora", "full") else None
        words = flags_of(tmp_path / name, model, data)
        if method == "dreambooth_lora":
            words += ["--instance_data_dir", str(scene_data), "--instance_prompt", "a sks star"]
        if method in ("lora", "dreambooth_lora"):
            words += ["--rank", "2"]
        reset_accelerate()
        script.main(cli.parse(script.Args, script.__doc__, [*words, *flags]))
        return tmp_path / name / "run"

    return run


def flags_of(folder: Path, model: Path, data: Path | None) -> list[str]:
    """The command line of a small run; the runs of a test share their caches."""
    words = run_flags(folder, model, data)
    place = words.index("--max_sequence_length")
    del words[place : place + 2]
    return [*words, "--latent_cache_dir", str(folder.parent / "cache"), "--seed", "0"]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(path if path.is_file() else folder / lora.WEIGHTS)


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


Call = tuple[Tensor, Tensor, Tensor]  # clean, noise, timestep


@pytest.fixture
def noised(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the loops have made noisy, call by call."""
    calls: list[Call] = []
    add = ddpm.add_noise

    def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, schedule: Any) -> Tensor:
        calls.append((clean, noise, timestep))
        return add(clean, noise, timestep, schedule)

    monkeypatch.setattr(ddpm, "add_noise", add_noise)
    return calls


def taken(calls: list[Call]) -> list[Call]:
    """The calls so far, which are forgotten."""
    found = list(calls)
    calls.clear()
    return found


# -- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        DARK,
        ("--loss_type", "smooth_l1", "--noise_offset", "0.05", "--input_perturbation", "0.1"),
    ],
    ids=("noise", "dark", "huber"),
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_eval_loss(train: Any, method: str, flags: Sequence[str]) -> None:
    more = ("--max_train_steps", "40", "--train_batch_size", "4", "--eval_fraction", "0.2")
    own = ("--lora_layers", "all-linear") if method == "lora" else ()
    rate = ("--learning_rate", "2e-2" if method == "lora" else "2e-3")
    folder = train(method, "out", *more, *own, *rate, *flags)
    losses = [row["eval_loss"] for row in rows(folder) if "eval_loss" in row]
    assert losses[-1] < 0.95 * losses[0]


def test_the_eval_loss_is_the_squared_error_whatever_is_trained(train: Any) -> None:
    def first(name: str, *flags: str) -> float:
        return rows(train("lora", name, "--eval_fraction", "0.2", *flags))[0]["eval_loss"]

    plain = first("plain")
    weighed = ("--snr_gamma", "5", "--loss_type", "huber", "--noise_offset", "0.1")
    assert first("weighed", *weighed) == plain
    assert first("velocity", "--prediction_type", "v_prediction") != plain


@each_method
def test_the_options_of_noise_change_what_is_seen_and_nothing_else(
    train: Any, noised: list[Call], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[Tensor] = []
    measure = Diffusion.errors

    def errors(self: Diffusion, *args: Any, noise: Tensor, **more: Any) -> Tensor:
        targets.append(noise)
        return measure(self, *args, noise=noise, **more)

    monkeypatch.setattr(Diffusion, "errors", errors)
    plain_run = train(method, "plain")
    plain, plain_targets = taken(noised), targets[:]
    targets.clear()
    assert all(torch.equal(c[1], t) for c, t in zip(plain, plain_targets, strict=True))
    assert same(plain_run, train(method, "zero", "--noise_offset", "0"))
    taken(noised)
    targets.clear()

    moved_run = train(method, "moved", "--noise_offset", "0.5")
    for before, now, target in zip(plain, taken(noised), targets, strict=True):
        assert torch.equal(before[0], now[0])
        assert torch.equal(before[2], now[2])
        shift = now[1] - before[1]  # one number for a channel of a picture
        assert torch.allclose(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-6)
        assert len(shift[:, :, 0, 0].flatten().unique()) == shift[:, :, 0, 0].numel()
        assert torch.equal(now[1], target)  # and it is what is learned
    targets.clear()

    disturbed_run = train(method, "disturbed", "--input_perturbation", "0.1")
    for before, now, target in zip(plain, taken(noised), targets, strict=True):
        assert torch.equal(before[1], target)
        assert (now[1] - target).std().item() == pytest.approx(0.1, rel=0.1)
    assert not same(plain_run, moved_run)
    assert not same(plain_run, disturbed_run)


@each_method
def test_only_the_chosen_timesteps_are_trained(train: Any, noised: list[Call], method: str) -> None:
    train(method, "out", "--min_timestep", "200", "--max_timestep", "210")
    levels = torch.cat([timestep for _, _, timestep in noised])
    assert len(levels) == 6
    assert 200 <= levels.min() <= levels.max() < 210
    assert len(levels.unique()) > 1


# -- what was trained is said -------------------------------------------------------------------


@each_method
def test_the_saved_scheduler_says_what_was_trained_and_diffusers_draws_with_it(
    train: Any, method: str, tiny_sd15: Path
) -> None:
    drawn = ("--validation_prompt", "a star", "--validation_inference_steps", "2")
    folder = train(method, "out", *DARK, *drawn, "--validation_guidance_rescale", "0.7")
    scheduler: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] == 0
    last = folder / "validation" / "step-3" / "00-a_star-seed0.png"
    base = folder if method == "full" else tiny_sd15
    pipeline = pipelines.load_pipeline(str(base), torch.float32)
    assert isinstance(pipeline, StableDiffusionPipeline)
    if method != "full":
        pipeline.scheduler = pipelines.load_loras(pipeline, [str(folder)], [1.0])
        card = (folder / "README.md").read_text()
        assert 'DDIMScheduler.from_pretrained(result, subfolder="scheduler")' in card
    assert type(pipeline.scheduler) is DDIMScheduler
    flags = ["--prompt", "a star", "--num_inference_steps", "2", "--guidance_rescale", "0.7"]
    words = ["--pretrained_model_name_or_path", str(base), *flags, "--height", "64"]
    args = cli.parse(demo.Args, None, [*words, "--width", "64"])
    (picture,) = demo.draw(pipeline, args.drawing, "a star", [0])
    with Image.open(last) as validated:
        assert validated.tobytes() == picture.tobytes()
    # With another class of scheduler too, which a user may prefer.
    euler: Any = EulerDiscreteScheduler.from_config(scheduler.config)
    assert euler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_where_nothing_changes_the_scheduler_is_the_bases(
    train: Any, method: str, tiny_sd15: Path
) -> None:
    folder = train(method, "out", "--snr_gamma", "5", "--noise_offset", "0.1")
    saved = folder / "scheduler" / "scheduler_config.json"
    if method == "lora":
        assert not saved.exists()
    else:
        own = tiny_sd15 / "scheduler" / "scheduler_config.json"
        assert saved.read_bytes() == own.read_bytes()


# -- stopping, refusing -------------------------------------------------------------------------


def test_a_run_with_every_option_of_noise_goes_on_exactly(train: Any) -> None:
    flags = (*DARK, "--noise_offset", "0.1", "--input_perturbation", "0.1", "--min_timestep", "9")
    flags += ("--loss_type", "huber", "--debiased_estimation", "--checkpointing_steps", "2")
    whole = train("lora", "whole", *flags)
    broken = train("lora", "broken", *flags)
    shutil.rmtree(broken / "checkpoint-3")
    (broken / lora.WEIGHTS).unlink()
    train("lora", "broken", *flags, "--resume_from_checkpoint", "latest")
    assert same(whole, broken)


@pytest.mark.parametrize(
    "other",
    [
        ("--prediction_type", "v_prediction"),
        ("--noise_offset", "0.1"),
        ("--snr_gamma", "5"),
        ("--max_timestep", "900"),
    ],
    ids=lambda flags: flags[0],
)
def test_another_objective_does_not_go_on(train: Any, other: Sequence[str]) -> None:
    train("lora", "out", "--max_train_steps", "1")
    more = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    with pytest.raises((UserError, TrainingStopped), match=other[0].lstrip("-")):
        train("lora", "out", *more, *other)


@each_method
@pytest.mark.parametrize("flags", [(), ("--dry_run",)], ids=("run", "dry"))
def test_noise_is_not_learned_where_no_signal_is_left(
    train: Any, tmp_path: Path, method: str, flags: Sequence[str]
) -> None:
    with pytest.raises(UserError, match=r"--rescale_betas_zero_snr: .*v_prediction"):
        train(method, "out", "--rescale_betas_zero_snr", *flags)
    assert not (tmp_path / "cache").exists()


@each_method
def test_a_dry_run_writes_nothing(
    train: Any, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(method, "out", "--dry_run", *DARK)
    assert "optimizer steps: 3" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_guidance_is_rescaled_where_the_pipeline_can(tiny_sd3: Path, tmp_path: Path) -> None:
    import train_lora_sd3

    words = [*run_flags(tmp_path, tiny_sd3, tmp_path), "--validation_guidance_rescale", "0.7"]
    with pytest.raises(UserError, match=r"--validation_guidance_rescale: .*Diffusion 3"):
        train_lora_sd3.main(cli.parse(train_lora_sd3.Args, None, words))


# -- DreamBooth ---------------------------------------------------------------------------------


def test_a_batch_has_as_many_pictures_of_the_class_which_the_base_has_drawn(
    train: Any, noised: list[Call], tmp_path: Path
) -> None:
    prior = ("--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"))
    prior += ("--class_prompt", "a star", "--num_class_images", "3", "--sample_batch_size", "2")
    folder = train("dreambooth_lora", "out", *prior, "--prior_inference_steps", "1")
    assert [len(clean) for clean, _, _ in noised] == [4, 4, 4]
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    assert any(value.any() for name, value in weights(folder).items() if "lora_B" in name)


# -- DPO and ReFL of models that predict v ------------------------------------------------------


@pytest.fixture(scope="module")
def velocity_sd15(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Path:
    """The untrained SD1 as one that predicts v on a schedule that ends without signal."""
    folder = Path(shutil.copytree(tiny_sd15, tmp_path_factory.mktemp("models") / "velocity-sd15"))
    path = folder / "scheduler" / "scheduler_config.json"
    said = {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"}
    said |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_dpo_compares_errors_of_v(
    tmp_path: Path, velocity_sd15: Path, noised: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dpo_sd15 as script

    compared: list[Tensor] = []
    measure = ddpm.squared_error

    def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
        compared.append(target)
        return measure(predicted, target)

    monkeypatch.setattr(ddpm, "squared_error", squared_error)
    words = flags_of(tmp_path, velocity_sd15, write_pairs(tmp_path / "pairs", 4))
    words += ["--finetune", "lora", "--rank", "2", "--max_train_steps", "1"]
    script.main(script.cli.parse(script.Args, None, words))
    (clean, noise, timestep), *_ = noised
    schedule = ddpm.Schedule.of(
        json.loads((velocity_sd15 / "scheduler" / "scheduler_config.json").read_text())
    )
    expected = ddpm.velocity(clean, noise, timestep, schedule)
    assert len(compared) == 2  # the policy's, the reference's
    assert all(torch.equal(target, expected) for target in compared)
    assert rows(tmp_path / "run")[0]["loss"] == LOG_TWO


def test_ddpo_draws_along_v_and_begins_where_no_signal_is_left(
    tmp_path: Path, velocity_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_ddpo_sd15 as script

    asked: set[tuple[str, int, float]] = set()
    transition = ddpm.transition

    def spied(
        latents: Tensor, said: Tensor, at: int, to: int, schedule: Any, eta: float, kind: Any
    ) -> Any:
        found = transition(latents, said, at, to, schedule, eta, kind)
        asked.add((kind, at, eta))
        assert (found.std > 0) == (eta > 0)
        return found

    monkeypatch.setattr(ddpm, "transition", spied)
    words = policy_flags(tmp_path, velocity_sd15)
    words += ["--reward", mine(tmp_path, "brightness"), "--num_eval_prompts", "0"]
    words += ["--latent_cache_dir", str(tmp_path / "cache")]
    reset_accelerate()
    script.main(script.cli.parse(script.Args, None, words))
    # Trailing timesteps of four; the last one's step is neither drawn nor learned from.
    taken = {(timestep, float(timestep > 300)) for timestep in (999, 749, 499, 249)}
    assert asked == {("v_prediction", *pair) for pair in taken}
    (first, *_), *_ = [[row for row in rows(tmp_path / "run") if "loss" in row]]
    assert first["ratio_max_deviation"] == 0
    assert first["grad_norm"] > 0


def test_refl_reads_the_picture_from_v_and_begins_where_no_signal_is_left(
    tmp_path: Path, velocity_sd15: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_refl_sd15 as script

    ways: list[denoising.Way] = []
    estimate = denoising.estimate

    def spied(network: Any, noise: Tensor, way: denoising.Way, *rest: Any, **more: Any) -> Tensor:
        ways.append(way)
        return estimate(network, noise, way, *rest, **more)

    monkeypatch.setattr(denoising, "estimate", spied)
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"id": str(i), "text": text} for i, text in enumerate(PROMPTS)])
    )
    words = flags_of(tmp_path, velocity_sd15, None)
    words += ["--prompt_file", str(tmp_path / "prompts.json"), "--num_eval_prompts", "2"]
    words += ["--reward", mine(tmp_path, "brightness"), "--sample_steps", "4"]
    words += ["--eval_sample_steps", "2", "--eval_guidance_scale", "1", "--finetune", "lora"]
    words += ["--pretrain_data_dir", str(scene_data), "--rank", "2", "--max_train_steps", "2"]
    script.main(script.cli.parse(script.Args, None, words))
    assert {way.prediction for way in ways} == {"v_prediction"}
    assert {way.timesteps[0] for way in ways} == {999}
    learned = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in learned)
