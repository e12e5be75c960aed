"""Times what comes before training: pictures read, checked, and encoded into the cache of latents.

Pictures are made once and lie in the operating system's memory; every round fills a new cache. The
digest is of all numbers in it: two versions that do the same have the same one.

    python -m dojo.bench caches --resolution 512 --rounds 3
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from dojo import data
from dojo.bench import models
from dojo.bench.table import markdown
from dojo.cli import ranges
from dojo.lazy import no_grad, safetensors_torch, torch
from dojo.models.family import ModelArgs
from dojo.models.folders import posterior
from dojo.models.opening import open_model
from dojo.run import checkpoint, heap
from dojo.run.machine import peak_memory_gib

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.models.family import Model


@dataclass(frozen=True, kw_only=True)
class CacheBenchArgs:
    """What is timed."""

    model: Literal["pocket", "pocket-sd15", "pocket-sdxl"] = "pocket"
    """whose autoencoder encodes"""
    resolution: int = 512
    """height and width in pixels that pictures are encoded at"""
    num_pictures: int = 256
    """pictures that are read"""
    format: Literal["jpeg", "png"] = "jpeg"
    """of their files, which are twice as wide as the resolution and 3 : 2"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the autoencoder computes"""
    rounds: int = 3
    """times that a new cache is filled; the middle one counts"""
    work_dir: Path = Path("outputs/bench")
    """folder of the pictures and the caches"""
    output: Path | None = None
    """also write every number to this JSON file"""

    def __post_init__(self) -> None:
        ranges.check(self, "resolution num_pictures rounds", least=1)


def main(args: CacheBenchArgs) -> None:
    """Makes pictures, fills caches, prints."""
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(models.pocket(args.model))))
    pictures = _make_pictures(args)
    rounds = [_round(args, model, pictures) for _ in range(args.rounds)]
    found = {name: median(float(one[name]) for one in rounds) for name in _SECONDS}
    result = {
        "args": {name: str(value) for name, value in asdict(args).items()},
        "threads": torch.get_num_threads(),
        "pictures_per_s": args.num_pictures / sum(found.values()),
        "digests": sorted({str(one["digest"]) for one in rounds}),
        "peak_gib": peak_memory_gib(torch.device(args.device)),
        "rounds": rounds,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown([_row(args, result, found)]))


_SECONDS = ("read_s", "check_s", "encode_s")


def _row(
    args: CacheBenchArgs, result: Mapping[str, Any], found: Mapping[str, float]
) -> dict[str, str]:
    return {
        "model": args.model,
        "pixels": str(args.resolution),
        "pictures/s": f"{result['pictures_per_s']:.1f}",
        **{f"{name[:-2]}, s": f"{value:.2f}" for name, value in found.items()},
        "peak GiB": f"{result['peak_gib']:.2f}",
        "digest": " ".join(result["digests"]),
    }


def _make_pictures(args: CacheBenchArgs) -> Path:
    """Smooth colours with some grain, as photographs have, and captions."""
    folder = args.work_dir.absolute() / "datas"
    folder /= f"caches-{args.format}-{args.resolution}px-{args.num_pictures}"
    if folder.is_dir():
        return folder
    width, height = 2 * args.resolution, 4 * args.resolution // 3

    def write(partial: Path) -> None:
        generator = np.random.default_rng(0)
        rows: list[str] = []
        for number in range(args.num_pictures):
            name = f"{number:05d}.{args.format}"
            coarse = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int16)
            grain = generator.integers(-8, 9, (height, width, 1), dtype=np.int16)
            picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            picture.save(partial / name, quality=90)
            rows.append(json.dumps({"file_name": name, "text": f"colours {number}"}))
        (partial / "metadata.jsonl").write_text("\n".join(rows) + "\n")

    checkpoint.write_whole(folder, write)
    return folder


@no_grad
def _round(args: CacheBenchArgs, model: Model, folder: Path) -> dict[str, float | str]:
    """One cold cache: seconds of each phase, and the digest of what it holds."""
    root = args.work_dir.absolute() / "caches"
    shutil.rmtree(root, ignore_errors=True)
    options = data.DataArgs(dataset_name=str(folder), resolution=(args.resolution,))
    vae = model.load_vae(torch.device(args.device))
    times = [time.perf_counter()]
    source = data.open_training(options)
    source = data.identified(source, root)
    times.append(time.perf_counter())
    source, _ = data.checked(source, root, on_bad_sample="error", num_threads=2, progress=False)
    plan = data.assign(source, options, model.pixel_step)
    times.append(time.perf_counter())
    pictures = data.Pictures(
        *(source, options, data.CaptionArgs()), seed=0, latent_step=model.pixels_per_latent
    )
    with heap.kept(torch.device(args.device)):
        data.cache_latents(
            pictures,
            plan.needed(),
            lambda pixels: posterior(vae, pixels),
            root,
            {"vae": args.model},
            latent_channels=model.vae["latent_channels"],
        )
    times.append(time.perf_counter())
    seconds = (end - begin for begin, end in itertools.pairwise(times))
    found: dict[str, float | str] = dict(zip(_SECONDS, seconds, strict=True))
    found["digest"] = _digest(root)
    shutil.rmtree(root)
    return found


def _digest(root: Path) -> str:
    """Of all tensors in the shards, by their names."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.safetensors")):
        tensors: dict[str, Tensor] = safetensors_torch.load_file(path)
        for name in sorted(tensors):
            digest.update(path.name.encode() + name.encode())
            digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
