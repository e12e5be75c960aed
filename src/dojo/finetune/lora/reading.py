"""A LoRA file of any public trainer, as the updates that it means.

Factors are called .lora_A.weight and .lora_B.weight (diffusers, peft) or .lora_down.weight and
.lora_up.weight (the others); alpha is a tensor beside them, or stands in diffusers' header or in
peft's adapter_config.json; without one it is the rank. LyCORIS puts a core between the factors of a
convolution (.lora_mid.weight), and writes a DoRA's magnitudes as .dora_scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from dojo.cli import UserError
from dojo.finetune.lora import lycoris, names
from dojo.finetune.lora.layers import Factors, Lora, from_original, is_dora
from dojo.lazy import torch
from dojo.models.folders import TRANSFORMER, UNET
from dojo.models.keys import Blocks

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.finetune.lora.layers import Layers

METADATA = "lora_adapter_metadata"  # where diffusers looks for the adapters' configurations
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

_PART = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight|"
    r"\.lora_(?P<new>A|B|down|up|mid)(?:\.\w+)?\.weight|"
    r"\.(?P<alone>dora_scale|lora_magnitude_vector|alpha)(?:\.\w+)*)"
)
_KINDS = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude"}
# Updates that are no product of two factors, or that come beside one, by the ends of their names.
_FOREIGN = {
    "OFT": r"oft_\w+",
    "GLoRA": r"[ab][12]\.weight",
    "a whole difference": r"diff|diff_b|set_weight|reshape_weight|[wb]_norm",
    "a bias of its own": r"lora_(?:B|up)(?:\.\w+)?\.bias",
    "an embedding's LoRA": r"lora_embedding_[AB](?:\.\w+)*",
    "a scalar of its own": r"scalar",
}
_FOREIGN_PART = re.compile(
    r"(?P<layer>.+?)\.(?:"
    + "|".join(f"(?P<k{i}>{end})" for i, end in enumerate(_FOREIGN.values()))
    + ")"
)
# Those of LyCORIS that peft has too.
_KIN_PART = re.compile(r"(?P<layer>.+?)\.(?P<end>(?P<method>hada|lokr)_\w+)")
_METHODS: dict[str, lycoris.Method] = {"hada": "LoHa", "lokr": "LoKr"}
# peft changes the base's weights beside these, and the file alone is not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class File:
    """What a file holds."""

    lora: Lora
    kin: lycoris.Updates
    """its layers by LoHa and LoKr"""
    lost: list[str]
    """layers that no Stable Diffusion has"""
    metadata: dict[str, str]
    """the header's free text"""


class _Troubled(Exception):
    """A layer that cannot be read as it was meant: why, and what to call it if not its name."""


def read(
    path: Path,
    where: str | None = None,
    *,
    partial: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Lora, list[str]]:
    """A LoRA file of a Stable Diffusion, and the layers in it that none of them has.

    Args:
        where: what error messages call the file.
        blocks: how the UNet is built that it is for; unset, layers called as in the original code
            are taken for SDXL's (or those of a pocket model, if their places say so).
        partial: leave out, as a whole, layers that cannot be read as they were meant (LoHa, a
            missing half, a bias beside the factors); they are given back among the others.

    Raises:
        UserError: the file is broken, no LoRA, for another model, or has such layers.
    """
    file = read_any(path, where, partial=partial, blocks=blocks, kin=False)
    return file.lora, file.lost


def read_any(
    path: Path,
    where: str | None = None,
    *,
    partial: bool = False,
    blocks: Blocks | None = None,
    kin: bool = True,
) -> File:
    """The same, of a file that may also be a LoHa or LoKr.

    Args:
        kin: whether such layers can be taken.

    Raises:
        UserError: see `read`.
    """
    where = where or str(path)
    state, metadata = _open(path, where)
    halves, others, foreign, rest = _sort(state)
    if other := names.family([*halves, *others, *foreign]):
        raise UserError(
            f"{where} is a LoRA for {other[0]}, and here are Stable Diffusion 1, 2, XL and 3 (a "
            f"layer is called {other[1]})"
        )
    if not halves and not others and not foreign:
        raise UserError(f"{where} is no LoRA (its names begin with {min(state)!r})")
    config = _configuration(path, where, metadata, state)
    blocks = blocks or Blocks.told_by(names.originals([*halves, *others, *foreign]))
    lora: Lora = {}
    updates: lycoris.Updates = {}
    lost, good = rest, 0
    troubled: dict[str, list[str]] = {}
    for layer in dict.fromkeys([*halves, *others, *foreign]):
        place = names.resolve(layer, blocks)
        if place is None:
            lost.append(layer)
            continue
        part, name = place
        try:
            if layer in foreign:
                raise _Troubled(*foreign[layer])
            if layer in others:
                update = _kin(others[layer], halves.get(layer, {}), taken=kin)
                if name in updates.get(part, {}):
                    raise _Troubled("there twice")
                updates.setdefault(part, {})[name] = update
                good += 1
                continue
            found = _split(part, name, _factors(halves[layer], config.get(part, {}), name))
            if not found.keys().isdisjoint(lora.get(part, {})):
                raise _Troubled("there twice")
        except (_Troubled, lycoris.Unreadable) as trouble:
            title, *shown = trouble.args
            troubled.setdefault(title, []).append(shown[0] if shown else layer)
            continue
        lora.setdefault(part, {}).update(found)
        good += 1
    if not lora and not updates and not troubled:
        # Nothing of it is known by name: at least the method is.
        for title, key in [*foreign.values(), *map(_method, others.values())]:
            troubled.setdefault(title, []).append(key)
    if troubled and not (partial and good):
        _refuse(where, troubled, good)
    _refuse_useless(where, lora)
    lost += [name for shown in troubled.values() for name in shown]
    return File(lora=lora, kin=updates, lost=lost, metadata=metadata)


