"""A folder of configurations and tokenizers for a single file, made of constants: no download."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dojo.cli import UserError
from dojo.files import user_caches
from dojo.lazy import diffusers, torch, transformers
from dojo.models import loaded
from dojo.models.folders import FLAG
from dojo.models.unet.single_file import constants, vocabulary
from dojo.models.unet.single_file.header import SingleFile

_FORM = 1  # to be counted up whenever the same constants make another folder
_CLIP = "CLIPTextModel"


def configurations(file: SingleFile) -> Path:
    """The folder in diffusers' layout that goes with a file, without weights.

    It is made once for all files of the same sizes and marks, in the user's folder of caches
    (`XDG_CACHE_HOME`, else ~/.cache), under a name that says what is in it.

    Raises:
        UserError: the file is built in another way than the public models, or no folder can be
            made.
    """
    made = _describe(file)
    versions = [_FORM, diffusers.__version__, transformers.__version__]
    digest = hashlib.blake2b(json.dumps([made, versions]).encode(), digest_size=8).hexdigest()
    folder = cache_folder() / f"{file.family}-{digest}"
    if (folder / loaded.INDEX).is_file():
        return folder
    try:
        _make(folder, made, file)
    except OSError as error:
        raise UserError(
            f"{FLAG}: the configurations of {file.path.name} cannot be written to {folder} "
            f"({error}); XDG_CACHE_HOME names another place for caches"
        ) from error
    return folder


def cache_folder() -> Path:
    """Where such folders lie."""
    return user_caches() / "single-files"


def _describe(file: SingleFile) -> dict[str, Any]:
    """Everything that decides what is in the folder."""
    texts = {part: constants.text_encoder(file, part) for part in constants.TEXTS[file.family]}
    networks = {"unet": constants.unet(file), "vae": constants.vae(file)}
    _check_widths(file, networks["unet"], texts)
    kind, settings = constants.scheduler(file)
    return {**networks, **texts, "scheduler": [kind, settings]}


def _check_widths(file: SingleFile, unet: dict[str, Any], texts: dict[str, Any]) -> None:
    given = sum(settings["hidden_size"] for settings in texts.values())
    if given != unet["cross_attention_dim"]:
        lacks = [part for part in texts if part not in file]
        raise UserError(
            f"{FLAG}: the UNet of {file.path} reads {unet['cross_attention_dim']} numbers per "
            f"token, the public text encoders give {given}"
            + (f" (the file has no {', '.join(lacks)})" if lacks else "")
            + f": name a folder with its configurations as {constants.CONFIG_FLAG}"
        )


def _make(folder: Path, made: dict[str, Any], file: SingleFile) -> None:
    """Writes everything under a passing name and renames it; another process may be first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        inside = temporary / folder.name
        inside.mkdir()
        _fill(inside, made, file)
        try:
            inside.rename(folder)
        except OSError:
            if not (folder / loaded.INDEX).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, made: dict[str, Any], file: SingleFile) -> None:
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        try:
            with torch.device("meta"):
                network: Any = kind.from_config(made[part])
        except Exception as error:  # whatever a class says to sizes that it cannot have
            raise UserError(
                f"{FLAG}: the {part} of {file.path} has sizes of no public model ({error}): name "
                f"a folder with its configurations as {constants.CONFIG_FLAG}"
            ) from error
        network.save_config(folder / part)
    texts = constants.TEXTS[file.family]
    for part in texts:
        projected = "WithProjection" if part == "text_encoder_2" else ""
        settings = transformers.CLIPTextConfig(**made[part], architectures=[_CLIP + projected])
        settings.save_pretrained(folder / part)
        # OpenCLIP was trained with captions filled up with zeros, which is the token of "!".
        pad = "!" if made[part]["hidden_act"] == "gelu" else vocabulary.END
        vocabulary.write(folder / part.replace("text_encoder", "tokenizer"), pad=pad)
    kind, settings = made["scheduler"]
    getattr(diffusers, kind).from_config(settings).save_config(folder / "scheduler")
    text = json.dumps(_index(file.family, list(texts), kind), indent=2)
    (folder / loaded.INDEX).write_text(text + "\n", encoding="utf-8")


def _index(family: str, texts: list[str], scheduler: str) -> dict[str, Any]:
    """model_index.json."""
    index: dict[str, Any] = {"_diffusers_version": diffusers.__version__}
    if family == "sdxl":
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index["safety_checker"] = [None, None]
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    for part in texts:
        projected = "WithProjection" if part == "text_encoder_2" else ""
        index[part] = ["transformers", _CLIP + projected]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    return dict(sorted({**index, "scheduler": ["diffusers", scheduler]}.items()))
