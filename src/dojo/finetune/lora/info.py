"""Says what a LoRA file is: method, format, base, layers, ranks, alphas, norms and its header; and
what a file of a learned word is.

python -m dojo.lora info --input hearts.safetensors
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dojo.files import tensors
from dojo.finetune import embeddings
from dojo.finetune.lora import bases, reading
from dojo.finetune.lora.files import WEIGHTS, find, together
from dojo.finetune.lora.layers import Factors
from dojo.lazy import torch

# What a reader of a file wants to know of its header; the rest is counted.
_TOLD = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.trigger_phrase",
    "ss_output_name",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_v_parameterization",
    "ss_zero_terminal_snr",
    "ss_resolution",
    "ss_num_train_images",
    "ss_steps",
    "ss_learning_rate",
    "ss_training_comment",
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """The file."""

    input: str
    """LoRA, LoHa, LoKr or learned word: file, folder or hub id of any public trainer"""


def main(args: Args) -> None:
    """Prints one fact a line."""
    place = Path(args.input)
    words = [embeddings.describe(one, "--input") for one in embeddings.found(place)]
    for line in (line for lines in words for line in lines):
        print(line)
    if any(words) and not (place / WEIGHTS).is_file():
        return
    path = find(args.input, "--input")
    file = reading.read_any(path, f"--input: {args.input}", partial=True)
    for line in describe(path, file):
        print(line)


def describe(path: Path, file: reading.File) -> list[str]:
    """The lines."""
    names = tensors.read_header(path)[0]
    base, reason = bases.guess(file.lora or _shells(file), file.metadata)
    prediction = "v" if base.predicts_v else "the noise (nothing says v)"
    lines = [
        f"file: {path}, {path.stat().st_size / 1e6:.1f} MB, {_types(names.values())}",
        f"method: {_methods(file)}",
        f"format: {_format(names)}",
        f"base: {base.family} ({reason})",
    ]
    if base.has_unet:
        lines.append(f"base predicts: {prediction}")
    for part, layers in together({}, file.lora, file.kin).items():
        lines.append(f"{part}: {_part(layers)}")
    if file.lost:
        lines.append(f"not understood: {len(file.lost)} layers, such as {file.lost[0]}")
    told = [name for name in _TOLD if name in file.metadata]
    lines += [f"{name}: {file.metadata[name]}" for name in told]
    if rest := len(file.metadata.keys() - {*told, "format"}):
        lines.append(f"other entries of its header: {rest}")
    return lines


def _shells(file: reading.File) -> Any:
    """LoHa and LoKr layers in the form that widths are told from."""
    return {
        part: {
            name: Factors(torch.empty(1, update.delta().shape[1]), torch.empty(1, 1), 1.0)
            for name, update in updates.items()
        }
        for part, updates in file.kin.items()
    }


def _types(entries: Iterable[Mapping[str, Any]]) -> str:
    return " and ".join(sorted({str(entry["dtype"]) for entry in entries}))


def _methods(file: reading.File) -> str:
    found: Counter[str] = Counter()
    for layers in file.lora.values():
        for factors in layers.values():
            kind = "DoRA" if factors.magnitude is not None else "LoRA"
            conv = " of convolutions (LoCon)" if factors.down.shape[2:].numel() > 1 else ""
            found[kind + conv] += 1
    for updates in file.kin.values():
        found.update(update.method for update in updates.values())
    return ", ".join(f"{count} x {kind}" for kind, count in found.most_common()) or "none known"


def _format(names: Iterable[str]) -> str:
    forms = {
        "kohya's": ("lora_unet_", "lora_te"),
        "LyCORIS'": ("lycoris_",),
        "ComfyUI's": ("diffusion_model.", "text_encoders."),
        "peft's": ("base_model.model.",),
        "OneTrainer's": ("lora_transformer_",),
        "diffusers'": ("unet.", "transformer.", "text_encoder"),
    }
    found = {form for name in names for form, starts in forms.items() if name.startswith(starts)}
    return " and ".join(sorted(found)) or "bare names"


def _part(layers: Mapping[str, Any]) -> str:
    ranks = Counter(update.rank for update in layers.values())
    alphas = Counter(float(update.alpha) for update in layers.values())
    norms = torch.tensor([_norm(update) for update in layers.values()])
    largest = max(layers, key=lambda name: _norm(layers[name]))
    return (
        f"{len(layers)} layers, rank {_several(ranks)}, alpha {_several(alphas)}; norms of the "
        f"updates {norms.mean():.4g} on average, {norms.max():.4g} at most ({largest})"
    )


def _norm(update: Any) -> float:
    """Of what is added to the weight; a product's by the traces of its small Gram matrices."""
    if not isinstance(update, Factors):
        return float(update.delta().norm())
    down, up = update.down.double().flatten(1), update.up.double().flatten(1)
    square = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return float(abs(update.scale) * square.sqrt())


def _several(counts: Counter[Any]) -> str:
    """The most common first."""
    shown = [f"{value:g}" for value, _ in counts.most_common(4)]
    return ", ".join(shown) + (" and others" if len(counts) > 4 else "")
