"""Adapters on disk: saved so that they say their alpha, loaded so that they are known to arrive."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download

from dojo.cli import UserError
from dojo.files import outputs, tensors
from dojo.finetune.lora import bases, formats, lycoris, reading
from dojo.finetune.lora.injected import ADAPTER, config_of, set_state, state
from dojo.finetune.lora.layers import is_dora
from dojo.finetune.lora.placing import add_loaded, check_lost, fit, fit_lycoris, in_file
from dojo.finetune.lora.reading import METADATA, PEFT_CONFIG, PEFT_WEIGHTS
from dojo.lazy import nn, safetensors_torch, torch
from dojo.models.folders import UNET
from dojo.models.keys import Blocks
from dojo.models.opening import facts_of

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.finetune.lora.adapter import LoraArgs
    from dojo.finetune.lora.bases import Base
    from dojo.finetune.lora.formats import Format
    from dojo.finetune.lora.layers import Factors, Layers, Lora

WEIGHTS = "pytorch_lora_weights.safetensors"


def save(
    folder: Path,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`.

    The adapters' configurations go into the file's header: without them diffusers would take
    alpha for the rank. Equal weights give equal bytes.
    """
    models = _models(network, text_encoder, text_encoder_2)
    if kin := _held(models):
        formats.write_lycoris(outputs.own(folder / WEIGHTS), kin)
        return
    weights: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part, model in models.items():
        weights |= _named(part, model)
        for name, value in config_of(model)[ADAPTER].to_dict().items():
            if name == "base_model_name_or_path":
                continue  # a path of this machine
            if name == "target_modules":
                value = sorted(map(formats.any_release, value))
            config[f"{part}.{name}"] = sorted(value) if isinstance(value, set) else value
    metadata = {METADATA: json.dumps(config, indent=2, sort_keys=True)}
    tensors.save(outputs.own(folder / WEIGHTS), weights, metadata)


def export(folder: Path, form: Format, base: Base | None = None) -> Path:
    """Writes a saved adapter in another format beside diffusers' file and returns where.

    Args:
        base: the model it is for; unset, it is guessed from the layers.

    Raises:
        UserError: it has no form in that format (DoRA).
    """
    source = folder / WEIGHTS
    if form == "diffusers":
        return source
    target = source.with_name(f"{source.stem}_{form}.safetensors")
    if form == "comfyui" and base is not None and base.adapters_are_pefts:
        target = source.with_name(form) / PEFT_WEIGHTS  # its configuration comes beside it
    formats.write(outputs.own(target), reading.read(source)[0], form, base)
    return target


def _named(part: str, model: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors by their names in a file."""
    return {f"{part}.{in_file(part, name)}": value for name, value in state(model).items()}


def restore(
    folder: Path,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Puts a saved adapter's tensors back into models that have the same adapters.

    Raises:
        UserError: the file's tensors are not exactly those of the adapters.
    """
    models = _models(network, text_encoder, text_encoder_2)
    if kin := _held(models):
        _restore_lycoris(folder / WEIGHTS, models, kin)
        return
    saved = safetensors_torch.load_file(folder / WEIGHTS)
    own: dict[str, Tensor] = {}
    for part, model in models.items():
        own |= _named(part, model)
    wrong = sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} does not fit this adapter (other --rank, --lora_layers or "
            f"--train_text_encoder?): {', '.join(wrong[:4])}"
        )
    for part, model in models.items():
        mine = {name: saved[f"{part}.{in_file(part, name)}"] for name in state(model)}
        set_state(model, mine)


def _held(models: Mapping[str, nn.Module]) -> lycoris.Updates:
    """What adapters by LoHa or LoKr hold, by the names that files have."""
    held = {part: lycoris.of_model(model) for part, model in models.items()}
    return {
        part: {in_file(part, name): update for name, update in updates.items()}
        for part, updates in held.items()
        if updates
    }


def _restore_lycoris(path: Path, models: Mapping[str, nn.Module], kin: lycoris.Updates) -> None:
    saved = fit_lycoris(reading.read_any(path).kin, models, str(path))[0]
    own = {part: lycoris.of_model(models[part]) for part in kin}

    def shapes(updates: lycoris.Updates) -> dict[str, Any]:
        return {
            f"{part}.{name}.{kind}": tensor.shape
            for part, layers in updates.items()
            for name, update in layers.items()
            for kind, tensor in update.parts.items()
        }

    if shapes(saved) != shapes(own):
        raise UserError(f"{path} does not fit this adapter (another --init_lora_weights_path?)")
    for part, updates in saved.items():
        lycoris.put(models[part], updates)


