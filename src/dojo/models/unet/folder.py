"""A result folder's frozen parts: copied from the base model so that plain diffusers loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dojo.files import outputs
from dojo.lazy import nn
from dojo.maths.objective import Diffusion, Objective
from dojo.models import folders, loaded
from dojo.models.family import Saving
from dojo.models.unet import schedule, single_file
from dojo.models.unet.config import Config

SINGLE_FILE = "model.safetensors"


def copy_parts(config: Config, folder: Path, parts: Sequence[str]) -> None:
    """Fills a result folder with frozen parts of the base model and with model_index.json.

    Afterwards the pipeline's `from_pretrained(folder)`, once the parts not named here (unet) are
    there, gives float32 models with the base's weights. Safety checker, feature extractor and image
    encoder come along where the base has them.

    Args:
        parts: sub-folders such as `vae`, `scheduler`, `text_encoder` and `tokenizer`.
    """

    def load(part: str) -> Any:
        inside = (config.folder / part).is_dir() or config.elsewhere(part)
        kind = loaded.class_of(index, part, config.folder, config.flag) if inside else None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            return None  # listed, but never downloaded
        return config.load_part(kind, part, config.exact_dtype(part))

    index = loaded.read_index(config.folder, config.flag)
    wanted = list(dict.fromkeys([*parts, *config.optional_parts]))
    elsewhere = [part for part in wanted if config.elsewhere(part)]
    written = folders.copy_parts(
        config.folder, folder, wanted, config.args.variant, load, elsewhere
    )
    settings = config.index_settings(written)
    if settings:
        folders.write_index(folder, {**written, **settings})
    if config.checkpoint is not None and "scheduler" in parts:
        # The file's marks may say more than the folder that goes with it.
        outputs.fill(folder / "scheduler", schedule.own(config.scheduler).save_pretrained)


def save_whole(
    folder: Path, unet: Any, config: Config, saving: Saving, objective: Objective
) -> None:
    """Writes the whole pipeline, every component, so that one plain call loads the folder."""
    outputs.discard(folder / SINGLE_FILE)  # of a longer run's shorter past
    cast = folders.save_network(folder, unet, config.part, saving.dtype, saving.max_shard_size)
    kind = schedule.save(folder, config.scheduler, objective)
    copied = () if kind else ("scheduler",)
    copy_parts(config, folder, ("vae", *copied, *config.text_folders))
    if kind:
        index = loaded.read_index(folder, config.flag)
        folders.write_index(folder, {**index, "scheduler": ["diffusers", kind]})
    if saving.single_file:
        _save_single_file(folder, cast, config, saving, objective)


def _save_single_file(
    folder: Path, cast: Any, config: Config, saving: Saving, objective: Objective
) -> None:
    """Writes all of it as one file, with the marks of what was trained."""
    assert isinstance(objective, Diffusion)
    parts: dict[str, Any] = {config.part: cast}
    for part, kind in config.networks.items():
        if part != config.part:
            parts[part] = config.load_part(kind, part, config.exact_dtype(part)).state_dict()
    single_file.save(
        outputs.own(folder / SINGLE_FILE),
        parts,
        family=config.kind_of_file,
        dtype=saving.dtype,
        prediction_type=objective.prediction_type,
        zero_snr=objective.schedule.ends_without_signal,
        title=folder.resolve().name,
        resolution=(config.native_size, config.native_size),
    )
