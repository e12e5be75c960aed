"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on an MMDiT: adding, saving, loading.

peft computes them; this file decides which layers get one, keeps them in float32, and makes sure
that what is saved says its alpha and that what is loaded arrives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dojo.cli import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "default"

_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
PRESETS = {
    "attn": rf"transformer_blocks\.\d+\.{_ATTENTION}",
    "attn+ff": rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
    "all-linear": r"transformer_blocks\.\d+\..*",
}


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """The adapter."""

    rank: int = 16
    """rank of the two factors"""
    lora_alpha: float | None = None
    """the update is scaled by alpha / rank; unset is the rank, a scale of 1"""
    lora_dropout: float = 0.0
    """dropout on the adapter's input"""
    lora_layers: tuple[str, ...] = ("attn",)
    """attn (every attention projection, attn2 and the text stream's included), attn+ff, all-linear,
    names of layers (also as one comma list, such as attn.to_k,attn.to_q), or one regular
    expression over full module names, marked by a leading re:"""
    use_dora: bool = False
    """decompose weights into magnitude and direction (DoRA, arXiv:2402.09353)"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("--rank must be at least 1")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError("--lora_alpha must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("--lora_dropout must lie in [0, 1)")
        if not self.lora_layers:
            raise ValueError("--lora_layers needs at least one name")


def target_layers(model: nn.Module, choice: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `--lora_layers` means.

    The last block's query of the text stream is left out: its output is thrown away, so it would
    get a zero gradient for ever.

    Raises:
        UserError: a name or expression matches no layer; the message names it.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    dead = _dead_layers(linear)
    found: list[str] = []
    for word in [part.strip() for item in choice for part in _parts(item)]:
        if word in PRESETS:
            pattern = PRESETS[word]
        elif word.startswith("re:"):
            pattern = word.removeprefix("re:")
        else:
            pattern = rf"(.*\.)?{re.escape(word)}"
        try:
            matches = [name for name in linear if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(
                f"--lora_layers: {word!r} is no regular expression ({error})"
            ) from error
        if not matches:
            raise UserError(
                f"--lora_layers: {word!r} matches no linear layer; there are, for example, "
                f"{', '.join(linear[:6])}"
            )
        found += matches
    wanted = set(found) - dead
    if not wanted:
        raise UserError(
            f"--lora_layers: {', '.join(found)} alone would never learn: nothing reads its result"
        )
    return [name for name in linear if name in wanted]


def _parts(item: str) -> list[str]:
    return [item] if item.startswith("re:") else item.split(",")


def _dead_layers(linear: Sequence[str]) -> set[str]:
    """Layers of the last joint block whose result nothing reads."""
    blocks = [int(m[1]) for name in linear if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    return {f"transformer_blocks.{max(blocks)}.attn.add_q_proj"} if blocks else set()


def add(model: nn.Module, args: LoraArgs) -> list[nn.Parameter]:
    """Adds an adapter to the frozen model and returns its parameters, float32 and trainable.

    B starts at zero, so the model is unchanged; A is drawn from torch's global generator.
    """
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha if args.lora_alpha is not None else args.rank,  # pyright: ignore
        lora_dropout=args.lora_dropout,
        target_modules=target_layers(model, args.lora_layers),
        use_dora=args.use_dora,
        init_lora_weights="gaussian",
    )
    model.add_adapter(config, ADAPTER)  # pyright: ignore
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        # peft creates them in the base's dtype; a bfloat16 weight of 0.02 cannot take a step of
        # 1e-5, which is below half a unit in its last place.
        param.data = param.data.float()
    return params


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for a while: the reference of KL terms and of before/after pictures."""
    model.disable_adapters()  # pyright: ignore
    try:
        yield
    finally:
        model.enable_adapters()  # pyright: ignore


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU."""
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save(
    folder: Path,
    transformer: nn.Module,
    pipeline: type[DiffusionPipeline] = StableDiffusion3Pipeline,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`.

    The adapter's configuration goes into the file's header: without it diffusers would take alpha
    for the rank. Equal weights give equal bytes.
    """
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in transformer.peft_config[ADAPTER].to_dict().items()  # pyright: ignore
    }
    pipeline.save_lora_weights(  # pyright: ignore
        folder,
        transformer_lora_layers=state(transformer),
        transformer_lora_adapter_metadata=config,
    )
    _sort_header(folder / WEIGHTS)


def _sort_header(path: Path) -> None:
    """Puts the header's free text in alphabetical order; safetensors writes it in a random one.

    The format is 8 bytes of header length, a JSON header padded with spaces, the tensors.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])


def restore(folder: Path, transformer: nn.Module) -> None:
    """Puts a saved adapter's tensors back into a model that has the same adapter.

    Raises:
        UserError: the file's tensors are not exactly those of the adapter.
    """
    saved = load_file(folder / WEIGHTS)
    tensors = {name.removeprefix("transformer."): value for name, value in saved.items()}
    own = state(transformer)
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} does not fit this adapter (other --rank or --lora_layers?): "
            f"{', '.join(wrong[:4])}"
        )
    set_peft_model_state_dict(transformer, tensors, adapter_name=ADAPTER)


def load(pipeline: Any, path: Path | str, name: str) -> int:
    """Loads a LoRA file, folder or hub id into a pipeline and returns how many tensors arrived.

    Raises:
        UserError: the file is missing or unreadable, or not one of its tensors found a place:
            diffusers loads several public formats as a silent no-op.
    """
    file = _find(path)
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
        level = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()  # it warns of each encoder that has no adapter
        try:
            pipeline.load_lora_weights(str(file), adapter_name=name)
        finally:
            diffusers_logging.set_verbosity(level)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--lora_weights_path: {path} could not be loaded ({str(error).splitlines()[0]})"
        ) from error
    arrived = 0
    for part, component in pipeline.components.items():
        if name in getattr(component, "peft_config", {}):
            for key, value in get_peft_model_state_dict(component, adapter_name=name).items():
                # Older files are renamed on the way; their up-projection is then not zero.
                moved = "lora_B" in key and bool(value.any())
                arrived += f"{part}.{key}" in names or moved
    if arrived == 0:
        raise UserError(
            f"--lora_weights_path: not one tensor of {path} fits this model (its names begin with "
            f"{min(names, default='')!r})"
        )
    return arrived


def _find(path: Path | str) -> Path:
    """The safetensors file that a `--lora_weights_path` means."""
    location = Path(path)
    if location.is_dir():
        files = sorted(location.glob("*.safetensors"))
        if (location / WEIGHTS) in files or len(files) == 1:
            return location / WEIGHTS if (location / WEIGHTS) in files else files[0]
        raise UserError(f"--lora_weights_path: {path} has no {WEIGHTS}")
    if location.is_file():
        return location
    if location.suffix or str(path).count("/") != 1:
        raise UserError(f"--lora_weights_path: there is no file or folder {path}")
    try:
        return Path(hf_hub_download(str(path), WEIGHTS))
    except OSError as error:
        raise UserError(
            f"--lora_weights_path: {path} is neither a file, a folder nor a reachable hub "
            f"repository with {WEIGHTS}"
        ) from error
