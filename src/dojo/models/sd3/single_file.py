"""Checkpoints in one .safetensors file, as ComfyUI and Stability's own code read them.

`inspect` and `load_encoder` read, `save_single_file` writes; diffusers' `from_single_file` reads
the transformer and the autoencoder, and reads back what is written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import diffusers, torch, transformers
from dojo.models import classic, loaded
from dojo.models.folders import FLAG
from dojo.models.sd3 import keys

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
_SAMPLE = 65_536  # bytes read of each tensor for a fingerprint


@dataclass(frozen=True)
class SingleFile:
    """What a single-file checkpoint holds, without its weights."""

    path: Path
    header: dict[str, dict[str, Any]] = field(repr=False)

    def __contains__(self, part: str) -> bool:
        """Whether the file has this part (`vae`, `text_encoder_3`, ...) of the pipeline."""
        return part == "transformer" or bool(part in keys.PREFIXES and self._names(part))

    def _names(self, part: str) -> list[str]:
        """The file's names that belong to a part, sorted."""
        return sorted(name for name in self.header if name.startswith(keys.PREFIXES[part]))

    @property
    def prefix(self) -> str:
        """What the transformer's names begin with; files with nothing else may have no prefix."""
        prefix = keys.PREFIXES["transformer"]
        return prefix if prefix + _MARK in self.header else ""

    @property
    def hub_id(self) -> str | None:
        """The hub repository with this model's configurations; None for sizes of no public SD3."""
        width = self.header[self.prefix + _MARK]["shape"][0]  # 6 x hidden size
        positions = self.header[self.prefix + "pos_embed"]["shape"][1]
        large = f"{self.prefix}joint_blocks.37.x_block.mlp.fc1.weight" in self.header
        if width == 6 * 1536 and positions == 192**2:
            return "stabilityai/stable-diffusion-3-medium-diffusers"
        if width == 6 * 1536 and positions == 384**2:
            return "stabilityai/stable-diffusion-3.5-medium"
        return "stabilityai/stable-diffusion-3.5-large" if large else None

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """Compares names and sizes of transformer and autoencoder with their configurations.

        Raises:
            UserError: they differ.
        """
        try:
            with torch.device("meta"):
                model: Any = diffusers.SD3Transformer2DModel.from_config(dict(transformer))
                coder: Any = diffusers.AutoencoderKL.from_config(dict(vae))
        except Exception as error:  # whatever a class says to sizes that it cannot have
            raise UserError(f"--single_file_config: it makes no network ({error})") from error
        wanted = {
            name: list(make("meta").shape)
            for name, make in keys.transformer_to_original(model.state_dict()).items()
        }
        self._compare(self.prefix, wanted)
        if "vae" in self:
            original = keys.vae_to_original(coder.state_dict())
            self._compare(
                keys.PREFIXES["vae"], {name: list(value.shape) for name, value in original.items()}
            )

    def _compare(self, prefix: str, wanted: Mapping[str, list[int]]) -> None:
        """Compares the tensors whose names begin with `prefix` with those of a configuration."""
        there = {
            name.removeprefix(prefix): entry["shape"]
            for name, entry in self.header.items()
            if (name.startswith(prefix) if prefix else name in wanted)
        }
        wrong = sorted(
            name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)
        )
        if wrong:
            name = wrong[0]
            raise UserError(
                f"--single_file_config: {self.path.name} is another model than this configuration: "
                f"{len(wrong)} tensors differ, such as {name} (in the file {there.get(name)}, "
                f"configured {wanted.get(name)})"
            )

    def dtype(self, part: str) -> torch.dtype:
        """The precision that holds a part's tensors exactly; bfloat16 for 8-bit ones."""
        codes = {self.header[name]["dtype"] for name in self._names(part)}
        if "F32" in codes or codes >= {"F16", "BF16"}:
            return torch.float32
        return torch.float16 if "F16" in codes else torch.bfloat16

    def fingerprint(self, part: str) -> str:
        """Identifies a part's tensors by names, types, sizes and their first 64 KiB each."""
        digest = hashlib.blake2b(digest_size=16)
        with self.path.open("rb") as file:
            for name in self._names(part):
                entry = self.header[name]
                digest.update(f"{name}:{entry['dtype']}:{entry['shape']}".encode())
                start, end = entry["data_offsets"]
                file.seek(start)
                digest.update(file.read(min(end - start, _SAMPLE)))
        return digest.hexdigest()


