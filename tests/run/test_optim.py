"""Claims about the length of a run, its optimizers and the schedule of the learning rate."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.run import optim as optimizers
from dojo.run import split
from dojo.run.averaging import Averaged, EmaArgs
from dojo.run.cost import live_bytes
from dojo.run.optim import OptimArgs

# Length


@pytest.mark.parametrize(
    ("options", "samples", "processes", "steps"),
    [
        ({}, 10, 1, 1000),
        ({"max_train_steps": 7}, 10, 1, 7),
        ({"max_train_steps": 7, "num_train_epochs": 100}, 10, 2, 7),
        ({"num_train_epochs": 2}, 10, 1, 5),  # 20 samples by 4
        ({"num_train_epochs": 3}, 10, 1, 8),  # 30 by 4, rounded up
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 10, 1, 4),
        ({"num_train_epochs": 3}, 10, 2, 4),
        ({"num_train_epochs": 3, "steps_per_epoch": 50}, 10, 4, 150),
        ({"num_train_epochs": 1, "train_batch_size": 64}, 10, 1, 1),
        # 15 * (25 / 3) is a little more than 125 in floating point.
        ({"num_train_epochs": 15, "train_batch_size": 3}, 25, 1, 125),
    ],
)
def test_the_length_of_a_run_follows_from_data_and_batch(
    options: dict[str, int], samples: int, processes: int, steps: int
) -> None:
    assert OptimArgs(**options).num_steps(samples, processes) == steps  # pyright: ignore


@pytest.mark.parametrize(
    "name", ["train_batch_size", "gradient_accumulation_steps", "max_train_steps"]
)
def test_lengths_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}"):
        OptimArgs(**{name: 0})  # pyright: ignore


def test_a_warm_up_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match="--lr_warmup_steps"):
        OptimArgs(lr_warmup_steps=10)
    OptimArgs(lr_warmup_steps=10, lr_scheduler="constant_with_warmup")


# The schedule


class Processes:
    """As much of a run as the optimizer asks for, with any number of processes."""

    device = torch.device("cpu")

    def __init__(self, optim: OptimArgs, num_processes: int) -> None:
        self.num_steps = optim.num_steps(80, num_processes)
        self.samples_per_step = optim.samples_per_step(num_processes)


def rates(optim: OptimArgs, num_processes: int = 1) -> list[float]:
    """The learning rate of every step of a run over 80 samples, and the one after the last."""
    run: Any = Processes(optim, num_processes)
    optimizer, schedule = optimizers.make([nn.Parameter(torch.ones(1))], optim, run)
    found = [float(rate) for rate in schedule.get_last_lr()]
    for _ in range(run.num_steps):
        optimizer.step()
        schedule.step()
        found += [float(rate) for rate in schedule.get_last_lr()]
    return found


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("length", [{"max_train_steps": 12}, {"num_train_epochs": 3}])
def test_the_schedule_ends_with_the_run_whatever_the_number_of_processes(
    processes: int, length: dict[str, int]
) -> None:
    # diffusers #8312: with N processes the schedule ran N times too fast or never ended.
    optim = OptimArgs(learning_rate=0.5, lr_scheduler="linear", **length)  # pyright: ignore
    found = rates(optim, processes)
    assert found[0] == 0.5
    assert found[-1] == pytest.approx(0)
    assert min(found[:-1]) > 0
    count = len(found) - 1
    assert found == pytest.approx([0.5 * (1 - i / count) for i in range(count + 1)])


def test_warm_up_rises_and_cosine_falls() -> None:
    optim = OptimArgs(
        learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=4, max_train_steps=12
    )
    found = rates(optim)
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert found[8] == pytest.approx(0.5)
    assert found[12] == pytest.approx(0)


@pytest.mark.parametrize(("processes", "factor"), [(1, 6), (4, 24)])
def test_scale_lr_multiplies_by_the_samples_per_step(processes: int, factor: int) -> None:
    optim = OptimArgs(
        learning_rate=1e-3,
        scale_lr=True,
        train_batch_size=3,
        gradient_accumulation_steps=2,
        max_train_steps=1,
    )
    assert rates(optim, processes)[0] == pytest.approx(1e-3 * factor)


def test_adam_gets_its_options() -> None:
    optim = OptimArgs(
        adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.03, adam_epsilon=1e-6,
        max_train_steps=1,
    )  # fmt: skip
    run: Any = Processes(optim, 1)
    optimizer, _ = optimizers.make([nn.Parameter(torch.ones(1))], optim, run)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.03, 1e-6)


# The optimizers

EIGHT = ["adamw8bit", "paged_adamw8bit", "lion8bit", "paged_lion8bit"]
KINDS = ["adamw", *EIGHT, "adafactor", "lion", "prodigy", "schedulefree", "stableadamw"]
SIZE = 4096 + 7  # bitsandbytes keeps weights below 4096 numbers in full precision


def skip_without_its_package(kind: str) -> None:
    if kind.endswith("8bit") and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")


def problem(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    """A weight that starts at 1 and its optimizer."""
    skip_without_its_package(kind)
    rate = {"prodigy": 1.0, "lion": 1e-3, "lion8bit": 1e-3, "paged_lion8bit": 1e-3}.get(kind, 1e-2)
    options: Any = {"optimizer": kind, "learning_rate": rate, "max_train_steps": 40, **more}
    args = OptimArgs(**options)
    weight = nn.Parameter(torch.ones(SIZE, dtype=dtype))
    run: Any = Processes(args, 1)
    return weight, optimizers.make([weight], args, run)[0]


def descend(weight: Tensor, optimizer: Any, steps: range, goal: float = 0.0) -> None:
    """Steps of gradient descent on half the squared distance to the goal, with fixed noise."""
    for step in steps:
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        gradient = weight.detach().float() - goal + 0.01 * noise
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_goes_downhill(kind: str) -> None:
    weight, optimizer = problem(kind)
    descend(weight, optimizer, range(40))
    # Prodigy starts from a step of 1e-6 and only feels its way in forty steps.
    assert weight.mean() < (1 - 1e-6 if kind == "prodigy" else 0.97)


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_goes_on_exactly_from_its_saved_state(kind: str, tmp_path: Path) -> None:
    whole, optimizer = problem(kind)
    descend(whole, optimizer, range(10))
    half, optimizer = problem(kind)
    descend(half, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, optimizer = problem(kind)
    with torch.no_grad():
        resumed.copy_(half)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    descend(resumed, optimizer, range(5, 10))
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adafactor_keeps_of_convolutions_is_counted(dtype: torch.dtype) -> None:
    shapes = [(8, 16), (8, 16, 3, 3), (8, 16, 1, 1), (4, 8, 1, 3, 3), (8,)]
    weights = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    args = OptimArgs(optimizer="adafactor", max_train_steps=1)
    run: Any = Processes(args, 1)
    optimizer, _ = optimizers.make(weights, args, run)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    saved: Any = optimizer.state_dict()
    states = saved.get("inner", saved)["state"].values()  # bfloat16's are kept inside
    parts = ("row_var", "col_var", "variance")
    kept = [of[name].nbytes for of in states for name in parts if name in of]
    assert sum(kept) == args.factored_bytes(weights)
    assert OptimArgs(optimizer="lion").factored_bytes(weights) == 0


def test_adamw_is_the_formula() -> None:
    weight, optimizer = problem("adamw", adam_weight_decay=0.1)
    expected, first, second = torch.ones(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    for step in range(5):
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        gradient = expected + 0.01 * noise
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9 ** (step + 1))
        root = (second / (1 - 0.999 ** (step + 1))).sqrt()
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * corrected / (root + 1e-8)
    descend(weight, optimizer, range(5))
    assert torch.allclose(weight, expected, atol=1e-6)


# bfloat16 weights

LOW = ["adamw", "lion", "adafactor", *EIGHT]


def way(kind: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """Where eight weights near 1 are over 5,000 steps: [5001, 8], float32.

    The gradients are one burst of a hundred steps, then a thousand times smaller and falling.
    """
    skip_without_its_package(kind)
    args: Any = {"optimizer": kind, "max_train_steps": 5000, **options}
    weight = nn.Parameter(torch.linspace(0.9, 1.1, 8).bfloat16().to(dtype))
    run: Any = Processes(OptimArgs(**args), 1)
    optimizer, _ = optimizers.make([weight], OptimArgs(**args), run)
    noise = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    size = torch.where(torch.arange(5000) < 100, 1.0, 1e-3 * 0.9995 ** torch.arange(5000.0))
    gradients = (size[:, None] * (0.5 + noise)).bfloat16()
    seen = [weight.detach().float().clone()]
    for gradient in gradients:
        weight.grad = gradient.to(dtype)
        optimizer.step()
        seen.append(weight.detach().float().clone())
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # Steps far below a weight's last place.
        ("adamw", {"learning_rate": 1e-5, "adam_weight_decay": 0.0, "adam_beta2": 0.9}),
        ("adamw", {"learning_rate": 1e-4, "adam_weight_decay": 2.0}),
        ("lion", {"learning_rate": 1e-5, "adam_weight_decay": 20.0}),
        ("adafactor", {"learning_rate": 1e-3, "adam_weight_decay": 0.1}),
        ("lion8bit", {"learning_rate": 1e-5, "adam_weight_decay": 20.0}),
    ],
)
def test_bfloat16_weights_go_the_way_of_float32_ones(kind: str, options: dict[str, float]) -> None:
    high, low = way(kind, torch.float32, **options), way(kind, torch.bfloat16, **options)
    moved = (high[-1] - high[0]).abs().min()
    assert moved > 2**-7, "the premise: there is a way to go"
    assert (low[-1] - high[-1]).abs().max() <= 0.02 * moved + 2**-8  # and what bfloat16 can show
    assert torch.equal(low, rounded(high)), "more than that: they are float32's, rounded"


def rounded(whole: Tensor) -> Tensor:
    """float32 numbers whose lower 16 bits are rounded away, to the nearest."""
    return ((whole.detach().view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)


@pytest.mark.parametrize("kind", LOW)
def test_bfloat16_weights_go_on_exactly_from_their_saved_state(kind: str, tmp_path: Path) -> None:
    whole, optimizer = problem(kind, torch.bfloat16)
    descend(whole, optimizer, range(10))
    half, optimizer = problem(kind, torch.bfloat16)
    descend(half, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, optimizer = problem(kind, torch.bfloat16)
    with torch.no_grad():
        resumed.copy_(half)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    descend(resumed, optimizer, range(5, 10))
    assert torch.equal(whole, resumed)
    assert torch.equal(optimizer.lower[0], problem_end(kind))


def problem_end(kind: str) -> Tensor:
    """The lower halves after ten steps in one go."""
    weight, optimizer = problem(kind, torch.bfloat16)
    descend(weight, optimizer, range(10))
    return optimizer.lower[0]


def test_weights_in_portions_and_groups_train_as_they_would_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split, "PORTION", 10)
    args = OptimArgs(learning_rate=1e-2, lr_scheduler="linear", max_train_steps=5)
    run: Any = Processes(args, 1)

    def train(dtype: torch.dtype) -> list[nn.Parameter]:
        shapes = [(4,), (3, 2), (5, 5), (), (2, 3)]
        some = [nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in shapes]
        groups = [{"params": some[:3]}, {"params": some[3:], "lr": 1e-3}]
        optimizer, schedule = optimizers.make(groups, args, run)
        for step in range(5):
            for i, param in enumerate(some):
                drawn = torch.Generator().manual_seed(10 * step + i)
                if i != 4:  # one without a gradient
                    param.grad = torch.randn(shapes[i], generator=drawn).bfloat16().to(dtype)
            optimizer.step()
            schedule.step()
        return some

    for high, low in zip(train(torch.float32), train(torch.bfloat16), strict=True):
        assert torch.equal(low.float(), rounded(high))


def test_two_halves_are_the_number_to_the_bit() -> None:
    drawn = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10_000,), generator=drawn).int()
    edges = torch.tensor([0.0, -0.0, 1.0, -1e-45, 3.4028235e38, -torch.inf, 1.00390625])
    whole = torch.cat([bits.view(torch.float32), edges])
    whole = whole[~whole.isnan()]
    upper, lower = torch.empty_like(whole, dtype=torch.bfloat16), split.no_lower_half(whole)
    split.split_into(upper, lower, whole.clone())
    again = split.join(upper, lower)
    assert torch.equal(again.view(torch.int32), whole.view(torch.int32))
    ordinary = upper.isfinite() & (whole.abs() > 1e-37)
    off = ((upper.double() - whole.double()) / whole).abs()
    assert (off[ordinary] <= 2**-8).all()
    assert torch.equal(split.join(upper, split.no_lower_half(upper)), upper.float())


def test_a_state_that_kept_less_of_the_weights_is_refused() -> None:
    _, optimizer = problem("adamw", torch.bfloat16)
    _, other = problem("adamw")
    with pytest.raises(UserError, match="bfloat16 weights"):
        optimizer.load_state_dict(other.state_dict())


# But for what leaves the device, on a GPU.
COUNTED = [kind for kind in [*LOW, "stableadamw"] if "paged" not in kind]


@pytest.mark.parametrize("kind", COUNTED)
def test_the_bytes_per_weight_are_those_that_a_training_takes(kind: str) -> None:
    skip_without_its_package(kind)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and kind not in LOW:
            continue
        args: Any = {"optimizer": kind, "max_train_steps": 1}
        args = OptimArgs(**args)
        run: Any = Processes(args, 1)
        weight = nn.Parameter(torch.ones(512, 512, dtype=dtype))
        optimizer, _ = optimizers.make([weight], args, run)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept = sum(one.nbytes for one in tensors_in(optimizer.state_dict()))
        taken = (weight.nbytes + weight.grad.nbytes + kept) / weight.numel()
        assert taken == pytest.approx(args.state_bytes(dtype), abs=0.1)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a state."""
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for one in inner for tensor in tensors_in(one)]


