"""The prompts of reinforcement learning: read, held out for evaluation, and drawn epoch by epoch.

    prompts = open_prompts(args)
    ids = prompts.draw(seed, epoch, 48, replace=False)     # indices of prompts.train

A prompt is its text and its metadata: what else stands in its row, which rewards receive. Two rows
that agree in both are one prompt; its id is its index in `train`. Which prompts are held out and
which come in an epoch follows from the texts, the seed and the epoch alone, so nothing is saved and
every process knows the same.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dojo import rng
from dojo.cli import UserError, option
from dojo.data.lines import named, split_lines, split_options
from dojo.data.options import DataArgs
from dojo.data.sources.columns import one_line, shown
from dojo.data.sources.metadata import read_json, read_metadata
from dojo.data.sources.tables import load_dataset, load_saved
from dojo.lazy import torch
from dojo.pocket import compositions, scenes
from dojo.run.run import Run

COLUMNS = ("prompt", "text", "caption")
"""Fields of a row that the prompt is taken from, the first one preferred."""
_TABLES = (".jsonl", ".csv", ".json")
_NOT_TEXT = (*_TABLES, ".tsv", ".parquet", ".yaml", ".yml")

# DDPO's 45 animals (Black et al. 2023, arXiv:2305.13301): the prompt is the name.
_ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf
lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken
duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
"""

_POCKET_COUNT = 1200
_POCKET_SEED = 11  # not that of the captions that `dojo.pocket` draws for data sets and scores
_POCKET_DRAWS = 12_000  # enough for each of the 72 that single_object has to come

_DEFAULT_HELD_OUT, _LARGEST_SHARE = 32, 5  # 32 prompts, but no more than a fifth


@dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """Prompts to draw pictures for, and those held out for evaluation."""

    prompt_file: Path | None = option(None, incidental=True, common=True)
    """.txt with a prompt per line, .jsonl or .csv with a column prompt (or text, or caption), whose
    other columns go to the rewards, or .json: a list of such rows, or of prompts"""
    prompt_set: Literal["animals", "pocket", "pocket_compositional"] | None = option(
        None, common=True
    )
    """a list that is built in: the 45 animals of DDPO, 1,200 captions of the pocket grammar, or as
    many of up to four objects (compositional)"""
    prompt_dataset_name: str | None = option(None, incidental=True)
    """hub id, or local folder that the datasets library reads; other columns go to the rewards"""
    prompt_column: str = "prompt"
    """column of prompt_dataset_name that holds the prompts"""
    prompt_dataset_split: str = "train"
    """split of prompt_dataset_name"""
    max_prompts: int | None = None
    """train on the first N prompts only; what is held out does not depend on it"""
    balance: str | None = None
    """column by whose values the prompts are balanced, such as task in the pocket set: those of
    rarer values stand several times in the set, so that all values come equally often"""
    num_eval_prompts: int | None = None
    """prompts held out of training for evaluation, 0 for none; unset is 32, or a fifth of the
    prompts if that is less"""
    eval_prompt_file: Path | None = option(None, incidental=True)
    """file of prompts for evaluation instead, all of them or the first num_eval_prompts; no text of
    it is trained on"""

    def __post_init__(self) -> None:
        names = ("prompt_file", "prompt_set", "prompt_dataset_name")
        if sum(getattr(self, name) is not None for name in names) != 1:
            flags = ", ".join(f"--{name}" for name in names)
            raise ValueError(f"the prompts come from one of {flags}: give one of them")
        if self.prompt_dataset_name is None:
            for name, usual in (("prompt_column", "prompt"), ("prompt_dataset_split", "train")):
                if getattr(self, name) != usual:
                    raise ValueError(f"--{name} needs --prompt_dataset_name")
        for name in ("prompt_dataset_name", "prompt_column", "prompt_dataset_split"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name} must not be empty")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"--max_prompts must be at least 1, got {self.max_prompts}")
        if self.num_eval_prompts is not None and self.num_eval_prompts < 0:
            raise ValueError(f"--num_eval_prompts must be 0 or more, got {self.num_eval_prompts}")
        if self.num_eval_prompts == 0 and self.eval_prompt_file is not None:
            raise ValueError("--num_eval_prompts 0 contradicts --eval_prompt_file")

    @property
    def location(self) -> str:
        """Where the prompts come from, in a word."""
        return str(self.prompt_file or self.prompt_dataset_name or self.prompt_set or "")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    text: str
    """on one line"""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """the rest of its row, as JSON has it"""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """how it wants to be drawn, from the end of its line: see `dojo.data.lines`"""

    @property
    def key(self) -> str:
        """Text and metadata as one line of JSON: equal for equal prompts."""
        return json.dumps([self.text, dict(self.metadata)], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run; no text is in both parts."""

    train: tuple[Prompt, ...]
    """a prompt's id is its index here"""
    held_out: tuple[Prompt, ...]
    """for evaluation; may be empty"""
    description: str
    """one line for the screen: how many there are, and where they come from"""

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the training prompts and their order."""
        lines = "\n".join(prompt.key for prompt in self.train)
        return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()

    @property
    def texts(self) -> list[str]:
        """Every text once, to be embedded."""
        return list(dict.fromkeys(prompt.text for prompt in (*self.train, *self.held_out)))

    def draw(self, seed: int, epoch: int, count: int, *, replace: bool) -> list[int]:
        """The ids of the prompts of one epoch: a function of the arguments, in every process.

        Without replacement the set is gone through in shuffled order, pass after pass, and the
        stream of passes is cut into epochs: a pass holds every prompt once, an epoch none twice.

        Args:
            seed: of the run.
            epoch: from 0.
            count: prompts of an epoch, the same in all of them.
            replace: draw each prompt independently of the others instead.

        Raises:
            UserError: an epoch without replacement wants more prompts than there are.
        """
        if count < 1:
            raise ValueError(f"--num_prompts_per_epoch must be at least 1, got {count}")
        size = len(self.train)
        if replace:
            generator = rng.generator(seed, "prompts with replacement", epoch)
            return torch.randint(size, (count,), generator=generator).tolist()
        if count > size:
            raise UserError(
                f"--num_prompts_per_epoch {count}: there are only {size:,} prompts to train on, "
                "and an epoch holds none of them twice"
            )
        first_pass, place = divmod(epoch * count, size)
        passes = itertools.islice(_passes(seed, size, count, first_pass), 2)
        return list(itertools.chain.from_iterable(passes))[place : place + count]

    def stream(
        self,
        seed: int,
        batch_size: int,
        *,
        first_batch: int = 0,
        process: int = 0,
        num_processes: int = 1,
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Batches of this process without end: the places of the prompts in the run, and they.

        The set is gone through in shuffled order, pass after pass without a seam, so that no batch
        is short. Batch b of W processes holds the places from b W B on: together they see what one
        process with a batch of W B sees.

        Raises:
            UserError: a batch over all processes holds more prompts than there are.
        """
        whole = batch_size * num_processes
        if whole > len(self.train):
            raise UserError(
                f"--train_batch_size: {whole} prompts over all processes in a batch, and there are "
                f"only {len(self.train)} to train on"
            )
        for batch in itertools.count(first_batch):
            drawn = self.draw(seed, batch, whole, replace=False)
            own = range(process * batch_size, (process + 1) * batch_size)
            yield [batch * whole + i for i in own], [self.train[drawn[i]] for i in own]


def _passes(seed: int, size: int, count: int, first: int) -> Iterator[list[int]]:
    """The orders of pass `first` and those after it, without end; count <= size.

    A pass that begins within an epoch begins with prompts that the epoch has not had. So its order
    hangs on the end of the pass before, back to a pass that begins together with an epoch.
    """
    together = count // math.gcd(size, count)  # every so many passes that happens
    order: list[int] = []
    for number in itertools.count(first - first % together):
        generator = rng.generator(seed, "prompts", number)
        shuffled: list[int] = torch.randperm(size, generator=generator).tolist()
        had = number * size % count  # prompts of this epoch that the pass before gave
        before = set(order[size - had :])
        fresh = [prompt for prompt in shuffled if prompt not in before][: count - had]
        taken = set(fresh)
        order = fresh + [prompt for prompt in shuffled if prompt not in taken]
        if number >= first:
            yield order


# -- opening ----------------------------------------------------------------------------------


def open_together(run: Run, args: PromptArgs) -> Prompts:
    """`open_prompts` on all processes, rank 0 first (downloads), and what was found is said."""
    with run.accelerator.main_process_first():
        source = open_prompts(args)
    run.say(source.description)
    return source


def open_prompts(args: PromptArgs) -> Prompts:
    """Reads the prompts and holds some out.

    Raises:
        UserError: they cannot be read, one is missing, or none is left to train on.
    """
    given = _read(args)
    found = _merged(given)
    notes: list[str] = []
    if args.eval_prompt_file is not None:
        given_eval = read_file(args.eval_prompt_file, "--eval_prompt_file")
        evaluation = _merged(given_eval)
        merged = len(given) + len(given_eval) - len(found) - len(evaluation)
        apart = {prompt.text for prompt in evaluation}
        held_out = evaluation[: args.num_eval_prompts]
        both = sum(prompt.text in apart for prompt in found)
        if both:
            notes.append(f"{both:,} also in {args.eval_prompt_file}, so not trained on")
    else:
        merged = len(given) - len(found)
        apart = _held_out_texts(found, args.num_eval_prompts)
        held_out = [prompt for prompt in found if prompt.text in apart]
    rest = [prompt for prompt in found if prompt.text not in apart]
    if not rest:
        cause = (
            f"--num_eval_prompts {args.num_eval_prompts}"
            if args.eval_prompt_file is None
            else f"--eval_prompt_file {args.eval_prompt_file}"
        )
        raise UserError(
            f"{cause} leaves nothing to train on of {args.location} ({len(found):,} prompts)"
        )
    if merged:
        notes.append(f"{merged:,} duplicates merged")
    train = rest[: args.max_prompts]
    if len(train) < len(rest):
        notes.append(f"{len(rest) - len(train):,} not used (--max_prompts)")
    if args.balance is not None:
        train = _balanced(train, args.balance)
        notes.append(f"repeated to {len(train):,}, of each {args.balance} as many")
    place = f" from {args.eval_prompt_file}" if args.eval_prompt_file else ""
    counts = f"{len(train):,} to train on, {len(held_out):,} held out{place}"
    return Prompts(
        train=tuple(train),
        held_out=tuple(held_out),
        description="; ".join([f"prompts of {args.location}: {counts}", *notes]),
    )


def _balanced(prompts: Sequence[Prompt], column: str) -> list[Prompt]:
    """As many of each value as the most frequent one has; rarer ones are gone through again."""
    by_value: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if column not in prompt.metadata:
            raise UserError(f"--balance: {prompt.text!r} has no column {column}")
        by_value.setdefault(str(prompt.metadata[column]), []).append(prompt)
    most = max(map(len, by_value.values()))
    repeated = [itertools.islice(itertools.cycle(some), most) for some in by_value.values()]
    return list(itertools.chain.from_iterable(repeated))


def _read(args: PromptArgs) -> list[Prompt]:
    """The prompts of the source that is given."""
    if args.prompt_file is not None:
        return read_file(args.prompt_file, "--prompt_file")
    if args.prompt_set == "animals":
        return [Prompt(text=name) for name in _ANIMALS.split()]
    if args.prompt_set == "pocket":
        return _pocket()
    if args.prompt_set == "pocket_compositional":
        return _compositional()
    return _read_dataset(args.location, args.prompt_dataset_split, args.prompt_column)


def _merged(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, at its first place."""
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        kept.setdefault(prompt.key, prompt)
    return list(kept.values())


def _held_out_texts(prompts: Sequence[Prompt], count: int | None) -> set[str]:
    """The texts to hold out: those with the smallest hashes, as many of each `task`.

    A longer list holds out none of those that the shorter one trained on. A text counts once,
    whatever number of metadata it has.
    """
    tasks: dict[str, str] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.text, str(prompt.metadata.get("task")))
    if count is None:
        count = min(_DEFAULT_HELD_OUT, len(tasks) // _LARGEST_SHARE)
    by_hash = sorted(tasks, key=lambda text: rng.seed_for("held-out prompts", text))
    of_task: Counter[str] = Counter()
    ranks: dict[str, int] = {}
    for text in by_hash:
        ranks[text] = of_task[tasks[text]]
        of_task[tasks[text]] += 1
    return set(sorted(by_hash, key=lambda text: ranks[text])[:count])


def _pocket() -> list[Prompt]:
    """1,200 captions of the pocket grammar, the tasks in turn.

    200 of each would be balanced, but single_object has 72 captions in all: the others have 225 or
    226.
    """
    return [Prompt(text=text, metadata={"task": task}) for text, task in _pocket_texts()]


def _compositional() -> list[Prompt]:
    """1,200 captions of one to four objects; the task is their number."""
    captions = compositions.captions(_POCKET_COUNT, _POCKET_SEED)
    numbers = (scenes.parse(text).num_objects for text in captions)
    rows = zip(captions, numbers, strict=True)
    return [Prompt(text=text, metadata={"task": f"{number}_object"}) for text, number in rows]


@functools.cache
def _pocket_texts() -> tuple[tuple[str, str], ...]:
    """Their captions and tasks."""
    by_task: dict[str, list[tuple[str, str]]] = {task: [] for task in scenes.TASKS}
    for text in dict.fromkeys(scenes.evaluation_captions(_POCKET_DRAWS, _POCKET_SEED)):
        task = scenes.parse(text).task
        by_task[task].append((text, task))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_task.values()))
    return tuple(itertools.islice(filter(None, turns), _POCKET_COUNT))


# -- files and tables -------------------------------------------------------------------------


def read_file(path: Path, flag: str, *, with_options: bool = False) -> list[Prompt]:
    """The prompts of a file, in their order: of its lines, or of its rows (.jsonl, .csv, .json).

    Args:
        with_options: lines may end in options of kohya's sample prompts.

    Raises:
        UserError: the file cannot be read, holds none, has a row without one, or has options that
            nobody asked for; it names `flag`.
    """
    if path.suffix.lower() in _NOT_TEXT and path.suffix not in _TABLES:
        raise UserError(f"{flag}: {path} is none of .txt, {', '.join(_TABLES)}")
    try:
        if path.suffix in _TABLES:
            return list(_rows(path))
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} cannot be read ({error})") from error
    try:
        prompts = [_of_line(line, with_options) for line in lines]
    except ValueError as error:
        raise UserError(f"{flag}: {path}: {error}") from error
    if not prompts:
        raise UserError(f"{flag}: {path} holds no prompt")
    return prompts


def _of_line(line: str, with_options: bool) -> Prompt:
    """The prompt of a line of text.

    Raises:
        ValueError: its options are wrong, or nobody asked for them.
    """
    try:
        text, options = split_options(line)
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from None
    if options and not with_options:
        raise ValueError(
            f"{line!r} ends in options of kohya's sample prompts ({named(options)}), which are not "
            "used here: take them out, or write .jsonl with a column prompt, where they are words"
        )
    return Prompt(text=one_line(text), options=options)


def _rows(path: Path) -> Iterator[Prompt]:
    """The prompts of a table."""
    is_json = path.suffix == ".json"
    for row in read_json(path, COLUMNS[0]) if is_json else read_metadata(path):
        fields = row.fields
        if path.suffix == ".csv":  # an empty cell is not set
            fields = {name: cell for name, cell in fields.items() if cell not in ("", None)}
        try:
            if row.problem:
                raise ValueError(row.problem)
            yield _prompt(fields, COLUMNS)
        except ValueError as error:
            raise UserError(f"{path} has a line without prompt ({row.place}: {error})") from error


def _read_dataset(name: str, split: str, column: str) -> list[Prompt]:
    """The prompts of a data set, with its other columns but pictures and sounds.

    Raises:
        UserError: it cannot be loaded, has no such column, or a row without prompt.
    """
    root = Path(name).expanduser()
    options = DataArgs(dataset_name=name, dataset_split=split)
    saved = any((root / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    try:
        table = (
            load_saved(root, options)
            if saved
            else load_dataset(str(root) if root.is_dir() else name, options)
        )
    except UserError as error:
        reason = str(error).replace("--dataset_split", "--prompt_dataset_split")
        raise UserError(f"--prompt_dataset_name: {reason}") from error
    # Features that decode their cells are pictures and sounds.
    plain = [key for key, one in table.features.items() if not hasattr(one, "decode_example")]
    if column not in plain:
        raise UserError(f"--prompt_column: {name} has no column {column!r}; it has {shown(plain)}")
    prompts: list[Prompt] = []
    for number, row in enumerate(table.select_columns(plain), start=1):
        try:
            # Dates and the like become text, so that the metadata can be sent to a server.
            prompts.append(_prompt(json.loads(json.dumps(row, default=str)), (column,)))
        except ValueError as error:
            raise UserError(
                f"--prompt_dataset_name: {name} has a row without prompt (row {number}: {error})"
            ) from error
    if not prompts:
        raise UserError(f"--prompt_dataset_name: {name} holds no prompt")
    return prompts


def _prompt(fields: Mapping[str, object], columns: Sequence[str]) -> Prompt:
    """The prompt of a row.

    Raises:
        ValueError: there is none; it says why.
    """
    column = next((name for name in columns if fields.get(name) is not None), None)
    if column is None:
        raise ValueError(f"no {' or '.join(columns)}; it has {shown(fields)}")
    text = fields[column]
    if not isinstance(text, str):
        raise ValueError(f"{column} is of type {type(text).__name__}, not text")
    text = one_line(text)
    if not text:
        raise ValueError(f"{column} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{column} holds half of a character")  # JSON may: "\ud83d"
    return Prompt(
        text=text, metadata={name: cell for name, cell in fields.items() if name != column}
    )
