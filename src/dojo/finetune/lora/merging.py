"""Puts LoRAs into a model's weights, or several LoRAs into one.

    python -m dojo.lora merge --input outputs/hearts --base MODEL --output hearts-model
    python -m dojo.lora merge --input hearts.safetensors --base model.safetensors \
        --output hearts-model.safetensors
    python -m dojo.lora merge --input a.safetensors b.safetensors --scales 1 0.5 \
        --output both.safetensors

With --base the result is a folder like the base's, with every weight, or one file where the base
is one. Without it the factors are laid side by side: the result does exactly what the inputs do
together, and its rank is their sum.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from dojo.cli import UserError
from dojo.files import tensors
from dojo.finetune.lora import algebra, bases, formats, reading
from dojo.finetune.lora.files import find, together
from dojo.finetune.lora.layers import Factors, is_dora
from dojo.finetune.lora.lycoris import Update
from dojo.finetune.lora.placing import TEXT_MODEL, check_lost
from dojo.lazy import torch
from dojo.models.folders import UNET, find_folder
from dojo.models.unet import single_file
from dojo.models.unet.single_file import CONFIG_FLAG

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.finetune.lora.bases import Base
    from dojo.finetune.lora.layers import Lora
    from dojo.models.unet.ldm import Origin
    from dojo.models.unet.single_file import SingleFile


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to merge, and into what."""

    input: tuple[str, ...]
    """LoRA, LoHa or LoKr files, folders or hub ids of any public trainer"""
    output: Path
    """with a folder as --base a new folder, else the .safetensors file to write"""
    base: str | None = None
    """folder, hub id or single file (.safetensors, .ckpt) of the model whose weights they go into;
    unset: one LoRA is made of all"""
    single_file_config: str | None = None
    """with a single file as --base: folder or hub id of the same model in parts, which says how it
    is built; unset is told by the file"""
    scales: tuple[float, ...] = (1.0,)
    """strength of each input, or one for all"""
    lora_format: formats.Format = "diffusers"
    """format of the LoRA that is written without --base"""
    overwrite: bool = False
    """replace the output if it is there"""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("--input needs at least one LoRA")
        if len(self.scales) not in (1, len(self.input)):
            raise ValueError(f"--scales needs one number, or {len(self.input)}: one for each input")
        if self.base is None and self.output.suffix != ".safetensors":
            raise ValueError("--output must end in .safetensors (or give --base)")
        if self.base is None and len(self.input) == 1:
            raise ValueError("--input: one LoRA alone is merged into a --base")
        if self.into_file and self.output.suffix != ".safetensors":
            raise ValueError("--output must end in .safetensors, as --base is one file")
        if self.base and not self.into_file and self.output.suffix == ".safetensors":
            raise ValueError("--output is a folder with a folder as --base")
        if self.single_file_config and not self.into_file:
            raise ValueError("--single_file_config goes with a single file as --base")
        if self.base is not None and self.lora_format != "diffusers":
            raise ValueError("--lora_format is of a LoRA; with --base a model is written")

    @property
    def into_file(self) -> bool:
        """Whether the base is one file."""
        return self.base is not None and single_file.is_named_like_one(self.base)

    def strengths(self) -> list[float]:
        """One for each input."""
        return list(self.scales) * (len(self.input) if len(self.scales) == 1 else 1)


def main(args: Args) -> None:
    """Reads, merges, writes, and says what was left out."""
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: {args.output} is there already (--overwrite replaces it)")
    if args.base is None:
        _into_one(args)
    elif args.into_file:
        _into_file(args, Path(args.base))
    else:
        _into_base(args, args.base)


# ---- LoRAs into one ----


def _into_one(args: Args) -> None:
    if args.output.is_dir():
        raise UserError(f"--output: {args.output} is a folder; name a file in it")
    parts: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
    known: list[Base] = []
    for name, strength in zip(args.input, args.strengths(), strict=True):
        where = f"--input: {name}"
        file = reading.read_any(find(name, "--input"), where)
        check_lost(together({}, file.lora, file.kin), file.lost, where)
        if file.kin or any(map(is_dora, file.lora.values())):
            method = "a LoHa or LoKr" if file.kin else "a DoRA"
            raise UserError(
                f"{where} is {method}, which adds up with others in a model only (--base)"
            )
        known.append(bases.guess(file.lora, file.metadata)[0])
        for part, layers in file.lora.items():
            for layer, factors in layers.items():
                there = parts.setdefault(part, {}).setdefault(layer, [])
                there.append((factors, strength))
        _say_lost(name, file.lost)
    if len({base.family for base in known}) > 1:
        families = " and ".join(sorted({base.family for base in known}))
        raise UserError(f"--input: the LoRAs are for different models, {families}")
    lora: Lora = {
        part: {layer: algebra.added(several) for layer, several in layers.items()}
        for part, layers in parts.items()
    }
    formats.write(args.output, lora, args.lora_format, known[0])
    count = {part: len(layers) for part, layers in lora.items()}
    print(
        f"{args.output}: {count} layers of {len(args.input)} LoRAs in {args.lora_format}'s format"
    )


