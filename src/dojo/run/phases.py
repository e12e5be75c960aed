"""What a run holds in a device's memory, phase by phase, computed from configurations alone.

Networks that do not compute together are not on the device together: text encoders come one after
another, the pipeline of the class pictures in turns, and the autoencoder only where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

from dojo import tables
from dojo.lazy import diffusers, late, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.run import cost
else:
    cost = late("dojo.run.cost")

CARDS = (8, 10, 12, 16, 24, 48, 80)
"""Sizes of graphics cards in GiB (sold as GB)."""
MARGIN = 1.1
"""What the allocator and kernels take on top of the tensors: assumed, not measured."""
CONTEXT = 1.0
"""GiB that the CUDA context and libraries take: assumed, not measured."""
CAPTIONS = 32
"""Captions that an encoder reads at a time: a shard of the cache."""

TEXTS, LATENTS, CLASS, TRAINING, VALIDATION, SCORING = PHASES = (
    *("text cache", "latent cache", "class pictures"),
    *("training", "validation", "scoring"),
)
_GIB = 2**30


class Model(Protocol):
    """A pipeline's folder, what is known of its parts, and its network on the meta device."""

    @property
    def folder(self) -> Path: ...
    @property
    def vae(self) -> dict[str, Any]: ...
    @property
    def pixels_per_latent(self) -> int: ...
    @property
    def text_lengths(self) -> Mapping[str, int]: ...
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]: ...
    def meta_encoder(self, part: str) -> nn.Module: ...
    def meta_network(self) -> Any: ...
    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...
    def predict(
        self,
        network: nn.Module,
        noisy: Tensor,
        level: Tensor,
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor: ...


def bytes_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a precision."""
    return dtype.itemsize * sum(param.numel() for param in model.parameters())


def encoder_bytes(encoder: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a text encoder's weights in a precision."""
    kept = getattr(encoder, "_keep_in_fp32_modules", None) or ()
    if dtype != torch.float16 or not kept:
        return bytes_of(encoder, dtype)
    # transformers keeps T5's in float32.
    whole = [one for name, one in encoder.named_modules() if name.rpartition(".")[2] in kept]
    more = sum(param.numel() for one in whole for param in one.parameters())
    return bytes_of(encoder, dtype) + 2 * more


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run holds beside the network that it trains."""

    config: Model
    dtype: torch.dtype
    """of the run: of text encoders and of what is computed"""
    vae_dtype: torch.dtype
    size: tuple[int, int]
    """height and width of the largest picture in pixels"""
    drawn_size: tuple[int, int] | None = None
    """those of the largest that is drawn in training, unset: the same"""
    text_on_cpu: bool = False
    """the text encoders compute on the CPU"""
    text_bytes: Callable[[nn.Module, torch.dtype], int] = encoder_bytes
    """of the weights of a text encoder on the meta device, as it is stored in a precision"""
    tiling: bool = False
    """the autoencoder takes large pictures in tiles"""
    slicing: bool = False
    """the autoencoder takes the pictures of a batch one by one"""
    encoded: int = 0
    """pictures whose latents are computed at a time, 0 for none"""
    encoded_in_training: int = 0
    """the same where a training step begins with them, beside all that is kept"""
    embedded: bool = True
    """texts are embedded before training"""
    decoded: int = 0
    """pictures that are drawn at a time, 0 for none"""
    rows: int | None = None
    """rows of the network's batches while they are drawn; unset is two a picture, with guidance"""
    class_pictures: int = 0
    """those that the whole pipeline draws at a time before training"""
    class_dtype: torch.dtype | None = None
    """precision of that drawing; unset is the run's"""
    vae_stays: bool = True
    """the autoencoder is on the device in training too, and the network while it decodes"""
    before_texts: Sequence[Literal["autoencoder", "rewards"]] = ()
    """what is on the device already while texts are embedded and latents computed"""
    live_text: Sequence[str] = ()
    """text encoders that are there in training too"""
    batch_is_free: bool = True
    """a batch may be taken in smaller parts: nothing else hangs on its size"""
    scored: bool = False
    """what is drawn is scored by rewards"""
    scorers: Sequence[nn.Module] = ()
    """their networks, as loaded, which are on the device all the time"""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What training holds of the network, in bytes; computed from a network on the meta device."""

    network: Any
    """as it is trained"""
    kept: int
    """of what is there between two steps: weights, gradients, the optimizer's state, averages"""
    activations: int
    """of what a training step has besides"""
    leaving: int = 0
    """of its weights, as they are stored, those that may leave the device for a while: none whose
    memory something else counts on, as with `--shard` and DeepSpeed"""
    whole: int = 0
    """of its weights that are gathered from other processes while it is asked and draws, all of
    them together"""


@dataclass(frozen=True)
class Phase:
    """What is on the device at the fullest moment of a phase, in bytes."""

    name: str
    parts: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def size(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def told(self) -> str:
        """The parts in words, those of less than a hundredth of a GiB left out."""
        shown = {name: size / _GIB for name, size in self.parts.items() if size >= _GIB / 200}
        return " + ".join(f"{name} {size:.2f}" for name, size in shown.items())


def compute(needs: Needs, held: Held) -> list[Phase]:
    """The phases of a run that hold something on the device, in their order."""
    makers: dict[str, Callable[[Needs, Held], Mapping[str, int]]] = {
        TEXTS: _texts,
        LATENTS: _latents,
        CLASS: _class_pictures,
        TRAINING: _training,
        SCORING if needs.scored else VALIDATION: _drawing,
    }
    found = [Phase(name, make(needs, held)) for name, make in makers.items()]
    return [phase for phase in found if phase.size]


def wanted(gib: float) -> float:
    """What a card must have for so many GiB of tensors."""
    return MARGIN * gib + CONTEXT


def card_for(gib: float) -> int | None:
    """The smallest card that holds so many GiB of tensors; None if none of those known does."""
    return next((card for card in CARDS if wanted(gib) <= card), None)


def table(found: Sequence[Phase]) -> list[str]:
    """The phases as the dry run prints them, and which cards hold the largest."""
    largest = max(found, key=lambda phase: phase.size)
    most = largest.size / _GIB
    head = ("phase", "GiB", "of it")
    rows = [(phase.name, f"{phase.size / _GIB:.2f}", phase.told) for phase in found]
    fits = ", ".join(f"{card} {'yes' if wanted(most) <= card else 'no'}" for card in CARDS)
    return [
        "memory on the device by phase, computed, not measured:",
        tables.told(head, rows, right=[1]),
        f"largest phase: {largest.name}, {most:.2f} GiB",
        f"fits on a card of so many GB: {fits} (with {MARGIN - 1:.0%} and {CONTEXT:g} GiB on top "
        "for allocator and context: assumed)",
    ]


# ---- the phases ----


def _texts(needs: Needs, held: Held) -> Mapping[str, int]:
    at_use = set(needs.live_text).issuperset(needs.config.text_lengths)
    if not needs.embedded or needs.text_on_cpu or at_use:
        return {}
    most = max(_encoders(needs, needs.dtype, CAPTIONS), key=_total, default={})
    return {**most, **_before(needs)} if most else {}


def _latents(needs: Needs, held: Held) -> Mapping[str, int]:
    if not needs.encoded:
        return {}
    vae = _autoencoder(needs, needs.vae_dtype)
    own = {"autoencoder": _bytes(vae), "activations": _encoding(vae, needs)}
    return {**_before(needs), **own}


def _class_pictures(needs: Needs, held: Held) -> Mapping[str, int]:
    """Text encoders one after another, as training has them, then the base's network and
    autoencoder in turns, every part in the precision of the drawing."""
    count, dtype = needs.class_pictures, needs.class_dtype or needs.dtype
    if not count:
        return {}
    vae = _autoencoder(needs, dtype)
    weights = _own_weights(held.network)
    turns = [
        *([] if needs.text_on_cpu else _encoders(needs, dtype, count)),
        {"network": dtype.itemsize * weights, "activations": _asking(needs, held, 2 * count)},
        {"autoencoder": _bytes(vae), "activations": _decoding(vae, needs, count)},
    ]
    return max(turns, key=_total)


def _training(needs: Needs, held: Held) -> Mapping[str, int]:
    activations = held.activations
    if needs.encoded_in_training:
        encoding = replace(needs, encoded=needs.encoded_in_training)
        vae = _autoencoder(needs, needs.vae_dtype)
        activations = max(activations, _encoding(vae, encoding))
    return {"weights and state": held.kept, "activations": activations, **_residents(needs)}


def _drawing(needs: Needs, held: Held) -> Mapping[str, int]:
    """Validation, or drawing for rewards: denoising, then decoding."""
    if not needs.decoded:
        return {}
    needs = replace(needs, size=needs.drawn_size or needs.size)
    vae = _autoencoder(needs, needs.vae_dtype)
    rows = 2 * needs.decoded if needs.rows is None else needs.rows
    gone = 0 if needs.vae_stays else held.leaving
    common = {"autoencoder": _bytes(vae), **_residents(needs)}
    if held.whole:
        common["gathered weights"] = held.whole
    denoising = {
        "weights and state": held.kept,
        **common,
        "activations": _asking(needs, held, rows),
    }
    decoding = {
        "weights and state": held.kept - gone,
        **common,
        "activations": _decoding(vae, needs, needs.decoded),
    }
    return max(denoising, decoding, key=_total)


def _residents(needs: Needs) -> dict[str, int]:
    """What is on the device all the time beside the network."""
    scorers = [param for scorer in needs.scorers for param in scorer.parameters()]
    made: dict[str, int] = {}
    if needs.vae_stays:
        made["autoencoder"] = _bytes(_autoencoder(needs, needs.vae_dtype))
    for part in () if needs.text_on_cpu else needs.live_text:
        if (needs.config.folder / part / "config.json").is_file():
            made[part] = _stored(_encoder(needs.config, part), needs.dtype, needs.text_bytes)
    if scorers:
        made["rewards"] = sum(param.nbytes for param in scorers)
    return made


def _before(needs: Needs) -> dict[str, int]:
    """What of these is there before texts and latents are made."""
    return {name: size for name, size in _residents(needs).items() if name in needs.before_texts}


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


# ---- the parts ----


def _encoders(needs: Needs, dtype: torch.dtype, captions: int) -> list[Mapping[str, int]]:
    """Weights and activations of each text encoder."""
    made: list[Mapping[str, int]] = []
    for part, tokens in needs.config.text_lengths.items():
        if not (needs.config.folder / part / "config.json").is_file():  # SD3 without T5
            continue
        encoder = _encoder(needs.config, part)
        made.append(
            {
                part: _stored(encoder, dtype, needs.text_bytes),
                "activations": _reading(encoder, dtype, captions, tokens),
            }
        )
    return made


_made: dict[Path, nn.Module] = {}


def _encoder(config: Model, part: str) -> nn.Module:
    """A text encoder on the meta device, made once."""
    folder = config.folder / part
    if folder not in _made:
        _made[folder] = config.meta_encoder(part)
    return _made[folder]


@cache
def _stored(
    encoder: nn.Module, dtype: torch.dtype, text_bytes: Callable[[nn.Module, torch.dtype], int]
) -> int:
    return text_bytes(encoder, dtype)


@cache
def _reading(encoder: nn.Module, dtype: torch.dtype, captions: int, tokens: int) -> int:
    """Bytes that are alive while an encoder reads captions."""
    encoder = encoder.to(dtype)
    words = torch.empty(captions, tokens, dtype=torch.int64, device="meta")
    return cost.live_bytes(lambda: encoder(words, output_hidden_states=True, return_dict=True))


_asked: WeakKeyDictionary[nn.Module, dict[object, int]] = WeakKeyDictionary()


def _asking(needs: Needs, held: Held, rows: int) -> int:
    """Bytes that are alive while the network predicts, without a gradient."""
    counted = _asked.setdefault(held.network, {})
    key = (needs.size, needs.dtype)
    if key not in counted:
        inputs = needs.config.meta_inputs(1, needs.config.latent_shape(*needs.size), needs.dtype)
        network = held.network.eval()
        counted[key] = cost.live_bytes(
            lambda: needs.config.predict(network, *inputs, needs.dtype), autocast=needs.dtype
        )
    return rows * counted[key]  # the rows do not know of each other


_ADAPTERS = ("lora_", "hada_", "lokr_")  # in peft's names of their weights

_own: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _own_weights(network: nn.Module) -> int:
    """How many weights are the network's own: no adapter's."""
    if network not in _own:
        named = network.named_parameters()
        own = (param for name, param in named if not any(word in name for word in _ADAPTERS))
        _own[network] = sum(param.numel() for param in own)
    return _own[network]


def _autoencoder(needs: Needs, dtype: torch.dtype) -> Any:
    return _autoencoder_of(json.dumps(needs.config.vae, sort_keys=True, default=list), dtype)


@cache
def _autoencoder_of(config: str, dtype: torch.dtype) -> Any:
    return meta_autoencoder(json.loads(config), dtype)


def meta_autoencoder(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """An autoencoder on the meta device, without weights."""
    with torch.device("meta"):
        vae: Any = diffusers.AutoencoderKL.from_config(dict(config))
    for param in vae.parameters():
        param.data = param.data.to(dtype)  # its own `to` has remarks
    return vae


def _bytes(model: nn.Module) -> int:
    return sum(param.nbytes for param in model.parameters())


def _encoding(vae: Any, needs: Needs) -> int:
    """Bytes beside the weights while pictures are encoded."""
    count, size = _at_once(vae, needs, needs.encoded)
    given = needs.encoded * 3 * math.prod(needs.size) * vae.dtype.itemsize
    return given + _alive(vae, "encode", (count, 3, *size))


def _decoding(vae: Any, needs: Needs, count: int) -> int:
    """Bytes beside the weights while latents are decoded."""
    once, (height, width) = _at_once(vae, needs, count)
    step = needs.config.pixels_per_latent
    shape = (once, needs.config.vae["latent_channels"], height // step, width // step)
    alive = _alive(vae, "decode", shape)
    if (once, (height, width)) == (count, needs.size):
        return alive
    return alive + count * 3 * math.prod(needs.size) * vae.dtype.itemsize  # and what is done


def _at_once(vae: Any, needs: Needs, count: int) -> tuple[int, tuple[int, int]]:
    """Pictures, or tiles of them, that pass through the autoencoder together, and their size."""
    side = vae.tile_sample_min_size if needs.tiling else max(needs.size)
    height, width = needs.size
    return min(count, 1) if needs.slicing else count, (min(height, side), min(width, side))


@cache
def _alive(vae: Any, way: Literal["encode", "decode"], shape: tuple[int, ...]) -> int:
    given = torch.empty(shape, dtype=vae.dtype, device="meta")
    return cost.live_bytes(lambda: getattr(vae, way)(given))
