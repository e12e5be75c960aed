"""The preference pairs of a run: opened, checked, chosen by a model if wanted, cached, watched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dojo import data, rewards, rng
from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.files import outputs
from dojo.inputs.pictures import latent_settings, posterior_of, refuse_inside
from dojo.launch import interrupt
from dojo.lazy import no_grad, torch
from dojo.models.family import Model
from dojo.models.folders import posterior
from dojo.rewards import spec, weights
from dojo.run import checkpoint, heap
from dojo.run.machine import arithmetic
from dojo.run.run import Key, Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor


class Groups(Protocol):
    """The groups of a script's options that say what the pairs are and how they are read."""

    @property
    def data(self) -> data.PairArgs: ...
    @property
    def cache(self) -> data.CacheArgs: ...
    @property
    def scorers(self) -> rewards.ScorerArgs: ...


@dataclass
class Sources:
    """The pairs to train on, and those held out."""

    train: data.Pairs
    held_out: data.Pairs | None
    left_out: list[data.BadReport] = field(default_factory=list)
    choices: dict[str, Path] = field(default_factory=dict)
    """tables of what `--choice_model` chose, by the name that they get in the output folder"""

    def report(self) -> str:
        """The content of data_report.json."""
        counts = {"train": len(self.train), "held_out": len(self.held_out or ())}
        dropped = {"ties": self.train.num_ties, "of_one_picture": self.train.num_same}
        left_out = [asdict(row) for row in self.left_out]
        about = {"description": self.train.description, "left_out": left_out}
        about |= data.seen(self.train.pictures)
        return json.dumps({**counts, **dropped, **about}, indent=1, ensure_ascii=False)


def open_sources(run: Run, args: Groups) -> Sources:
    """Finds the pairs, decodes every picture once, and holds some out: rank 0 goes first.

    A dry run decodes nothing, and remembers nothing.

    Raises:
        UserError: they cannot be read, or nothing is left.
    """
    args.data.check(args.cache)
    with run.accelerator.main_process_first():
        root = None if run.args.dry_run else args.cache.latent_cache_dir
        everything = data.open_pairs(args.data, root, progress=run.main)
        left_out: list[data.BadReport] = []
        if not run.args.dry_run:
            everything, left_out = data.check_pairs(
                everything,
                args.cache.latent_cache_dir,
                on_bad_sample=args.data.on_bad_sample,
                num_threads=max(2, args.data.dataloader_num_workers),
                progress=run.main,
            )
    run.say(everything.description)
    refuse_inside(run.output_dir, args.data.location, "output_dir")
    train, held_out = data.split_pairs(
        everything,
        eval_fraction=args.data.eval_fraction,
        max_train_samples=args.data.max_train_samples,
    )
    counts = f"{len(train)} to train on, {len(held_out or ())} held out"
    run.say(f"pairs: {counts}, {len(left_out)} left out")
    for row in left_out[:10]:
        run.say(f"  left out: {row.name}: {row.reason}")
    for line in data.told_notes(everything.pictures):
        run.say(line)
    return Sources(train, held_out, left_out)


