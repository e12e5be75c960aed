"""Preference pairs of a model's own pictures: `python -m dojo.pairs`.

A model draws several pictures of each prompt, a reward scores them, and the best and the worst of
each prompt become a pair: a folder that `train_dpo_*.py` reads. Drawn anew with what was learned
from it, this is preference learning online, three commands a round:

    python -m dojo.pairs --pretrained_model_name_or_path MODEL --prompt_file prompts.txt \\
        --reward pickscore --output_dir outputs/pairs-1
    python train_dpo_FAMILY.py --pretrained_model_name_or_path MODEL --finetune lora \\
        --dataset_name outputs/pairs-1 --output_dir outputs/dpo-1
    python -m dojo.pairs --pretrained_model_name_or_path MODEL --prompt_file prompts.txt \\
        --lora_weights_path outputs/dpo-1 --reward pickscore --seed 1 --output_dir outputs/pairs-2

In the folder lie metadata.jsonl (caption, images, scores: the better picture first), the pictures,
the prompts that were held out (held_out.jsonl, for --validation_prompts_file), drawn.jsonl (every
score) and pairs.json (how it was made, and what came of it). The same command goes on where it was
killed, to the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dojo import cli, files, rewards, rng
from dojo.bars import Bar
from dojo.cli import UserError, ranges
from dojo.cli.masking import hide
from dojo.evaluate import pipelines, versus
from dojo.evaluate.picture import DrawArgs, draw
from dojo.evaluate.placing import PlaceArgs
from dojo.files import outputs
from dojo.files.records import read_table
from dojo.inputs import prompts
from dojo.inputs.prompts import Prompt, Prompts
from dojo.lazy import TF, no_grad, torch
from dojo.models import folders, loaded
from dojo.rewards import Reward, weights

if TYPE_CHECKING:
    from PIL import Image

PAIRS, DRAWN, SUMMARY, HELD_OUT = "metadata.jsonl", "drawn.jsonl", "pairs.json", "held_out.jsonl"
_MODEL = "--pretrained_model_name_or_path"
_COMMITS = "commits of the hub"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Who draws what, and which pictures make a pair."""

    pretrained_model_name_or_path: str
    """folder or hub id of the pipeline that draws, or one .safetensors file"""
    lora_weights_path: tuple[str, ...] = cli.option((), common=True)
    """LoRA files, folders or hub ids that draw with it, all active at once"""
    lora_scale: tuple[float, ...] = (1.0,)
    """strength of each LoRA, or one for all"""
    prompts: prompts.PromptArgs
    reward: rewards.RewardArgs = field(default_factory=rewards.RewardArgs)
    drawing: DrawArgs = field(default_factory=DrawArgs)
    num_images: int = cli.option(4, common=True)
    """pictures of each prompt, of which the best and the worst are kept"""
    min_margin: float = cli.option(0.0, common=True)
    """leave out prompts whose best and worst score are less apart than this, in the reward's units;
    equal scores never make a pair. Another margin chooses anew from what was drawn"""
    sample_batch_size: int | None = None
    """pictures that are drawn at a time; unset is all of a prompt"""
    seed: int = cli.option(0, common=True)
    """seed of all pictures; each has its own, which stands in its name. Another round takes
    another"""
    place: PlaceArgs = field(default_factory=PlaceArgs)
    output_dir: Path = cli.option(Path("outputs/pairs"), common=True)
    """folder of the pairs"""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError("--num_images must be at least 2: one picture makes no pair")
        if not self.lora_weights_path:
            ranges.check_unread(self, "lora_scale", "without --lora_weights_path")
        if len(self.lora_scale) not in (1, len(self.lora_weights_path)):
            raise ValueError("--lora_scale takes one number, or one for each --lora_weights_path")
        ranges.check(self, "sample_batch_size", least=1)
        ranges.check(self, "min_margin", least=0)
        ranges.check_seed(self, "seed")


@dataclass(frozen=True)
class Drawn:
    """What came of one prompt: a line of drawn.jsonl."""

    caption: str
    seeds: list[int]
    scores: list[float | None]
    """of every picture; None is no valid score"""
    images: list[str]
    """the best and the worst, as files of the folder; empty where there are not two scores"""

    @property
    def ends(self) -> tuple[float, float]:
        """The highest and the lowest score; NaN where there is none."""
        valid = [score for score in self.scores if score is not None]
        return (max(valid), min(valid)) if valid else (math.nan, math.nan)

    def makes_a_pair(self, margin: float) -> bool:
        """Whether the two are far enough apart."""
        best, worst = self.ends
        return bool(self.images) and best - worst >= margin and best > worst


Draws = Callable[[Prompt, int], Drawn]
"""A prompt and its number -> what came of it; the pictures are kept."""


def main(args: Args) -> None:
    """Draws, scores, chooses and writes, from where an earlier command was killed."""
    outputs.claim(args.output_dir, "pairs")
    try:
        make(args)
    finally:
        outputs.release(args.output_dir)


