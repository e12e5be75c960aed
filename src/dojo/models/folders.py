"""What the pipeline folders of every model family share: found, read, identified, copied.

A folder in diffusers' layout has a `model_index.json`, a sub-folder for each part, and in it a
configuration and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from huggingface_hub import constants, hf_hub_download

from dojo.cli import TrainingStopped, UserError
from dojo.files import outputs
from dojo.files.tensors import obey_umask
from dojo.lazy import diffusers, no_grad, torch
from dojo.models import classic, loaded, precisions, published
from dojo.run import finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FLAG = "--pretrained_model_name_or_path"
TRANSFORMER, UNET = "transformer", "unet"
Embeds: TypeAlias = "dict[str, torch.Tensor]"
# The beginning of a pipeline's class, and how the scripts that train it end. The first counts.
SCRIPTS = {
    "StableDiffusion3": "sd3",
    "StableDiffusionXL": "sdxl",
    "StableDiffusionPipeline": "sd15",
    "Kolors": "kolors",
    "HunyuanDiT": "hunyuandit",
}

_WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor")
_OF_DIFFUSERS = ("vae", TRANSFORMER, UNET)
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|msgpack|h5|onnx|pth|pt|index(\..+)?\.json)")


# ---- finding and reading ----


def find_folder(
    name: str,
    flag: str,
    *,
    revision: str | None,
    variant: str | None,
    passed: Mapping[str, None] | None = None,
) -> Path:
    """A folder, or the local copy of a hub repository without the `passed` parts' weights.

    While a dry run plans, a known model's configurations are enough (`published`).

    Args:
        flag: what the user named it with.
        revision: branch, tag or commit of the repository.
        variant: which of its files, such as fp16.
    Raises:
        UserError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if (known := published.planned_folder(name)) is not None:
        return known
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.startswith("models/"):
        short = published.find(name)
        hint = f"; {short.title} is {short.hub_ids[0]} (a dry run needs no more)" if short else ""
        raise UserError(f"{flag}: there is no folder {name}{hint}")
    try:
        folder = Path(
            diffusers.DiffusionPipeline.download(
                name, revision=revision, variant=variant, **(passed or {})
            )
        )
        for part in passed or ():  # diffusers skips a passed part's configuration too
            hf_hub_download(name, f"{part}/config.json", revision=revision)
    except OSError as error:
        raise UserError(
            f"{flag}: {name} is neither a folder nor a reachable hub "
            f"repository ({str(error).splitlines()[0]})"
        ) from error
    return folder


def kind_of(folder: Path, flag: str) -> str:
    """The class of a folder's pipeline.

    A Kolors is one by its text encoder: its authors' own folder may name another class. That of
    Hunyuan-DiT's authors names none.

    Raises:
        UserError: there is no model_index.json, or it is damaged.
    """
    if tencents(folder) is not None:
        return "HunyuanDiTPipeline"
    kind = str(loaded.read_index(folder, flag)["_class_name"])
    try:
        encoder: Any = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    except (OSError, ValueError):  # who reads it for its own sake says so
        return kind
    is_kolors = isinstance(encoder, dict) and encoder.get("model_type") == "chatglm"
    return "KolorsPipeline" if is_kolors and not kind.startswith("Kolors") else kind


def tencents(folder: Path) -> Path | None:
    """The folder `t2i` of a Hunyuan-DiT as Tencent publishes it, which a folder is or has."""
    if (folder / loaded.INDEX).is_file():
        return None
    inside = [(place, part) for place in (folder, folder / "t2i") for part in ("model", "denoiser")]
    return next((p for p, part in inside if any((p / part).glob("pytorch_model_*.pt"))), None)


def check_kind(folder: Path, flag: str, prefix: str, name: str) -> None:
    """Refuses a folder whose pipeline's class does not begin with `prefix`, which `name` has.

    Raises:
        UserError: naming the class that it is, and the script for it.
    """
    kind = kind_of(folder, flag)
    if not kind.startswith(prefix):
        own = next((own for start, own in SCRIPTS.items() if kind.startswith(start)), None)
        hint = f" (its scripts are train_*_{own}.py)" if own else ""
        raise UserError(f"{flag}: {folder} holds a {kind}, no {name}{hint}")


def read_config(folder: Path, flag: str, part: str, file: str = "config.json") -> dict[str, Any]:
    """A part's configuration.

    Raises:
        UserError: it is missing or broken.
    """
    return loaded.read_json(folder / part / file, loaded.subject(folder, part, flag))


def whole_numbers(config: Mapping[str, Any], where: str, *names: str) -> list[int]:
    """Numbers of a configuration that must be there and positive.

    Raises:
        UserError: one is not; `where` begins the sentence.
    """
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "has no" if value is None else f"says {value!r} for"
            raise UserError(f"{where} {found} {name}, which must be a whole number above 0")
    return [config[name] for name in names]


