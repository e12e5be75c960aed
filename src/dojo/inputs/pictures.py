"""What does not train: pictures to latents and captions to embeddings, once or at every use.

`prepare` does the frozen work before training where the options allow it, and frees the encoders;
the loop then asks `latents(batch)` and `conditions(batch)` without knowing which way was taken.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dojo import data, rng
from dojo.cli import UserError
from dojo.data.dataset import Dataset
from dojo.finetune.adapters import TEXT_PARTS
from dojo.finetune.tokens import check_used
from dojo.inputs import made, texts
from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.models.family import Model
from dojo.models.folders import Embeds, posterior
from dojo.run import checkpoint, heap, phases
from dojo.run.machine import arithmetic
from dojo.run.optim import OptimArgs
from dojo.run.processes import ABOUT_SIZE
from dojo.run.run import Run

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor


class Groups(Protocol):
    """The groups of a script's options that say what the data are and how they are read."""

    @property
    def data(self) -> data.DataArgs: ...
    @property
    def captions(self) -> data.CaptionArgs: ...
    @property
    def cache(self) -> data.CacheArgs: ...


@dataclass
class Sources:
    """The samples to train on, those held out, and what was left out when they were checked."""

    train: data.Captioned
    held_out: data.Captioned | None
    left_out: list[data.BadReport] = field(default_factory=list)
    plan: data.Plan | None = None
    eval_plan: data.Plan | None = None
    shards: data.Stream | data.Made | None = None
    """The samples to train on, where they lie in shards; `train` has none then."""

    @property
    def count(self) -> int:
        """Samples to train on."""
        return len(self.train if self.shards is None else self.shards)

    @property
    def size(self) -> data.Size:
        """(height, width) of the largest training pictures: what memory, shift and validation go
        by. With aspect buckets it stands for all shapes of that many pixels."""
        recipes = self.train.recipes
        return (
            max(recipe.height or max(recipe.resolution) for recipe in recipes),
            max(recipe.width or max(recipe.resolution) for recipe in recipes),
        )

    @property
    def samples_per_epoch(self) -> int:
        """Uses of pictures per epoch: repeats count; partners of DreamBooth's batches do not."""
        if self.plan is not None:
            return self.plan.samples_per_epoch
        if self.shards is not None:
            return len(self.shards)
        return sum(self.train.recipe(index).repeats for index in range(len(self.train)))

    def fingerprint(self, whole_batch: int) -> str:
        """Identifies what is trained on: samples, captions, sizes, order, and how they are used.

        Args:
            whole_batch: samples of a micro-batch over all processes; batches of several buckets
                are filled in other ways when it changes.
        """
        digest = hashlib.blake2b(digest_size=8)
        plan, train = self.plan, self.train
        by_shards = self.shards is not None
        rounds = [sorted(some.items()) for some in plan.rounds] if plan and not by_shards else []
        partners = plan.partners if plan else ()
        filled = whole_batch if plan and len(plan.sizes) > 1 else 0
        recipes = [asdict(recipe) for recipe in train.recipes]
        for words in (
            train.ids,
            train.captions,
            train.recipe_of,
            recipes,
            rounds,
            partners,
            filled,
            *(self.shards.words if self.shards is not None else ()),
        ):
            digest.update(json.dumps(words).encode())
        return digest.hexdigest()

    def report(self, batch_size: int) -> str:
        """The content of data_report.json."""
        counts = {"train": self.count, "held_out": len(self.held_out or ())}
        buckets = self.plan.rows(batch_size) if self.plan else []
        left_out = [asdict(row) for row in self.left_out]
        sources = [source for source in (self.train, self.held_out) if source is not None]
        return json.dumps(
            {**counts, "description": self.train.description, "buckets": buckets}
            | {"left_out": left_out, **data.seen(*sources)},
            indent=1,
            ensure_ascii=False,
        )


