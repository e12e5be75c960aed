"""Which family a model is of: the one place that lists them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.models import hunyuandit, kolors, sd3, sd15, sdxl
from dojo.models.facts import NetworkFacts
from dojo.models.family import Model, ModelArgs, TextArgs
from dojo.models.folders import FLAG, SCRIPTS, find_folder, kind_of
from dojo.models.sd3 import single_file as sd3_file
from dojo.models.unet import single_file

if TYPE_CHECKING:
    from torch import nn

# The beginning of a pipeline's class in model_index.json, and the package of its family. The first
# that fits counts.
_PACKAGES: dict[str, Any] = {
    **{"sd3": sd3, "sdxl": sdxl, "sd15": sd15, "kolors": kolors, "hunyuandit": hunyuandit}
}
FAMILIES: dict[str, Any] = {start: _PACKAGES[name] for start, name in SCRIPTS.items()}


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Opens a model by its configurations; no weights are read.

    Options of a family's own open that family and refuse another; plain `ModelArgs` open whatever
    is there: a folder or hub repository by its model_index.json, a .safetensors file by its header.

    Raises:
        UserError: there is no such model, or it is of another family, or of none that is known.
    """
    for family in FAMILIES.values():
        if isinstance(args, family.ModelArgs):
            return family.open_model(args, text)
    family = family_of(args)
    given = {field.name: getattr(args, field.name) for field in fields(ModelArgs)}
    return family.open_model(family.ModelArgs(**given), text)


def family_of(args: ModelArgs) -> Any:
    """The package of the family that a model is of.

    Raises:
        UserError: there is no such model, or its family is not known.
    """
    name = args.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if path.is_file():
        return _family_of_file(path)
    folder = find_folder(name, FLAG, revision=args.revision, variant=args.variant)
    kind = kind_of(folder, FLAG)
    for beginning, family in FAMILIES.items():
        if kind.startswith(beginning):
            return family
    known = ", ".join(family.Model.name for family in FAMILIES.values())
    raise UserError(f"{FLAG}: {folder} holds a {kind}; known are {known}")


def _family_of_file(path: Path) -> Any:
    """By the header of a single file.

    Raises:
        UserError: naming what else it is.
    """
    contents = single_file.read(path, FLAG)
    if any("joint_blocks." in name for name in contents.entries):
        sd3_file.inspect(path)
        return sd3
    kind = single_file.identify(contents).family
    return next(one for one in (sd15, sdxl) if kind in one.Model.single_files)


def facts_of(network: nn.Module) -> NetworkFacts:
    """What is known of a network, by its class or one that its class comes from.

    A network of an unknown class can be trained too, by adapters on layers that are named.
    """
    known = {family.Model.network_class: family.Model.network_facts for family in FAMILIES.values()}
    names = (kind.__name__ for kind in type(network).__mro__)
    return next((known[name] for name in names if name in known), NetworkFacts(part="transformer"))