def make(args: Args) -> None:
    """The same in a folder that has been taken."""
    folder, model = args.output_dir, args.pretrained_model_name_or_path
    args = replace(args, place=args.place.for_loras(model, args.lora_weights_path))
    source = prompts.open_prompts(args.prompts)
    print(source.description)
    device = args.place.find_device()
    settings = _settings(args, source, device)
    _check(folder, settings)
    done = _read(folder / DRAWN)
    if len(done) < len(source.train):
        draws = _open(args, source.train, device)
        settings = _settings(args, source, device)  # what was missing has been fetched now
        _check(folder, settings)
        _write_json(folder / SUMMARY, {"made_with": settings})
        done += _draw(args, draws, source.train, len(done))
    rows = ({**one.metadata, "prompt": one.text} for one in source.held_out)
    _write_rows(folder / HELD_OUT, rows)
    _finish(args, settings, done)


# -- drawing and scoring --------------------------------------------------------------------------


def _open(args: Args, asked: Sequence[Prompt], device: torch.device) -> Draws:
    """Loads what draws and scores.

    Raises:
        UserError: something is not there, or does not fit.
    """
    (reward,) = args.reward.load(device)
    rewards.check_prompts(print, reward, asked)
    pipeline = args.place.load(args.pretrained_model_name_or_path, device)
    pipeline.scheduler = pipelines.load_loras(pipeline, args.lora_weights_path, args.lora_scale)
    args.place.put(pipeline, device)
    args.drawing.tell_cut(pipeline, asked)
    return partial(_one, args, pipeline, reward)


def _draw(args: Args, draws: Draws, asked: Sequence[Prompt], first: int) -> list[Drawn]:
    """Draws and scores the prompts from `first` on; each is on the disk before the next begins."""
    made: list[Drawn] = []
    rest = Bar(range(first, len(asked)), "prompts", len(asked), initial=first)
    with outputs.own(args.output_dir / DRAWN).open("ab") as log:
        for i in rest:
            made.append(draws(asked[i], i))
            _append(log, asdict(made[-1]))
    return made


def _one(args: Args, pipeline: Any, reward: Reward, prompt: Prompt, i: int) -> Drawn:
    """Draws and scores prompt number `i`, and keeps its best and its worst picture."""
    seeds = [rng.seed_for("pairs", args.seed, i, k) >> 32 for k in range(args.num_images)]
    size = args.sample_batch_size or len(seeds)
    pictures: list[Image.Image] = []
    for start in range(0, len(seeds), size):
        pictures += draw(pipeline, args.drawing, prompt.text, seeds[start : start + size])
    scores = _scores(reward, pictures, prompt)
    order = sorted(
        (k for k, score in enumerate(scores) if score is not None), key=lambda k: -(scores[k] or 0)
    )
    images: list[str] = []
    for k in (order[0], order[-1]) if len(order) > 1 else ():
        images.append(versus.file_name(i, prompt.text, seeds[k]))
        with files.whole(outputs.own(args.output_dir / images[-1])) as file:
            pictures[k].save(file, "PNG")
    return Drawn(prompt.text, seeds, scores, images)


@no_grad
def _scores(reward: Reward, pictures: Sequence[Image.Image], prompt: Prompt) -> list[float | None]:
    """The score of each picture as it lies on the disk; None where it is not valid."""
    pixels = torch.stack([TF.pil_to_tensor(one.convert("RGB")) for one in pictures]).float() / 255
    output = reward(pixels, [prompt.text] * len(pixels), [prompt.metadata] * len(pixels))
    found = zip(output.scores.tolist(), output.valid.tolist(), strict=True)
    # Nine digits tell any two numbers of float32 apart.
    return [float(f"{score:.9g}") if valid else None for score, valid in found]


# -- what was drawn before ------------------------------------------------------------------------


def _settings(args: Args, source: Prompts, device: torch.device) -> dict[str, Any]:
    """What the pairs depend on, but for the margin: with files that are here by what they hold."""
    model, loras, reward = args.pretrained_model_name_or_path, args.lora_weights_path, args.reward
    own = args.place.tencent_weights
    return {
        "model": hide(model),
        "files of the model": _model_files(Path(model), own),
        "lora_weights_path": [*loras],
        "files of lora_weights_path": [_lora_files(Path(path)) for path in loras],
        "lora_scale": [*args.lora_scale] if loras else [],
        "single_file_config": args.place.single_file_config,
        **({} if own == "auto" else {"tencent_weights": own}),
        "prompts": source.fingerprint,
        **asdict(args.drawing, dict_factory=_plain),
        # Of an address the masked form: a query may choose what is served, and may be a secret.
        "reward": hide(reward.reward),
        "files of reward": _reward_files(reward.reward),
        _COMMITS: _commits([model, *loras, *rewards.places(reward.reward)]),
        "reward_dtype": reward.reward_dtype,
        "num_images": args.num_images,
        "seed": args.seed,
        "device": device.type,
        "dtype": str(args.place.dtype_on(device)).removeprefix("torch."),
    }