def clip_tokens(folder: Path, flag: str) -> int:
    """Length that the CLIP tokenizers of a folder pad to (77 for the real models).

    Raises:
        UserError: `tokenizer/` does not say it.
    """
    where = f"{flag}: {folder / 'tokenizer'}"
    settings = loaded.read_json(folder / "tokenizer" / "tokenizer_config.json", where)
    (length,) = whole_numbers(settings, f"{where}/tokenizer_config.json", "model_max_length")
    return length


def check_tokens(folder: Path, flag: str, encoders: Mapping[str, Any]) -> None:
    """Refuses CLIPs whose tokenizers are not there, or pad to more places than they have.

    Args:
        encoders: the configurations of the CLIPs, by their folders' names.
    Raises:
        UserError: naming what is missing, or both numbers.
    """
    for part, settings in encoders.items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        where = loaded.subject(folder, tokenizer, flag)
        loaded.check_vocabulary_files(folder / tokenizer, where)
        tokens, places = clip_tokens(folder, flag), settings.get("max_position_embeddings", 77)
        if tokens > places:
            raise UserError(
                f"{flag}: {folder}: the tokenizer pads to {tokens} tokens "
                f"(model_max_length), {part} has {places} places for them"
            )


def check_channels(folder: Path, vae: Mapping[str, Any], channels: int, network: str) -> None:
    """Refuses an autoencoder whose latents the network does not take.

    Raises:
        UserError: naming both numbers.
    """
    where = f"{folder}/vae/config.json"
    widths = vae.get("block_out_channels")
    if not isinstance(widths, list) or not widths:
        raise UserError(f"{where} has no list of block_out_channels")
    if whole_numbers(vae, where, "latent_channels") != [channels]:
        raise UserError(
            f"{folder}: the autoencoder has {vae['latent_channels']} channels, the "
            f"{network} expects {channels}"
        )


def fingerprint(folder: Path, parts: Sequence[str]) -> str:
    """Identifies the model files of some sub-folders: names, sizes and samples of their contents.

    64 blocks of 64 KiB spread over each file are read, so that 10 GB take no longer than 10 MB;
    training changes every block of a weight file. A file no larger than these blocks is read once.
    """
    return fingerprint_of(
        {
            f"{part}/{path.name}": path
            for part in parts
            for path in sorted(path for path in (folder / part).glob("*") if path.is_file())
        }
    )


def fingerprint_of(files: Mapping[str, Path]) -> str:
    """Identifies some files, and the names that they are given, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path in files.items():
        size = path.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with path.open("rb") as file:
            if size <= 64 * 65_536:
                digest.update(file.read())
                continue
            for i in range(64):
                file.seek((size - 65_536) * i // 63)
                digest.update(file.read(65_536))
    return digest.hexdigest()


def hub_commit(name: str) -> str:
    """Which commit of "owner/name", or of "owner/name/file", the hub's cache holds here.

    It stands for all of its files. "" is none: nothing was fetched, or it is no id.
    """
    owner, _, rest = name.partition("/")
    ref = Path(constants.HF_HUB_CACHE) / f"models--{owner}--{rest.partition('/')[0]}/refs/main"
    return ref.read_text().strip() if owner and rest and ref.is_file() else ""


# ---- copying ----


def copy_parts(
    base: Path,
    folder: Path,
    parts: Sequence[str],
    variant: str | None,
    load: Callable[[str], Any],
    elsewhere: Collection[str] = (),
) -> dict[str, Any]:
    """Fills a result folder with parts of a base pipeline, and returns its model_index.json.

    The models come out in float32 from a plain call: files of a variant lose its name, and what
    transformers loads says float32 in its configuration, where it would else take half precision
    from. A part that the base does not have is null in the index.

    Args:
        load: a part as a model, for those whose weights are no safetensors in `base`; None if
            there is no such model.
        elsewhere: parts whose weights are to be loaded although `base` has them.
    """
    index = loaded.read_index(base, FLAG)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        from_model = part in elsewhere
        plain = part.startswith(_WITHOUT_WEIGHTS)
        if not from_model and not plain and not index.get(part, [None])[0]:
            outputs.clear(folder / part)
            continue
        copy = partial(_copy_part, base / part, variant, partial(load, part), from_model=from_model)
        if not outputs.fill(folder / part, copy):
            index[part] = [None, None]
    write_index(folder, index)
    return index


def _copy_part(
    source: Path, variant: str | None, load: Callable[[], Any], target: Path, *, from_model: bool
) -> None:
    """Copies a part's folder, or loads it and saves it; writes nothing where there is none."""
    without_weights = source.name.startswith(_WITHOUT_WEIGHTS)
    if without_weights and not from_model:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
    elif from_model or not _copy_weights(source, target, variant):
        model = load()
        if model is not None:
            model.save_pretrained(target)
    if target.is_dir() and not source.name.startswith((*_WITHOUT_WEIGHTS, *_OF_DIFFUSERS)):
        path = target / "config.json"
        settings = json.loads(path.read_text())
        settings.pop("torch_dtype", None)
        path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")
        classic.rewrite(target)


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes model_index.json."""
    outputs.own(folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_weights(source: Path, target: Path, variant: str | None) -> bool:
    """Copies a model's folder with one set of safetensors; False if it has none."""
    infix = f".{variant}" if variant else ""
    files = {path.name: path for path in source.glob("*") if path.is_file()}
    renamed = {name.replace(infix, ""): name for name in files if infix and infix in name}
    chosen = {name: old for name, old in renamed.items() if _WEIGHTS.fullmatch(name)}
    if not chosen:
        chosen = {name: name for name in files if _WEIGHTS.fullmatch(name)}
    if not any(name.endswith(".safetensors") for name in chosen):
        return False
    chosen |= {name: name for name in files if not _ANY_WEIGHTS.fullmatch(name)}
    target.mkdir(parents=True, exist_ok=True)
    for name, old in chosen.items():
        if name.endswith(".index.json"):
            listed = json.loads(files[old].read_text())
            listed["weight_map"] = {
                tensor: file.replace(infix, "") for tensor, file in listed["weight_map"].items()
            }
            (target / name).write_text(json.dumps(listed, indent=2) + "\n")
        else:
            shutil.copyfile(files[old], target / name)
    return True