def _say_lost(name: str, lost: list[str]) -> None:
    if lost:
        print(f"{name}: {len(lost)} layers have no place, such as {lost[0]}")


# ---- LoRAs into a base ----

_PLAIN = re.compile(r"[a-z_]+(?:-\d+-of-\d+)?\.safetensors")
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".ckpt", ".h5", ".onnx", ".pt")
Change = tuple[Factors | Update, float]
Changes = dict[Any, dict[str, list[Change]]]
"""by where a tensor lies (a folder's file, or a name in a single file), then by its name"""


def _into_base(args: Args, base: str) -> None:
    folder = find_folder(base, "--base", revision=None, variant=None)
    weights: dict[str, dict[str, Path]] = {}

    def weights_of(part: str) -> Mapping[str, Path]:
        return weights.setdefault(part, _weights_of(folder, part))

    changes, count = _collect(args, _blocks_of(folder), weights_of)
    used = {path for there in weights.values() for path in there.values()}
    _write_folder(args, folder, changes, used)
    print(f"{args.output}: {folder} with {count} updates of {len(args.input)} files")


def _collect(
    args: Args, blocks: Any, weights_of: Callable[[str], Mapping[str, Any]]
) -> tuple[Changes, int]:
    """What changes in a base, and how many updates that are.

    Args:
        blocks: how its UNet is built.
        weights_of: the tensors of a part by diffusers' names, and where each lies.
    Raises:
        UserError: a LoRA is for another model.
    """
    changes: Changes = {}
    count = 0
    for name, strength in zip(args.input, args.strengths(), strict=True):
        where = f"--input: {name}"
        file = reading.read_any(find(name, "--input"), where, blocks=blocks)
        found: dict[str, dict[str, Any]] = {}
        lost = list(file.lost)
        for part, layers in together({}, file.lora, file.kin).items():
            there = weights_of(part)
            for layer, update in layers.items():
                tensor = _tensor_of(there, layer)
                if tensor is None:
                    lost.append(f"{part}.{layer}")
                    continue
                found.setdefault(part, {})[layer] = update
                change = changes.setdefault(there[tensor], {}).setdefault(tensor, [])
                change.append((update, strength))
                count += 1
        check_lost(found, lost, where)
        _say_lost(name, lost)
    return changes, count


def _blocks_of(folder: Path) -> Any:
    path = folder / UNET / "config.json"
    return bases.Blocks.of(json.loads(path.read_text())) if path.is_file() else None


def _weights_of(folder: Path, part: str) -> dict[str, Path]:
    """The tensors of a part by name, and where each is; nothing of a part that is not there.

    Raises:
        UserError: the part is there and has no .safetensors.
    """
    if not (folder / part).is_dir():
        return {}
    files = sorted((folder / part).glob("*.safetensors"))
    plain = [path for path in files if _PLAIN.fullmatch(path.name)] or files
    if not plain:
        raise UserError(f"--base: {folder / part} has no .safetensors, which alone are merged into")
    found: dict[str, Path] = {}
    for path in plain:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
        if names & found.keys():
            raise UserError(f"--base: {folder / part} has several variants of its weights")
        found |= dict.fromkeys(names, path)
    return found


def _tensor_of(weights: Mapping[str, Any], layer: str) -> str | None:
    names = (f"{layer}.weight", f"{layer.removeprefix(TEXT_MODEL)}.weight")
    return next((name for name in names if name in weights), None)


