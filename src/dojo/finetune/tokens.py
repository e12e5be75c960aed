"""New words in training: their options, and the vectors that learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dojo.cli import UserError, option, ranges
from dojo.files import outputs, tensors
from dojo.finetune import embeddings
from dojo.lazy import safetensors_torch, torch
from dojo.models.words import CLIPS, Word, Words, widths

if TYPE_CHECKING:
    from torch import nn

    from dojo.models.family import Model
    from dojo.models.table import NewRows
    from dojo.run.optim import OptimArgs

ROWS = "new_rows.safetensors"
"""In a checkpoint: the vectors as they are trained, by encoder."""
_ModelT = TypeVar("_ModelT", bound="Model")


@dataclass(frozen=True, kw_only=True)
class NewTokenArgs:
    """New words of the CLIP text encoders."""

    new_tokens: tuple[str, ...] = option((), common=True)
    """new words that are learned, to be used in captions and prompts: <dog>, or <dog>:4 for one of
    four vectors"""
    initializer_token: tuple[str, ...] = ()
    """the words that their vectors begin as, one for each or one for all; unset: drawn with mean
    and standard deviation of the model's own. T5 (SD3) reads these words in their place"""
    keep_token_norm: bool = False
    """the vectors keep the length that they begin with: their direction alone is learned"""

    def __post_init__(self) -> None:
        if self.new_tokens:
            self.words()
        elif self.initializer_token or self.keep_token_norm:
            name = "initializer_token" if self.initializer_token else "keep_token_norm"
            raise ValueError(f"--{name} needs --new_tokens")

    def words(self, seed: int = 0) -> Words | None:
        """The words; None where there are none.

        Raises:
            ValueError: they are malformed, or have another number than their initializers.
        """
        if not self.new_tokens:
            return None
        starts = self.initializer_token
        if len(starts) not in (0, 1, len(self.new_tokens)):
            raise ValueError(
                f"--initializer_token: {len(starts)} words for {len(self.new_tokens)} --new_tokens:"
                " one for each, or one for all"
            )
        every = [*starts] * (len(self.new_tokens) if len(starts) == 1 else 1)
        every = every or [None] * len(self.new_tokens)
        try:
            found = [Word.read(*one) for one in zip(self.new_tokens, every, strict=True)]
        except ValueError as error:
            raise ValueError(f"--new_tokens: {error}") from error
        return Words(words=tuple(found), seed=seed, keep_norm=self.keep_token_norm)

    def taught(self, model: _ModelT, seed: int) -> _ModelT:
        """The model with the new words.

        Args:
            seed: of the vectors that are drawn.
        Raises:
            UserError: the model knows one of them, or its encoders compute where and as frozen
                ones may.
        """
        words = self.words(seed)
        if words is None:
            return model
        for name in ("text_encoder_device", "text_encoder_precision"):
            value = getattr(model.args, name)
            if value != "auto":
                raise UserError(
                    f"--{name} {value} is for text encoders through which nothing learns: leave it "
                    "out, or --new_tokens"
                )
        made = replace(model, words=words)
        made.readers()  # refuses a word that is known, before anything is read or written
        return made


