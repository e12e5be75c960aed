"""From a reward's text (`dojo.rewards.spec`) to a reward; and the list of what there is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dojo import tables
from dojo.cli import UserError, option
from dojo.lazy import nn, torch
from dojo.models.precisions import dtype_of
from dojo.rewards import spec
from dojo.rewards.foreign import Function
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import Place, Scorer

# Imported when it is asked for: a scorer's libraries are loaded with it.
SCORERS = {
    "pocket": "dojo.rewards.pocket:Pocket",
    "pocket_strict": "dojo.rewards.pocket:PocketStrict",
    "pocket_atoms": "dojo.rewards.pocket:PocketAtoms",
    "jpeg_compressibility": "dojo.rewards.jpeg:Compressibility",
    "jpeg_incompressibility": "dojo.rewards.jpeg:Incompressibility",
    "clip": "dojo.rewards.clip:Clip",
    "clip_iqa": "dojo.rewards.clip:ClipIqa",
    "pickscore": "dojo.rewards.clip:PickScore",
    "hpsv2": "dojo.rewards.hps:HpsV2",
    "hpsv2.1": "dojo.rewards.hps:HpsV21",
    "aesthetic": "dojo.rewards.aesthetic:Aesthetic",
    "aesthetic_v1": "dojo.rewards.aesthetic:AestheticV1",
    "imagereward": "dojo.rewards.imagereward:ImageReward",
    "hpsv3": "dojo.rewards.hpsv3:HpsV3",
    "geneval": "dojo.rewards.geneval:GenEval",
    "geneval_dense": "dojo.rewards.geneval:GenEvalDense",
    "ocr": "dojo.rewards.ocr:Ocr",
    "vlm": "dojo.rewards.vlm:Vlm",
    "tifa": "dojo.rewards.vlm:Tifa",
    "unifiedreward": "dojo.rewards.vlm:UnifiedReward",
}


@dataclass(frozen=True, kw_only=True)
class ScorerArgs:
    """Where and how pictures are scored."""

    reward_device: str | None = option(None, incidental=True)
    """device of the scorers' networks, as cuda:1; by default the device of the training"""
    reward_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """precision of their weights"""
    reward_batch_size: int = option(16, incidental=True)
    """pictures that are scored at a time"""
    list_rewards: bool = option(False, incidental=True)
    """print the scorers with checkpoint, size, licence and range, and exit"""

    def __post_init__(self) -> None:
        if self.reward_batch_size < 1:
            raise ValueError("--reward_batch_size must be at least 1")
        if self.reward_device is not None:
            try:
                torch.device(self.reward_device)
            except RuntimeError:
                raise ValueError(
                    f"--reward_device: {self.reward_device} is no device (cpu, cuda, cuda:1)"
                ) from None

    def load_all(
        self, device: torch.device, texts: Sequence[str], flags: Sequence[str] = ()
    ) -> list[Reward]:
        """Loads rewards by their texts (`dojo.rewards.spec`), which share what they can.

        Args:
            device: where they work unless --reward_device says otherwise.
            flags: which flag gave each of the texts; those without one came by --eval_reward.
        Raises:
            UserError: what one lacks, by the flag that was typed.
        """
        device = torch.device(self.reward_device or device)
        place = Place(device=device, dtype=dtype_of(self.reward_dtype))
        flags = [*flags, *["--eval_reward"] * (len(texts) - len(flags))]
        loaded: list[Reward] = []
        for text, flag in zip(texts, flags, strict=True):
            try:
                loaded.append(_load(text, place, self.reward_batch_size))
            except UserError as error:
                raise UserError(str(error).replace("--reward:", f"{flag}:", 1)) from error
        return loaded


