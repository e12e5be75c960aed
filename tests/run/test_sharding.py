"""Claims about `--shard`: the numbers of plain data parallelism, and runs that go on exactly."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.run import checkpoint, exchange, optim
from dojo.run.averaging import Averaged, EmaArgs
from dojo.run.replicas import Learned
from dojo.run.sharding import Shards
from tests.conftest import make_tiny, reset_accelerate, run_flags
from tests.processes import Death, free_port, together
from tests.scripts import runs

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread

# -- a toy --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Sizes that two processes cannot share evenly, down to a weight of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 3), nn.Linear(3, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(self.up(inputs).tanh())


class Toy(nn.Module):
    """Two blocks, and something around them."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.end = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.end(inputs)


@dataclass
class Plain:
    """What of the toy is written where it is whole: nothing, it is sharded."""

    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> None: ...
    def save_average(self, folder: Path) -> None: ...
    def restore_average(self, folder: Path) -> None: ...


class Length:
    num_steps, samples_per_step, device = 4, 1, torch.device("cpu")


class Training:
    """The toy with an optimizer and an average, as a `Learner` would train it."""

    def __init__(
        self, kind: str, weights: torch.dtype = torch.float32, precision: torch.dtype | None = None
    ) -> None:
        reset_accelerate()
        self.shards = Shards(
            accelerate.Accelerator(), precision or weights, summing=kind == "prodigy"
        )
        torch.manual_seed(0)
        self.toy = Toy().to(weights)
        groups: list[dict[str, Any]] = [{"params": list(self.toy.parameters())}]
        self.params = self.shards.spread([self.toy], groups)
        rate = 1.0 if kind == "prodigy" else 1e-2
        args = optim.OptimArgs(optimizer=kind, learning_rate=rate)  # pyright: ignore
        self.optimizer, _ = optim.make(groups, args, Length())
        average = EmaArgs(use_ema=kind != "schedulefree", ema_decay=0.5)
        self.learned = Learned(
            Plain(), Averaged(self.params, average, self.optimizer), self.optimizer
        )
        self.dtype = precision or weights

    def batch(self, step: int) -> Tensor:
        """This process's part of a step's four rows."""
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        accelerator = self.shards.accelerator
        part = 4 // accelerator.num_processes
        start = part * accelerator.process_index
        return rows[start : start + part].to(self.dtype)

    def step(self, number: int) -> float:
        """The loss over all processes."""
        loss = (self.toy(self.batch(number)).float() - 1).square().mean()
        loss.backward()
        self.shards.clip(self.params, 0.5)
        self.optimizer.step()
        self.shards.zero_grad(self.optimizer)
        self.learned.averaged.update(number)
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.shards.accelerator.num_processes

    def write(self, folder: Path) -> None:
        self.shards.write(folder, self.learned, lambda inside: None)

    def read(self, folder: Path) -> None:
        self.shards.read(folder, self.learned)

    def numbers(self) -> list[Tensor]:
        """This process's weights and averages."""
        return [
            value.detach().clone() for value in (*self.params, *self.learned.averaged.shadows())
        ]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


KINDS = ["adamw", "lion", "prodigy", "schedulefree", "split"]


def make(kind: str) -> Training:
    if kind == "split":
        return Training("adamw", torch.bfloat16)
    return Training(kind)