def _plain(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {name: [*value] if isinstance(value, tuple) else value for name, value in items}


def _model_files(place: Path, tencent_weights: pipelines.TencentWeights = "auto") -> str:
    if place.is_file():
        return folders.fingerprint_of({place.name: place})
    place = pipelines.in_diffusers_layout(place, tencent_weights)
    if not (place / "model_index.json").is_file():
        return ""
    parts = sorted(name for name in loaded.read_index(place, _MODEL) if not name.startswith("_"))
    return folders.fingerprint(place, parts)


def _lora_files(place: Path) -> str:
    found = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return folders.fingerprint_of({path.name: path for path in found})


def _reward_files(text: str) -> str:
    """Of a reward's own functions, and of the models here that it reads."""
    here = (path for name in rewards.places(text) for path in weights.files_here(name))
    return folders.fingerprint_of({str(path): path for path in here})


def _commits(names: Sequence[str]) -> dict[str, str]:
    """Of the names that stand for a repository of the hub, what was fetched of it."""
    found = {name: folders.hub_commit(name) for name in names if not Path(name).exists()}
    return {name: commit for name, commit in sorted(found.items()) if commit}


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the folder holds pairs that were drawn otherwise.
    """
    before = read_table(folder / SUMMARY, ": remove it, or choose another folder")
    before = before.get("made_with", settings)
    other = [name for name, value in settings.items() if _differs(before.get(name), value)]
    if other:
        changes = ", ".join(
            f"{name} changed"
            if "files" in name or name in ("prompts", _COMMITS)
            else f"{name} was {before.get(name)}, now {settings[name]}"
            for name in other
        )
        raise UserError(
            f"--output_dir {folder} holds pairs that were drawn otherwise ({changes}): choose "
            "another folder"
        )


def _differs(before: Any, now: Any) -> bool:
    """Of a commit that is not known, before or now, nothing can be said."""
    if isinstance(now, dict):
        known: dict[str, str] = before or {}
        return any(known.get(name, commit) != commit for name, commit in now.items())
    return before != now


def _read(path: Path) -> list[Drawn]:
    """The whole lines of drawn.jsonl; what a kill cut off is taken away."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return [Drawn(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--output_dir: {path} is damaged ({error}): remove its folder, or choose another"
        ) from error


# -- the pairs ------------------------------------------------------------------------------------


def _finish(args: Args, settings: Mapping[str, Any], drawn: Sequence[Drawn]) -> None:
    """Chooses the pairs, writes them and says what came of it.

    Raises:
        UserError: there is none.
    """
    folder, margin = args.output_dir, args.min_margin
    chosen = [one for one in drawn if one.makes_a_pair(margin)]
    unscored = sum(not one.images for one in drawn)
    scores = [score for one in drawn for score in one.scores if score is not None]
    counts = {
        "prompts": len(drawn),
        "pairs": len(chosen),
        "too_close": len(drawn) - len(chosen) - unscored,
        "without_two_scores": unscored,
        "pictures": sum(len(one.scores) for one in drawn),
        "pictures_without_a_score": sum(one.scores.count(None) for one in drawn),
    }
    means = {
        "mean": _mean(scores),
        "mean_of_the_better": _mean([one.ends[0] for one in chosen]),
        "mean_of_the_worse": _mean([one.ends[1] for one in chosen]),
    }
    known = {name: value for name, value in means.items() if not math.isnan(value)}
    _write_json(folder / SUMMARY, {"made_with": settings, "min_margin": margin, **counts, **known})
    told = (
        f"{counts['pairs']:,} pairs of {counts['prompts']:,} prompts in {folder}; left out: "
        f"{counts['too_close']:,} with scores equal or less than --min_margin {margin:g} apart, "
        f"{unscored:,} without two valid scores ({counts['pictures_without_a_score']:,} of "
        f"{counts['pictures']:,} pictures have none)"
    )
    if not chosen:
        outputs.discard(folder / PAIRS)
        raise UserError(f"--reward {hide(args.reward.reward)} prefers nothing: {told}")
    _write_rows(
        folder / PAIRS,
        ({"caption": one.caption, "images": one.images, "scores": one.ends} for one in chosen),
    )
    better, worse = means["mean_of_the_better"], means["mean_of_the_worse"]
    print(f"{told}; mean score {means['mean']:.4g}, of pairs {better:.4g} and {worse:.4g}")


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with files.whole(outputs.own(path)) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _write_rows(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with files.whole(outputs.own(path)) as file:
        for row in rows:
            file.write(_line(row))


def _append(log: BinaryIO, row: Mapping[str, Any]) -> None:
    """Adds a line, and waits until it is on the disk."""
    log.write(_line(row))
    log.flush()
    os.fsync(log.fileno())


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


if __name__ == "__main__":
    cli.run(main, Args, __doc__, {"--list_rewards": rewards.table})
