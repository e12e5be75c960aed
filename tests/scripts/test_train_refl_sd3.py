"""Claims about `train_refl_sd3.py`: where its gradient goes, and where it refuses to take one.

What it shares with `train_refl_sd15.py` is claimed there; runs from end to end, kills and several
processes are in `test_every_script.py`.
"""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train_refl_sd3
from dojo import finetune, rewards
from dojo.cli import UserError
from dojo.maths import denoising, flow
from dojo.maths.denoising import FlowWay
from dojo.maths.objective import Flow
from dojo.methods import refl
from dojo.methods.refl import FlowReflArgs
from dojo.models import opening
from dojo.models.family import ModelArgs
from dojo.models.sd3 import models
from dojo.run.cost import Cost
from tests.conftest import ROOT
from tests.scripts.runs import SCRIPTS, adapter, in_process, mine, one_thread, steps, with_reward

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
NO_EVALUATION = ("--num_eval_prompts", "0")
ONE_STEP = ("--max_train_steps", "1", "--checkpointing_steps", "1")


def train(folder: Path, model: Path, *more: str) -> Path:
    """A small run in this process, without pre-training loss; its output folder."""
    script = SCRIPTS["refl_sd3"]
    flags, own = script.kind(folder, model, model.parent)
    words = own.replace("{inputs}/mine.py:brightness", mine(model.parent, "brightness")).split()
    place = words.index("--prompt_file")
    words[place : place + 2] = ["--prompt_set", "pocket", "--max_prompts", "6"]
    # Or the gradient through an untrained model drowns in --adam_epsilon.
    scale = ("--grad_scale", "1e3", "--learning_rate", "1e-3", "--rank", "2", "--seed", "0")
    in_process(train_refl_sd3, [*flags, *words, *scale, *more])
    return folder / "run"


# -- where the gradient goes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(
            ("--grad_steps", "3", "--first_step", "3", "--guidance_scale", "3"),
            marks=pytest.mark.slow,
        ),
        ("--finetune", "full", "--sigma_grid", "pipeline", "--first_step", "1"),
    ],
    ids=["lora", "chain-guided", "full-pipeline"],
)
def test_the_weights_learn_at_the_chosen_steps_sigma_alone(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    calls: list[tuple[float, bool, bool]] = []
    ask, estimate = models.velocity, denoising.estimate
    ends: list[int] = []

    def velocity(network: Any, noisy: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        predicted = ask(network, noisy, sigma, *rest, **more)
        calls.append((sigma[0].item(), noisy.requires_grad, predicted.requires_grad))
        return predicted

    def counted(predict: Any, noise: Tensor, way: FlowWay, *rest: Any, **how: int) -> Tensor:
        calls.clear()
        clean = estimate(predict, noise, way, *rest, **how)
        last, free = how["last"], how["last"] + 1 - how["grad_steps"]
        assert [call[0] for call in calls] == pytest.approx(way.sigmas[: last + 1])
        chain = [(number > 0, True) for number in range(how["grad_steps"])]
        assert [call[1:] for call in calls] == [(False, False)] * free + chain
        ends.append(last)
        grid = "pipeline" if "pipeline" in flags else "even"
        assert way.sigmas == FlowWay.of(4, 3.0, grid).sigmas
        return clean

    monkeypatch.setattr(models, "velocity", velocity)
    monkeypatch.setattr(denoising, "estimate", counted)
    folder = train(tmp_path, tiny_sd3, *NO_EVALUATION, "--max_train_steps", "2", *flags)
    assert len(ends) == 2
    assert set(ends) <= ({1, 2} if "pipeline" in flags else {3})
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in steps(folder))
    if "full" not in flags:
        assert all(value.any() for name, value in adapter(folder).items() if "lora_B" in name)


def test_neither_the_reward_nor_the_autoencoder_gets_a_gradient(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[nn.Module] = []
    load, autoencoder = rewards.RewardArgs.load, train_refl_sd3.sd3.Model.load_vae

    def loaded(self: Any, *rest: Any) -> Any:
        found = load(self, *rest)
        frozen.extend(rewards.networks(found))
        return found

    def vae(self: Any, *rest: Any, **more: Any) -> Any:
        frozen.append(autoencoder(self, *rest, **more))
        return frozen[-1]

    monkeypatch.setattr(rewards.RewardArgs, "load", loaded)
    monkeypatch.setattr(train_refl_sd3.sd3.Model, "load_vae", vae)
    clip = ("--reward", f"clip[model={ROOT / 'models' / 'pocket-clip'}]")
    (row,) = steps(train(tmp_path, tiny_sd3, *NO_EVALUATION, *ONE_STEP, *clip))
    assert row["grad_norm"] > 0
    assert len(frozen) == 2
    for network in frozen:
        params = list(network.parameters())
        assert params
        assert not any(param.requires_grad for param in params)
        assert all(param.grad is None for param in params)


# -- which steps are scored -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (FlowReflArgs(), range(15, 20)),
        (FlowReflArgs(sigma_grid="pipeline"), range(15, 19)),
        (FlowReflArgs(sample_steps=4), range(3, 4)),
        (FlowReflArgs(sample_steps=4, sigma_grid="pipeline"), range(2, 3)),
        (FlowReflArgs(sample_steps=2, sigma_grid="pipeline"), range(1)),
        (FlowReflArgs(sample_steps=1), range(1)),
        (FlowReflArgs(first_step=19), range(19, 20)),
    ],
    ids=("usual", "pipeline", "short", "short-pipeline", "two", "one", "last"),
)
def test_scored_steps_lie_in_the_last_quarter_where_sigma_counts(
    args: FlowReflArgs, expected: range
) -> None:
    drawn = Counter(args.draw(7, batch) for batch in range(200))
    assert set(drawn) == set(expected)
    sigmas = args.way(3.0).sigmas
    assert min(sigmas[step] for step in expected) > 0.07
    assert max(sigmas[step] for step in expected) <= (1 if args.sample_steps < 4 else 0.7)


