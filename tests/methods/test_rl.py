"""Claims about methods.rl: batches and scores over processes, guidance, chunks, the reference."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import accelerate
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import train_grpo_sd3
from dojo import cli, finetune, rng
from dojo.cli import TrainingStopped, UserError
from dojo.inputs.prompts import Prompt
from dojo.inputs.steering import Steering
from dojo.maths import rollout
from dojo.maths.flow import squared_error
from dojo.maths.surrogate import clipped_surrogate
from dojo.methods import rl
from dojo.methods.rl import episodes
from dojo.models import sd3
from dojo.rewards import RewardOutput
from dojo.run import run as training
from dojo.run.optim import OptimArgs
from tests.conftest import rl_flags

Value = TypeVar("Value")

PROMPTS = [Prompt(text=f"prompt {i}", metadata={"number": i}) for i in range(9)]
SHAPE = (16, 8, 8)


class Team:
    """Stands for the accelerators of processes that are threads here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tensors: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def member(self, process: int) -> Any:
        def gather(tensor: Tensor) -> Tensor:
            self.tensors[process] = tensor
            self.barrier.wait()
            whole = torch.cat(self.tensors)
            self.barrier.wait()
            return whole

        return SimpleNamespace(
            share={"process": process, "num_processes": self.size},
            seed=3,
            device=torch.device("cpu"),
            accelerator=SimpleNamespace(num_processes=self.size, gather=gather),
            stopping=SimpleNamespace(end_if_asked=lambda: None),
        )


def together(size: int, work: Callable[[Any], Value]) -> list[Value]:
    """What `work` returns on each of so many processes."""
    team = Team(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(work, team.member(process)) for process in range(size)]
        return [job.result() for job in jobs]