def _write_folder(
    args: Args,
    folder: Path,
    changes: Mapping[Path, Mapping[str, list[Change]]],
    used: Collection[Path],
) -> None:
    """The base's folder with the files replaced that have changed; whole, or not there.

    Of a part that changes, other copies of its weights (variants, pickles) are left out: they would
    be those of the base.

    Args:
        used: the files of weights of those parts.
    """
    unfinished = args.output.with_name(f"{args.output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    parts = {path.parent for path in used}

    def left_out(inside: str, names: list[str]) -> list[str]:
        paths = {name: Path(inside) / name for name in names}
        stale = {n for n, path in paths.items() if path.parent in parts and path not in used}
        return [
            name
            for name, path in paths.items()
            if path in changes or name == ".git" or (name in stale and name.endswith(_WEIGHTS))
        ]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, unfinished, ignore=left_out)
    try:
        for path, tensors_ in changes.items():
            _rewrite(path, unfinished / path.relative_to(folder), tensors_)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if args.output.is_dir():
        shutil.rmtree(args.output)
    unfinished.rename(args.output)


def _rewrite(source: Path, target: Path, changes: Mapping[str, list[Change]]) -> None:
    """A file of weights with updates in some of them; the others, types and header stay.

    Raises:
        UserError: an update has another size than its weight.
    """
    with safe_open(source, framework="pt") as opened:
        made: dict[str, Callable[[str], Tensor]] = {
            name: partial(_changed, opened, name, changes.get(name, ()))
            for name in list(opened.keys())
        }
        metadata: dict[str, str] = opened.metadata() or {}
        tensors.save(target, made, metadata)


def _changed(opened: Any, name: str, changes: Any, device: str) -> Tensor:
    if device == "meta":
        part = opened.get_slice(name)
        return torch.empty(part.get_shape(), dtype=opened.get_tensor(name).dtype, device="meta")
    weight: Tensor = opened.get_tensor(name)
    return _updated(weight, name, changes).to(weight.dtype) if changes else weight


def _updated(weight: Tensor, name: str, changes: Iterable[Change]) -> Tensor:
    """A weight with updates: float32.

    Raises:
        UserError: one has another size than the weight.
    """
    new = weight.float()
    for update, strength in changes:
        try:
            new = algebra.merged(new, update, strength)
        except RuntimeError as error:
            raise UserError(f"--input: a layer {name} has another size in --base") from error
    return new


# ---- LoRAs into a single file ----

# Of a header: what is no longer so.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_AVERAGED = "model_ema."


def _into_file(args: Args, path: Path) -> None:
    if args.output.is_dir():
        raise UserError(f"--output: {args.output} is a folder; name a file in it")
    file = single_file.inspect(path.expanduser(), "--base")
    if args.single_file_config:
        folder = find_folder(args.single_file_config, CONFIG_FLAG, revision=None, variant=None)
    else:
        folder = single_file.configurations(file)
    origins = {
        part: single_file.origins(file, part, folder)
        for part in single_file.PARTS[file.family]
        if part in file
    }

    def weights_of(part: str) -> Mapping[str, str]:
        found = origins.get(part, {}).items()
        return {ours: name for name, origin in found for ours in origin.names}

    changes, count = _collect(args, _blocks_of(folder), weights_of)
    _write_file(args.output, file, origins, changes)
    print(f"{args.output}: {path} with {count} updates of {len(args.input)} files")


def _write_file(
    path: Path, file: SingleFile, origins: Mapping[str, Mapping[str, Origin]], changes: Changes
) -> None:
    """A single file with updates in some of its tensors; the others, types and marks stay.

    A second, averaged UNet is left out where the plain one has changed: it would be the base's.
    """
    known = {name: origin for part in origins.values() for name, origin in part.items()}
    names = list(file.contents.entries)
    if file.has_ema and changes.keys() & origins["unet"].keys():
        names = [name for name in names if not name.startswith(_AVERAGED)]
        print(f"left out: the averaged UNet of {file.path.name}, which is the base's")
    kept = {key: text for key, text in file.contents.metadata.items() if key not in _STALE}
    with file.contents.opened() as get:
        made: dict[str, tensors.Source] = {
            name: partial(_changed_in_file, get, name, known.get(name), changes.get(name, {}))
            for name in names
        }
        tensors.save(path, made, kept)


def _changed_in_file(
    get: Callable[[str], Tensor],
    name: str,
    origin: Origin | None,
    changes: Mapping[str, list[Change]],
    device: str,
) -> Tensor:
    """A tensor of the file; of one that is several of diffusers', some parts may have changed."""
    tensor = get(name)
    if device == "meta" or origin is None or not changes:
        return tensor.to(device)
    parts = origin.split(tensor.float())
    for ours, updates in changes.items():
        parts[ours] = _updated(parts[ours], ours, updates)
    joined = origin.join([parts[ours] for ours in origin.names])
    return joined.reshape(tensor.shape).to(tensor.dtype)