def optimizers(place: Path, results: str) -> None:
    """In every process: four steps, and two that go on from the second, for every optimizer."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        first = make(kind)
        losses = [first.step(1), first.step(2)]
        first.write(place / kind / "checkpoint-2")
        losses += [first.step(3), first.step(4)]
        again = make(kind)
        again.read(place / kind / "checkpoint-2")
        repeated = [again.step(3), again.step(4)]
        found[kind] = {
            "losses": losses,
            "exact": repeated == losses[2:] and same(first.numbers(), again.numbers()),
        }
        from_one = place.parent / "one" / kind / "checkpoint-2"
        if from_one.is_dir() and place.name != "one":
            other = make(kind)
            other.read(from_one)
            found[kind]["from one"] = [other.step(3), other.step(4)]
    found |= asked_unequally() | in_float32() | exchanged()
    everyones = accelerate.utils.gather_object([found])
    if os.environ.get("RANK", "0") == "0":
        (place / results).write_text(json.dumps(everyones))
    accelerate.Accelerator().end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


def asked_unequally() -> dict[str, Any]:
    """Steps with and without an evaluation between them that one process asks more of."""
    ends = []
    for watched in (False, True):
        one = Training("adamw")
        one.step(1)
        for number in (2, 3):
            if watched:
                with torch.no_grad(), one.shards.gathered():
                    for _ in range(1 + 2 * one.shards.accelerator.process_index):
                        one.toy(one.batch(0))
            one.step(number)
        ends.append(one.numbers())
    return {"watched": same(*ends)}


def in_float32() -> dict[str, Any]:
    """Whether a sum of bfloat16 gradients has more digits than bfloat16."""
    one = Training("adamw", precision=torch.bfloat16)
    one.toy(one.batch(1)).float().square().mean().backward()
    one.shards.clip(one.params, 1e9)
    gradients = [param.grad for param in one.params if param.grad is not None]
    return {"more digits": any(not torch.equal(g, g.bfloat16().float()) for g in gradients)}


def exchanged() -> dict[str, Any]:
    """Whether what processes exchange over gloo is what torch's own collectives give."""
    group: Any = dist.group.WORLD
    rows = torch.randn(3 * group.size(), generator=torch.Generator().manual_seed(group.rank()))
    found = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        mine, torchs = torch.empty(3), torch.empty(3)
        exchange.Share()(mine, rows, group, op)
        dist.reduce_scatter_tensor(torchs, rows.clone(), op=op, group=group)
        found.append(torch.equal(mine, torchs))
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        part = (10 * rows[:3]).to(dtype)
        mine, torchs = (torch.zeros(3 * group.size(), dtype=dtype) for _ in range(2))
        exchange.Gather()(mine, part, group)
        dist.all_gather_into_tensor(torchs, part, group=group)
        in_place = torch.zeros_like(mine)
        own = in_place.view(group.size(), -1)[group.rank()]
        own.copy_(part)
        exchange.Gather()(in_place, own, group)
        found += [torch.equal(mine, torchs), torch.equal(in_place, torchs)]
    return {"exchanged": all(found)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, list[Any]]:
    """What one process found, and what two did."""
    place = tmp_path_factory.mktemp("toy")
    found = {}
    for name, processes in (("one", 1), ("two", 2), ("machines", 2)):
        (place / name).mkdir()
        work = optimizers_over_machines if name == "machines" else optimizers
        code, said = together(work, (place / name, "told.json"), place / name, None, processes)
        assert code == 0, said
        found[name] = json.loads((place / name / "told.json").read_text())
    return found


def optimizers_over_machines(place: Path, results: str) -> None:
    """As if each process had a machine of its own."""
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    optimizers(place, results)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_goes_on_exactly_and_on_another_number_of_processes(
    told: dict[str, list[Any]], kind: str
) -> None:
    [alone] = told["one"]
    near = pytest.approx(alone[kind]["losses"], rel=2e-2 if kind == "split" else 1e-5)
    for name, everyones in told.items():
        for found in everyones:
            assert found[kind]["exact"], name
            assert found[kind]["losses"] == near
            if name != "one":
                assert found[kind]["from one"] == pytest.approx(
                    alone[kind]["losses"][2:], rel=2e-2 if kind == "split" else 1e-5
                )


def test_an_evaluation_that_one_process_asks_more_of_changes_nothing(
    told: dict[str, list[Any]],
) -> None:
    for everyones in told.values():
        assert all(found["watched"] for found in everyones)


