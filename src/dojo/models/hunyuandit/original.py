"""Hunyuan-DiT as Tencent publishes it, `t2i/`: made to look like diffusers' layout, without a copy.

    t2i/model/pytorch_model_ema.pt (or _module, _distill)   the network, pickled, in Tencent's names
    t2i/clip_text_encoder/pytorch_model.bin                 a bilingual CLIP's BERT
    t2i/mt5/pytorch_model.bin, spiece.model                 mT5, encoder and decoder
    t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.bin
    t2i/tokenizer/vocab.txt

`linked` makes a folder of links that goes with the process, with the configurations that Tencent's
code has as constants; which version a network is, its tensors' shapes say. Pickles are read by
`weights_only` alone, which runs nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError
from dojo.lazy import diffusers, torch
from dojo.models import loaded, published
from dojo.models.folders import FLAG, TRANSFORMER
from dojo.models.hunyuandit import keys
from dojo.models.unet.single_file import reading

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["auto", "ema", "module", "distill"]
WEIGHTS_FLAG = "--tencent_weights"

# Where a part lies: as published, and as Tencent's notes for kohya's scripts rename it.
_PLACES = {
    "vae": ("sdxl-vae-fp16-fix", "vae"),
    "text_encoder": ("clip_text_encoder", "clip"),
    "text_encoder_2": ("mt5",),
    "tokenizer": ("tokenizer",),
    "tokenizer_2": ("mt5",),
}
# What diffusers' pipeline reads the text with, whatever was saved in the files.
_CLASSES = {
    "text_encoder": {"architectures": ["BertModel"], "model_type": "bert"},
    "text_encoder_2": {"architectures": ["T5EncoderModel"], "model_type": "t5"},
}
_SUFFIXES = (".bin", ".safetensors", ".index.json")
_RATIO = 4.3637  # of the real ones' feed-forward layers
# What a file of a training by DeepSpeed holds beside weights: options, as plain values.
_SAFE = (argparse.Namespace,)


@dataclass(frozen=True)
class Original:
    """A folder of Tencent's, and what stands for it in diffusers' layout."""

    folder: Path
    """of links"""
    weights: Path
    """of the network"""
    keys: tuple[str, ...]
    """under which of these its tensors may lie in the file; the first that is there counts"""
    places: Mapping[str, Path] = field(default_factory=dict)
    """where Tencent has what is at a path of these"""
    room: Any = field(repr=False, compare=False, default=None)
    """keeps the folder of links"""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Sentences about the folder of links name Tencent's."""
        try:
            yield
        except UserError as error:
            text = str(error)
            for path, place in self.places.items():
                text = text.replace(path, str(place))
            raise UserError(text) from error

    def load(self, dtype: torch.dtype) -> Any:
        """The network in `dtype`.

        Raises:
            UserError: the file is damaged, or holds another network.
        """
        where = f"{FLAG}: {self.weights}"
        state, unknown = keys.from_original(_read(self.weights, self.keys))
        config = loaded.read_json(self.folder / TRANSFORMER / "config.json", where)
        with torch.device("meta"):
            model: Any = diffusers.HunyuanDiT2DModel.from_config(config)
        sizes = {name: value.shape for name, value in model.state_dict().items()}
        other = [name for name in sizes.keys() & state.keys() if state[name].shape != sizes[name]]
        report = {
            "missing_keys": sizes.keys() - state.keys(),
            "unexpected_keys": [*unknown, *sorted(state.keys() - sizes.keys())],
            "mismatched_keys": other,
        }
        own = {name: value for name, value in state.items() if name in sizes and name not in other}
        loaded.check_finite(own, where)
        cast = {name: value.to(dtype, copy=True).contiguous() for name, value in own.items()}
        model.load_state_dict(cast, strict=False, assign=True)
        loaded.check_whole(model, report, where)
        return model.eval()


def linked(folder: Path, weights: Weights) -> Original:
    """A folder of Tencent's in diffusers' layout.

    Args:
        folder: `t2i`.
        weights: which of its networks.
    Raises:
        UserError: a part is missing, or the network's file holds something else.
    """
    chosen, kind = _network(folder, weights)
    return _linked(folder.resolve(), chosen.resolve(), kind)