def lycoris_start(args: LoraArgs) -> Path | None:
    """The file of `--init_lora_weights_path`, if its layers are LoHa or LoKr; these are kept."""
    if args.init_lora_weights_path is None:
        return None
    path = find(args.init_lora_weights_path, "--init_lora_weights_path")
    return path if reading.is_lycoris(path) else None


def add_lycoris(path: Path, network: nn.Module, args: LoraArgs, part: str) -> list[nn.Parameter]:
    """Adds the adapters of a LoHa or LoKr to one part, and returns their parameters, in float32.

    Raises:
        UserError: see `load`; or the options want something else of them.
    """
    where = f"--init_lora_weights_path: {path}"
    if args.lora_format != "diffusers":
        raise UserError(
            f"--lora_format {args.lora_format}: a LoHa or LoKr is saved in LyCORIS' own format "
            "alone, which kohya's scripts and ComfyUI read"
        )
    if args.conv_rank or args.lora_dropout:
        flag = "--conv_rank" if args.conv_rank else "--lora_dropout"
        raise UserError(f"{flag}: {path} is a LoHa or LoKr, whose layers are trained as they are")
    file = reading.read_any(path, where, blocks=_blocks(network) if part == UNET else None)
    if file.lora:
        _fit(file, {part: network}, where)
        raise UserError(f"{where} is only partly a LoHa or LoKr")
    mine = replace(file, kin={key: value for key, value in file.kin.items() if key == part})
    updates = _fit(mine, {part: network}, where)[1]
    lycoris.add(network, updates[part])
    params = [param for param in network.parameters() if param.requires_grad]
    for param in params:
        param.data = param.data.float()
    return params


