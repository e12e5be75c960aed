"""Claims about steps that are taken in the backward pass."""

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import train_dpo_sd15
import train_full_sd3
from dojo import cli
from dojo.bench import models
from dojo.cli import UserError
from dojo.finetune import whole
from dojo.run import fused, phases
from dojo.run import optim as optimizers
from dojo.run.cost import _Live
from dojo.run.fused import FusedOptimizer
from dojo.run.optim import OptimArgs
from tests.conftest import reset_accelerate, run_flags
from tests.scripts.runs import SCRIPTS, make_inputs, metrics

WIDTH = 80  # its square is more than the 4096 numbers from which on states are kept in 8 bits


class Net(nn.Module):
    """Layers of which one is used twice, and one is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for param in self.parameters():
            nn.init.normal_(param, std=0.1, generator=drawn)

    def forward(self, x: Tensor) -> Tensor:
        first, twice, again, last = self.layers
        x = twice(torch.tanh(twice(torch.tanh(first(x)))))
        x = checkpoint(lambda y: torch.tanh(again(y)), x, use_reentrant=False)  # pyright: ignore
        return last(x).float().square().mean()


class Length:
    num_steps, samples_per_step, device = 6, 1, torch.device("cpu")


def make(dtype: torch.dtype, **options: Any) -> tuple[Net, Any, Any]:
    """A network, its optimizer and its schedule."""
    if options.get("optimizer", "").endswith("8bit") and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    usual: Any = {"learning_rate": 1e-2, "lr_scheduler": "linear", "max_train_steps": 6}
    net = Net().to(dtype)
    groups: Any = [{"params": [*net.layers[0].parameters()]}]
    groups.append({"params": [*net.layers[1:].parameters()], "lr": 3e-3})
    return net, *optimizers.make(groups, OptimArgs(**usual, **options), Length())


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(made: tuple[Net, Any, Any], steps: range, dtype: torch.dtype, clip: float) -> list[float]:
    """The norms of the gradients."""
    net, optimizer, schedule = made
    norms = []
    for step in steps:
        net(batch(step, dtype)).backward()
        if isinstance(optimizer, FusedOptimizer):
            norm = optimizer.norm()
        else:
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        norms.append(norm.item())
    return norms


KINDS = ["adamw", "adafactor", "lion", "stableadamw", "adamw8bit", "lion8bit"]
CASES = [(kind, torch.float32) for kind in KINDS]
CASES += [(kind, torch.bfloat16) for kind in KINDS if kind in optimizers.SPLIT_BYTES]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_where_nothing_is_clipped_the_weights_are_those_of_plain_training(
    kind: str, dtype: torch.dtype
) -> None:
    options: Any = {"optimizer": kind, "max_grad_norm": 1e3}
    plain, other = make(dtype, **options), make(dtype, fused_backward=True, **options)
    norms = train(plain, range(6), dtype, 1e3)
    assert train(other, range(6), dtype, 1e3) == norms
    start = Net().to(dtype)
    for before, mine, his in zip(
        start.parameters(), plain[0].parameters(), other[0].parameters(), strict=True
    ):
        assert torch.equal(mine, his)
        assert not torch.equal(mine, before)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_fused_steps_go_on_exactly_from_their_saved_state(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    options: Any = {"optimizer": kind, "fused_backward": True, "max_grad_norm": 0.01}
    whole, half = make(dtype, **options), make(dtype, **options)
    train(whole, range(6), dtype, 0)
    train(half, range(3), dtype, 0)
    torch.save([half[1].state_dict(), half[2].state_dict()], tmp_path / "state.pt")
    resumed = make(dtype, **options)
    resumed[0].load_state_dict(half[0].state_dict())
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed[1].load_state_dict(saved[0])
    resumed[2].load_state_dict(saved[1])
    train(resumed, range(3, 6), dtype, 0)
    for mine, his in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(mine, his)


def test_a_gradient_is_scaled_down_by_the_norm_of_its_own_weight() -> None:
    made = make(torch.float32, fused_backward=True, max_grad_norm=0.02, adam_weight_decay=0)
    net, optimizer, _ = made
    twin = Net()
    twin(batch(0, torch.float32)).backward()
    gradients = [param.grad for param in twin.parameters()]
    [norm] = train(made, range(1), torch.float32, 0)
    own = torch.stack([gradient.norm() for gradient in gradients if gradient is not None])
    assert norm == pytest.approx(own.norm().item())
    assert own.min() < 0.02 < own.max(), "the premise: one is scaled and one is not"
    for param, gradient in zip(net.parameters(), gradients, strict=True):
        assert gradient is not None
        seen = optimizer.inner.state[param]["exp_avg"] / 0.1  # the first step's is (1 - beta1) g
        expected = gradient * min(1, 0.02 / (gradient.norm().item() + 1e-6))
        assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-9)


def test_one_gradient_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer, _ = make(torch.float32, fused_backward=True)
    held: list[int] = []
    step_one = fused.step_one

    def watched(inner: Any, place: int) -> None:
        held.append(sum(param.grad is not None for param in net.parameters()))
        step_one(inner, place)

    monkeypatch.setattr(fused, "step_one", watched)
    net(batch(0, torch.float32)).backward()
    assert held == [1] * 8
    assert all(param.grad is None for param in net.parameters())
    # By bytes too, the states being there after a step: whatever else the backward pass holds.
    peaks: dict[bool, int] = {}
    for how in (False, True):
        net, optimizer, _ = make(torch.float32, optimizer="adafactor", fused_backward=how)
        for step in range(2):
            loss = net(batch(step, torch.float32))
            with live(net.parameters()) as counted:
                loss.backward()
                optimizer.step()
            peaks[how] = counted.peak  # the last one counts
            optimizer.zero_grad()
            del loss
    weights = [param.nbytes for param in net.parameters()]
    assert peaks[False] >= sum(weights)
    # The norms of the gradients, and the like, are numbers of their own.
    assert peaks[True] <= peaks[False] - sum(weights) + 2 * max(weights) + 64 * len(weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 1"),
        ({"optimizer": "prodigy"}, "prodigy"),
        ({"optimizer": "schedulefree"}, "schedulefree"),
    ],
)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"--fused_backward.*{words}"):
        OptimArgs(fused_backward=True, **options)


class Fake:
    """As much of a run as is looked at."""

    def __init__(self, processes: int = 1, precision: str = "no") -> None:
        self.args = self.accelerator = self
        self.num_processes, self.mixed_precision = processes, precision


@pytest.mark.parametrize(
    ("run", "passes", "words"),
    [
        (Fake(processes=2), 1, "one process"),
        (Fake(precision="fp16"), 1, "--mixed_precision fp16"),
        (Fake(), 3, "has 3 in one"),
    ],
)
def test_runs_that_need_all_gradients_are_refused(run: Any, passes: int, words: str) -> None:
    with pytest.raises(UserError, match=f"--fused_backward.*{words}"):
        fused.check_run(run, passes)
    fused.check_run(Fake(precision="bf16"))  # pyright: ignore


# Memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_more_than_is_counted(kind: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and kind not in optimizers.SPLIT_BYTES:
        return
    net, optimizer, _ = make(dtype, optimizer=kind, fused_backward=True)
    weight = next(net.parameters())
    peak = 0
    for _ in range(2):  # states are there from the second step on
        weight.grad = torch.ones_like(weight)
        with live([weight, weight.grad]) as counted:
            fused.step_one(optimizer.inner, 0)
        peak = counted.peak
    assert peak <= fused.step_bytes([weight]) + 4 * 4 * WIDTH


def live(known: Iterable[Tensor]) -> _Live:
    """Counts what is made inside; views of what is there are not."""
    counting = _Live()
    counting._known.update({tensor.untyped_storage()._cdata: 0 for tensor in known})
    return counting


class Flat(torch.autograd.Function):
    """Attention that takes what fused kernels take: inputs, output, gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