# ---- a trained network ----


def save_network(
    folder: Path, network: Any, part: str, dtype: torch.dtype, max_shard_size: str
) -> dict[str, torch.Tensor]:
    """Writes the trained network of a result, and returns its weights as they are in the files.

    Args:
        part: its name in the pipeline.
        dtype: that it is written in.
        max_shard_size: of a file, such as 5GB.
    Raises:
        TrainingStopped: a weight is too large for `dtype`.
    """
    with torch.device("meta"):
        twin: Any = type(network).from_config(network.config)
    cast = {name: value.to("cpu", dtype) for name, value in network.state_dict().items()}
    if finite.not_finite({"weights": cast.values()}):
        name = precisions.name_of(dtype)
        raise TrainingStopped(
            f"the result's weights are too large for --save_dtype {name}: it was not "
            "written; give --resume_from_checkpoint latest --save_dtype bf16 (or fp32)"
        )
    twin.load_state_dict(cast, assign=True)

    def write(inside: Path) -> None:
        twin.save_pretrained(inside, max_shard_size=max_shard_size)
        for path in inside.glob("*.safetensors"):
            obey_umask(path)

    outputs.fill(folder / part, write)
    return cast


# ---- embeddings ----


def zeros_for_empty(embeds: Embeds, captions: Sequence[str]) -> Embeds:
    """The embeddings with zeros in the rows of empty captions."""
    if "" not in captions:
        return embeds
    device = next(iter(embeds.values())).device
    there = torch.tensor([caption != "" for caption in captions], device=device)
    return {
        name: value * there.view(-1, *[1] * (value.dim() - 1)) for name, value in embeds.items()
    }


# ---- the autoencoder ----


class Frugal(Protocol):
    """How an autoencoder may save memory."""

    @property
    def enable_vae_tiling(self) -> bool: ...
    @property
    def enable_vae_slicing(self) -> bool: ...


def frugal(vae: Any, args: Frugal) -> Any:
    """The autoencoder, working in tiles and picture by picture where the options say so."""
    if args.enable_vae_tiling:
        vae.enable_tiling()
    if args.enable_vae_slicing:
        vae.enable_slicing()
    return vae


@no_grad
def posterior(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the autoencoder's posterior, unscaled: pixels [B, 3, H, W] in [-1, 1]."""
    encoded: Any = vae.encode(pixels.to(vae.device, vae.dtype))  # pyright: ignore
    distribution = encoded.latent_dist
    return distribution.mean, distribution.std


def decode(
    vae: AutoencoderKL, latents: torch.Tensor, *, scale: float, shift: float = 0.0
) -> torch.Tensor:
    """Latents, scaled and shifted, to pictures float32 [B, 3, H, W] in [0, 1], differentiably."""
    unscaled = latents.float() / scale + shift
    decoded = vae.decode(unscaled.to(vae.device, vae.dtype)).sample  # pyright: ignore
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