def alone() -> Any:
    return Team(1).member(0)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "values"),
    [
        (rl.SampleArgs, {"resolution": 0}),
        (rl.SampleArgs, {"group_size": 0}),
        (rl.SampleArgs, {"num_prompts_per_epoch": 0}),
        (rl.SampleArgs, {"sample_batch_size": 0}),
        (rl.SampleArgs, {"guidance_scale": 0.5}),
        (rl.SampleArgs, {"flow_shift": 0.0}),
        (rl.SampleArgs, {"max_invalid": 1.0}),
        (rl.PolicyArgs, {"num_inner_epochs": 0}),
        (rl.PolicyArgs, {"clip_range": 0.0}),
        (rl.PolicyArgs, {"adv_clip_max": -1.0}),
        (rl.PolicyLoraArgs, {"lora_dropout": 0.1}),
        (rl.EvalArgs, {"eval_every": 0}),
        (rl.EvalArgs, {"eval_sample_steps": 0}),
        (rl.EvalArgs, {"eval_guidance_scale": 0.0}),
        (rl.EvalArgs, {"num_saved_images": -1}),
        (train_grpo_sd3.GrpoArgs, {"beta": -1.0}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_by_the_name_of_their_flag(
    group: Any, values: dict[str, Any]
) -> None:
    group()
    with pytest.raises(ValueError, match=f"--{next(iter(values))}"):
        group(**values)


@pytest.mark.parametrize(
    ("sample", "optim", "processes", "batches"),
    [
        ({"num_prompts_per_epoch": 6, "group_size": 4}, {"train_batch_size": 3}, 4, 2),
        (
            {"num_prompts_per_epoch": 6, "group_size": 4, "sample_batch_size": 6},
            {"train_batch_size": 3, "gradient_accumulation_steps": 4},
            *(2, 2),
        ),
    ],
)
def test_sizes_that_divide_make_an_epoch(
    sample: dict[str, int], optim: dict[str, int], processes: int, batches: int
) -> None:
    args, optimizer = rl.SampleArgs(**sample), OptimArgs(**optim)  # pyright: ignore
    assert args.check(optimizer, processes, min_group=2) == batches
    made = batches * args.batch_size(optimizer) * processes
    assert made == args.samples == 24
    with pytest.raises(UserError, match="--num_prompts_per_epoch"):
        args.check(optimizer, 5, min_group=2)


# -- batches over processes ---------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_processes_see_together_what_one_sees(processes: int, size: int) -> None:
    args = rl.SampleArgs(num_prompts_per_epoch=3, group_size=4)
    drawn = [7, 2, 5]
    shares = together(
        processes, lambda run: rl.batches(run, args, PROMPTS, drawn, epoch=1, size=size)
    )
    whole = rl.batches(alone(), args, PROMPTS, drawn, epoch=1, size=6)
    # The first pictures of an epoch come in the first batches: one step sees the same ones.
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert [place for part in parts for place in part.places] == batch.places
        assert [one for part in parts for one in part.prompt_ids] == batch.prompt_ids
        keys = [key for part in parts for key in part.keys(alone(), "noise")]
        assert keys == batch.keys(alone(), "noise")
    assert [place for batch in whole for place in batch.places] == list(range(12))
    ids = [one for batch in whole for one in batch.prompt_ids]
    assert ids == [7] * 4 + [2] * 4 + [5] * 4
    assert [text for batch in whole for text in batch.texts] == [PROMPTS[i].text for i in ids]
    assert [row["number"] for batch in whole for row in batch.metadata] == ids


def test_no_two_pictures_share_their_noise() -> None:
    args = rl.SampleArgs(num_prompts_per_epoch=2, group_size=3)
    keys = [
        key
        for epoch in range(3)
        for batch in rl.batches(alone(), args, PROMPTS, [1, 2], epoch, 3)
        for stream in ("noise", "way")
        for key in batch.keys(alone(), stream)
    ]
    assert len(set(keys)) == len(keys) == 3 * 6 * 2


def test_chunks_come_as_often_as_asked_in_an_order_that_all_processes_share() -> None:
    chunks: Any = list(range(8))

    def order(run: Any, epoch: int) -> list[int]:
        found: Any = list(rl.shuffled(chunks, run, epoch, 3))
        return found

    orders = together(2, lambda run: order(run, 0))
    assert orders[0] == orders[1]
    passes = [tuple(orders[0][i : i + 8]) for i in (0, 8, 16)]
    assert all(sorted(one) == chunks for one in passes)
    assert len({*passes, tuple(order(alone(), 1)[:8])}) == 4


def test_pictures_that_part_later_start_from_one_noise() -> None:
    args = rl.WaySampleArgs(num_prompts_per_epoch=2, group_size=3, branch=True)
    whole = rl.batches(alone(), args, PROMPTS, [1, 2], 0, 6)
    parts = rl.batches(alone(), args, PROMPTS, [1, 2], 0, 3)  # whole groups, as they must be
    keys = [key for batch in parts for key in batch.noise_keys(alone(), args.copies)]
    assert keys == whole[0].noise_keys(alone(), args.copies)
    assert len(set(keys)) == 2
    assert len(set(whole[0].keys(alone(), "way"))) == 6
    half = OptimArgs(train_batch_size=2)
    with pytest.raises(UserError, match="--branch: --train_batch_size 2"):
        args.check(half, 1, min_group=2)
    single = rl.WaySampleArgs(num_prompts_per_epoch=2, group_size=1, branch=True)
    with pytest.raises(UserError, match="--branch: with --group_size 1 nobody shares"):
        single.check(half, 1, min_group=1)


# -- scores -------------------------------------------------------------------------------------


class Told:
    """Scores pictures by their first pixel; black ones have no score."""

    weights: Mapping[str, float] = {"first": 2.0, "zero": 0.0}

    def __init__(self, trouble: BaseException | None = None) -> None:
        self.trouble = trouble

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Future[RewardOutput]:
        assert len(images) == len(prompts) == len(metadata)
        future: Future[RewardOutput] = Future()
        if self.trouble is not None:
            future.set_exception(self.trouble)
            return future
        first = images[:, 0, 0, 0]
        valid = first > 0
        parts = {"first": first.where(valid, math.nan), "zero": torch.zeros(len(images))}
        future.set_result(
            RewardOutput(scores=(2 * first).where(valid, 0.0), valid=valid, components=parts)
        )
        return future


def pictures(batch: rl.Batch) -> Tensor:
    """[B, 3, 32, 32], one colour each; that of place 5 is black."""
    shades = torch.tensor([0.0 if place == 5 else (place + 1) / 16 for place in batch.places])
    return shades.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)


def collected(run: Any, size: int, reward: Any, max_invalid: float = 0.5) -> rl.Scores:
    args = rl.SampleArgs(num_prompts_per_epoch=3, group_size=4)
    scoring = rl.Scoring(run, reward, max_invalid)
    for batch in rl.batches(run, args, PROMPTS, [7, 2, 5], 0, size):
        scoring.submit(batch, pictures(batch))
    return scoring.collect()


@pytest.mark.parametrize(("processes", "size"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_every_process_knows_all_scores_in_the_order_of_places(processes: int, size: int) -> None:
    expected = torch.tensor([(place + 1) / 16 for place in range(12)])
    for found in together(processes, lambda run: collected(run, size, Told())):
        assert found.prompt_ids.tolist() == [7] * 4 + [2] * 4 + [5] * 4
        assert found.valid.tolist() == [place != 5 for place in range(12)]
        assert found.scores.tolist() == [0.0 if i == 5 else 2 * expected[i] for i in range(12)]
        assert found.components["first"].isnan().nonzero().flatten().tolist() == [5]
        table, weights = found.table(Told.weights)
        assert torch.equal(table[found.valid, 0], expected[found.valid])
        assert weights.tolist() == [2, 0]
        row = found.row()
        valid = 2 * expected[found.valid].double()
        assert row["reward"] == pytest.approx(valid.mean().item())
        assert row["reward_std"] == pytest.approx(valid.std(correction=0).item())
        assert row["reward/first"] == pytest.approx(valid.mean().item() / 2)
        assert row["invalid_share"] == pytest.approx(1 / 12)
        assert row["diversity"] > 0


def test_a_reward_that_float32_cannot_hold_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training.Run(accelerate.Accelerator(), training.RunArgs(output_dir=tmp_path), 0)
    for _ in range(2):
        scoring: Any = rl.Scoring(run, Told(), 0.5)  # pyright: ignore[reportArgumentType]
        table = {"far": 1e8 + torch.rand(8), "near": torch.rand(8)}
        scoring._say_coarse(table, torch.arange(8) // 4, torch.ones(8, dtype=torch.bool))
    said = capsys.readouterr().out
    assert said.count("the scores of far are so large (1e+08)") == 1
    assert "near" not in said


def test_trouble_of_one_process_stops_all_of_them() -> None:
    def work(run: Any) -> str:
        trouble = TrainingStopped("no answer") if run.share["process"] == 1 else None
        with pytest.raises(TrainingStopped) as stopped:
            collected(run, 2, Told(trouble))
        return str(stopped.value)

    messages = together(3, work)
    assert messages[1] == "no answer"
    assert messages[0] == messages[2] == "another process had to stop"


def test_a_bug_in_a_reward_is_not_taken_for_a_stop() -> None:
    with pytest.raises(ZeroDivisionError):
        collected(alone(), 4, Told(ZeroDivisionError()))


def test_the_share_of_pictures_without_score_is_limited() -> None:
    assert not collected(alone(), 4, Told(), max_invalid=1 / 12).valid.all()
    with pytest.raises(TrainingStopped, match=r"1 of 12 pictures .*--max_invalid 0\.08"):
        collected(alone(), 4, Told(), max_invalid=0.08)


def test_diversity_is_the_distance_of_two_pictures_of_a_prompt() -> None:
    def shades(*values: float) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)

    def measured(ids: Sequence[int], *values: float) -> float | None:
        return episodes.diversity(shades(*values), torch.tensor(ids))

    assert measured([4, 4], 0.2, 0.7) == pytest.approx(0.5)
    assert measured([4, 4, 4], 0.3, 0.3, 0.3) == 0
    # Three pictures: the mean square of the three distances 0.1, 0.2 and 0.3.
    assert measured([4, 4, 4], 0.1, 0.2, 0.4) == pytest.approx(math.sqrt(0.14 / 3))
    # A mean over prompts; their own difference and a prompt with one picture count nothing.
    assert measured([4, 9, 4, 9, 1], 0.0, 0.9, 0.2, 0.5, 0.5) == pytest.approx(0.3)
    assert measured([1, 2, 3], 0.0, 0.5, 1.0) is None


# -- guidance -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tiny_sd3: Path) -> SD3Transformer2DModel:
    model: Any = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    return model.requires_grad_(False).eval()


def texts(captions: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings that hang on the text alone."""
    keys: list[tuple[rng.Key, ...]] = [(caption,) for caption in captions]
    return {
        "prompt_embeds": rng.normal((30, 192), keys),
        "pooled_prompt_embeds": rng.normal((160,), keys),
    }


class Plain(sd3.Model):
    """A model of which the velocity is asked, and nothing else."""


def steering(guidance: float, negative: str = "") -> Steering:
    source: Any = texts
    nothing: Any = {}
    args = sd3.ModelArgs(pretrained_model_name_or_path="-")
    return Steering(
        model=Plain(args=args, folder=Path(), vae=nothing, scheduler=nothing, transformer=nothing),
        texts=source,
        size=(64, 64),
        guidance_scale=guidance,
        negative_prompt=negative,
        dtype=torch.float32,
    )


def latents(count: int = 4) -> Tensor:
    return rng.normal(SHAPE, [("latents", i) for i in range(count)])


CAPTIONS = ["a", "b", "c", "b"]


@torch.no_grad()
def test_guidance_is_that_of_two_forward_passes(network: SD3Transformer2DModel) -> None:
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3])
    found = steering(4.5, "ugly")(network, CAPTIONS)(latents(), sigma)

    def once(captions: Sequence[str]) -> Tensor:
        embeds = texts(captions)
        return network(
            hidden_states=latents(),
            timestep=1000 * sigma,
            encoder_hidden_states=embeds["prompt_embeds"],
            pooled_projections=embeds["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    without, wanted = once(["ugly"] * 4), once(CAPTIONS)
    # As StableDiffusion3Pipeline writes it.
    expected = without + 4.5 * (wanted - without)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, wanted, atol=1e-2)


@torch.no_grad()
def test_without_guidance_the_network_is_asked_once(network: SD3Transformer2DModel) -> None:
    rows: list[int] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        for guidance in (1.0, 2.0):
            steering(guidance, "ugly")(network, CAPTIONS)(latents(), torch.full((4,), 0.5))
    finally:
        hook.remove()
    assert rows == [4, 8]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_pictures_have_in_common_is_computed_once(
    network: SD3Transformer2DModel, guidance: float
) -> None:
    common, sigma = latents(2), torch.full((2,), 0.8)
    velocity = steering(guidance, "ugly")(network, ["a", "a", "b", "b"])
    once = velocity(common, sigma)
    assert once.shape == common.shape
    apart = velocity(common.repeat_interleave(2, 0), sigma.repeat_interleave(2))
    torch.testing.assert_close(apart, once.repeat_interleave(2, 0), atol=2e-5, rtol=1e-5)


# -- chunks -------------------------------------------------------------------------------------


@pytest.fixture
def way(network: SD3Transformer2DModel) -> tuple[rl.Batch, rollout.Trajectory]:
    """A batch of four pictures and how they were sampled."""
    args = rl.SampleArgs(num_prompts_per_epoch=2, group_size=2)
    (batch,) = rl.batches(alone(), args, PROMPTS, [3, 1], 0, 4)
    plan = rl.RolloutArgs(sample_steps=4, train_timesteps="all", sampler="sde").plan(3.0, 0, 0)
    velocity = steering(1.0)(network, batch.texts)
    return batch, rollout.sample(velocity, latents(), plan, batch.keys(alone(), "way"))


def test_a_chunk_as_large_as_the_batch_is_the_batch_itself(
    network: SD3Transformer2DModel, way: tuple[rl.Batch, rollout.Trajectory]
) -> None:
    def never(_: Sequence[str]) -> rollout.Velocity:
        raise AssertionError("nothing has to be computed anew")

    (chunk,) = rl.split(*way, 4, never)
    assert chunk.batch is way[0]
    assert chunk.steps is way[1].steps


def test_smaller_chunks_hold_the_policy_as_training_will_compute_it(
    network: SD3Transformer2DModel, way: tuple[rl.Batch, rollout.Trajectory]
) -> None:
    batch, trajectory = way
    asked = partial(steering(1.0), network)
    chunks = list(rl.split(batch, trajectory, 2, asked))
    assert [chunk.batch.places for chunk in chunks] == [[0, 1], [2, 3]]
    assert [chunk.batch.texts for chunk in chunks] == [["prompt 3"] * 2, ["prompt 1"] * 2]
    for chunk, rows in zip(chunks, (slice(0, 2), slice(2, 4)), strict=True):
        assert chunk.steps.keys() == trajectory.steps.keys()
        for number, step in chunk.steps.items():
            whole = trajectory.steps[number]
            assert torch.equal(step.latents, whole.latents[rows])
            assert torch.equal(step.reached, whole.reached[rows])
            again, _ = rollout.predict(
                asked(chunk.batch.texts), step.latents, number, trajectory.plan
            )
            assert torch.equal(step.policy.mean, again.mean)  # to the bit
            assert not step.policy.mean.requires_grad
            torch.testing.assert_close(step.policy.mean, whole.policy.mean[rows])
            assert step.policy.std == whole.policy.std


# -- what a step leaves in the metrics ----------------------------------------------------------


@dataclass
class Notes:
    """Takes the place of a run."""

    means: dict[str, float]
    peaks: dict[str, float]

    def average(self, **values: Tensor) -> None:
        self.means |= {name: value.float().mean().item() for name, value in values.items()}

    def peak(self, **values: Tensor) -> None:
        self.peaks |= {name: value.max().item() for name, value in values.items()}


def test_a_record_tells_clipping_by_side_and_the_ratio_by_its_time() -> None:
    moved = torch.tensor([0.2, -0.2, 0.2, -0.2, 0.001]).log1p()
    surrogate = clipped_surrogate(moved, torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0]), 0.1)
    notes: Any = Notes({}, {})
    rl.record(notes, surrogate, fresh=True)
    assert notes.peaks == {"ratio_max_deviation": pytest.approx(0.2, abs=1e-6)}
    rl.record(notes, surrogate, fresh=False)
    assert notes.peaks.keys() == {"ratio_max_deviation", "ratio_max_deviation_later"}
    assert notes.means["clip_fraction_high"] == pytest.approx(2 / 5)
    assert notes.means["clip_fraction_low"] == pytest.approx(1 / 5)
    assert notes.means["clip_fraction"] == pytest.approx(3 / 5)
    assert notes.means["approx_kl"] == pytest.approx(moved.square().mean().item() / 2)


def test_a_record_tells_how_far_the_policy_is_where_that_is_held_back() -> None:
    moved = torch.tensor([0.2, -0.2, 0.2]).log1p()
    divergence = torch.tensor([1e-5, 3e-5, 2e-6])
    args = rl.PolicyArgs(trust_region="divergence")
    notes: Any = Notes({}, {})
    rl.record(notes, args.surrogate(moved, torch.ones(3), divergence), fresh=False)
    assert notes.peaks["divergence_max"] == pytest.approx(3e-5)
    assert notes.means["divergence"] == pytest.approx(1.4e-5)
    assert notes.means["clip_fraction"] == pytest.approx(1 / 3)
    rl.record(notes, rl.PolicyArgs().surrogate(moved, torch.ones(3), divergence), fresh=False)
    assert notes.means["clip_fraction"] == pytest.approx(2 / 3)


def test_a_ratio_that_is_made_for_the_clip_is_refused_with_the_mask() -> None:
    with pytest.raises(ValueError, match=r"--ratio guard .* leave it"):
        rl.PolicyArgs(trust_region="divergence", ratio="guard")


@pytest.mark.parametrize(
    ("taken", "changed"), [("divergence", "clip_range"), ("clip", "kl_mask_threshold")]
)
def test_the_other_trust_regions_bound_is_refused(taken: Any, changed: str) -> None:
    with pytest.raises(ValueError, match=f"--{changed} does nothing with --trust_region {taken}"):
        rl.PolicyArgs(trust_region=taken, **{changed: 1e-2})  # pyright: ignore


# -- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_stays_where_the_policy_began(
    tmp_path: Path, tiny_sd3: Path, network: SD3Transformer2DModel, kind: str
) -> None:
    flags = [*rl_flags(tmp_path, tiny_sd3), "--finetune", kind]
    args = cli.parse(train_grpo_sd3.Args, None, flags)
    run = training.start(args.run, args.optim)
    config = sd3.open_model(args.model)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.load(config, config.objective((64, 64)), with_reference=True)
    frozen = [param for param in trained.network.parameters() if not param.requires_grad]
    kept = [param.clone() for param in frozen]
    # What a step does to the weights; a LoRA's two factors both matter then.
    torch.manual_seed(0)
    with torch.no_grad():
        for param in trained.params:
            param.add_(0.1 * torch.randn_like(param))
    plan = rl.RolloutArgs(sample_steps=4, window_size=1).plan(3.0, 0, 0)
    embeds = steering(2.0).embeds(CAPTIONS)
    now, predicted = rollout.predict(
        steering(2.0).predictor(trained.network, embeds), latents(), 0, plan
    )
    step = rollout.Step(latents=latents(), policy=now, reached=latents())
    then, usual = rl.reference(run, trained, steering(2.0), embeds, step, 0, plan)
    with torch.no_grad():
        base, expected = rollout.predict(
            steering(2.0).predictor(network, embeds), latents(), 0, plan
        )
    assert torch.equal(usual, expected)
    assert torch.equal(then.mean, base.mean)
    assert not usual.requires_grad
    assert squared_error(predicted, usual).min() > 1e-4
    # The policy is as it was before the reference was asked, and so is its gradient.
    squared_error(predicted, usual).mean().backward()
    grads = [param.grad for param in trained.params]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0
    again, _ = rollout.predict(steering(2.0).predictor(trained.network, embeds), latents(), 0, plan)
    assert torch.equal(again.mean, now.mean)
    assert all(torch.equal(*pair) for pair in zip(frozen, kept, strict=True))
    assert all(param.requires_grad for param in trained.params)