# One block's own activations and one gradient, beside what is kept for the backward pass.
RECOMPUTED = 0.45 * 2**30


def planned(folder: Path, size: models.Size) -> tuple[Any, Any, Any, Any]:
    """A model of the published size, its network in bfloat16 on the meta device, and the cost of a
    picture of 1024 px whose activations are computed again; the arguments of a forward pass."""
    models.write_settings(folder / size, size)
    family = models.FAMILIES[size]
    path = str(folder / size)
    model = family.open_model(family.ModelArgs(pretrained_model_name_or_path=path), None)
    low, shape = whole.WholeArgs(train_dtype="bf16"), model.latent_shape(1024, 1024)
    thaw = partial(whole.thaw, args=low)
    network, cost = model.training_cost(low.dtype, thaw, 1, shape, checkpointing=True)
    return model, network, cost, model.meta_inputs(1, shape, low.dtype)


@pytest.mark.parametrize(
    ("size", "tensors", "offloaded"), [("sdxl", 11.15, 6.4), ("sd35-medium", 10.05, 5.9)]
)
def test_full_fine_tuning_at_1024_pixels_fits_a_small_card(
    tmp_path: Path, size: models.Size, tensors: float, offloaded: float
) -> None:
    """GiB of all tensors, as in docs/gpu.md: Adafactor on bfloat16 weights whose lower halves the
    optimizer keeps, steps in the backward pass, an autoencoder in bfloat16 beside."""
    _, network, cost, _ = planned(tmp_path, size)
    vae = models.on_meta(models.settings(size)["vae"])
    weights = [*network.parameters()]
    beside = cost.saved_bytes + RECOMPUTED + fused.step_bytes(weights)
    beside += phases.bytes_of(vae, torch.bfloat16)
    beside += sum(buffer.nbytes for buffer in network.buffers())
    for offload, expected in ((False, tensors), (True, offloaded)):
        args = OptimArgs(optimizer="adafactor", fused_backward=True, offload_lower_halves=offload)
        each = args.state_bytes(torch.bfloat16)
        total = (each * sum(weight.numel() for weight in weights) + beside) / 2**30
        assert total == pytest.approx(expected, abs=0.1)
        assert total < 12
        # With what the dry run assumes for allocator and context on top.
        assert phases.MARGIN * total + phases.CONTEXT < (8.1 if offload else 16)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sdxl", "sd35-medium"])