def test_gradients_are_summed_in_float32(told: dict[str, list[Any]]) -> None:
    # Of a single process, a bfloat16 gradient is all there is.
    assert all(found["more digits"] for found in told["machines"])


def test_what_is_exchanged_on_cpus_is_what_torchs_own_collectives_give(
    told: dict[str, list[Any]],
) -> None:
    for everyones in told.values():
        assert all(found["exchanged"] for found in everyones)


# -- whole runs ---------------------------------------------------------------------------------


def several(place: Path, commands: Sequence[tuple[str, list[str]]], ports: Sequence[int]) -> None:
    """In every process: runs scripts one after the other; writes down which timesteps came."""
    seen: set[str] = set()
    forward: Callable[..., Tensor] = Timesteps.forward

    def watched(self: Timesteps, timesteps: Tensor) -> Tensor:
        seen.add(str(timesteps.dtype))
        return forward(self, timesteps)

    Timesteps.forward = watched
    for (script, flags), port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        runs.in_process(runs.SCRIPTS[script].load(), flags)
        if dist.is_initialized():
            dist.destroy_process_group()
    (place / f"timesteps-{os.environ['RANK']}.json").write_text(json.dumps(sorted(seen)))


class Place:
    """Where the runs of this file lie, and their commands."""

    def __init__(self, folder: Path, models: dict[str, Path], data: Path) -> None:
        self.folder, self.models, self.data = folder, models, data

    def run(self, name: str) -> Path:
        return self.folder / name

    def flags(self, script: str, name: str, *more: str, batch: int = 2) -> list[str]:
        flags = run_flags(self.folder, self.models[script.rpartition("_")[2]], self.data)
        if "sd3" not in script:
            place = flags.index("--max_sequence_length")
            del flags[place : place + 2]
        flags += ["--output_dir", str(self.run(name)), "--seed", "0", "--max_train_steps", "4"]
        flags += ["--train_batch_size", str(batch), "--gradient_accumulation_steps", "2"]
        flags += ["--checkpointing_steps", "2", "--learning_rate", "1e-3", "--use_ema"]
        return [*flags, *more]


WATCHED = ("--validation_steps", "2", "--validation_inference_steps", "2")
WATCHED += ("--validation_prompt", "a star", "a ring", "a cross")
BEST = ("--eval_fraction", "0.2", "--validation_steps", "2", "--keep_best", "eval_loss")
SHORT = ("--max_train_steps", "2")
LORA = ("--shard", "--rank", "2", "--mixed_precision", "bf16")
LORA += ("--optimizer", "prodigy", "--learning_rate", "1")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path, scene_data: Path, one_thread: None
) -> Iterator[Place]:
    """Many runs of two processes, which share what a start costs."""
    folder = tmp_path_factory.mktemp("sharded")
    models = {"sd3": tiny_sd3, "sd15": make_tiny(folder / "tiny-sd15", "sd15")}
    place = Place(folder, models, scene_data)
    alone(place, "full_sd3", "one", *SHORT)
    latest = ("--resume_from_checkpoint", "latest")
    from_one = ("--resume_from_checkpoint", str(place.run("one") / "checkpoint-2"))
    commands = [
        ("full_sd3", place.flags("full_sd3", "replicas")),
        ("full_sd3", place.flags("full_sd3", "sharded", "--shard")),
        ("full_sd3", place.flags("full_sd3", "watched", "--shard", *WATCHED)),
        ("full_sd3", place.flags("full_sd3", "best", "--shard", *BEST)),
        ("full_sd3", place.flags("full_sd3", "broken", "--shard", *SHORT)),
        ("full_sd3", place.flags("full_sd3", "broken", "--shard", *latest)),
        ("full_sd3", place.flags("full_sd3", "one-to-two", "--shard", *from_one)),
        ("lora_sd3", place.flags("lora_sd3", "lora", *LORA)),
        ("lora_sd3", place.flags("lora_sd3", "lora-broken", *LORA, *SHORT)),
        ("lora_sd3", place.flags("lora_sd3", "lora-broken", *LORA, *latest)),
        ("full_sd15", place.flags("full_sd15", "unet-replicas", *SHORT)),
        ("full_sd15", place.flags("full_sd15", "unet", "--shard", *SHORT)),
    ]
    ports = [free_port() for _ in commands]
    code, said = together(several, (folder, commands, ports), folder / "pair", None, 2)
    assert code == 0, said
    yield place
    reset_accelerate()