def start_from(
    args: LoraArgs,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Makes fresh adapters compute what `--init_lora_weights_path` computes; unset does nothing.

    A file of smaller rank fills the first ranks; in the others B stays zero and A random, so
    that the update is the file's and every rank can learn. Layers that the file lacks stay fresh.
    Files for a UNet often adapt convolutions and text encoders too: those that are not trained here
    are left out, and it is said.

    Raises:
        UserError: the file has other layers than the adapters, or a larger rank, or is a DoRA.
    """
    if args.init_lora_weights_path is None or lycoris.of_model(network):
        return
    flag = "--init_lora_weights_path"
    path = find(args.init_lora_weights_path, flag)
    where = f"{flag}: {path}"
    models = _models(network, text_encoder, text_encoder_2)
    lora, unknown = reading.read(path, where, blocks=_blocks(network))
    if any(map(is_dora, lora.values())):
        raise UserError(f"{where} is a DoRA, which training cannot start from")
    _check_parts(lora, models, where)
    fitted, left = fit(lora, models, where)
    left = [*unknown, *left]
    check_lost(fitted, left, where)
    if UNET in models:
        fitted[UNET] = _adapted(models[UNET], fitted.get(UNET, {}), left)
        if not fitted[UNET]:
            raise UserError(f"{where} has no layer of this UNet but convolutions (--conv_rank)")
    for part, layers in fitted.items():
        for name, factors in layers.items():
            module: Any = models[part].get_submodule(name)
            if not hasattr(module, "lora_A"):
                raise UserError(f"{where} adapts {name}, which --lora_layers does not")
            _fill(module, factors, f"{path}: {name}")
    if left and os.environ.get("RANK", "0") == "0":
        print(f"{where}: {len(left)} layers are not trained here and left out, such as {left[0]}")


def _models(
    network: nn.Module, text_encoder: nn.Module | None, text_encoder_2: nn.Module | None
) -> dict[str, nn.Module]:
    """The adapted models by their names in a pipeline and in a file."""
    models = {
        facts_of(network).part: network,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    return {part: model for part, model in models.items() if model is not None}


def _blocks(network: Any) -> Blocks | None:
    """How a UNet is built; None of another network."""
    if not isinstance(network, nn.Module):
        return None
    return Blocks.among(name for name, _ in network.named_modules())


def _check_parts(lora: Lora, models: Mapping[str, nn.Module], where: str) -> None:
    """Refuses a file for another network, or for text encoders that an SD3 run does not train."""
    if UNET in models:
        return
    if UNET in lora:
        raise UserError(f"{where} is a LoRA for {bases.guess(lora)[0].title}")
    for part in lora:
        if part not in models:
            raise UserError(
                f"{where} adapts {part}, which is not trained here (--train_text_encoder)"
            )


def _adapted(unet: nn.Module, layers: Layers, left: list[str]) -> Layers:
    """The layers without the convolutions that are not trained; these are added to `left`."""
    found: Layers = {}
    for name, factors in layers.items():
        module = unet.get_submodule(name)
        if isinstance(module, nn.Conv2d):  # without an adapter around it
            left.append(f"{UNET}.{name}")
        else:
            found[name] = factors
    return found


def _fill(module: Any, factors: Factors, where: str) -> None:
    down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    if factors.rank > len(down):
        flag = "--rank" if down.ndim == 2 else "--conv_rank"
        raise UserError(
            f"{flag} {len(down)} is smaller than the rank {factors.rank} of "
            f"--init_lora_weights_path {where}"
        )
    ratio = factors.scale / module.scaling[ADAPTER]
    with torch.no_grad():
        down[: factors.rank] = factors.down.to(down)
        up.zero_()
        up[:, : factors.rank] = factors.up.to(up) * ratio


def load(pipeline: Any, path: Path | str, name: str) -> int:
    """Loads a LoRA file, folder or hub id into a pipeline and returns how many tensors arrived.

    The file is read by `reading` and given to peft layer by layer, each at its own strength:
    diffusers' own way loses alphas and whole layers without a word. What found no place is said on
    the screen.

    Raises:
        UserError: the file is missing or unreadable, has layers that cannot be taken over, does not
            fit, or most of its layers of the network find no place.
    """
    flag = "--lora_weights_path"
    where = f"{flag}: {path}"
    blocks = _blocks(getattr(pipeline, UNET, None))
    file = reading.read_any(find(path, flag), where, blocks=blocks)
    models = {
        part: model
        for part in file.lora.keys() | file.kin.keys()
        if isinstance(model := getattr(pipeline, part, None), nn.Module)
    }
    fitted, kin, left = _fit(file, models, where)
    for part, layers in fitted.items():
        add_loaded(models[part], layers, name)
    for part, updates in kin.items():
        lycoris.add(models[part], updates, name)
    if left:
        print(f"{path}: {len(left)} layers have no place in this model, such as {left[0]}")
    return sum(
        2 + (factors.magnitude is not None)
        for layers in fitted.values()
        for factors in layers.values()
    ) + sum(len(update.parts) for updates in kin.values() for update in updates.values())


def _fit(
    file: reading.File, models: Mapping[str, nn.Module], where: str
) -> tuple[Lora, lycoris.Updates, list[str]]:
    """A file's layers under the models' names, and the names of those without a place.

    Raises:
        UserError: see `fit`, `check_lost`; or a part has layers of two methods.
    """
    fitted, left = fit(file.lora, models, where)
    kin, left_too = fit_lycoris(file.kin, models, where)
    left = [*file.lost, *left, *left_too]
    check_lost(together({}, fitted, kin), left, where)
    for part, updates in kin.items():
        methods = sorted({update.method for update in updates.values()})
        if part in fitted:
            methods.append("LoRA")
        if len(methods) > 1:
            raise UserError(
                f"{where} adapts some layers of the {part} by {' and some by '.join(methods)}, "
                "which peft cannot do in one adapter (python -m dojo.lora merge puts it into the "
                "weights, resize makes a LoRA of it)"
            )
    return fitted, kin, left


def together(start: Any, *files_: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers of several files' parts, side by side."""
    found: dict[str, dict[str, Any]] = dict(start)
    for file in files_:
        for part, layers in file.items():
            found[part] = {**found.get(part, {}), **layers}
    return found


def find(path: Path | str, flag: str) -> Path:
    """The safetensors file that an option means; of a hub repository the local copy.

    Raises:
        UserError: there is none, or several that might be meant.
    """
    location = Path(path)
    if location.is_dir():
        return _in_folder(location, flag)
    if location.is_file():
        return location
    if location.suffix or str(path).count("/") != 1:
        raise UserError(f"{flag}: there is no file or folder {path}")
    try:
        return Path(hf_hub_download(str(path), WEIGHTS))
    except OSError as error:
        try:
            hf_hub_download(str(path), PEFT_CONFIG)
            return Path(hf_hub_download(str(path), PEFT_WEIGHTS))
        except OSError:
            raise UserError(
                f"{flag}: {path} is neither a file, a folder nor a reachable hub "
                f"repository with {WEIGHTS} or {PEFT_WEIGHTS}"
            ) from error


def _in_folder(folder: Path, flag: str) -> Path:
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{flag}: {folder} has no {WEIGHTS} but several others: name one ({names})")
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in reading.PICKLES]
    only = f", only {pickles[0]}, a pickle, which is not read here" if pickles else ""
    raise UserError(f"{flag}: {folder} has no {WEIGHTS}{only}")