@dataclass(frozen=True)
class EvalSet:
    """Pictures that the eval loss looks at, as they are: no mirror, no dropped caption."""

    name: str
    dataset: data.Pictures | data.Latents
    draws: list[data.Draw]


@dataclass
class Inputs:
    """The data sets and the frozen models' outputs for them."""

    train: data.Pictures | data.Latents | data.Streamed | data.MadeRows
    evaluation: list[EvalSet]
    plan: data.Plan
    vae: AutoencoderKL
    text: texts.Texts
    model: Model
    options: Groups
    run: Run
    shards: data.Stream | data.Made | None = None

    def posterior(self, batch: data.Batch) -> data.Posterior:
        """Mean and std of a batch's posterior: float32 [B, C, h, w], unscaled, on the device."""
        return posterior_of(batch, self.vae, self.run.device)

    def latents(self, batch: data.Batch) -> Tensor:
        """A training batch as the network sees it, drawn anew from its posterior: [B, C, h, w]."""
        mean, std = self.posterior(batch)
        keys = self.run.keys("posterior", batch["place"])
        return self.model.scaled(mean, std, rng.normal(mean.shape[1:], keys, self.run.device))

    def conditions(self, batch: data.Batch) -> dict[str, Tensor]:
        """What the network reads beside latents and level, some encoders dropped as the options
        say."""
        return self.model.conditions(self._embeds(batch), self.geometry(batch))

    def geometry(self, batch: data.Batch) -> data.Geometry | None:
        """Where a batch's pictures come from, for models that are told."""
        return data.Geometry.of(batch) if self.model.sized else None

    def _embeds(self, batch: data.Batch) -> Embeds:
        cached = {name: batch[name] for name in self.model.embed_names if name in batch}
        embeds = self.text(batch["caption"], cached)
        shares = self.model.text.dropout
        if not any(shares.values()):
            return embeds
        dropped = {
            name: (rng.uniform(self.run.keys(f"{name} dropout", batch["place"])) <= share).to(
                self.run.device
            )
            for name, share in shares.items()
        }
        return self.model.drop(embeds, dropped)

    def area(self, batch: data.Batch) -> Tensor | None:
        """How much each place of the latents counts: [B, 1, h, w], or None where all count."""
        if "mask" not in batch:
            return None
        mask = batch["mask"].to(self.run.device)
        return mask + (1 - mask) * self.options.data.masked_loss_weight

    def loader(self, batch_size: int) -> Iterable[data.Batch]:
        """Batches of this process from where the run stands, without end."""
        run = self.run
        batches = data.Batches(
            self.plan,
            batch_size,
            seed=run.seed,
            first_batch=run.samples // (batch_size * run.accelerator.num_processes),
            **run.share,
        )
        shards = self.shards
        # Workers read the cached embeddings too; encoders on the device stay with the main process.
        lookup = self.text.lookup
        loader: torch.utils.data.DataLoader[data.Batch] = torch.utils.data.DataLoader(
            _WithText(self.train, lookup) if isinstance(lookup, data.CachedText) else self.train,
            batch_sampler=batches if shards is None else data.Ahead(batches, shards),
            collate_fn=data.collate,
            num_workers=self.options.data.dataloader_num_workers,
            worker_init_fn=interrupt.stand_apart,
            pin_memory=run.device.type == "cuda",
        )
        # Only rows of shards can be bad now: the others have been looked at.
        return loader if shards is None else _InOwnWords(loader)


@dataclass(frozen=True)
class _InOwnWords:
    """Batches, of which a worker's complaint is one sentence as the main process's would be."""

    loader: torch.utils.data.DataLoader[data.Batch]

    def __iter__(self) -> Iterator[data.Batch]:
        try:
            yield from self.loader
        except UserError as error:
            kind = type(error)
            said = str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
            raise kind(said) from error


