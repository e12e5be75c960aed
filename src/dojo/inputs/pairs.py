"""The preference pairs of a run: opened, checked, chosen by a model if wanted, cached, watched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dojo import data, rewards, rng
from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.files import outputs
from dojo.finetune.weights import Trained
from dojo.inputs import pictures as frozen
from dojo.inputs import steering
from dojo.inputs.texts import Texts
from dojo.launch import interrupt
from dojo.maths import ddpm, preference
from dojo.models import sd15
from dojo.rewards import spec, weights
from dojo.run import checkpoint
from dojo.run.run import Key, Run, arithmetic


class Options(Protocol):
    """The groups of a script's options that say what the pairs are and how they are read."""

    @property
    def model(self) -> sd15.ModelArgs: ...
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


def open_sources(run: Run, args: Options) -> Sources:
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
    frozen.refuse_inside(run.output_dir, args.data.location, "output_dir")
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


def chosen(run: Run, sources: Sources, args: Options) -> Sources:
    """The pairs with their winners chosen by `--choice_model`, if there is one: a collective.

    Scores are kept among the caches: another run with the same pairs and model scores nothing.
    """
    text = args.data.choice_spec
    if text is None:
        return sources
    root = args.cache.latent_cache_dir

    def load() -> data.Score:
        (reward,) = args.scorers.load_all(run.device, [text], ["--choice_model"])

        @torch.no_grad()
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
    config: sd15.Config,
    vae: AutoencoderKL,
    args: Options,
    *,
    with_held_out: bool,
) -> tuple[data.PairSet, data.PairSet | None]:
    """Fills the cache of latents where the options allow it: a collective.

    Args:
        with_held_out: whether anything will look at the held-out pairs.
    """
    if run.main:
        checkpoint.write_file(run.output_dir / "data_report.json", sources.report())
        for name, path in sources.choices.items():
            shutil.copyfile(path, outputs.own(run.output_dir / name))

    def cached(pairs: data.Pairs, *, still: bool) -> data.PairSet:
        return data.prepare_pairs(
            *(pairs, args.data, args.cache),
            lambda pixels: sd15.posterior(vae, pixels),
            {
                **{"vae": config.fingerprint(["vae"]), "dtype": args.model.vae_dtype},
                **arithmetic(run.device),
            },
            seed=run.seed,
            latent_channels=config.vae["latent_channels"],
            pixel_step=config.pixel_step,
            latent_step=config.pixels_per_latent,
            still=still,
            **run.share,
        )

    with run.phase("cache"):
        train = cached(sources.train, still=False)
        held_out = None
        if with_held_out and sources.held_out is not None:
            held_out = cached(sources.held_out, still=True)
        run.accelerator.wait_for_everyone()
    return train, held_out