def inspect(path: Path) -> SingleFile:
    """Reads the header of a single-file checkpoint.

    Raises:
        UserError: the file is missing, broken, or holds no SD3.
    """
    if not path.is_file():
        raise UserError(f"{FLAG}: there is no file {path}")
    try:
        header, _ = tensors.read_header(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{FLAG}: {path} is no whole safetensors file ({reason})") from error
    found = SingleFile(path, header)
    if any("lora" in name for name in header):
        raise UserError(
            f"{FLAG}: {path} is a LoRA; name its base model here (demo.py takes it as "
            "--lora_weights_path, training as --init_lora_weights_path)"
        )
    if found.prefix + _MARK not in header or f"{found.prefix}pos_embed" not in header:
        raise UserError(
            f"{FLAG}: {path} holds no Stable Diffusion 3 (its tensors begin with "
            f"{min(header, default='')!r})"
        )
    return found


def load_encoder(file: SingleFile, part: str, folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder of a single file, with its configuration from a folder.

    CLIP-L's projection is the identity in SD3 whatever a file says, as in Stability's code.

    Raises:
        UserError: the file's tensors are not those of the configuration.
    """
    kind = (
        transformers.T5EncoderModel
        if part == "text_encoder_3"
        else transformers.CLIPTextModelWithProjection
    )
    try:
        config: Any = kind.config_class.from_pretrained(folder, subfolder=part)  # pyright: ignore
        with torch.device("meta"):
            empty: dict[str, Tensor] = kind(config).state_dict()
    except Exception as error:  # whatever the classes say to what they cannot have
        raise UserError(
            f"--single_file_config: {folder / part}/config.json makes no network ({error})"
        ) from error
    prefix = keys.PREFIXES[part]
    with safe_open(file.path, framework="pt") as opened:
        state = {
            name.removeprefix(prefix): opened.get_tensor(name)
            for name in file.header
            if name.startswith(prefix)
        }
    if part != "text_encoder_3":
        state = classic.rename(state)  # old merges leave text_model. out
    for useless in ("logit_scale", "text_model.embeddings.position_ids"):
        state.pop(useless, None)
    if part == "text_encoder":
        state["text_projection.weight"] = torch.eye(config.hidden_size)
    if part == "text_encoder_3" and "shared.weight" in state:
        state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    wrong = sorted(
        name
        for name in empty.keys() | state.keys()
        if name not in empty or name not in state or empty[name].shape != state[name].shape
    )
    if wrong:
        raise UserError(
            f"--single_file_config: {part} of {file.path.name} is another model than this "
            f"configuration: {len(wrong)} tensors differ, such as {wrong[0]}"
        )
    loaded.check_finite(state, f"{FLAG}: {part} of {file.path}")
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def save_single_file(
    path: Path,
    parts: Any,
    dtype: torch.dtype | None = None,
    *,
    with_t5: bool = True,
    title: str | None = None,
    resolution: tuple[int, int] | None = None,
) -> None:
    """Writes one .safetensors with the original names, tensor by tensor and whole or not at all.

    `StableDiffusion3Pipeline.from_single_file(path, config=FOLDER, local_files_only=True)` and
    ComfyUI's checkpoint loader read it. Equal weights give equal bytes. The format has no text
    projection for CLIP-L: another than the identity is left out, which is said on the screen.

    Args:
        parts: a StableDiffusion3Pipeline, or state dicts by part (`transformer`, `vae`,
            `text_encoder`, `text_encoder_2`, `text_encoder_3`) of which some may be missing.
        dtype: precision in the file; None keeps each tensor's own.
        with_t5: T5 is most of the file (9.5 GB in half precision), and readers can do without.
        title: `modelspec.title`; the file's name if unset.
        resolution: (height, width) for `modelspec.resolution`.
    """
    if not isinstance(parts, Mapping):
        modules = {part: getattr(parts, part, None) for part in keys.PREFIXES}
        parts = {part: module.state_dict() for part, module in modules.items() if module}
    chosen = {part: state for part, state in parts.items() if with_t5 or part != "text_encoder_3"}

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def entry(make: tensors.Source) -> tensors.Source:
        return lambda device: cast(make(device))

    entries: dict[str, tensors.Source] = {}
    for part, state in chosen.items():
        for name, make in _original(part, state).items():
            entries[keys.PREFIXES[part] + name] = entry(make)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": keys.architecture(parts["transformer"]),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or path.stem,
    }
    if resolution:
        height, width = resolution
        metadata["modelspec.resolution"] = f"{width}x{height}"
    tensors.save(path, entries, metadata)


def _original(part: str, state: Mapping[str, Tensor]) -> dict[str, tensors.Source]:
    """A part's tensors under their original names, without the part's prefix."""
    if part == "transformer":
        return keys.transformer_to_original(state)
    kept = dict(state)
    if part == "vae":
        kept = keys.vae_to_original(state)
    elif part == "text_encoder":
        projection = kept.pop("text_projection.weight")
        if not torch.equal(projection.cpu().float(), torch.eye(len(projection))):
            print(
                "CLIP-L's text projection is not the identity, which readers of single SD3 files "
                "take it for: their pooled embeddings will differ from this model's"
            )
    if part in ("text_encoder", "text_encoder_2"):
        kept = classic.rename(kept)
    return {name: lambda device, tensor=tensor: tensor.to(device) for name, tensor in kept.items()}