def chosen(run: Run, sources: Sources, args: Groups) -> Sources:
    """The pairs with their winners chosen by `--choice_model`, if there is one: a collective.

    Scores are kept among the caches: another run with the same pairs and model scores nothing.
    """
    text = args.data.choice_spec
    if text is None:
        return sources
    root = args.cache.latent_cache_dir
    run.check_shared(root, "--latent_cache_dir")

    def load() -> data.Score:
        (reward,) = args.scorers.load_all(run.device, [text], ["--choice_model"])

        @no_grad
        def score(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            output = reward(images.to(run.device), prompts)
            return output.scores, output.valid

        return score

    shown = hide(text)
    settings = {"reward": shown, "dtype": args.scorers.reward_dtype, **_own_code(text)}
    settings |= arithmetic(run.device)
    with run.accelerator.main_process_first():
        settings |= _own_weights(text, root)
    if shown != text:  # a query may choose what is served: no secret is kept, but its hash
        settings["address"] = data.digest([text])
    tables: dict[str, Path] = {}

    def choose(pairs: data.Pairs, name: str) -> data.Pairs:
        words = [args.data.location, pairs.fingerprint, *settings.values()]
        tables[name] = root / f"choices-{data.digest(words)}.csv"
        choice = data.relabel(
            *(pairs, load, tables[name], root, settings),
            **run.share,
            wait=run.accelerator.wait_for_everyone,
        )
        run.say(f"{shown}: {choice.description}")
        return choice.pairs

    train = choose(sources.train, "choices.csv")
    held_out = sources.held_out and choose(sources.held_out, "eval_choices.csv")
    return Sources(train, held_out, sources.left_out, tables)


def _own_code(text: str) -> dict[str, str]:
    """What identifies the files that a reward's functions stand in: they may change."""
    try:
        places = [term.source.rpartition(":")[0] for term in spec.parse(text)]
    except ValueError as error:
        raise UserError(f"--choice_model: {error}") from None
    files = [Path(place) for place in places if place.endswith(".py")]
    code = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    return {"code": data.digest(code)} if code else {}


def _own_weights(text: str, root: Path) -> dict[str, str]:
    """What identifies the files here that a reward's options name: they may be trained anew.

    Args:
        root: folder of the caches, where their hashes are remembered.
    """
    named = [value for term in spec.parse(text) for value in term.options.values()]
    paths = [path for value in named if (path := Path(weights.locate(value))).exists()]
    files = [
        (file.relative_to(path).as_posix(), file)
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]
    found = data.file_hashes([file for _, file in files], root)
    words = [word for (name, _), one in zip(files, found, strict=True) for word in (name, one)]
    return {"weights": data.digest(words)} if words else {}


def prepare(
    run: Run,
    sources: Sources,
    model: Model,
    vae: AutoencoderKL,
    args: Groups,
    *,
    with_held_out: bool,
) -> Inputs:
    """Fills the cache of latents where the options allow it: a collective.

    Args:
        with_held_out: whether anything will look at the held-out pairs.
    """
    if run.main:
        checkpoint.write_file(run.output_dir / "data_report.json", sources.report())
        for name, path in sources.choices.items():
            shutil.copyfile(path, outputs.own(run.output_dir / name))

    if not args.cache.no_cache_latents:
        run.check_shared(args.cache.latent_cache_dir, "--latent_cache_dir")

    def cached(pairs: data.Pairs, *, still: bool) -> data.PairSet:
        return data.prepare_pairs(
            *(pairs, args.data, args.cache),
            lambda pixels: posterior(vae, pixels),
            latent_settings(run, model),
            seed=run.seed,
            latent_channels=model.vae["latent_channels"],
            pixel_step=model.pixel_step,
            latent_step=model.pixels_per_latent,
            still=still,
            **run.share,
        )

    with run.phase("cache"), heap.kept(run.device):
        train = cached(sources.train, still=False)
        held_out = None
        if with_held_out and sources.held_out is not None:
            held_out = cached(sources.held_out, still=True)
        run.accelerator.wait_for_everyone()
    return Inputs(train, held_out, vae, model, run)


@dataclass
class Inputs:
    """The pairs, and what a step reads of them. B pairs are 2B pictures, winners before losers."""

    train: data.PairSet
    held_out: data.PairSet | None
    vae: AutoencoderKL
    model: Model
    run: Run

    @property
    def held_out_texts(self) -> list[str]:
        """The captions of the held-out pairs."""
        return self.held_out.texts() if self.held_out else []

    def loader(self, batch_size: int) -> torch.utils.data.DataLoader[data.Batch]:
        """Batches of this process from where the run stands, without end."""
        run = self.run
        return torch.utils.data.DataLoader(
            self.train,
            batch_sampler=data.Batches(
                self.train.plan(),
                batch_size,
                seed=run.seed,
                first_batch=run.samples // (batch_size * run.accelerator.num_processes),
                **run.share,
            ),
            collate_fn=data.collate,
            num_workers=self.train.args.dataloader_num_workers,
            worker_init_fn=interrupt.stand_apart,
            pin_memory=run.device.type == "cuda",
        )

    def latents(self, rows: data.Batch, keys: Sequence[Key]) -> Tensor:
        """Both pictures of every pair, each drawn for itself from its posterior: [2B, C, h, w].

        Args:
            keys: one per pair.
        """
        flat = {k: rows[k].flatten(0, 1) for k in ("mean", "std", "pixels") if k in rows}
        mean, std = posterior_of(flat, self.vae, self.run.device)  # [2B, C, h, w], pair by pair
        own = [(*key, "posterior", side) for key in keys for side in (0, 1)]
        clean = self.model.scaled(mean, std, rng.normal(mean.shape[1:], own, self.run.device))
        return torch.cat([clean[0::2], clean[1::2]])

    def geometry(self, rows: data.Batch, *, sides: int = 2) -> data.Geometry | None:
        """Where the pictures of the pairs come from, for models that are told: as `latents`.

        Args:
            sides: 1 for the winners alone.
        """
        if not self.model.sized:
            return None
        return data.Geometry.of(rows)[: sides * len(rows["caption"])]

    def noise(self, keys: Sequence[Key], like: Tensor) -> Tensor:
        """Noise of which a pair's two pictures have the same: [2B, C, h, w] as `like`.

        For winners alone, [B, C, h, w], that of the pairs.
        """
        streams = [(*key, "noise") for key in keys]
        noise = rng.normal(like.shape[1:], streams, self.run.device)
        return noise.repeat(len(like) // len(keys), 1, 1, 1)