@dataclass(frozen=True, kw_only=True)
class RewardArgs(ScorerArgs):
    """What pictures are scored by."""

    reward: str = option("aesthetic", common=True)
    """what to maximise: scorers with weights, as "aesthetic=0.5,pickscore=1"; options stand in
    brackets, "clip[model=models/pocket-clip]"; own functions are "package.module:function" or
    "file.py:function", served ones "http://localhost:8000#pickscore" """

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.parse(self.reward)

    def load(self, device: torch.device, *others: str) -> list[Reward]:
        """Loads the reward, and others by their texts, which share what they can."""
        return self.load_all(device, (self.reward, *others), ("--reward",))


def networks(rewards: Sequence[Reward]) -> list[nn.Module]:
    """The networks that rewards hold, each once: what they take of a device's memory."""
    found: dict[int, nn.Module] = {}
    for reward in rewards:
        for one in reward.components:
            for value in vars(one.scorer).values():
                inner = vars(value).values() if hasattr(value, "__dict__") else ()
                for thing in (value, *(() if isinstance(value, nn.Module) else inner)):
                    if isinstance(thing, nn.Module):
                        found[id(thing)] = thing
    return [*found.values()]


def load(
    text: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
) -> Reward:
    """Loads what a reward's text (`dojo.rewards.spec`) names; scorers share what they can.

    Raises:
        UserError: something is not there, naming what, or an option is wrong.
    """
    place = Place(device=torch.device(device or "cpu"), dtype=dtype or torch.float32)
    return _load(text, place, batch_size)


def _load(text: str, place: Place, batch_size: int) -> Reward:
    try:
        terms = spec.parse(text)
    except ValueError as error:
        raise UserError(str(error)) from None
    components = [
        Component(name=term.name, scorer=_scorer(term, place), weight=term.weight) for term in terms
    ]
    return Reward(components, batch_size=batch_size)


def _scorer(term: spec.Term, place: Place) -> Scorer:
    options = dict(term.options)
    try:
        device = torch.device(options.pop("device", place.device))
        dtype = dtype_of(options.pop("dtype")) if "dtype" in options else place.dtype
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--reward: {term.name} has a wrong device or dtype ({error})") from None
    make, place = scorer_class(term.source), Place(device=device, dtype=dtype, loaded=place.loaded)
    allowed = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in options:
        if name not in allowed:
            known = ", ".join([*allowed, "name", "scale", "device", "dtype"])
            raise UserError(f"--reward: {term.source} has no option {name} (it has {known})")
    return make(place, **options)


def scorer_class(source: str) -> Callable[..., Scorer]:
    """What makes the scorer of a name, an address or a function's place."""
    if spec.is_address(source):
        from dojo.rewards.remote import Remote
        from dojo.rewards.wire import RETRIES

        return lambda place, *, timeout="60", retries=str(RETRIES): Remote(
            place, address=source, timeout=timeout, retries=retries
        )
    if source in SCORERS:
        module, _, name = SCORERS[source].partition(":")
        return getattr(importlib.import_module(module), name)
    if ":" not in source:
        raise UserError(f"--reward: there is no scorer {source} (there are {', '.join(SCORERS)})")
    return lambda place: Function(place, source)


def places(text: str) -> list[str]:
    """What a reward reads, by the names of paths or of the hub: weights, files, functions.

    Raises:
        UserError: there is no such scorer.
    """
    found: list[str] = []
    for term in spec.parse(text):
        if spec.is_address(term.source):
            continue
        if term.source not in SCORERS and ":" in term.source:
            found.append(term.source.rpartition(":")[0])
            continue
        make: Any = scorer_class(term.source)
        known = inspect.signature(make).parameters
        for number, name in enumerate(make.places):
            value = term.options.get(name, known[name].default)
            if value is None and number == 0:
                value = make.checkpoint
            found += [value] if value else []
    return found


def table() -> str:
    """The scorers as a table, for --list_rewards."""
    head = ("name", "gradient", "usual range", "size", "licence of the weights", "checkpoint")
    rows: list[tuple[str, ...]] = []
    for name in SCORERS:
        one: Any = scorer_class(name)
        gradient = "yes" if one.differentiable else "no"
        rows.append((name, gradient, one.range, one.size, one.licence, one.checkpoint))
    return tables.told(head, rows)