def test_the_bytes_without_gradients_are_those_of_a_fused_backward_pass() -> None:
    for dtype, gradient in ((torch.float32, 4), (torch.bfloat16, 2)):
        plain, other = (
            OptimArgs(optimizer="adafactor", fused_backward=how) for how in (False, True)
        )
        assert plain.state_bytes(dtype) - other.state_bytes(dtype) == gradient


@pytest.mark.parametrize("kind", [kind for kind in EIGHT if "paged" in kind])
def test_a_state_that_is_read_back_is_paged_again(kind: str) -> None:
    eightbit = pytest.importorskip("dojo.run.eightbit")
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 1e-8}
    weight = nn.Parameter(torch.ones(SIZE))
    gpu = torch.device("cuda")  # what is made for one; the weight stays where it is

    def make(asked: list[int]) -> Any:
        optimizer = eightbit.make(kind, [{"params": [weight]}], options, gpu)
        make_buffer = optimizer.get_state_buffer

        def buffer(*args: Any, **kwargs: Any) -> Tensor:
            made = make_buffer(*args, **kwargs)
            made.is_paged = True
            asked.append(1)
            return made

        optimizer.get_state_buffer = buffer
        optimizer.prefetch_state = lambda weight: None
        return optimizer

    states = 1 if "lion" in kind else 2
    first, again = [], []
    optimizer = make(first)
    with pytest.warns(UserWarning, match="not supported on CPU"):
        descend(weight, optimizer, range(2))
    assert len(first) == states
    saved, before = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    descend(weight, optimizer, range(2, 4))
    expected = weight.detach().clone()
    other = make(again)
    weight.data.copy_(before)
    other.load_state_dict(saved)
    for state in other.state.values():  # a copy on the device is no page
        state.update({name: one.clone() for name, one in state.items() if "state" in name})
    with pytest.warns(UserWarning, match="not supported on CPU"):
        descend(weight, other, range(2, 4))
    assert len(again) == states
    assert torch.equal(weight, expected)