class _WithText(Dataset[data.Batch]):
    """Rows with the cached embeddings of their captions."""

    def __init__(
        self,
        rows: data.Pictures | data.Latents | data.Streamed | data.MadeRows,
        lookup: data.CachedText,
    ) -> None:
        self.rows = rows
        self.lookup = lookup

    def __getitem__(self, draw: data.Draw) -> data.Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        row = self.rows[draw]
        return {**row, **self.lookup.row(row["caption"])}


def open_sources(run: Run, args: Groups) -> Sources:
    """Finds the samples and their captions; reads no picture. Rank 0 goes first (downloads)."""
    if data.is_streamed(args.data.location):
        return _open_shards(run, args)
    args.cache.check(args.data)
    with run.accelerator.main_process_first():
        source = data.open_training(args.data)
        train, held_out = data.split(
            source,
            eval_fraction=args.data.eval_fraction,
            seed=0,  # not the run's: runs with other seeds keep the same held-out pictures
            max_train_samples=args.data.max_train_samples,
        )
        if args.data.eval_data_dir:
            held_out = data.open_evaluation(args.data)
    run.say(source.description)
    if args.data.eval_data_dir and held_out is not None:
        run.say(held_out.description)
    refuse_inside(run.output_dir, args.data.location, "output_dir")
    return Sources(train, held_out)


def _open_shards(run: Run, args: Groups) -> Sources:
    """The same for samples in shards: of each as much is read as tells how many rows it has.

    Raises:
        UserError: something was asked for that shards cannot do.
    """
    location = args.data.location
    if getattr(getattr(args, "prior", None), "with_prior_preservation", False):
        raise UserError(
            f"{location}: --with_prior_preservation takes the pictures of the instance from a "
            "folder or a hub id, not from shards"
        )
    with run.accelerator.main_process_first():
        shards = data.open_shards(args.data)
        held_out = data.open_evaluation(args.data)
    run.say(shards.description)
    for row in shards.left_out[:10]:
        run.say(f"  left out: {row.name}: {row.reason}")
    if isinstance(shards, data.Stream):
        run.say(
            "latents and embeddings are made at every use, with the encoders in memory; "
            "`python -m dojo.data cache` makes them once"
        )
    elif args.cache.no_cache_latents or args.cache.no_cache_text_embeddings:
        name = "latents" if args.cache.no_cache_latents else "text_embeddings"
        run.say(f"--no_cache_{name}: the folder holds those of its rows, and they are used")
    if held_out is not None:
        run.say(held_out.description)
    train = data.nothing(shards.description, data.Recipe.of(args.data))
    return Sources(train, held_out, list(shards.left_out), shards=shards)


def plan(run: Run, sources: Sources, optim: OptimArgs) -> None:
    """Fixes the length of the run by the samples: see `Run.plan`."""
    whole_batch = optim.train_batch_size * run.accelerator.num_processes
    run.plan(optim, sources.samples_per_epoch, sources.fingerprint(whole_batch))


def needs(
    run: Run,
    model: Model,
    args: Groups,
    size: data.Size,
    batch_size: int,
    *,
    drawn: bool,
    class_pictures: int = 0,
) -> phases.Needs:
    """What a run of captioned pictures holds beside its network, for the dry run.

    Args:
        size: of the largest pictures.
        batch_size: of training, which encodes as many at a time without a cache.
        drawn: validation pictures are asked for.
        class_pictures: those that are drawn at a time before training, 0 for none.
    Raises:
        UserError: weights are not there, or one of several resolutions does not fit the model.
    """
    for side in args.data.resolution:
        model.check_step(args.data.height or side, args.data.width or side)
    _remark(run, model, [size])
    shards = data.open_shards(args.data) if data.is_streamed(args.data.location) else None
    if isinstance(shards, data.Made):
        made.check(shards, model, args)
    at_use = _encodes_at_use(args, shards)
    # A batch has as many class pictures as others.
    paired = getattr(getattr(args, "prior", None), "with_prior_preservation", False)
    rows = batch_size * (1 + paired)
    encoded = rows if at_use else data.encoded_at_a_time(size)
    return model.needs(
        run.dtype,
        size,
        encoded=encoded if _encodes(args, shards) else 0,
        encoded_in_training=rows * at_use,
        embedded=_embeds(args, shards),
        decoded=int(drawn),
        drawn_size=_drawn_size(args, size) if drawn else None,
        class_pictures=class_pictures,
        vae_stays=at_use,
        before_texts=["autoencoder"] if at_use else [],
        live_text=_live_text(model, args, shards),
    )