def alone(place: Place, script: str, name: str, *more: str) -> None:
    """A sharded run of this process."""
    flags = place.flags(script, name, "--shard", *more, batch=4)
    runs.in_process(runs.SCRIPTS[script].load(), flags)
    assert not dist.is_initialized()


def numbers(folder: Path, name: str) -> list[float]:
    return [row[name] for row in runs.metrics(folder) if "loss" in row]


@pytest.mark.parametrize(("one", "other"), [("replicas", "sharded"), ("unet-replicas", "unet")])
def test_sharded_training_has_the_numbers_of_plain_data_parallelism(
    place: Place, one: str, other: str
) -> None:
    plain, sharded = place.run(one), place.run(other)
    assert numbers(sharded, "loss") == pytest.approx(numbers(plain, "loss"), rel=1e-6)
    assert numbers(sharded, "grad_norm") == pytest.approx(numbers(plain, "grad_norm"), rel=1e-5)
    assert len(numbers(plain, "loss")) >= 2


def everything(folder: Path) -> dict[str, Any]:
    """The weights of a result, and the rows of training."""
    weights = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    assert weights
    rows = [row for row in runs.timeless(folder) if "loss" in row]
    return {"weights": weights, "rows": rows}


@pytest.mark.parametrize(("whole", "broken"), [("sharded", "broken"), ("lora", "lora-broken")])
def test_a_run_that_was_broken_off_ends_with_the_same_bits(
    place: Place, whole: str, broken: str
) -> None:
    assert everything(place.run(whole)) == everything(place.run(broken))


def test_three_pictures_on_two_processes_leave_the_training_as_it_is(place: Place) -> None:
    watched = place.run("watched")
    for step in (0, 2, 4):
        assert len(list((watched / "validation" / f"step-{step}").glob("*.png"))) == 3
    assert everything(watched) == everything(place.run("sharded"))


def test_the_best_weights_of_shards_are_a_whole_result(place: Place) -> None:
    run = place.run("best")
    losses = {row["step"]: row["eval_loss"] for row in runs.with_loss(run)}
    record = json.loads((run / "best" / "best.json").read_text())
    assert record["value"] == losses[record["step"]] == min(losses.values())
    assert record["step"] == 4  # written before, at another step, and replaced
    for part in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (run / "best" / part).read_bytes() == (run / part).read_bytes()


def test_another_number_of_processes_goes_on_but_for_rounding(place: Place) -> None:
    checkpoint_ = str(place.run("sharded") / "checkpoint-2")
    alone(place, "full_sd3", "two-to-one", "--resume_from_checkpoint", checkpoint_)
    expected = numbers(place.run("sharded"), "loss")[2:]
    assert numbers(place.run("two-to-one"), "loss") == pytest.approx(expected, rel=1e-6)
    assert numbers(place.run("one-to-two"), "loss") == pytest.approx(expected, rel=1e-6)


def test_timesteps_arrive_in_float32_where_all_else_is_bfloat16(place: Place) -> None:
    for rank in (0, 1):
        seen = json.loads((place.folder / f"timesteps-{rank}.json").read_text())
        assert seen in (["torch.float32"], ["torch.float32", "torch.int64"])  # a UNet's are whole