def test_a_cpu_is_told_what_falls_back() -> None:
    assert "nothing is paged" in optimizers.remark(
        OptimArgs(optimizer="paged_lion8bit"), torch.device("cpu")
    )
    assert "float32" in optimizers.remark(OptimArgs(use_8bit_adam=True), torch.device("cpu"))
    assert not optimizers.remark(OptimArgs(optimizer="stableadamw"), torch.device("cpu"))
    assert not optimizers.remark(OptimArgs(optimizer="lion8bit"), torch.device("cuda"))


@pytest.mark.parametrize("kind", ["prodigy", "schedulefree", "stableadamw"])
def test_optimizers_that_cannot_train_bfloat16_weights_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"--optimizer {kind}.*bfloat16"):
        problem(kind, torch.bfloat16)


def test_groups_have_learning_rates_of_their_own() -> None:
    args = OptimArgs(learning_rate=1e-3, scale_lr=True, train_batch_size=2, max_train_steps=1)
    run: Any = Processes(args, 1)
    groups = [{"params": [nn.Parameter(torch.ones(1))]}] * 1
    groups.append({"params": [nn.Parameter(torch.ones(1))], "lr": 5e-6})  # pyright: ignore
    optimizer, _ = optimizers.make(groups, args, run)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-3, 1e-5])


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "--lr_scheduler"),
        ({"optimizer": "lion", "use_8bit_adam": True}, "--use_8bit_adam"),
        ({"optimizer": "prodigy", "scale_lr": True}, "--scale_lr"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        OptimArgs(**options)


def test_the_logged_rate_of_prodigy_holds_its_step_size() -> None:
    weight, optimizer = problem("prodigy")
    descend(weight, optimizer, range(3))
    group = optimizer.param_groups[0]
    assert group["d"] < 1
    assert optimizers.learning_rate(optimizer) == group["d"] * group["lr"]


# Averages


def test_the_moving_average_is_the_formula() -> None:
    weight, optimizer = problem("adamw")
    averaged = Averaged([weight], EmaArgs(use_ema=True, ema_decay=0.9), optimizer)
    expected = torch.ones(SIZE)
    for step in range(1, 31):
        descend(weight, optimizer, range(step, step + 1))
        averaged.update(step)
        # diffusers' warm-up: the first update takes the weights, then (1 + n) / (10 + n).
        n = step - 1
        decay = 0.0 if n == 0 else min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
    before = weight.detach().clone()
    with averaged.applied():
        assert torch.allclose(weight, expected, atol=1e-6)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_the_average_moves_only_when_its_turn_has_come() -> None:
    weight, optimizer = problem("adamw")
    args = EmaArgs(use_ema=True, ema_update_every=3)
    averaged = Averaged([weight], args, optimizer)
    seen = []
    for step in range(1, 7):
        descend(weight, optimizer, range(step, step + 1))
        averaged.update(step)
        with averaged.applied():
            seen.append(weight.mean().item())
    assert seen[0] == seen[1] == 1.0
    assert seen[2] == seen[3] == seen[4] != 1.0
    assert seen[5] != seen[4]


def test_the_average_of_bfloat16_weights_is_float32() -> None:
    weight, optimizer = problem("adamw", torch.bfloat16)
    averaged = Averaged([weight], EmaArgs(use_ema=True), optimizer)
    assert averaged.ema is not None
    assert averaged.ema.shadow_params[0].dtype == torch.float32
    averaged.update(1)
    with averaged.applied():
        assert weight.dtype == torch.bfloat16


def test_an_average_in_cpu_memory_comes_to_the_weights_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = [nn.Parameter(torch.rand(n, dtype=torch.bfloat16)) for n in (300, 500, 400)]
    here, offloaded = EmaArgs(use_ema=True), EmaArgs(use_ema=True, offload_ema=True)
    optimizer = torch.optim.SGD(weights)
    averages = [Averaged(weights, args, optimizer) for args in (here, offloaded)]
    assert averages[1].ema is not None
    step, there = averages[1].ema.step, list[int]()

    def watched(params: Any) -> None:
        assert averages[1].ema is not None
        there.append(sum(shadow.numel() for shadow in averages[1].ema.shadow_params))
        step(params)

    monkeypatch.setattr(averages[1].ema, "step", watched)
    for number in range(1, 4):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)
        taken = live_bytes(lambda: averages[0].update(number))  # noqa: B023
        averages[1].update(number)
        assert taken == here.step_bytes(weights)
    assert there == [300, 500, 400] * 3
    assert offloaded.step_bytes(weights) - here.step_bytes(weights) == 4 * max(there)
    for one, other in zip(averages[0].shadows(), averages[1].shadows(), strict=True):
        assert torch.equal(one, other)
    assert averages[1].ema.optimization_step == 3