Shards = data.Stream | data.Made | None


def _drawn_size(args: Groups, size: data.Size) -> data.Size:
    """That of the largest validation picture.

    Args:
        size: of training, which is also theirs where nothing else was asked for.
    """
    validation: Any = getattr(args, "validation", None)
    sizes = [(one.height, one.width) for one in validation.pictures(size)] if validation else []
    return max(sizes, key=math.prod, default=size)


def _encodes(args: Groups, shards: Shards) -> bool:
    """Whether any picture goes through the autoencoder."""
    return not isinstance(shards, data.Made) or args.data.eval_data_dir is not None


def _encodes_at_use(args: Groups, shards: Shards) -> bool:
    """Whether pictures do so at every use."""
    asked = args.cache.no_cache_latents and _encodes(args, shards)
    return asked or isinstance(shards, data.Stream)


def _embeds(args: Groups, shards: Shards) -> bool:
    """Whether texts have to be embedded: of a folder that holds them, only others, if there are."""
    if not isinstance(shards, data.Made) or args.data.eval_data_dir or _trains_text(args):
        return True
    words = getattr(getattr(args, "validation", None), "texts", ())
    return not {*words, ""}.issubset(shards.prompts.texts)


def _live_text(model: Model, args: Groups, shards: Shards) -> list[str]:
    """The text encoders that are there in training: all without a cache, CLIPs that train."""
    at_use = args.cache.no_cache_text_embeddings and _embeds(args, shards)
    if at_use or isinstance(shards, data.Stream):
        return list(model.text_encoders)
    return [part for part in model.text_encoders if _trains_text(args) and part in TEXT_PARTS]


def _trains_text(args: Groups) -> bool:
    """Whether text encoders are there in training: for their adapters, or for new words."""
    new_words = bool(getattr(getattr(args, "tokens", None), "new_tokens", ()))
    return new_words or getattr(getattr(args, "text_encoder", None), "train_text_encoder", False)


def refuse_inside(folder: Path, location: str, flag: str) -> None:
    """Pictures that a run makes must not turn up among those that it learns."""
    source = Path(location).expanduser()
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--{flag} {folder} lies in the folder of the training pictures, {location}: its "
            "pictures would be trained on"
        )


