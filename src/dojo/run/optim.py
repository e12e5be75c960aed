"""Length of a training, its optimizer and the schedule of the learning rate.

The optimizers themselves come from torch and from their authors' packages; this file gives them
the same options and makes sure that each can be resumed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from dojo.cli import UserError, option, ranges
from dojo.lazy import diffusers, late, nn, torch

if TYPE_CHECKING:
    from dojo.run import fused, split
else:
    split = late("dojo.run.split")
    fused = late("dojo.run.fused")

Groups: TypeAlias = "Sequence[nn.Parameter] | Sequence[dict[str, Any]]"

# Bytes per trained weight: weight, gradient and the optimizer's state, with float32 weights.
STATE_BYTES = {
    "adamw": 16,
    "adamw8bit": 10,
    "adafactor": 8,
    "lion": 12,
    "prodigy": 24,
    "schedulefree": 16,
    "stableadamw": 16,
    "lion8bit": 9,
    # Their state may leave the device, page by page, where it has no room.
    "paged_adamw8bit": 8,
    "paged_lion8bit": 8,
}
# The same of bfloat16 weights and gradients: `split` keeps each weight's lower half beside it.
SPLIT_BYTES = {
    "adamw": 14,
    "lion": 10,
    "adafactor": 6,
    "adamw8bit": 8,
    "lion8bit": 7,
    "paged_adamw8bit": 6,
    "paged_lion8bit": 6,
}


@dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """Length of the training, batch, optimizer and its schedule."""

    train_batch_size: int = option(4, incidental=True, common=True)
    """samples per process and micro-step"""
    gradient_accumulation_steps: int = option(1, incidental=True, common=True)
    """micro-steps per optimizer step"""
    max_train_steps: int | None = option(None, incidental=True, common=True)
    """optimizer steps; wins over num_train_epochs; both unset is 1000 steps"""
    num_train_epochs: int | None = option(None, incidental=True)
    """passes over the data"""
    steps_per_epoch: int | None = option(None, incidental=True)
    """optimizer steps that count as one epoch; unset is what the data set takes"""
    optimizer: Literal[
        "adamw",
        "adamw8bit",
        "paged_adamw8bit",
        "adafactor",
        "lion",
        "lion8bit",
        "paged_lion8bit",
        "prodigy",
        "schedulefree",
        "stableadamw",
    ] = "adamw"
    """adamw (fused), adamw8bit (bitsandbytes), adafactor (torch; its
    rate is relative to the weights' size, 1e-2 is usual), lion (optimi, wants a learning rate 3 to
    10 times smaller), lion8bit (bitsandbytes), paged_adamw8bit, paged_lion8bit (their state leaves
    a GPU that has no room for it), prodigy (finds its step size: set --learning_rate 1),
    schedulefree (AdamW that averages its weights and needs no schedule), stableadamw (optimi: AdamW
    whose steps are scaled down where a gradient is larger than the ones before)"""
    use_8bit_adam: bool = False
    """the same as --optimizer adamw8bit"""
    use_adafactor: bool = False
    """the same as --optimizer adafactor"""
    learning_rate: float = option(1e-4, common=True)
    """learning rate after warm-up"""
    scale_lr: bool = False
    """multiply the learning rate by batch size, accumulation steps and processes"""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """shape of the learning rate over the steps"""
    lr_warmup_steps: int = 0
    """optimizer steps of linear warm-up (every shape but constant; schedulefree has its own)"""
    lr_num_cycles: int = 1
    """hard restarts of cosine_with_restarts"""
    lr_power: float = 1.0
    """power of polynomial"""
    lr_when_length_changes: Literal["stretch", "restart", "keep"] | None = option(
        None, incidental=True
    )
    """a run that goes on with another length, where the shape hangs on it: stretch takes the rate
    of a run that was so long from the start, restart begins the shape anew over the steps that are
    left, keep leaves it as it was; unset refuses"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.999
    """decay of the second moment (lion: 0.99 is usual)"""
    adam_weight_decay: float = 1e-4
    """decoupled weight decay"""
    adam_epsilon: float = 1e-8
    """added to the root of the second moment"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm, with --fused_backward each weight's by itself"""
    fused_backward: bool = False
    """full fine-tuning, one process: take each weight's step in the backward pass, so that one
    layer's gradients are in memory at a time"""
    offload_lower_halves: bool = option(False, incidental=True)
    """with --train_dtype bf16: keep the lower 16 bits of the weights in CPU memory between steps"""

    def __post_init__(self) -> None:
        counts = "train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs"
        ranges.check(self, f"{counts} steps_per_epoch lr_num_cycles", least=1)
        # Without an epsilon the first step of a weight whose gradient is zero would be 0 / 0.
        ranges.check(self, "learning_rate max_grad_norm lr_power adam_epsilon", above=0)
        ranges.check(self, "adam_beta1 adam_beta2", least=0, below=1)
        ranges.check(self, "adam_weight_decay lr_warmup_steps", least=0)
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"--use_8bit_adam contradicts --optimizer {self.optimizer}")
        if self.use_adafactor and self.optimizer not in ("adamw", "adafactor"):
            raise ValueError(f"--use_adafactor contradicts --optimizer {self.optimizer}")
        if self.use_adafactor and self.use_8bit_adam:
            raise ValueError("--use_adafactor contradicts --use_8bit_adam")
        if self.kind == "schedulefree":
            if self.lr_scheduler not in ("constant", "constant_with_warmup"):
                raise ValueError("--optimizer schedulefree takes no --lr_scheduler: leave it unset")
        elif self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError("--lr_warmup_steps needs --lr_scheduler constant_with_warmup")
        if self.scale_lr and self.kind == "prodigy":
            raise ValueError("--scale_lr: prodigy finds its own step size")
        if self.fused_backward:
            fused.check(self.kind, self.gradient_accumulation_steps)

    @property
    def kind(self) -> str:
        """The optimizer's name, with the older spellings of two."""
        if self.use_adafactor:
            return "adafactor"
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    def samples_per_step(self, num_processes: int) -> int:
        """The effective batch size."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def epoch_length(self, num_samples: int, num_processes: int) -> float:
        """Optimizer steps per epoch; the stream of samples knows no last, short batch."""
        return self.steps_per_epoch or num_samples / self.samples_per_step(num_processes)

    def num_steps(self, num_samples: int, num_processes: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return 1000
        if self.steps_per_epoch is not None:
            return self.num_train_epochs * self.steps_per_epoch
        samples = self.num_train_epochs * num_samples
        return -(-samples // self.samples_per_step(num_processes))  # rounded up, in integers

    @property
    def has_length(self) -> bool:
        """Whether the user said how long to train."""
        return self.max_train_steps is not None or self.num_train_epochs is not None

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes per trained weight: weight, gradient, optimizer state.

        Without the gradient where the step is taken in the backward pass (`fused.step_bytes` are
        those of one weight), and on the device alone.
        """
        held = (STATE_BYTES if dtype == torch.float32 else SPLIT_BYTES).get(self.kind, 16)
        gradient = dtype.itemsize if self.fused_backward else 0
        return held - gradient - (2 if self.offload_lower_halves else 0)

    def factored_bytes(self, params: Iterable[torch.Tensor]) -> int:
        """Bytes of adafactor's state; 0 for the others, whose state is in `state_bytes`.

        It keeps a number for each row and each column of a weight's last two dimensions. Of a
        linear layer that is next to nothing; a convolution's are those of its kernel, which makes
        two numbers for each weight of a 1 x 1 convolution, and two for three of a 3 x 3 one.
        """
        if self.kind != "adafactor":
            return 0
        numbers = 0
        for param in params:
            rows_and_columns = param.shape[-2:] if param.dim() > 1 else [1]
            numbers += sum(param.numel() // size for size in rows_and_columns)
        return 4 * numbers


class Length(Protocol):
    """What a schedule has to know of a run."""

    num_steps: int
    samples_per_step: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...


def make(
    params: Groups, args: OptimArgs, run: Length
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and its schedule over the optimizer steps of the run.

    The schedule is stepped once per optimizer step on every process, whatever their number; it
    must not be handed to accelerate, which would step it once per process.

    Args:
        params: weights, or groups of them with a learning rate `lr` of their own, and a step
            `until` which they are trained and then stay.
    Raises:
        UserError: the optimizer's package is missing, or it cannot train bfloat16 weights.
    """
    scale = run.samples_per_step if args.scale_lr else 1
    groups = [
        {**group, "lr": group.get("lr", args.learning_rate) * scale}
        for group in (entry if isinstance(entry, dict) else {"params": [entry]} for entry in params)
    ]
    if not isinstance(params[0], dict):
        groups = [{"params": list(params), "lr": args.learning_rate * scale}]
    optimizer = _optimizer(groups, args, run.device)
    schedule = _shape(optimizer, args, run.num_steps)
    schedule.lr_lambdas = _each(optimizer, schedule.lr_lambdas[0])
    return optimizer, schedule


def _each(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> list[Callable[[int], float]]:
    """What each group's rate is multiplied by at a step: nothing from its `until` on."""

    def own(until: int | None) -> Callable[[int], float]:
        if until is None:
            return factor
        return lambda step: factor(step) if step < until else 0.0

    return [own(group.get("until")) for group in optimizer.param_groups]


def _shape(
    optimizer: torch.optim.Optimizer, args: OptimArgs, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    return diffusers.get_scheduler(
        "constant" if args.kind == "schedulefree" else args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


@dataclass(frozen=True)
class Span:
    """The optimizer steps that a schedule runs over; past its end the rate stays."""

    start: int
    steps: int

    def at(self, step: int) -> int:
        """The schedule's own step."""
        return min(max(step - self.start, 0), self.steps)


def new_span(args: OptimArgs, made: Span, step: int, num_steps: int) -> Span:
    """The schedule's span when a run goes on.

    Args:
        made: that of the checkpoint.
        step: optimizer steps done.
        num_steps: the run's length now.
    Raises:
        UserError: the length is another one, the rate hangs on it, and nothing says how.
    """
    if args.kind == "schedulefree" or args.lr_scheduler in ("constant", "constant_with_warmup"):
        return Span(0, num_steps)
    end = made.start + made.steps
    if not made.steps or end == num_steps:
        return made if made.steps else Span(0, num_steps)
    spans = {
        "stretch": Span(0, num_steps),
        "restart": Span(step, max(1, num_steps - step)),
        "keep": made,
    }
    if args.lr_when_length_changes is None:
        then, *now = (
            args.learning_rate * _factor(args, span)(step) for span in (made, *spans.values())
        )
        rates = dict(zip(spans, now, strict=True))
        raise UserError(
            f"--max_train_steps: the run's --lr_scheduler {args.lr_scheduler} was made for {end} "
            f"optimizer steps and stands at {step} with a learning rate of {then:.3g}; for "
            f"{num_steps} steps choose --lr_when_length_changes stretch (as if it had been so long "
            f"from the start: goes on at {rates['stretch']:.3g}), restart (anew over the steps "
            f"that are left: {rates['restart']:.3g}) or keep (as it was: {rates['keep']:.3g})"
        )
    return spans[args.lr_when_length_changes]


def _factor(args: OptimArgs, span: Span) -> Callable[[int], float]:
    """What the rate is multiplied by at a step of the run."""
    weight = nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([weight], lr=args.learning_rate)
    shape = _shape(plain, args, span.steps).lr_lambdas[0]
    return lambda step: shape(span.at(step))


def respan(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    args: OptimArgs,
    span: Span,
) -> None:
    """Lets a schedule that was read back run over a span, from its step on."""
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    schedule.lr_lambdas = _each(optimizer, _factor(args, span))
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [
        base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def check(args: OptimArgs, dtype: torch.dtype) -> None:
    """Refuses before the data work what `make` would refuse after it.

    Raises:
        UserError: the optimizer's package is missing, or it cannot train weights of this dtype.
    """
    if dtype != torch.float32 and args.kind not in SPLIT_BYTES:
        raise UserError(
            f"--optimizer {args.kind} cannot train bfloat16 weights: with --train_dtype bf16 use "
            f"{', '.join(SPLIT_BYTES)}, or leave --train_dtype at fp32"
        )
    if dtype == torch.float32 and args.offload_lower_halves:
        raise UserError(
            "--offload_lower_halves needs --train_dtype bf16: others have no such halves"
        )
    if args.kind.endswith("8bit"):
        _require("bitsandbytes", args)


def _optimizer(
    groups: list[dict[str, Any]], args: OptimArgs, device: torch.device
) -> torch.optim.Optimizer:
    low = any(param.dtype != torch.float32 for group in groups for param in group["params"])
    check(args, torch.bfloat16 if low else torch.float32)

    def inner(some: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if low:
            return split.SplitOptimizer(
                some,
                lambda whole: _float32_optimizer(whole, args, device),
                offload=args.offload_lower_halves,
            )
        return _float32_optimizer(some, args, device)

    if args.fused_backward:
        return fused.FusedOptimizer(groups, inner, args.max_grad_norm)
    return inner(groups)


def _float32_optimizer(
    groups: list[dict[str, Any]], args: OptimArgs, device: torch.device
) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.kind == "adafactor":  # its second moment is factored, its first one absent
        return torch.optim.Adafactor(
            groups, lr=args.learning_rate, weight_decay=args.adam_weight_decay
        )
    if args.kind.endswith("8bit"):
        from dojo.run import eightbit

        return eightbit.make(args.kind, groups, common, device)
    if args.kind == "prodigy":
        import prodigyopt

        return prodigyopt.Prodigy(groups, safeguard_warmup=True, use_bias_correction=True, **common)
    if args.kind == "schedulefree":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(
            groups, warmup_steps=args.lr_warmup_steps, **common
        )
        optimizer.train()
        return optimizer
    if args.kind in ("lion", "stableadamw"):
        import optimi

        if args.kind == "stableadamw":
            # optimi 0.3.3 would choose triton by an empty list of weights, so on a CPU too.
            return optimi.StableAdamW(
                groups, triton=None if device.type == "cuda" else False, **common
            )
        common.pop("eps")
        return optimi.Lion(groups, **common)
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **common)


def remark(args: OptimArgs, device: torch.device) -> str:
    """What the user should hear about the optimizer on this device; mostly nothing."""
    if device.type != "cpu" or not args.kind.endswith("8bit"):
        return ""
    paged = ", and nothing is paged" if args.kind.startswith("paged") else ""
    return (
        f"--optimizer {args.kind} on a CPU: bitsandbytes computes each weight's step in float32 "
        f"between reading and writing its 8-bit state{paged}"
    )


def _require(package: str, args: OptimArgs) -> None:
    if find_spec(package) is None:
        raise UserError(
            f"--optimizer {args.kind} needs the package {package}: pip install {package}"
        )


def learning_rate(optimizer: Any) -> float:
    """The rate of the first group's next step; prodigy's own step size is in it."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))