def test_the_last_step_of_the_pipelines_table_is_refused_in_a_sentence(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    wrong = ("--sigma_grid", "pipeline", "--last_step", "3")
    with pytest.raises(UserError, match=r"--last_step 3 .* sigma 0\.0089.*--last_step 2 is the"):
        train(tmp_path, tiny_sd3, *wrong, "--dry_run")
    assert not (tmp_path / "run").exists()
    fine = FlowReflArgs(sample_steps=400)
    with pytest.raises(UserError, match=r"--last_step 399 .* --last_step 397 is the last one"):
        fine.way(3.0)
    assert FlowReflArgs(sample_steps=400, last_step=397).way(3.0).sigmas[397] >= 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow_shift": 0.0}, "--flow_shift must be positive"),
        ({"sample_steps": 1, "sigma_grid": "pipeline"}, "--sigma_grid pipeline needs"),
        ({"grad_steps": 17}, "--grad_steps 17: there are 16 calls at least"),
        ({"last_step": 20}, r"lie in 0 \.\. 19 \(--sample_steps\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_by_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowReflArgs(**options)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_are_float32_while_the_base_computes_in_bfloat16(
    tmp_path: Path, tiny_sd3: Path
) -> None:
    own = (*NO_EVALUATION, *ONE_STEP, "--mixed_precision", "bf16", "--grad_steps", "2")
    own += ("--first_step", "3")
    folder = train(tmp_path / "lora", tiny_sd3, *own)
    assert steps(folder)[0]["grad_norm"] > 0
    assert {value.dtype for value in adapter(folder).values()} == {torch.float32}
    folder = train(tmp_path / "full", tiny_sd3, *own, "--finetune", "full", "--train_dtype", "bf16")
    (row,) = steps(folder)
    assert all(math.isfinite(value) for value in row.values())
    assert row["grad_norm"] > 0


# -- the pre-training loss ------------------------------------------------------------------------


def test_the_pre_training_loss_is_the_velocitys_with_the_trainings_shift(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    shifts: list[float] = []
    measure = Flow.errors

    def errors(
        self: Flow, predicted: Tensor, noisy: Tensor, level: Tensor, **pictures: Any
    ) -> Tensor:
        clean, noise = pictures["clean"], pictures["noise"]
        torch.testing.assert_close(noisy, flow.interpolate(clean, noise, level))
        found.append(measure(self, predicted, noisy, level, **pictures))
        expected = flow.squared_error(predicted, noise - clean)
        assert torch.equal(found[-1], expected)
        assert predicted.requires_grad
        shifts.append(self.shift)
        return found[-1]

    monkeypatch.setattr(Flow, "errors", errors)
    own = ("--pretrain_data_dir", str(scene_data), "--pretrain_weight", "3", "--grad_scale", "2")
    folder = train(tmp_path, tiny_sd3, *NO_EVALUATION, *ONE_STEP, *own, "--flow_shift", "2")
    (row,) = steps(folder)
    assert row["pretrain_loss"] == pytest.approx(found[0].mean().item())
    assert row["loss"] == pytest.approx(3 * row["pretrain_loss"] - 2 * row["reward"], rel=1e-5)
    assert shifts == [2]
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["shift"] == 2


# -- the plan, and what it learns -----------------------------------------------------------------


def test_a_dry_run_counts_the_calls_with_and_without_gradient(
    tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = {}
    for name, flags in {
        "usual": ("--sample_steps", "20"),
        "draft": ("--sample_steps", "20", "--first_step", "19", "--grad_steps", "3"),
        "short": ("--sample_steps", "4"),
    }.items():
        train(tmp_path, tiny_sd3, "--dry_run", "--finetune", "full", *flags)
        shown = capsys.readouterr().out
        operations[name] = float(shown.split("process and step: ")[1].split()[0])
    # A call with gradients is three. Steps 15 to 19 are 17 on the way there on average.
    calls = {"usual": 17 + 3, "draft": 17 + 9, "short": 3 + 3}
    for name, count in calls.items():
        expected = operations["usual"] * count / calls["usual"]
        assert operations[name] == pytest.approx(expected, rel=0.02), name
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_room_for_the_way_back_through_the_decoder(tiny_sd3: Path) -> None:
    model = opening.open_model(ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    run: Any = SimpleNamespace(dtype=torch.float32)
    trained = finetune.AllWeights(run, finetune.WholeArgs())
    shape = model.latent_shape(64, 64)

    def counted(*, checkpointing: bool) -> Cost:
        args = FlowReflArgs(resolution=64)
        given = (run, trained, model, args, 2, shape)
        return refl.reward_cost(*given, checkpointing=checkpointing)[1]

    whole, again = counted(checkpointing=False), counted(checkpointing=True)
    vae = model.load_vae(torch.device("cpu"))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latents = torch.zeros(2, *shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        picture = model.decode(vae, latents)
    weights = {param.untyped_storage().data_ptr() for param in vae.parameters()}
    decoder = sum(size for place, size in kept.items() if place not in weights)
    del picture
    assert decoder > whole.saved_bytes  # it is most of what there is
    assert whole.peak_bytes >= whole.saved_bytes + decoder
    assert whole.peak_bytes < whole.saved_bytes + 1.5 * decoder
    assert again.peak_bytes < 0.7 * whole.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--grad_steps", "2", "--first_step", "7")])
def test_held_out_pictures_become_what_is_rewarded(
    tmp_path: Path, tiny_sd3: Path, flags: tuple[str, ...]
) -> None:
    change = {}
    learn = ("--max_train_steps", "24", "--validation_steps", "24", "--eval_sample_steps", "8")
    learn += ("--sample_steps", "8", "--finetune", "full", *flags, "--eval_reward")
    for name in ("brightness", "darkness"):
        own = ("--reward", mine(tiny_sd3.parent, name))
        other = "darkness" if name == "brightness" else "brightness"
        folder = train(tmp_path / name, tiny_sd3, *own, *learn, mine(tiny_sd3.parent, other))
        before, after = with_reward(folder)
        change[name] = after["eval_reward"] - before["eval_reward"]
        fell = after[f"eval_reward/{other}"] - before[f"eval_reward/{other}"]
        assert fell == pytest.approx(-change[name], abs=1e-5)
    assert min(change.values()) > 0.004, change