def _method(parts: Mapping[str, tuple[str, Tensor]]) -> tuple[lycoris.Method, str]:
    """LoHa or LoKr, and one of the names in the file."""
    end, (key, _) = next(iter(parts.items()))
    return _METHODS[end.partition("_")[0]], key


def _kin(
    parts: Mapping[str, tuple[str, Tensor]], rest: Mapping[str, Tensor], *, taken: bool
) -> lycoris.Update:
    method, key = _method(parts)
    if not taken:
        raise _Troubled(method, key)
    return lycoris.read(method, {end: tensor for end, (_, tensor) in parts.items()}, rest)


def _open(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's free text, of a file that has a LoRA's names in it."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{where} is a pickle, which can run any code when it is read: it has to be saved as "
            ".safetensors first, by the program that made it"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            all_names = list(opened.keys())
            if all_names and not any(map(_is_of_lora, all_names)):
                raise UserError(f"{where} is no LoRA (its names begin with {min(all_names)!r})")
            state = {name: opened.get_tensor(name) for name in all_names}
            metadata: dict[str, str] = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} cannot be read ({str(error).splitlines()[0]})") from error
    if not state:
        raise UserError(f"{where} is empty: there is no tensor in it")
    return state, metadata


def _is_of_lora(name: str) -> bool:
    return any(one.fullmatch(name) for one in (_PART, _KIN_PART, _FOREIGN_PART))


def is_lora(all_names: Iterable[str]) -> bool:
    """Whether a file with these tensors is a LoRA, or of LoRA's kin, and no model."""
    return any(map(_is_of_lora, all_names))


def is_lycoris(path: Path) -> bool:
    """Whether a file has layers by LoHa or LoKr; one that cannot be read has none."""
    try:
        with safe_open(path, framework="pt") as opened:
            return any(map(_KIN_PART.fullmatch, opened.keys()))
    except (OSError, SafetensorError):
        return False


def _sort(
    state: Mapping[str, Tensor],
) -> tuple[
    dict[str, dict[str, Tensor]],
    dict[str, dict[str, tuple[str, Tensor]]],
    dict[str, tuple[str, str]],
    list[str],
]:
    """Tensors by layer and kind: of LoRA, then of LoHa and LoKr with their names in the file;

    then layers of other methods, with title and a key; and other names.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    kin: dict[str, dict[str, tuple[str, Tensor]]] = {}
    foreign: dict[str, tuple[str, str]] = {}
    rest = []
    for name, tensor in state.items():
        if match := _KIN_PART.fullmatch(name):
            kin.setdefault(names.clean(match["layer"]), {})[match["end"]] = (name, tensor)
        elif match := _FOREIGN_PART.fullmatch(name):
            title = next(t for i, t in enumerate(_FOREIGN) if match[f"k{i}"])
            foreign.setdefault(names.clean(match["layer"]), (title, name))
        elif match := _PART.fullmatch(name):
            word = match["old"] or match["new"] or match["alone"]
            # The old spelling's layer ends in to_q_lora, which `clean` knows.
            layer = match["layer"] + ("_lora" if f"_lora.{match['old']}." in name else "")
            there = halves.setdefault(names.clean(layer), {})
            kind = _KINDS.get(word, word)
            there["twice" if kind in there else kind] = tensor
        else:
            rest.append(name)
    return halves, kin, foreign, rest


def _factors(there: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Factors:
    """The update that one layer's tensors mean, a core contracted into the down-projection."""
    for kind, title in (("down", "lora_A (down)"), ("up", "lora_B (up)")):
        if kind not in there:
            raise _Troubled(f"without {title}")
    if "twice" in there:
        raise _Troubled("there twice")
    if not all(tensor.float().isfinite().all() for tensor in there.values()):
        raise _Troubled("not finite")
    if "alpha" in there and there["alpha"].numel() != 1:
        raise _Troubled("of more than one alpha")
    down, up = there["down"], there["up"]
    if "mid" in there:
        down = _contracted(down, there["mid"])
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0]
    if not fits or up.shape[2:].numel() != 1:
        raise _Troubled("of shapes that do not belong together")
    if up.shape[1] == 0:
        raise _Troubled("of rank 0")
    alpha = float(there["alpha"]) if "alpha" in there else _alpha(config, name, up.shape[1])
    return Factors(down, up, alpha, _magnitude(there, up.shape[0]))


