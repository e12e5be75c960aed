"""A part of a single file as diffusers' or transformers' network, whole or refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import diffusers, torch, transformers
from dojo.models import classic, loaded
from dojo.models.folders import FLAG
from dojo.models.unet import ldm
from dojo.models.unet.single_file.constants import CONFIG_FLAG
from dojo.models.unet.single_file.header import SingleFile

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {
    "unet": (diffusers, "UNet2DConditionModel"),
    "vae": (diffusers, "AutoencoderKL"),
    "text_encoder": (transformers, "CLIPTextModel"),
    "text_encoder_2": (transformers, "CLIPTextModelWithProjection"),
}
# What files have beside a part's tensors and no reader takes: what is counted off, the loss of the
# autoencoder's own training, the other half of a CLIP, and OpenCLIP-H's last layer and projection.
_LEFT_ASIDE = {
    "unet": r"(?!)",
    "vae": r"(loss|model_ema)\..*",
    "text_encoder": r"(.*\.)?position_ids|logit_scale|attn_mask"
    r"|(text_projection|visual_projection|vision_model|visual)\b.*",
    "text_encoder_2": r"(.*\.)?position_ids|logit_scale|attn_mask|visual\..*",
}


def check(file: SingleFile, folder: Path) -> None:
    """Compares names and sizes of every part in a file with the configurations of a folder.

    Raises:
        UserError: they differ.
    """
    for part in ldm.PREFIXES[file.family]:
        if part in file:
            _matched(file, part, _meta(part, folder))


def origins(file: SingleFile, part: str, folder: Path) -> dict[str, ldm.Origin]:
    """The file's own names of a part's tensors, and what of diffusers' they are made of.

    Args:
        folder: with its configuration.
    Raises:
        UserError: names or sizes differ from the configuration.
    """
    return _matched(file, part, _meta(part, folder))


def load(file: SingleFile, part: str, folder: Path, dtype: torch.dtype) -> Any:
    """A part in its own class, with its configuration from a folder.

    Args:
        part: unet, vae, text_encoder or text_encoder_2.
        dtype: that it computes in; an 8-bit file's numbers are widened.
    Raises:
        UserError: the file lacks it, or it is damaged, incomplete, or other than its configuration.
    """
    where = f"{FLAG}: {part} of {file.path}"
    if part not in file:
        raise UserError(lacking(file, part))
    model = _meta(part, folder)
    matched = _matched(file, part, model)
    state: dict[str, Tensor] = {}
    with file.contents.opened() as get:
        for name, origin in matched.items():
            for ours, tensor in origin.split(get(name)).items():
                shared = len(origin.names) > 1  # a part of a larger one must not be its owner
                state[ours] = tensor.to(dtype, copy=shared).contiguous()
    loaded.check_finite(state, where)
    if part in ("unet", "vae"):
        model.load_state_dict(state, assign=True)
        return model.eval()
    return (
        type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=dtype).eval()
    )


def lacking(file: SingleFile, part: str) -> str:
    """That a file has no such part, and what to do about it."""
    if part == "vae":
        return (
            f"{FLAG}: {file.path} has no autoencoder: name one (a folder, hub id or file) as "
            "--pretrained_vae_model_name_or_path"
        )
    return f"{FLAG}: {file.path} has no {part}: name a folder that has one as {CONFIG_FLAG}"


def _meta(part: str, folder: Path) -> Any:
    """A network of a folder's configuration without memory.

    Raises:
        UserError: the configuration makes none.
    """
    kind: Any = getattr(*_KINDS[part])
    where = loaded.subject(folder, part, CONFIG_FLAG)
    settings = loaded.read_json(folder / part / "config.json", where)
    try:
        with torch.device("meta"):
            if part in ("unet", "vae"):
                return kind.from_config(settings)
            return kind(kind.config_class.from_pretrained(folder / part))
    except Exception as error:  # whatever a class says to sizes that it cannot have
        raise UserError(f"{where}/config.json makes no network ({error})") from error


def _matched(file: SingleFile, part: str, model: Any) -> dict[str, ldm.Origin]:
    """The file's own names of a part's tensors, and what they make of it.

    Raises:
        UserError: names or sizes are not those of the network.
    """
    state: Mapping[str, Tensor] = model.state_dict()
    origins = ldm.origins(file.family, part, state)
    wanted = {
        name: tuple(origin.join([state[ours] for ours in origin.names]).shape)
        for name, origin in origins.items()
    }
    own = _own_names(file, part)
    there = {name: file.contents.entries[full] for name, full in own.items()}
    known, last = _LEFT_ASIDE[part], getattr(model.config, "num_hidden_layers", -1)
    useless = re.compile(rf"{known}|transformer\.resblocks\.{last}\..*")
    wrong = [name for name in there if name not in wanted and not useless.fullmatch(name)]
    for name, shape in wanted.items():
        if name not in there or not _fits(there[name].shape, shape):
            wrong.append(name)
    whole = [name for name in wanted if name in there and there[name].dtype is None]
    if wrong:
        name = min(wrong)
        found = list(there[name].shape) if name in there else None
        configured = list(wanted[name]) if name in wanted else None
        raise UserError(
            f"{CONFIG_FLAG}: {part} of {file.path} is another model than this configuration: "
            f"{len(wrong)} tensors differ, such as {name} (in the file {found}, configured "
            f"{configured})"
        )
    if whole:
        raise UserError(
            f"{FLAG}: {part} of {file.path} holds {whole[0]} as whole numbers; weights are read "
            "as floating-point numbers only, not quantised"
        )
    return {own[name]: origin for name, origin in origins.items()}


def _own_names(file: SingleFile, part: str) -> dict[str, str]:
    """The classic names of a part, without its prefix, and what the file calls them."""
    prefix = file.prefix(part)
    names = {name.removeprefix(prefix): name for name in file.names(part)}
    return classic.rename(names) if part.startswith("text_encoder") else names


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """A 1x1 convolution may stand as a matrix."""
    return found == wanted or (wanted[2:] == (1, 1) and found == wanted[:2])