def check_samples(
    run: Run,
    sources: Sources,
    model: Model,
    args: Groups,
    *,
    pair_regularisation: bool = False,
) -> Sources:
    """Decodes every picture once and deals them into buckets by their sizes.

    Bad samples, and those too small for `--max_upscale`, stop the run or are left out, counted and
    reported.

    Args:
        pair_regularisation: regularisation pictures are not used by themselves but beside the
            others, in every batch (DreamBooth).
    Raises:
        UserError: a bad sample under `--on_bad_sample error`, or nothing is left.
    """

    def check(source: data.Captioned) -> tuple[data.Captioned, list[data.BadReport]]:
        with run.accelerator.main_process_first():
            return data.checked(
                source,
                args.cache.latent_cache_dir,
                on_bad_sample=args.data.on_bad_sample,
                num_threads=max(2, args.data.dataloader_num_workers),
                progress=run.main,
            )

    shards = sources.shards
    train, bad = check(sources.train) if shards is None else (sources.train, sources.left_out)
    held_out = eval_plan = None
    if sources.held_out is not None:
        held_out, more = check(sources.held_out)
        bad = bad + more
        eval_plan = data.assign(held_out, args.data, model.pixel_step)
        bad += [data.BadReport(held_out.names[index], why) for index, why in eval_plan.left_out]
    plan = (
        data.assign(train, args.data, model.pixel_step, pair_regularisation=pair_regularisation)
        if shards is None
        else made.plan(shards, model, args)
    )
    too_small = [data.BadReport(train.names[index], why) for index, why in plan.left_out]
    if too_small and args.data.on_bad_sample == "error":
        shown = "\n".join(f"  {row.name}: {row.reason}" for row in too_small[:10])
        raise UserError(
            f"{len(too_small)} pictures are too small (--on_bad_sample skip leaves them out, a "
            f"larger --max_upscale takes them):\n{shown}"
        )
    bad = bad + too_small
    if not plan.samples_per_epoch:
        raise UserError("there is nothing to train on")
    for height, width in plan.sizes:
        model.latent_shape(height, width)  # refuses what the model cannot take
    _remark(run, model, plan.sizes)
    count = len(train) if shards is None else len(shards)
    counts = f"{count - len(too_small)} to train on, {len(held_out or ())} held out"
    run.say(f"pictures: {counts}, {len(bad)} left out")
    for row in bad[:10]:
        run.say(f"  left out: {row.name}: {row.reason}")
    for line in data.told_notes(train, *([held_out] if held_out else [])):
        run.say(line)
    return Sources(train, held_out, bad, plan, eval_plan, shards)


def _remark(run: Run, model: Model, sizes: Iterable[data.Size]) -> None:
    """Says what the largest pictures are small for, if they are."""
    said = model.remark(*max(sizes, key=lambda size: size[0] * size[1]))
    if said is not None:
        run.say_once(ABOUT_SIZE, said)


