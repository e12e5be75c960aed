"""Files of new words: written as diffusers, ComfyUI and A1111's web UI read them.

A model with one CLIP has a file with one tensor, whose name is the word: diffusers takes the word
from there, the others from the file's name, and none of them asks more of the tensor's name. With
two CLIPs the tensors are `clip_l` and `clip_g`. A tensor is float32 [vectors, D].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.files import outputs, tensors
from dojo.lazy import safetensors_torch, torch
from dojo.models.words import CLIPS, Word

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "embeddings"
"""In a result and in a checkpoint: a file for each word."""
_BY_CLIP: Mapping[str, str] = dict(zip(CLIPS, ("clip_l", "clip_g"), strict=True))
_NAMELESS = ("emb_params", "*", *_BY_CLIP.values())
_BASES = {
    (768,): "Stable Diffusion 1",
    (1024,): "Stable Diffusion 2",
    (768, 1280): "SDXL or Stable Diffusion 3",
}
_PICKLES = (".pt", ".bin", ".pth")


def write(folder: Path, words: Iterable[Word]) -> None:
    """Writes a file for each learned word into `embeddings/`; equal vectors give equal bytes."""
    for word in words:
        one = len(word.rows) == 1
        named = {word.text if one else _BY_CLIP[part]: rows for part, rows in word.rows.items()}
        # Readers of today pass over a header: it says what the tensors' names cannot.
        told = {"token": word.text, **({"initializer": word.start} if word.start else {})}
        path = folder / FOLDER / word.file
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors.save(outputs.own(path), named, told)


def read(name: str, flag: str) -> list[Word]:
    """The words of a file, or of all files of a folder, by any of these programs.

    Args:
        name: the file; or a folder, or one with `embeddings/` in it.
        flag: what the user named it with.
    Raises:
        UserError: there is none, or it holds something else.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return [_read_file(path, flag)]
    inner = path / FOLDER if (path / FOLDER).is_dir() else path
    files = sorted(inner.glob("*.safetensors"))
    if not files:
        raise UserError(f"{flag}: {name} holds no embeddings (.safetensors)")
    return [_read_file(one, flag) for one in files]


def found(path: Path) -> list[Path]:
    """What may be files of words: a file, or those of a result's folder."""
    if path.is_dir():
        return sorted((path / FOLDER).glob("*.safetensors"))
    return [path] if path.is_file() else []


def describe(path: Path, flag: str) -> list[str]:
    """What a file of a learned word is, one fact a line; nothing of any other file.

    Raises:
        UserError: it is damaged.
    """
    try:
        pickled = path.suffix in _PICKLES
        names = _loaded(path, flag)[0] if pickled else tensors.read_header(path)[0]
    except (OSError, ValueError, UserError):
        return []  # who reads a LoRA says what is wrong
    if len(names) != 1 and not names.keys() <= {*_BY_CLIP.values()}:
        return []  # a LoRA has several tensors
    word = _read_file(path, flag)
    widths = {part: rows.shape[1] for part, rows in word.rows.items()}
    known = _BASES.get(tuple(widths.values()), "none that is known")
    sizes = ", ".join(f"{part} {width}" for part, width in widths.items())
    lines = [
        f"file: {path}, {path.stat().st_size / 1e3:.1f} kB",
        "method: textual inversion",
        f"word: {word.text}, {word.vectors} vectors",
        f"base: {known} (numbers of a vector: {sizes})",
    ]
    return [*lines, f"begun as: {word.start}"] if word.start else lines


def _read_file(path: Path, flag: str) -> Word:
    state, told = _loaded(path, flag)
    clips = {part: state[key] for part, key in _BY_CLIP.items() if key in state}
    if not clips and len(state) == 1:
        [tensor] = state.values()
        clips = {CLIPS[0]: tensor}
    rows = {part: _as_rows(tensor) for part, tensor in clips.items()}
    counts = {len(one) for one in rows.values()}
    if len(counts) != 1 or any(one.dim() != 2 for one in rows.values()):
        raise UserError(f"{flag}: {path} is no learned embedding: it holds {_some(state)}")
    [count] = counts
    text = told.get("token") or next((key for key in state if key not in _NAMELESS), path.stem)
    try:
        return Word(text=_as_word(text), vectors=count, start=told.get("initializer"), rows=rows)
    except ValueError as error:
        raise UserError(f"{flag}: {path}: {error}") from error


def _as_word(text: str) -> str:
    """A file's word; one that may be a word of the language is put into angle brackets."""
    word = text.strip().lower().replace(" ", "-")
    return word if any(not sign.isalnum() for sign in word) else f"<{word}>"


def _as_rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().float()
    return rows[None] if rows.dim() == 1 else rows


def _loaded(path: Path, flag: str) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Tensors by name, and the header's text."""
    if not path.is_file():
        raise UserError(f"{flag}: there is no file or folder {path}")
    try:
        if path.suffix in _PICKLES:
            return _of_pickle(torch.load(path, map_location="cpu", weights_only=True))
        return safetensors_torch.load_file(path), tensors.read_header(path)[1]
    except Exception as error:  # the libraries have many kinds of them
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{flag}: {path} cannot be read ({said})") from error


def _of_pickle(found: Any) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """A1111's own files have the vectors below `string_to_param`, and a name beside them."""
    if "string_to_param" not in found:
        return found, {}
    named = {"token": found["name"]} if isinstance(found.get("name"), str) else {}
    return dict(found["string_to_param"]), named


def _some(names: Iterable[str]) -> str:
    shown: Sequence[str] = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
