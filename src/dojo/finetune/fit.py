"""`--fit`: options with which a run fits a graphics card, the least change first.

Every script asks for it in one place: `planned(main)` is what its command line calls. With `--fit`
the script first plans, as a dry run does, up to where `begin` knows what the run would hold; there
the options are tried in a fixed order, and the script is called again with the first ones that fit.

Three ladders are climbed, each a list of changes from none to the most: how text encoders are
encoded with, how the autoencoder works, how the network is trained. The first two cost time once,
so they are used up before the third takes its next step; but for text encoders on the CPU where
there is no cache, which come last. What fits a card fits every larger one,
and the order is the same for all: a larger card never gets a change that a smaller one did not.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dojo import cli, loading
from dojo.cli import UserError
from dojo.files import records
from dojo.finetune.contract import Trained
from dojo.lazy import late, torch
from dojo.models import published
from dojo.models.family import needs_of
from dojo.run import checkpoint, deepspeed, phases, shardable, webhook
from dojo.run.phases import Held, Needs, Phase
from dojo.run.run import check_sharing

if TYPE_CHECKING:
    from torch import nn

    from dojo.run import fused
    from dojo.run.averaging import EmaArgs
    from dojo.run.cost import Cost
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Run
else:
    fused = late("dojo.run.fused")

ArgsT = TypeVar("ArgsT")
Change = Mapping[str, Any]
"""Options and their new values."""

CHOSEN = (
    *("gradient_checkpointing", "text_encoder_device", "text_encoder_precision"),
    *("enable_vae_slicing", "enable_vae_tiling", "vae_dtype"),
    *("train_batch_size", "gradient_accumulation_steps", "base_precision", "blocks_on_cpu"),
)
"""Every option that may be chosen."""
_GIB = 2**30
_BATCH = ("train_batch_size", "gradient_accumulation_steps")


class Planned(Exception):
    """A script has planned so far that options can be tried."""

    def __init__(self, tried: Tried) -> None:
        super().__init__("options can be tried")
        self.tried = tried


# Whether a script plans, up to where options can be tried.
_planning: ContextVar[bool] = ContextVar("planning", default=False)


def planned(main: Callable[[ArgsT], None]) -> Callable[[ArgsT], None]:
    """A script's `main` with the options that `--fit` chooses.

    A dry run of a known model asks for none of its files (see `models.published`).
    """

    def run(args: Any) -> None:
        loading.begin(bitsandbytes=args.run.fit is not None or uses_bitsandbytes(args))
        if args.run.fit is not None:
            args = _fitted(main, args, cli.typed(sys.argv[1:]))
        with published.planning(args.run.dry_run), webhook.failure_told():
            main(args)

    return run


def uses_bitsandbytes(args: Any) -> bool:
    """Whether a run computes with it; what `--fit` may choose is not looked at."""
    packed = any(getattr(group, "base_precision", "") == "nf4" for group in vars(args).values())
    return packed or args.optim.kind.endswith("8bit")


def _fitted(main: Callable[[Any], None], args: Any, typed: frozenset[str]) -> Any:
    """The options of the run that goes on, or those that are chosen.

    Raises:
        UserError: nothing fits.
    """
    recorded = _recorded(args, typed)
    if recorded is not None:
        return recorded
    tried = plan(main, args)
    change = choose(tried, args.run.fit, typed)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(told(args.run.fit, change, tried)))
    return changed(args, change)


def plan(main: Callable[[Any], None], args: Any) -> Tried:
    """What a script's run would hold, for options that are to be tried; nothing is downloaded.

    Raises:
        UserError: the run would be refused.
    """
    before = _planning.set(True)
    try:
        # What it says now is said again by the run.
        with published.planning(), redirect_stdout(io.StringIO()):
            main(replace(args, run=replace(args.run, dry_run=True)))
    except Planned as planned:
        return planned.tried
    finally:
        _planning.reset(before)
    raise AssertionError("a plan ends where options can be tried")


def _recorded(args: Any, typed: frozenset[str]) -> Any:
    """The options that an earlier start of the same run chose; None if there was none."""
    run = args.run
    if run.resume_from_checkpoint is None or run.overwrite_output_dir:
        return None
    resumed = checkpoint.choose(run.output_dir, run.resume_from_checkpoint)
    path = (resumed.parent if resumed else run.output_dir) / "args.json"
    groups: Any = records.read_table(path).get("args") if path.is_file() else None
    if not isinstance(groups, dict) or groups.get("run", {}).get("fit") != run.fit:
        return None
    change = {
        name: value
        for values in groups.values()
        if isinstance(values, dict)
        for name, value in values.items()
        if name in CHOSEN and name not in typed
    }
    return changed(args, change)


def asked() -> bool:
    """Whether a script plans for options to be tried."""
    return _planning.get()


def choose(tried: Tried, card: float, typed: frozenset[str] = frozenset()) -> Change:
    """The first change with which everything fits a card.

    Args:
        card: its GB.
        typed: options that stay as they are.
    Raises:
        UserError: the run is refused as it is, or nothing fits; naming what comes nearest, and
            the card that it fits.
    """
    if (refused := tried.refusal({})) is not None:
        raise UserError(str(refused)) from refused
    every: list[Change] = []
    for change in changes(tried, typed):
        if tried.refusal(change) is not None:
            continue
        every.append(change)
        if tried.wanted(change) <= card:
            return change
    raise UserError(_refusal(card, every, tried, typed))


# ---- the ladders ----


def changes(tried: Tried, typed: frozenset[str] = frozenset()) -> Iterator[Change]:
    """All changes of a script's options that may be tried, in their order.

    Args:
        typed: options that stay as they are.
    """
    args, needs = tried.args, tried.needs
    free = {name for name in _values(args) if name not in typed}
    if not tried.adapts:
        free -= {"base_precision", "blocks_on_cpu"}
    *texts, last = _text_steps(args)
    # Without a cache every step would wait for encoders on the CPU: that comes when all else is.
    for some in [texts, [last]] if texts and needs.live_text else [[*texts, last]]:
        for network in _network_steps(args, needs, free):
            for vae in _vae_steps(needs):
                for text in some:
                    change = {**network, **vae, **text}
                    if free.issuperset(change):
                        yield change


def _text_steps(args: Any) -> Iterator[Change]:
    yield {}
    trains = getattr(getattr(args, "text_encoder", None), "train_text_encoder", False)
    new_words = getattr(getattr(args, "tokens", None), "new_tokens", ())
    if not (trains or new_words):  # frozen ones only
        yield {"text_encoder_precision": "int8"}
        yield {"text_encoder_device": "cpu"}


def _vae_steps(needs: Needs) -> Iterator[Change]:
    slicing: Change = {"enable_vae_slicing": True}
    tiling: Change = {**slicing, "enable_vae_tiling": True}
    longest = max(*needs.size, *(needs.drawn_size or ()))
    large = longest > needs.config.vae.get("sample_size", 0)
    yield {}
    yield slicing
    if large:
        yield tiling
    if needs.dtype == torch.bfloat16:
        yield {**slicing, "vae_dtype": "bf16"}
        if large:
            yield {**tiling, "vae_dtype": "bf16"}


def _network_steps(args: Any, needs: Needs, free: set[str]) -> Iterator[Change]:
    """Smaller micro-batches, recomputed activations, quantised weights, weights in CPU memory.

    A smaller micro-batch comes before recomputation, which takes about 30 % longer: the effective
    batch stays the same.
    """
    batches = list(_batches(args, needs, free))
    last: Change = {}
    for base in _bases(args, free):
        for checkpointing in ({}, {"gradient_checkpointing": True}):
            for batch in batches:
                last = {**base, **checkpointing, **batch}
                yield last
    if "blocks_on_cpu" in free:
        for number in range(1, _MOST_BLOCKS + 1):
            yield {**last, "blocks_on_cpu": number}


def _bases(args: Any, free: set[str]) -> Iterator[Change]:
    """Fewer bits for the frozen weights, as far as there is the package that unpacks them."""
    yield {}
    if "base_precision" not in free or args.lora.base_precision != "bf16":
        return
    for precision in ("int8", "nf4"):
        with suppress(UserError):
            replace(args.lora, base_precision=precision).check_package()
            yield {"base_precision": precision}


_MOST_BLOCKS = 100  # no network has more; what has fewer refuses more


def _batches(args: Any, needs: Needs, free: set[str]) -> Iterator[Change]:
    """Divisors of the micro-batch, the largest first, with as many more accumulated."""
    yield {}
    optim = args.optim
    splits = needs.batch_is_free and free.issuperset(_BATCH)
    if not splits or getattr(optim, "fused_backward", False):  # which accumulates nothing
        return
    size = optim.train_batch_size
    for part in range(size - 1, 0, -1):
        if size % part == 0:
            times = optim.gradient_accumulation_steps * size // part
            yield {"train_batch_size": part, "gradient_accumulation_steps": times}


# ---- what they come to ----


@dataclass
class Tried:
    """A run's phases under changed options; what was counted once is kept."""

    args: Any
    trained: Trained
    cost: Callable[..., tuple[Any, Cost]]
    needs: Needs
    bytes_per_weight: int
    with_reference: bool = False
    _network: Any = None
    _costs: dict[bool, Cost] = field(default_factory=dict["bool", "Cost"])
    _refusals: dict[str, Exception | None] = field(default_factory=dict[str, Exception | None])
    _helds: dict[str, Held | UserError] = field(default_factory=dict[str, Held | UserError])
    _found: dict[str, list[Phase]] = field(default_factory=dict[str, list[Phase]])

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, beside weights that stay as they are."""
        own: Any = self.trained
        return getattr(self.args, "lora", None) is own.args

    def refusal(self, change: Change) -> Exception | None:
        """With what the run would be refused with the change; None if it would not be."""
        key = _key(change)
        if key not in self._refusals:
            try:
                self._check(change)
                self._refusals[key] = None
            except (ValueError, UserError) as refused:
                self._refusals[key] = refused
        return self._refusals[key]

    def _check(self, change: Change) -> None:
        """
        Raises:
            ValueError: the options do not go together.
            UserError: the run would be refused.
        """
        args = changed(self.args, change)
        trained = self._trained(args)
        trained.check(args.optim)
        trained.check_model(args.model)
        check_sharing(args, trained.run.accelerator)
        self._held(change)

    def phases(self, change: Change) -> list[Phase]:
        """What each phase holds."""
        key = _key(change)
        if key not in self._found:
            self._found[key] = phases.compute(self._needs(change), self._held(change))
        return self._found[key]

    def _needs(self, change: Change) -> Needs:
        """What is held beside the network; a smaller batch is also encoded in smaller parts."""
        args = changed(self.args, change)
        needs = replace(self.needs, **needs_of(args.model))
        if not needs.encoded_in_training:
            return needs
        times = self.args.optim.train_batch_size // args.optim.train_batch_size
        encoded = needs.encoded_in_training // times
        return replace(needs, encoded=encoded, encoded_in_training=encoded)

    def largest(self, change: Change) -> Phase:
        """The phase that decides."""
        return max(self.phases(change), key=lambda phase: phase.size)

    def wanted(self, change: Change) -> float:
        """GB of a card that holds all phases."""
        return phases.wanted(self.largest(change).size / _GIB)

    def _held(self, change: Change) -> Held:
        """
        Raises:
            UserError: the network cannot be stored so.
        """
        args = changed(self.args, change)
        size, checkpointing = args.optim.train_batch_size, args.model.gradient_checkpointing
        key = repr((size, checkpointing, getattr(args, "lora", None)))
        if key not in self._helds:
            try:
                self._helds[key] = self._count(args, size, checkpointing=checkpointing)
            except UserError as refused:
                self._helds[key] = refused
        found = self._helds[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _count(self, args: Any, size: int, *, checkpointing: bool) -> Held:
        if checkpointing not in self._costs:
            network, self._costs[checkpointing] = self.cost(checkpointing=checkpointing)
            # One for all: they differ in what is recomputed alone.
            self._network = network if self._network is None else self._network
        cost = self._costs[checkpointing]
        # A batch's activations are those of its rows.
        rows = size / self.args.optim.train_batch_size
        saved, peak = (round(rows * one) for one in (cost.saved_bytes, cost.peak_bytes))
        cost = replace(cost, saved_bytes=saved, peak_bytes=peak)
        state = self.bytes_per_weight
        how = (args.optim, args.ema, self.with_reference)
        return held(self._trained(args), self._network, cost, state, *how)

    def _trained(self, args: Any) -> Trained:
        """What is trained with other options."""
        trained: Any = self.trained
        return trained.with_args(args.lora) if self.adapts else trained


def _key(change: Change) -> str:
    return repr(sorted(change.items()))


def held(
    trained: Trained,
    network: nn.Module,
    cost: Cost,
    bytes_per_weight: int,
    optim: OptimArgs,
    ema: EmaArgs,
    with_reference: bool = False,
) -> Held:
    """What training holds of a network.

    Args:
        network: on the meta device, as it is trained.
        cost: of a micro-batch.
        bytes_per_weight: what training one weight takes.
        with_reference: whether the model as it was is asked for.
    """
    params = [param for param in network.parameters() if param.requires_grad]
    count = sum(param.numel() for param in params)
    stepping = fused.step_bytes(params) if optim.fused_backward else 0
    stored, on_their_way = trained.stored_bytes(network)
    kept = stored + bytes_per_weight * (count + trained.beside) + optim.factored_bytes(params)
    kept += trained.reference_bytes(network) if with_reference else 0
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    share = _shared(trained.run, network)
    leaving = stored + buffers + trained.dtype.itemsize * count - on_their_way
    return Held(
        network=network,
        kept=kept // share.parts + buffers + share.kept,
        activations=max(cost.held_bytes + stepping + share.stepping, ema.step_bytes(params)),
        leaving=0 if trained.run.replicas.owns_storage else leaving,
        whole=share.asking,
    )


@dataclass(frozen=True)
class Share:
    """How a process holds the weights, and what it has in bytes on top of its part."""

    parts: int = 1
    """among how many processes they are shared out"""
    kept: int = 0
    """at all times"""
    stepping: int = 0
    """of whole weights in a training step, and of their gradients"""
    asking: int = 0
    """of all weights, as a process has them that asks the network without the others
    (`Replicas.gathered`)"""


def _shared(run: Run, network: nn.Module) -> Share:
    """That of `--shard`, or of DeepSpeed's ZeRO-3; ZeRO-1 and 2 are counted as if nothing was
    shared out."""
    if deepspeed.deals_out(run.accelerator):
        return _dealt_out(run.accelerator.num_processes, list(network.parameters()))
    parts = int(os.environ.get("LOCAL_WORLD_SIZE") or run.accelerator.num_processes)
    if parts == 1 or not run.args.shard:
        return Share()
    names = set(getattr(network, "_no_split_modules", None) or ())
    block_of = dict.fromkeys(network.parameters(), network)
    for one in network.modules():  # blocks within blocks come later, and have their own
        if type(one).__name__ in names:
            block_of |= dict.fromkeys(one.parameters(), one)
    sizes: Counter[nn.Module] = Counter()
    trained: Counter[nn.Module] = Counter()
    for param, block in block_of.items():
        sizes[block] += param.numel()
        trained[block] += param.numel() * param.requires_grad
    # torch gathers gradients in the run's precision, and shares them out of a copy in float32,
    # which stays until the next block has its own.
    gradients = 4 * max(trained.values(), default=0)
    if trained.total() < shardable.FEW * sizes.total():
        gradients += 4 * trained.total()
    else:
        gradients += run.dtype.itemsize * max(trained.values(), default=0)
    total, rest = sizes.total(), sizes.pop(network, 0)
    size = run.dtype.itemsize
    two_blocks = 2 * max(sizes.values(), default=0)
    stepping = size * (rest + two_blocks) + gradients
    return Share(parts, stepping=stepping, asking=size * total)


def _dealt_out(processes: int, weights: list[nn.Parameter]) -> Share:
    """Of all processes, on every machine, each weight in its own precision. In a step as many
    numbers are whole at once as DeepSpeed lets live."""
    if processes == 1:
        return Share(kept=deepspeed.BUCKET_BYTES)
    count, total = sum(one.numel() for one in weights), sum(one.nbytes for one in weights)
    live = total * min(count, deepspeed.LIVE_WEIGHTS) // max(count, 1)
    return Share(processes, kept=deepspeed.BUCKET_BYTES, stepping=live, asking=total)


def changed(args: ArgsT, change: Change) -> ArgsT:
    """A script's options with some changed, in the groups that have them.

    Raises:
        ValueError: they do not go together.
    """
    groups: dict[str, Any] = {}
    for name, group in vars(args).items():
        own = {one.name: change[one.name] for one in fields(group) if one.name in change}
        if own:
            groups[name] = replace(group, **own)
    made: Any = args
    return replace(made, **groups)


def _values(args: Any) -> dict[str, Any]:
    """The options that may be chosen, with their values."""
    return {
        one.name: getattr(group, one.name)
        for group in vars(args).values()
        for one in fields(group)
        if one.name in CHOSEN
    }


# ---- in words ----


def words(change: Change) -> str:
    """A change as flags of a command line."""
    flags = (
        f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items()
    )
    return " ".join(flags)


def told(card: float, change: Change, tried: Tried) -> list[str]:
    """What was chosen, and why each part of it."""
    largest = tried.largest(change)
    size = f"{largest.size / _GIB:.2f} GiB ({largest.name}), computed, not measured"
    if not change:
        return [f"--fit {card:g}: the options fit as they are; the largest phase has {size}"]
    lines = [f"--fit {card:g} chooses: {words(change)}", f"  the largest phase has {size}"]
    for names in _together(change):
        rest = {name: value for name, value in change.items() if name not in names}
        without = tried.largest(rest)
        flags = words({name: change[name] for name in names})
        if phases.wanted(without.size / _GIB) > card:
            why = f"without it {without.name} has {without.size / _GIB:.2f} GiB"
        else:
            why = "a step on the way to the others"
        lines.append(f"  {flags}: {why}")
    return lines


def _together(change: Change) -> list[tuple[str, ...]]:
    """The options of a change, those of the batch as one."""
    alone = [(name,) for name in change if name not in _BATCH]
    return [*alone, _BATCH] if _BATCH[0] in change else alone


def _refusal(card: float, every: Sequence[Change], tried: Tried, typed: frozenset[str]) -> str:
    best = min(every, key=tried.wanted)
    largest = tried.largest(best)
    size = largest.size / _GIB
    larger = phases.card_for(size)
    where = f"which fits a card of {larger} GB" if larger else "more than any card known here has"
    flags = f"with {words(best)} " if best else ""
    kept = sorted(typed.intersection(_values(tried.args)))
    left = f"; typed, and so left as they are: {', '.join(f'--{name}' for name in kept)}"
    return (
        f"--fit {card:g}: nothing that was tried fits; {flags}{largest.name} still takes "
        f"{size:.2f} GiB, {where}{left if kept else ''}"
    )
