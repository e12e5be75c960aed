"""What a model card says of new words (textual inversion) that lie beside a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dojo.files import tensors
from dojo.publish import markdown

EMBEDDINGS = "embeddings"
"""The folder of their files, one for each word."""
_ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
_TWO_CLIPS = "clip_g"


def _files(folder: Path) -> Mapping[str, tuple[str, set[str]]]:
    """Word and tensors of each file, by its name."""
    found: dict[str, tuple[str, set[str]]] = {}
    for path in sorted((folder / EMBEDDINGS).glob("*.safetensors")):
        with suppress(OSError, ValueError):
            names, told = tensors.read_header(path)
            found[path.name] = (told.get("token", path.stem), set(names))
    return found


def loading(folder: Path, pipeline: str | None) -> list[str]:
    """Python that teaches diffusers' pipeline `pipe` the words of the folder `result`.

    Args:
        pipeline: diffusers' class of the base model.
    """
    several = any(_TWO_CLIPS in keys for _, keys in _files(folder).values())
    # SDXL's pipeline has a loader of words and SD3's has none: of which a file is, it does not say.
    if _cannot_load(pipeline) or (several and pipeline is None):
        return []
    lines: list[str] = []
    for name, (word, keys) in _files(folder).items():
        path = json.dumps(f"{EMBEDDINGS}/{name}")
        if _TWO_CLIPS not in keys:
            lines.append(f"pipe.load_textual_inversion(result, weight_name={path})")
            continue
        if not lines:
            lines.append("from safetensors.torch import load_file")
        lines.append(f'rows = load_file(result + "/" + {path})  # of a folder on this machine')
        for key, (encoder, tokenizer) in _ENCODERS.items():
            lines += [
                "pipe.load_textual_inversion(",
                f'    rows["{key}"], token={json.dumps(word)},',
                f"    text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer},",
                ")",
            ]
    if several:
        lines += [
            "# Published SDXLs have a wrong end of the text in their configurations, for which",
            "# transformers would take the new words.",
            "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
        ]
    return lines


def _cannot_load(pipeline: str | None) -> bool:
    """Whether diffusers' pipeline has no loader of words."""
    return (pipeline or "").startswith("StableDiffusion3")


def told(folder: Path, pipeline: str | None) -> str:
    """Where the words are written in prompts, and how other programs take them; "" without any.

    Args:
        pipeline: diffusers' class of the base model.
    """
    found = _files(folder)
    if not found:
        return ""
    words = ", ".join(markdown.code(word) for word, _ in found.values())
    names = ", ".join(markdown.code(name.removesuffix(".safetensors")) for name in found)
    said = (
        f"New words, to be written into prompts: {words}. SD Dojo's `demo.py` takes them with "
        f"`--embeddings`. In ComfyUI (`embedding:NAME`) and A1111's web UI the files of "
        f"`{EMBEDDINGS}/` go into the folder of embeddings, and the words are {names}."
    )
    if _cannot_load(pipeline):
        said += (
            " The pipeline of Stable Diffusion 3 has no `load_textual_inversion`: draw with "
            "`demo.py`, or with one of these programs."
        )
    return said