def test_a_schedule_free_optimizer_validates_with_its_own_average_and_loses_no_bit() -> None:
    weight, optimizer = problem("schedulefree")
    averaged = Averaged([weight], EmaArgs(), optimizer)
    descend(weight, optimizer, range(10))
    before = weight.detach().clone()
    with averaged.applied():
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    plain, other = problem("schedulefree")
    descend(plain, other, range(20))
    descend(weight, optimizer, range(10, 20))
    assert torch.equal(weight, plain)


def test_an_average_that_would_not_be_one_is_refused() -> None:
    with pytest.raises(UserError, match="--use_ema"):
        EmaArgs(use_ema=True).check("schedulefree", 10)
    with pytest.raises(UserError, match="--ema_update_every 11"):
        EmaArgs(use_ema=True, ema_update_every=11).check("adamw", 10)
    EmaArgs(use_ema=True, ema_update_every=10).check("adamw", 10)


def test_an_average_is_saved_and_restored_exactly(tmp_path: Path) -> None:
    weight, optimizer = problem("adamw")
    averaged = Averaged([weight], EmaArgs(use_ema=True), optimizer)
    for step in range(1, 6):
        descend(weight, optimizer, range(step, step + 1))
        averaged.update(step)
    saved: dict[str, Tensor] = {}
    averaged.save(tmp_path, lambda: saved.update(average=weight.detach().clone()))
    saved["own"] = weight.detach().clone()
    other, _ = problem("adamw")
    again = Averaged([other], EmaArgs(use_ema=True), optimizer)

    def read(name: str) -> None:
        with torch.no_grad():
            other.copy_(saved[name])

    again.restore(tmp_path, lambda: read("average"))
    read("own")
    for step in range(6, 9):
        descend(weight, optimizer, range(step, step + 1))
        with torch.no_grad():
            other.copy_(weight)
        averaged.update(step)
        again.update(step)
    with averaged.applied(), again.applied():
        assert torch.equal(weight, other)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    weight, optimizer = problem("adamw")
    averaged = Averaged([weight], EmaArgs(use_ema=True), optimizer)
    with pytest.raises(UserError, match="--use_ema"):
        averaged.restore(tmp_path, lambda: None)