@cache
def _linked(folder: Path, weights: Path, kind: str) -> Original:
    room = tempfile.TemporaryDirectory(prefix="dojo-hunyuandit-")
    into = Path(room.name)
    inside = (kind, "ema", "module", "state_dict")
    shapes = {name: tuple(one.shape) for name, one in _read(weights, inside).items()}
    known = published.MODELS["hunyuandit"]
    end = published.HUNYUANDIT_BETA_END["style_embedder.weight" in shapes]
    _write(into / "model_index.json", known.index)
    _write(into / TRANSFORMER / "config.json", config_of(shapes, str(weights)))
    (into / TRANSFORMER / "diffusion_pytorch_model.bin").symlink_to(weights)
    scheduler = {**known.parts["scheduler"], "beta_end": end}
    _write(into / "scheduler" / "scheduler_config.json", scheduler)
    told = {str(into / TRANSFORMER): weights}
    for part, places in _PLACES.items():
        source = _place(folder, part, places)
        told[str(into / part)] = source
        (into / part).mkdir()
        for path in sorted(source.iterdir()):
            of_weights = path.name.endswith(_SUFFIXES)
            belongs = path.name != "config.json" and part.startswith("tokenizer") != of_weights
            if path.is_file() and belongs:
                (into / part / path.name).symlink_to(path.resolve())
        if not part.startswith("tokenizer"):
            own = source / "config.json"
            found = loaded.read_json(own, f"{FLAG}: {source}") if own.is_file() else {}
            settings = found or dict(known.parts[part])
            _write(into / part / "config.json", {**settings, **_CLASSES.get(part, {})})
    # The longest first: some begin like others.
    told = dict(sorted(told.items(), reverse=True)) | {str(into): folder}
    return Original(into, weights, inside, told, room)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _place(folder: Path, part: str, places: tuple[str, ...]) -> Path:
    """The folder of a part.

    Raises:
        UserError: there is none.
    """
    found = next((folder / one for one in places if (folder / one).is_dir()), None)
    if found is None:
        raise UserError(f"{FLAG}: {folder} is incomplete: it has no {places[0]}/ ({part})")
    return found


def _network(folder: Path, weights: Weights) -> tuple[Path, str]:
    """The file of the network, and which one it is.

    Raises:
        UserError: the one that was asked for is not there.
    """
    there = {
        path.stem.removeprefix("pytorch_model_"): path
        for place in ("model", "denoiser")
        for path in sorted((folder / place).glob("pytorch_model_*.pt"))
    }
    wanted = ("ema", "module", "distill") if weights == "auto" else (weights,)
    kind = next((one for one in wanted if one in there), None)
    if kind is None:
        names = ", ".join(path.name for path in there.values())
        raise UserError(f"{WEIGHTS_FLAG} {weights}: {folder} has {names}")
    return there[kind], kind


def _read(path: Path, inside: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped from the file."""
    return reading.unpickle(path, FLAG, inside, _SAFE)


def config_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """diffusers' configuration of a network with tensors of these shapes, by Tencent's names.

    Raises:
        UserError: they are of another network.
    """
    if not keys.is_whole(shapes):
        first = min(shapes, default="nothing")
        raise UserError(f"{FLAG}: {where} holds no Hunyuan-DiT (its names begin with {first!r})")
    try:
        hidden, channels, _, patch = shapes["x_embedder.proj.weight"]
        (head,) = shapes["blocks.0.attn1.q_norm.weight"]
        feed_forward = shapes["blocks.0.mlp.fc1.weight"][0]
        tokens, width = shapes["text_embedding_padding"]
        t5 = shapes["mlp_t5.0.weight"][1]
        t5_tokens = shapes["pooler.positional_embedding"][0] - 1
        pooled = shapes["pooler.c_proj.weight"][0]
        out = shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{FLAG}: {where} holds no whole Hunyuan-DiT ({error})") from error
    exact = int(hidden * _RATIO) == feed_forward
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        **published.HUNYUANDIT,
        "_class_name": "HunyuanDiT2DModel",
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_layers": len(blocks),
        "mlp_ratio": _RATIO if exact else (feed_forward + 0.5) / hidden,
        "learn_sigma": out == 2 * channels * patch**2,
        "cross_attention_dim": width,
        "cross_attention_dim_t5": t5,
        "pooled_projection_dim": pooled,
        "text_len": tokens - t5_tokens,
        "text_len_t5": t5_tokens,
        # Of v1.0 and v1.1, not of v1.2.
        "use_style_cond_and_image_meta_size": "style_embedder.weight" in shapes,
    }