@dataclass(frozen=True, kw_only=True)
class InversionArgs(NewTokenArgs):
    """New words of the CLIP text encoders, which are all that is trained."""

    def __post_init__(self) -> None:
        if not self.new_tokens:
            raise ValueError("--new_tokens is missing: it names what is learned, such as <dog>")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PivotalArgs(NewTokenArgs):
    """New words of the CLIP text encoders, learned beside the adapters (pivotal tuning)."""

    token_lr: float = 5e-4
    """learning rate of --new_tokens"""
    token_steps: int | None = None
    """optimizer steps for which --new_tokens are trained, and then stay; unset: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(self, "token_lr", above=0)
        ranges.check(self, "token_steps", least=1)
        if self.token_steps is not None and not self.new_tokens:
            raise ValueError("--token_steps needs --new_tokens")

    def check(self, optim: OptimArgs) -> None:
        """
        Raises:
            ValueError: another rate than the network's, or words that stop, with an optimizer that
                has one rate, or averages over all steps.
        """
        if not self.new_tokens:
            return
        if optim.kind == "prodigy" and self.token_lr != optim.learning_rate:
            raise ValueError("--optimizer prodigy has one rate: --token_lr must equal it")
        if self.token_steps is not None and optim.kind in ("prodigy", "schedulefree"):
            raise ValueError(f"--token_steps does not go with --optimizer {optim.kind}")

    @property
    def group(self) -> dict[str, Any]:
        """What the optimizer is told of the vectors."""
        until = {} if self.token_steps is None else {"until": self.token_steps}
        return {"lr": self.token_lr, **until}


class Vectors:
    """The vectors of a model's new words, where they lie in its text encoders.

    Args:
        encoders: the CLIPs, which have been taught the words.
    """

    def __init__(self, words: Words, encoders: Sequence[nn.Module]) -> None:
        self.words = words
        self.rows = dict(zip(CLIPS, _rows(encoders), strict=False))
        for one in self.rows.values():
            one.rows.requires_grad = True

    @property
    def params(self) -> list[nn.Parameter]:
        """What is trained."""
        return [one.rows for one in self.rows.values()]

    def write(self, folder: Path) -> None:
        """Writes what users of the words load: see `embeddings`."""
        embeddings.write(folder, self._learned())

    def _learned(self) -> Iterator[Word]:
        """The words with their vectors."""
        counts = [word.vectors for word in self.words.words]
        split = {part: one.vectors().detach().split(counts) for part, one in self.rows.items()}
        for k, word in enumerate(self.words.words):
            yield replace(word, rows={part: some[k] for part, some in split.items()})

    def save(self, folder: Path) -> None:
        """Writes them for a checkpoint: to go on from, and to be used."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {part: one.rows for part, one in self.rows.items()}
        tensors.save(outputs.own(folder / ROWS), state, {"tokens": " ".join(self.words.pieces)})
        self.write(folder)

    def restore(self, folder: Path) -> None:
        """Reads them back, to the bit.

        Raises:
            UserError: the checkpoint holds others.
        """
        path = folder / ROWS
        try:
            state: Mapping[str, Any] = safetensors_torch.load_file(path)
            said = tensors.read_header(path)[1].get("tokens")
        except FileNotFoundError:
            state, said = {}, None
        if said != " ".join(self.words.pieces) or state.keys() != self.rows.keys():
            raise UserError(f"{path} does not hold the vectors of --new_tokens")
        with torch.no_grad():
            for part, one in self.rows.items():
                one.rows.copy_(state[part])


def _rows(encoders: Iterable[nn.Module]) -> list[NewRows]:
    from dojo.models.table import NewRows

    return [one for encoder in encoders for one in encoder.modules() if isinstance(one, NewRows)]


def numbers_of(model: Model) -> int:
    """How many numbers the vectors of a model's new words have together."""
    if model.words is None:
        return 0
    return model.words.vectors * sum(widths(model.folder, model.text_encoders).values())


def meta_clips(model: Model, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The CLIPs of a model, frozen, on the meta device, by their folders."""
    parts = [part for part in CLIPS if part in model.text_encoders]
    return {part: model.meta_encoder(part).to(dtype).requires_grad_(False) for part in parts}


def check_used(words: Words | None, captions: Iterable[str]) -> None:
    """Refuses words that no caption has: nothing would be learned.

    Raises:
        UserError: naming one.
    """
    if words is None:
        return
    left = {word.text for word in words.words}
    for caption in captions:
        left -= {word.text for word in words.find(caption)}
        if not left:
            return
    raise UserError(
        f"--new_tokens: no caption has {min(left)}, so nothing would be learned of it: write it "
        "into the captions, or into --instance_prompt"
    )
