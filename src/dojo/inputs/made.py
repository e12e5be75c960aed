"""Samples in shards: what they are to a model, and which texts have to be encoded for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from dojo import data
from dojo.cli import UserError
from dojo.finetune.tokens import check_used
from dojo.inputs import texts
from dojo.lazy import torch
from dojo.models import published
from dojo.models.family import Model
from dojo.run.run import Run

if TYPE_CHECKING:
    from torch import Tensor

# Options of the pictures that the numbers of a folder depend on.
_PICTURES = (
    *("resolution", "height", "width", "aspect_buckets", "bucket_step", "bucket_min", "bucket_max"),
    *("random_flip", "crop_variants", "mask_from_alpha"),
)
_CAPTIONS = ("shuffle_caption", "keep_tokens")


class Groups(Protocol):
    """The groups of options that say what pictures and captions become."""

    @property
    def data(self) -> data.DataArgs: ...
    @property
    def captions(self) -> data.CaptionArgs: ...


def settings(model: Model, args: Groups) -> dict[str, Any]:
    """What latents and embeddings depend on besides pictures and captions, as JSON has it.

    What decides last bits alone (precision of the encoders, the machine) is left out: a folder is
    made on one machine and trained from on another.
    """
    found: dict[str, Any] = {
        "model": model.name,
        "vae": model.fingerprint(["vae"]),
        "text encoders": model.fingerprint(model.text_folders),
        **model.text_settings,
        **{name: getattr(args.data, name) for name in _PICTURES},
        **{name: getattr(args.captions, name) for name in _CAPTIONS},
    }
    if args.captions.shuffle_caption:
        found["caption_variants"] = args.captions.caption_variants
    return json.loads(json.dumps(found, default=str))


def check(made: data.Made, model: Model, args: Groups) -> None:
    """Refuses a folder that was made for another model, or with other options.

    Encoders whose weights are not there are not compared: nothing is encoded.

    Raises:
        UserError: naming what differs; or there are new words, which it cannot have.
    """
    if model.words is not None:
        raise UserError(
            f"{made.location}: --new_tokens does not go with a folder that `python -m dojo.data "
            "cache` wrote, whose captions were embedded without them: name the pictures, or their "
            "shards"
        )
    now = settings(model, args)
    for name, parts in (("vae", ("vae",)), ("text encoders", model.text_encoders)):
        if not _has_weights(model, parts):
            del now[name]
    changed = data.differences(made.settings, now)
    if changed:
        raise UserError(
            f"{made.location} was made otherwise: {'; '.join(changed)}: train as it was made, or "
            "make another with `python -m dojo.data cache`"
        )


def _has_weights(model: Model, parts: Sequence[str]) -> bool:
    if published.has_no_weights(model.folder):  # a dry run plans by configurations
        return False
    try:
        model.check_weights(parts)
    except UserError:
        return False
    return True


def plan(shards: data.Stream | data.Made, model: Model, args: Groups) -> data.Plan:
    """Which rows are used at which size.

    Raises:
        UserError: the model takes no such size, a folder was made otherwise, or the caption of all
            rows lacks a new word.
    """
    if isinstance(shards, data.Made):
        check(shards, model, args)
        return data.Plan(rounds=(dict(shards.rounds()),))
    if shards.prompt is not None:  # else it is not known what the rows' captions have
        check_used(model.words, [shards.prompt])
    model.check_step(*args.data.size)
    return data.Plan(rounds=({args.data.size: shards.rows()},))


@dataclass(frozen=True)
class _Both:
    """A folder's texts, and the others."""

    made: data.MadeTexts
    others: texts.Lookup

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        rows = [(self.made if one in self.made else self.others)([one]) for one in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def text_of(
    run: Run,
    shards: data.Stream | data.Made,
    model: Model,
    cache: data.TextCacheArgs,
    words: Sequence[str],
    *,
    trained: bool,
) -> texts.Texts:
    """The encoders for a stream; for a folder the texts it holds, and encoders for others only.

    Args:
        words: that are needed besides the samples' captions.
        trained: keep the text encoders that can be trained.
    """
    if isinstance(shards, data.Stream):
        at_use = replace(cache, no_cache_text_embeddings=True)
        return texts.prepare(run, model, at_use, [list(words)], trained=trained)
    known = data.MadeTexts(shards)
    missing = sorted({one for one in words if one not in known})
    if not missing and not trained:
        return texts.Texts(known, run.device, model)
    made = texts.prepare(run, model, cache, [missing or [""]], trained=trained)
    return texts.Texts(_Both(known, made.lookup), run.device, model, made.encoders)