def test_the_result_is_a_pipeline_like_any_other(place: Place) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(place.run("sharded"))
    plain: Any = StableDiffusion3Pipeline.from_pretrained(place.run("replicas"))
    trained, same_ = pipeline.transformer.state_dict(), plain.transformer.state_dict()
    assert trained.keys() == same_.keys()
    for name, value in trained.items():
        assert torch.allclose(value, same_[name], atol=1e-4), name
    assert torch.isfinite(runs.draw(pipeline)).all()


def test_the_checkpoints_of_the_two_ways_are_told_apart(place: Place) -> None:
    plain = str(place.run("replicas") / "checkpoint-2")
    with pytest.raises(UserError, match="--shard was False, now True"):
        alone(place, "full_sd3", "refused", "--resume_from_checkpoint", plain)
    sharded = place.folder / "moved" / "checkpoint-2"  # without its run's args.json
    shutil.copytree(place.run("sharded") / "checkpoint-2", sharded)
    flags = place.flags("full_sd3", "refused", "--resume_from_checkpoint", str(sharded), batch=4)
    with pytest.raises(UserError, match="was made with --shard: give it"):
        runs.in_process(runs.SCRIPTS["full_sd3"].load(), flags)


def test_a_dry_run_looks_at_parts_and_joins_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def join(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run joins no processes")

    monkeypatch.setattr(dist, "init_process_group", join)
    latest = ("--resume_from_checkpoint", "latest")
    alone(place, "full_sd3", "one", "--dry_run", *latest)
    assert "optimizer steps: 4\n" in capsys.readouterr().out
    plain = place.folder / "plain" / "checkpoint-2"  # without its run's args.json
    shutil.copytree(place.run("replicas") / "checkpoint-2", plain)
    with pytest.raises(UserError, match="made without --shard"):
        alone(place, "full_sd3", "none", "--dry_run", latest[0], str(plain))


def test_a_damaged_part_is_found_and_the_checkpoint_before_it_named(place: Place) -> None:
    folder = place.folder / "damaged"
    shutil.copytree(place.run("sharded"), folder)
    last = folder / "checkpoint-4"
    assert checkpoint.check_whole(last)
    part = next((last / "shards").glob("__1_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=rf"{part.name} is not as it was .*{folder}/checkpoint-2"):
        checkpoint.check_whole(last)


def test_a_process_that_dies_while_it_writes_leaves_no_checkpoint(place: Place) -> None:
    flags = place.flags("full_sd3", "killed", "--shard", "--resume_from_checkpoint", "latest")
    ports = [free_port()]
    arguments = (place.folder, [("full_sd3", flags)], ports)
    death = Death(place="checkpoint", count=1)
    code, _ = together(several, arguments, place.folder / "kill", death, 2)
    assert code != 0
    assert not checkpoint.existing(place.run("killed"))
    code, said = together(several, arguments, place.folder / "kill", None, 2)
    assert code == 0, said
    assert everything(place.run("killed")) == everything(place.run("sharded"))


@pytest.mark.slow
def test_a_policy_that_draws_three_prompts_on_two_processes_learns_the_same(
    place: Place, tmp_path: Path
) -> None:
    runs.make_inputs(tmp_path / "inputs")
    script = runs.SCRIPTS["grpo_sd3"]
    more = ["--num_eval_prompts", "3", "--eval_batch_size", "1", "--max_train_steps", "4"]
    more += ["--adam_epsilon", "1e-3"]
    whole = script.flags(tmp_path / "inputs", tmp_path / "whole")
    runs.in_process(script.load(), [*whole, *more])
    flags = [*script.flags(tmp_path / "inputs", tmp_path / "two"), *more]
    flags += ["--train_batch_size", "2", "--shard"]
    arguments = (place.folder, [("grpo_sd3", flags)], [free_port()])
    code, said = together(several, arguments, tmp_path / "two", None, 2)
    assert code == 0, said
    runs.agree(script, tmp_path / "whole" / "run", tmp_path / "two" / "run")