def _contracted(down: Tensor, core: Tensor) -> Tensor:
    """A Tucker core [rank, rank', h, w] and a 1x1 down [rank', in, 1, 1] as one convolution."""
    if core.ndim != 4 or down.ndim not in (2, 4) or core.shape[1] != down.shape[0]:
        raise _Troubled("of shapes that do not belong together")
    narrow = down.flatten(1)
    if narrow.shape != down.shape[:2]:
        raise _Troubled("of shapes that do not belong together")
    return torch.einsum("abhw,bc->achw", core.float(), narrow.float()).contiguous()


def _magnitude(there: Mapping[str, Tensor], rows: int) -> Tensor | None:
    """A DoRA's norms of the rows [out]; LyCORIS may have written those of the columns instead."""
    if "magnitude" in there:
        norms = there["magnitude"]
    elif "dora_scale" in there:
        norms = there["dora_scale"]
        if norms.shape[:1] != (rows,):
            raise _Troubled("a DoRA over the columns (dora_scale [1, in]), which peft has not")
    else:
        return None
    if norms.numel() != rows:
        raise _Troubled("of shapes that do not belong together")
    return norms.flatten()


def _split(part: str, name: str, factors: Factors) -> Layers:
    """The layer under diffusers' name; an original one of an MMDiT may be several."""
    try:
        return from_original(name, factors) if part == TRANSFORMER else {name: factors}
    except KeyError:
        return {name: factors}  # diffusers' already


def _configuration(
    path: Path, where: str, metadata: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """peft's settings by part, from diffusers' header, or for a file of peft's from beside it."""
    is_pefts = path.name == PEFT_WEIGHTS or any(n.startswith("base_model.model.") for n in state)
    beside = path.parent / PEFT_CONFIG
    if METADATA in metadata:
        found: dict[str, dict[str, Any]] = {}
        for key, value in _object(metadata[METADATA], where).items():
            part, _, setting = key.partition(".")
            found.setdefault(part, {})[setting] = value
        return found
    if is_pefts and beside.is_file():
        config = _object(beside.read_text(encoding="utf-8", errors="replace"), where)
        _check_peft(config, where)
        return dict.fromkeys((TRANSFORMER, UNET, "text_encoder", "text_encoder_2"), config)
    if path.name == PEFT_WEIGHTS:
        raise UserError(f"{where}: {PEFT_CONFIG}, which has its alpha, is not beside it")
    return {}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: the settings of its adapter are broken ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: the settings of its adapter are broken (no JSON object)")
    return found


def _check_peft(config: Mapping[str, Any], where: str) -> None:
    """Refuses other methods of peft, and those that change more than the file holds."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{where} is no LoRA: {PEFT_CONFIG} calls it {kind}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise UserError(
            f"{where} began from {start}, which changes the base's weights too: it has to be saved "
            "by peft as a plain LoRA"
        )


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha that peft's settings give a layer; the rank without any."""
    if "lora_alpha" not in config:
        return float(rank)
    try:
        factor = rank**0.5 if config.get("use_rslora") else 1.0
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", name):
                return float(value) * factor
        return float(config["lora_alpha"]) * factor
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise _Troubled(f"of an alpha that is no number ({error})") from error


def _refuse(where: str, troubled: Mapping[str, list[str]], good: int) -> NoReturn:
    bad = sum(map(len, troubled.values()))
    reasons = "; ".join(
        f"{len(shown)} are {title}, such as {shown[0]}" for title, shown in troubled.items()
    )
    advice = ""
    if good:
        advice = " (`python -m dojo.lora convert --partial` writes a file without them)"
    raise UserError(
        f"{where}: {bad} of {good + bad} layers cannot be taken over as they were meant: "
        f"{reasons}{advice}"
    )


def _refuse_useless(where: str, lora: Lora) -> None:
    """Files that no pipeline could do anything with, or only something else than what was meant."""
    layers = [factors for there in lora.values() for factors in there.values()]
    if layers and all(factors.alpha == 0 for factors in layers):
        raise UserError(f"{where} does nothing: its alpha is 0")
    for part, there in lora.items():
        if is_dora(there) and any(factors.magnitude is None for factors in there.values()):
            raise UserError(
                f"{where} adapts some layers of the {part} as a DoRA and some as a plain LoRA, "
                "which peft cannot do in one adapter"
            )