def test_a_fused_backward_pass_holds_one_block_and_one_gradient_at_a_time(
    tmp_path: Path, size: models.Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, network, cost, inputs = planned(tmp_path, size)
    for param in network.parameters():
        param.grad = None
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: Flat.apply(query, key, value),
    )
    with live([*network.parameters(), *network.buffers()]) as counted:
        model.predict(network, *inputs, torch.bfloat16).mean().backward()
    assert cost.saved_bytes < counted.peak < cost.saved_bytes + RECOMPUTED


# The scripts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "inputs"
    make_inputs(folder)
    return folder


def test_adapters_are_refused(inputs: Path, tmp_path: Path) -> None:
    words = [*SCRIPTS["dpo_sd15"].flags(inputs, tmp_path), "--finetune", "lora"]
    args = cli.parse(train_dpo_sd15.Args, None, [*words, "--fused_backward"])
    with pytest.raises(UserError, match=r"--fused_backward is for training all weights"):
        train_dpo_sd15.main(args)


@pytest.fixture
def run(tiny_sd3: Path, scene_data: Path) -> Any:
    """`run(folder, *flags)`: full fine-tuning in small steps; its output folder."""

    def act(folder: Path, *flags: str) -> Path:
        reset_accelerate()
        own = ["--seed", "1", "--learning_rate", "1e-3", "--max_train_steps", "4"]
        words = [*run_flags(folder, tiny_sd3, scene_data), *own, *flags]
        args = cli.parse(train_full_sd3.Args, None, words)
        train_full_sd3.main(args)
        return args.run.output_dir

    return act


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, averages and logged numbers."""
    logged = [
        [{key: row[key] for key in ("step", "loss", "lr", "grad_norm")} for row in metrics(folder)]
        for folder in (one, other)
    ]
    parts = ("transformer", "transformer_ema")
    names = [f"checkpoint-4/{part}/diffusion_pytorch_model.safetensors" for part in parts]
    there = [name for name in names if (one / name).exists()]
    assert there
    equal = [(one / name).read_bytes() == (other / name).read_bytes() for name in there]
    return all(equal) and logged[0] == logged[1]


def test_lower_halves_in_cpu_memory_are_the_same_run(run: Any, tmp_path: Path) -> None:
    flags = (*LOW, "--fused_backward")
    near = run(tmp_path / "near", *flags)
    run(tmp_path / "far", *flags, "--offload_lower_halves", "--max_train_steps", "2")
    again = ("--resume_from_checkpoint", "latest")
    run(tmp_path / "far", *flags, *again, "--max_train_steps", "3")  # either way is the same run
    assert same(run(tmp_path / "far", *flags, *again, "--offload_lower_halves"), near)
    with pytest.raises(UserError, match=r"--offload_lower_halves needs --train_dtype bf16"):
        run(tmp_path / "high", "--offload_lower_halves")


LOW = ("--train_dtype", "bf16", "--mixed_precision", "bf16", "--optimizer", "adafactor")


@pytest.mark.parametrize("flags", [("--use_ema",), (*LOW, "--gradient_checkpointing")])
def test_a_run_is_that_of_plain_training_and_goes_on_exactly(
    run: Any, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    flags += ("--max_grad_norm", "1e6")
    plain = run(tmp_path / "plain", *flags)
    whole = run(tmp_path / "whole", *flags, "--fused_backward")
    assert same(plain, whole)
    again = ("--fused_backward", "--resume_from_checkpoint", "latest")
    run(tmp_path / "half", *flags, *again, "--max_train_steps", "2")
    assert same(run(tmp_path / "half", *flags, *again), whole)
    with pytest.raises(UserError, match="--fused_backward was True, now False"):
        run(tmp_path / "half", *flags, "--resume_from_checkpoint", "latest")


EIGHT = ["lion8bit", "paged_lion8bit", "paged_adamw8bit", "stableadamw"]


@pytest.mark.parametrize("kind", EIGHT)
def test_a_run_with_a_small_state_goes_on_exactly(
    run: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind.endswith("8bit") and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    whole = run(tmp_path / "whole", "--optimizer", kind)
    said = capsys.readouterr().out
    assert ("on a CPU" in said) == kind.endswith("8bit")
    assert ("nothing is paged" in said) == kind.startswith("paged")
    again = ("--optimizer", kind, "--resume_from_checkpoint", "latest")
    run(tmp_path / "half", *again, "--max_train_steps", "2")
    assert same(run(tmp_path / "half", *again), whole)
