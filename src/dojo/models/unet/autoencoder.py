"""An autoencoder in place of the model's own: of a folder, a hub repository, or one file.

Its latents have to be of the kind that the UNet was trained on: it is a repaired or fine-tuned one
of the same family, such as sdxl-vae-fp16-fix or sd-vae-ft-mse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import diffusers, safetensors_torch
from dojo.models import folders, loaded

if TYPE_CHECKING:
    import torch

FLAG = "--pretrained_vae_model_name_or_path"

# Of a repository: either layout, no other precision and no other format.
_WANTED = [
    f"{folder}{name}"
    for folder in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model*.safetensors*")
]
_UNWANTED = ["*.fp16*", "*non_ema*"]
_KIND = "AutoencoderKL"
_OVERFLOWS = "force_upcast"  # of a config.json: in float16
_DIFFUSERS = "diffusion_pytorch_model"  # how diffusers' own files begin
# What diffusers called an attention's layers once, as in the files of SD 1.5's own repository.
_NOW = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_FORMER = re.compile("|".join(map(re.escape, _NOW)))


@dataclass(frozen=True)
class Autoencoder:
    """One that is found, its weights unread."""

    path: Path
    """the file, or the folder that holds config.json and weights"""
    config: dict[str, Any]
    """the folder's own; with a file that of a folder that it lies in as diffusers writes it, or
    else the model's: files do not say any"""
    settings: Path
    """the folder whose config.json that is"""

    @property
    def where(self) -> str:
        """How sentences about it begin."""
        return f"{FLAG}: {self.path}"

    def fingerprint(self) -> str:
        """Identifies its weights and its configuration."""
        if self.path.is_dir():
            return folders.fingerprint(self.path, [""])
        words = json.dumps(self.config, sort_keys=True, default=str)
        return folders.fingerprint_of({words: self.path})

    def fitting_half(self) -> Autoencoder:
        """The same, of which the user says that it does not overflow in float16.

        Raises:
            UserError: it is a folder, which says it itself.
        """
        if self.path.is_dir():
            raise UserError(
                f"--vae_fits_fp16 is for an autoencoder in one file: {self.path}/config.json says "
                "itself whether it overflows (force_upcast)"
            )
        return replace(self, config={**self.config, _OVERFLOWS: False})

    def load(self, dtype: torch.dtype) -> diffusers.AutoencoderKL:
        """Reads it.

        Raises:
            UserError: it is damaged, incomplete, or other than its configuration.
        """
        if self.path.is_dir():
            return loaded.network(diffusers.AutoencoderKL, self.path, flag=FLAG, dtype=dtype)
        level = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity_error()
        try:
            weights: Any = {
                _FORMER.sub(lambda found: _NOW[found[0]], name): value
                for name, value in safetensors_torch.load_file(self.path).items()
            }
            vae: Any = diffusers.AutoencoderKL.from_single_file(
                weights, config=str(self.settings), local_files_only=True, dtype=dtype
            )
        except Exception as error:  # the library has many kinds of them
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.where} cannot be read as this autoencoder ({reason})"
            ) from error
        finally:
            diffusers.utils.logging.set_verbosity(level)
        loaded.check_whole(vae, {"missing_keys": [], "unexpected_keys": []}, self.where)
        loaded.check_finite(vae.state_dict(), self.where)
        if _OVERFLOWS in self.config:  # so that a result's config.json says it
            vae.register_to_config(**{_OVERFLOWS: self.config[_OVERFLOWS]})
        return vae


def find(name: str, model: Path) -> Autoencoder:
    """The autoencoder that a name stands for (downloading a hub id).

    Args:
        model: the model's folder, whose `vae/config.json` goes with a file.
    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(path, model / "vae")
    if not path.is_dir():
        path = _download(name)
    inside = path if (path / "config.json").is_file() else path / "vae"
    where = f"{FLAG}: {inside}"
    config = loaded.read_json(inside / "config.json", where)
    if config.get("_class_name") != _KIND:
        raise UserError(f"{where} holds a {config.get('_class_name')}, no {_KIND}")
    if not any(inside.glob("*.safetensors")) and not any(inside.glob("*.bin")):
        raise UserError(f"{where} holds no weights")
    return Autoencoder(inside, config, inside)


def check(found: Autoencoder, own: Mapping[str, Any], channels: int) -> None:
    """Refuses one whose latents the UNet does not take.

    Args:
        own: the configuration of the model's own autoencoder, which may be empty.
        channels: of the latents that the UNet takes.
    Raises:
        UserError: naming both numbers.
    """
    if found.config.get("latent_channels") != channels:
        raise UserError(
            f"{found.where}: the autoencoder has {found.config.get('latent_channels')} channels, "
            f"the UNet expects {channels}"
        )
    widths = found.config.get("block_out_channels")
    if not isinstance(widths, list) or not widths:
        raise UserError(f"{found.where}: its config.json has no list of block_out_channels")
    others = own.get("block_out_channels") or widths
    if len(others) != len(widths):
        sizes = [2 ** (len(one) - 1) for one in (widths, others)]
        raise UserError(
            f"{found.where}: a latent stands for {sizes[0]} pixels a side, in the model for "
            f"{sizes[1]}"
        )


def _of_file(path: Path, settings: Path) -> Autoencoder:
    """A file, and the configuration beside it or the model's own, which it has to fit."""
    if path.suffix != ".safetensors":
        raise UserError(f"{FLAG}: {path} is no .safetensors file")
    try:
        tensors.read_header(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{FLAG}: {path} is no whole safetensors file ({reason})") from error
    beside = path.parent / "config.json"
    if path.name.startswith(_DIFFUSERS) and beside.is_file():
        config = loaded.read_json(beside, f"{FLAG}: {path.parent}")
        if config.get("_class_name") == _KIND:
            return Autoencoder(path, config, path.parent)
    config = loaded.read_json(settings / "config.json", f"{FLAG}: {settings}")
    return Autoencoder(path, config, settings)


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.startswith("models/"):
        raise UserError(f"{FLAG}: there is no folder or file {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{FLAG}: {name} is neither a folder, a file nor a reachable hub repository "
            f"({str(error).splitlines()[0]})"
        ) from error