def loader(run: Run, pairs: data.PairSet, batch_size: int) -> DataLoader[data.Batch]:
    """Batches of this process from where the run stands, without end."""
    return DataLoader(
        pairs,
        batch_sampler=data.Batches(
            pairs.plan(),
            batch_size,
            seed=run.seed,
            first_batch=run.samples // (batch_size * run.accelerator.num_processes),
            **run.share,
        ),
        collate_fn=data.collate,
        num_workers=pairs.args.dataloader_num_workers,
        worker_init_fn=interrupt.stand_apart,
        pin_memory=run.device.type == "cuda",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Noised:
    """B pairs on their way to noise, the winners before the losers."""

    noisy: Tensor
    """[2B, C, h, w]"""
    noise: Tensor
    """[2B, C, h, w]; a pair's two pictures have the same"""
    timestep: Tensor
    """int64 [2B], likewise"""

    @property
    def winners(self) -> Noised:
        """The preferred pictures alone."""
        half = len(self.noisy) // 2
        first = (value[:half] for value in (self.noisy, self.noise, self.timestep))
        return Noised(**dict(zip(("noisy", "noise", "timestep"), first, strict=True)))


def noised(
    rows: data.Batch,
    keys: Sequence[Key],
    timestep: Tensor,
    config: sd15.Config,
    vae: AutoencoderKL,
    device: torch.device,
) -> Noised:
    """Draws both pictures of every pair from the autoencoder's posterior, each for itself, and
    noises them alike.

    Args:
        keys: one per pair, of its noise.
        timestep: int64 [B].
    """
    flat = {k: rows[k].flatten(0, 1) for k in ("mean", "std", "pixels") if k in rows}
    mean, std = frozen.posterior_of(flat, vae, device)  # [2B, C, h, w], pair by pair
    own = [(*key, "posterior", side) for key in keys for side in (0, 1)]
    clean = config.scaled(mean, std, rng.normal(mean.shape[1:], own, device))
    clean = torch.cat([clean[0::2], clean[1::2]])  # winners, losers
    noise = rng.normal(mean.shape[1:], [(*key, "noise") for key in keys], device).repeat(2, 1, 1, 1)
    timestep = timestep.to(device).repeat(2)
    return Noised(
        noisy=ddpm.add_noise(clean, noise, timestep, config.schedule),
        noise=noise,
        timestep=timestep,
    )


class Judge:
    """What the network makes of the held-out pairs, with the same noise at every evaluation.

    Args:
        pairs: those held out, or None: then it says nothing.
        num_timesteps: evenly spread timesteps at which each pair is looked at.
    """

    def __init__(
        self,
        run: Run,
        config: sd15.Config,
        vae: AutoencoderKL,
        texts: Texts,
        pairs: data.PairSet | None,
        beta: float,
        batch_size: int,
        num_timesteps: int = 4,
    ) -> None:
        self.run, self.config, self.vae, self.texts = run, config, vae, texts
        self.pairs, self.beta, self.batch_size = pairs, beta, batch_size
        self.num_timesteps = num_timesteps

    def catch_up(self, policy: Trained, *, due: bool) -> None:
        """The look before the first step, or the one that a run did not stay for.

        Args:
            due: whether one belongs where the run stands.
        """
        if due and not (self.run.step and self.run.has_logged("eval_accuracy")):
            self(policy)

    @torch.no_grad()
    def __call__(self, policy: Trained) -> None:
        """Loss, accuracy and drifts into metrics.jsonl: a collective.

        Raises:
            Interrupted: the run was asked to stop.
        """
        if self.pairs is None:
            return
        run = self.run
        total = self.config.schedule.num_timesteps
        middles = [
            (2 * k + 1) * total // (2 * self.num_timesteps) for k in range(self.num_timesteps)
        ]
        draws = self.pairs.draws()
        mine = draws[run.share["process"] :: run.share["num_processes"]]
        sums = torch.zeros(5, dtype=torch.float64)
        share = run.paused(mine, len(draws), self.batch_size)
        total = -(-len(mine) // self.batch_size)
        with run.phase("validation"):
            for some in tqdm(share, "held-out pairs", total, disable=not run.main, leave=False):
                rows = data.collate([self.pairs[draw] for draw in some])
                for timestep in middles:
                    sums += self._look(policy, rows, timestep)
            if run.accelerator.num_processes > 1:
                reduced: Any = run.accelerator.reduce(sums.to(run.device), "sum")
                sums = reduced.cpu()
        names = ("eval_loss", "eval_accuracy", "eval_winner_drift", "eval_loser_drift")
        means = (sums[:4] / sums[4]).tolist()
        run.write_metrics(dict(zip(names, means, strict=True)))

    def _look(self, policy: Trained, rows: data.Batch, timestep: int) -> Tensor:
        """Sums over a batch, and how many pairs it has: float64 [5]."""
        # Of the picture's place in the set and not of the run: every evaluation sees the same.
        keys: list[Key] = [("held-out pairs", place, timestep) for place in rows["place"]]
        every = torch.full((len(keys),), timestep)
        noised_pairs = noised(rows, keys, every, self.config, self.vae, self.run.device)
        captions = [*rows["caption"], *rows["caption"]]
        usual = reference_errors(policy, noised_pairs, self.texts, captions)
        own = errors(policy.network, noised_pairs, self.texts, captions, self.run.dtype)
        found = preference.dpo(*own.chunk(2), *usual.chunk(2), beta=self.beta)
        columns = (found.loss, found.accuracy, found.winner_drift, found.loser_drift)
        each = [column.double().sum().cpu() for column in columns]
        return torch.stack([*each, torch.tensor(float(len(keys)), dtype=torch.float64)])


def errors(
    unet: torch.nn.Module,
    pairs: Noised,
    texts: Texts,
    captions: Sequence[str],
    dtype: torch.dtype,
) -> Tensor:
    """The mean squared error of the predicted noise, winners before losers: [2B]."""
    epsilon = steering.predictor(unet, texts, captions, dtype)
    return ddpm.squared_error(epsilon(pairs.noisy, pairs.timestep), pairs.noise)


@torch.no_grad()
def reference_errors(
    policy: Trained, pairs: Noised, texts: Texts, captions: Sequence[str]
) -> Tensor:
    """`errors` of the model as it was before training, in the policy's own precision: [2B]."""
    with policy.reference() as before:
        return errors(before, pairs, texts, captions, policy.run.dtype)