def prepare(
    run: Run,
    sources: Sources,
    model: Model,
    args: Groups,
    others: Sequence[str],
    *,
    train_text: bool = False,
) -> Inputs:
    """Fills the caches of latents and embeddings, where the options allow it.

    Args:
        others: captions that are needed besides the samples': validation and negative prompts.
        train_text: keep the text encoders that can be trained; the others are freed as ever.
    """
    plan = sources.plan
    assert plan is not None, "check_samples comes first"
    whole_batch = run.samples_per_step // run.accelerator.gradient_accumulation_steps
    if run.main:
        report = sources.report(whole_batch)
        checkpoint.write_file(run.output_dir / "data_report.json", report)
    if len(plan.sizes) > 1 or plan.partners:
        run.say(plan.table(whole_batch))

    def pictures_of(source: data.Captioned, *, still: bool = False) -> data.Pictures:
        return data.Pictures(
            *(source, args.data, args.captions),
            seed=run.seed,
            still=still,
            latent_step=model.pixels_per_latent,
        )

    if sources.shards is not None:
        return _prepare_shards(run, sources, model, args, others, train_text=train_text)
    train = pictures_of(sources.train)
    vae = model.load_vae(run.device)

    def cached(pictures: data.Pictures, some: data.Plan) -> data.Pictures | data.Latents:
        return latents_of(run, pictures, some, vae, model, args.cache)

    with run.phase("cache"):
        evaluation: list[EvalSet] = []
        train_rows = cached(train, plan)
        others = [*others, ""]
        if sources.held_out is not None and (eval_plan := sources.eval_plan) is not None:
            held_out = pictures_of(sources.held_out, still=True)
            draws = _each_once(eval_plan)
            same = [
                draw
                for draw in _each_once(plan)
                if not sources.train.recipe(draw.index).is_regularisation
            ]
            count = min(len(draws), len(same))
            few = [same[i * len(same) // count] for i in range(count)]  # from all over the set
            if count:
                evaluation.append(EvalSet("eval", cached(held_out, eval_plan), draws))
                evaluation.append(EvalSet("train", train_rows.still(), few))
            others += held_out.texts()
            # Unshuffled, which training never asks for.
            others += [sources.train.captions[draw.index][0] for draw in few]
        run.accelerator.wait_for_everyone()
    if not args.cache.no_cache_latents:
        vae.to(device="cpu")  # pyright: ignore  # until something is drawn
    groups = [train.texts(), others]
    check_used(model.words, groups[0])
    text = texts.prepare(run, model, args.cache, groups, trained=train_text)
    return Inputs(train_rows, evaluation, plan, vae, text, model, args, run)


def _prepare_shards(
    run: Run,
    sources: Sources,
    model: Model,
    args: Groups,
    others: Sequence[str],
    *,
    train_text: bool,
) -> Inputs:
    """The same for samples in shards: nothing is made of them beforehand.

    The pictures of `--eval_data_dir` are cached as ever.
    """
    shards, plan = sources.shards, sources.plan
    assert shards is not None
    assert plan is not None
    common: dict[str, Any] = {"seed": run.seed}
    rows: data.Streamed | data.MadeRows
    if isinstance(shards, data.Made):
        rows = data.MadeRows(shards, args.data, args.captions, **common)
    else:
        step = model.pixels_per_latent
        rows = data.Streamed(shards, args.data, args.captions, **common, latent_step=step)
    vae = model.load_vae(run.device)
    evaluation: list[EvalSet] = []
    words = [*others, ""]
    if sources.held_out is not None and (eval_plan := sources.eval_plan) is not None:
        held_out = data.Pictures(
            *(sources.held_out, args.data, args.captions),
            **common,
            still=True,
            latent_step=model.pixels_per_latent,
        )
        with run.phase("cache"):
            latents = latents_of(run, held_out, eval_plan, vae, model, args.cache)
            run.accelerator.wait_for_everyone()
        evaluation.append(EvalSet("eval", latents, _each_once(eval_plan)))
        words += held_out.texts()
    if not _encodes_at_use(args, shards):
        vae.to(device="cpu")  # pyright: ignore  # until something is drawn
    text = made.text_of(run, shards, model, args.cache, words, trained=train_text)
    return Inputs(rows, evaluation, plan, vae, text, model, args, run, shards)


def posterior_of(batch: data.Batch, vae: AutoencoderKL, device: torch.device) -> data.Posterior:
    """Mean and std of a batch's posterior, cached or encoded now: float32, unscaled."""
    mean, std = (
        (batch["mean"], batch["std"]) if "mean" in batch else posterior(vae, batch["pixels"])
    )
    return mean.to(device).float(), std.to(device).float()


def latents_of(
    run: Run,
    pictures: data.Pictures,
    plan: data.Plan,
    vae: AutoencoderKL,
    model: Model,
    cache: data.CacheArgs,
) -> data.Pictures | data.Latents:
    """Pictures with their posteriors on disk, where the options allow it.

    The caller lets all processes arrive before anyone reads.
    """
    if cache.no_cache_latents:
        return pictures
    run.check_shared(cache.latent_cache_dir, "--latent_cache_dir")
    with heap.kept(run.device):
        return data.cache_latents(
            pictures,
            plan.needed(),
            lambda pixels: posterior(vae, pixels),
            cache.latent_cache_dir,
            latent_settings(run, model),
            latent_channels=model.vae["latent_channels"],
            **run.share,
        )


def latent_settings(run: Run, model: Model) -> dict[str, str]:
    """What the latents of pictures hang on, besides the pictures."""
    return {
        "vae": model.fingerprint(["vae"]),
        "dtype": model.args.vae_dtype,
        # Tiles are blended where they meet, and a picture by itself may round otherwise.
        **({"tiling": "yes"} if model.args.enable_vae_tiling else {}),
        **({"slicing": "yes"} if model.args.enable_vae_slicing else {}),
        **arithmetic(run.device),
    }


def _each_once(plan: data.Plan) -> list[data.Draw]:
    """One draw of every sample, at its size of the first round."""
    sizes = {index: size for size, some in plan.rounds[0].items() for index in some}
    return [data.Draw(index, index, sizes[index]) for index in sorted(sizes)]
