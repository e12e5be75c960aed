"""Captions for a folder of pictures, written beside them.

    python -m dojo.caption FOLDER --model Salesforce/blip-image-captioning-large
    python -m dojo.caption FOLDER --server http://localhost:8000/v1 --model NAME \\
        --prefix "sks dog," --language German

Pictures that have a caption are left as they are. The same command goes on where it was stopped or
killed. A server's key is read from the environment (DOJO_VLM_API_KEY). BLIP runs on this machine;
any vision-language model does behind a server that speaks OpenAI's protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from dojo import cli, data, files
from dojo.bars import Bar
from dojo.caption import shelf, writers
from dojo.caption.shelf import Shelf, Target
from dojo.caption.writers import Writer
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.cli.words import first_word_as
from dojo.data.images import BadSample

_LOCK = ".captions.lock"
_LISTED = 10
_CJK = "\u2e80"  # the first letter of writing without spaces


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is captioned, and by whom."""

    folder: Path = cli.option(Path(), common=True)
    """folder with pictures, also in sub-folders; the first word of the command stands for it"""
    model: str = cli.option("", common=True)
    """BLIP as folder or hub id or, with --server, the name that the server has for its model"""
    server: str | None = cli.option(None, common=True)
    """address of a server that speaks OpenAI's protocol, up to and with /v1"""
    to: Target = cli.option("txt", common=True)
    """txt: a file beside each picture; metadata: rows of one metadata.jsonl"""
    replace_captions: bool = cli.option(False, common=True)
    """write anew what has a caption, too; a command that is started again begins again"""
    prompt: str | None = cli.option(None, common=True)
    """what a served model is asked, or the words that BLIP begins its captions with"""
    language: str | None = cli.option(None, common=True)
    """language of the captions, as the served model knows it: German, 中文, ..."""
    prefix: str = cli.option("", common=True)
    """words that every caption begins with: a trigger word, "sks dog," """
    max_pictures: int | None = cli.option(None, common=True)
    """captions that are written at most, to try a prompt"""
    max_tokens: int = 200
    """longest caption, in the model's tokens"""
    max_side: int = 1024
    """pixels of the longer side of what the model sees; larger pictures are shrunk"""
    batch_size: int = 8
    """pictures that BLIP reads at a time"""
    workers: int = 4
    """requests to a server at a time"""
    timeout: float = 120.0
    """seconds that a server has for an answer"""
    retries: int = 8
    """times that a request is made again when there is no answer, after 1, 2, 4, ... 30 seconds"""
    on_bad_sample: Literal["skip", "error"] = "error"
    """pictures that cannot be read or captioned are left out and named at the end; error: with
    exit code 2"""

    def __post_init__(self) -> None:
        ranges.check(self, "max_pictures max_tokens batch_size workers", least=1)
        ranges.check(self, "max_side", least=32)
        ranges.check(self, "timeout", above=0)
        ranges.check(self, "retries", least=0)
        if not self.model:
            raise ValueError("--model names who writes the captions: BLIP, or the server's model")
        if self.language and not self.server:
            raise ValueError("--language is for --server: BLIP writes English")


@dataclass
class _Count:
    written: int = 0
    kept: int = 0
    bad: list[data.BadReport] = field(default_factory=list[data.BadReport])


def main(args: Args) -> None:
    """Writes the captions that are missing.

    Raises:
        UserError: nothing can be captioned, or some pictures could not.
        TrainingStopped: the server is gone; what was written is kept.
    """
    root = args.folder.expanduser()
    if not root.is_dir():
        raise UserError(f"{args.folder}: there is no such folder")
    try:
        with files.turn(root / _LOCK, wait=False):
            count = _caption(args, root)
    except BlockingIOError:
        raise UserError(f"{root}: another process is writing captions there") from None
    for one in count.bad[:_LISTED]:
        print(f"  no caption: {one.name}: {one.reason}", flush=True)
    if len(count.bad) > _LISTED:
        print(f"  and {len(count.bad) - _LISTED:,} more", flush=True)
    print(
        f"captions: {count.written:,} written, {count.kept:,} kept, {len(count.bad):,} pictures "
        "without one",
        flush=True,
    )
    if count.bad and args.on_bad_sample == "error":
        raise UserError(
            f"{root}: {len(count.bad)} pictures could not be captioned (--on_bad_sample skip is "
            "content with that)"
        )


def _caption(args: Args, root: Path) -> _Count:
    folder = data.scan(root, data.DataArgs(dataset_name=str(root)))
    if not folder.pictures:
        raise UserError(f"{root}: there is no picture in it")
    place = shelf.open_shelf(folder, args.to)
    wanted = [one for one in folder.pictures if args.replace_captions or not place.has(one)]
    if args.to == "txt":
        shelf.refuse_shared(wanted, root)
    count = _Count(kept=len(folder.pictures) - len(wanted))
    if not wanted:
        return count
    writer = _writer(args)
    try:
        _write(args, root, wanted[: args.max_pictures], writer, place, count)
    except TrainingStopped as error:
        raise TrainingStopped(
            f"{error}; {count.written:,} captions are written, and the same command goes on"
        ) from None
    finally:
        place.close()
    if isinstance(writer, writers.Served) and writer.cut:
        print(
            f"{writer.cut:,} captions end where --max_tokens {args.max_tokens} cut them",
            flush=True,
        )
    return count


def _writer(args: Args) -> Writer:
    if args.server is None:
        return writers.Blip(
            args.model, args.prompt, max_tokens=args.max_tokens, batch_size=args.batch_size
        )
    question = args.prompt or writers.QUESTION
    if args.language:
        question = f"{question} Answer in this language: {args.language}."
    return writers.Served(
        *(args.server, args.model, question),
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        retries=args.retries,
        workers=args.workers,
    )


def _write(
    args: Args,
    root: Path,
    pictures: Sequence[str],
    writer: Writer,
    place: Shelf,
    count: _Count,
) -> None:
    """Has captions written and puts each away when it comes, whatever comes before it."""

    def work(names: Sequence[str]) -> list[str | BadSample]:
        found = [_read(root, name, args.max_side) for name in names]
        good = [one for one in found if not isinstance(one, BadSample)]
        told = iter(writer(good) if good else [])
        return [one if isinstance(one, BadSample) else next(told) for one in found]

    bar = Bar(total=len(pictures), desc="Writing captions", unit="picture")
    pool = _Threads(writer.threads, left_alone=args.server is not None)
    running: dict[Future[list[str | BadSample]], Sequence[str]] = {}
    try:
        for names in _groups(pictures, writer.at_once):
            running[pool.submit(work, names)] = names
            if len(running) > 2 * writer.threads:
                _put(running, place, args.prefix, count, bar)
        while running:
            _put(running, place, args.prefix, count, bar)
    finally:
        bar.close()
        pool.end(running)


Work = Callable[[Sequence[str]], list[str | BadSample]]


class _Threads:
    """Threads that do one piece of work after the other.

    Args:
        left_alone: what they are still at is waited for by none when the command ends, be it by
            Ctrl-C: a silent server may take its time. (Python waits for a ThreadPoolExecutor's.)
    """

    def __init__(self, count: int, *, left_alone: bool) -> None:
        self.count = count
        self._waiting: SimpleQueue[tuple[Future[Any], Work, Sequence[str]] | None] = SimpleQueue()
        for _ in range(count):
            Thread(target=self._work, daemon=left_alone).start()

    def submit(self, work: Work, names: Sequence[str]) -> Future[list[str | BadSample]]:
        """Has work done when its turn comes."""
        future = Future[list[str | BadSample]]()
        self._waiting.put((future, work, names))
        return future

    def _work(self) -> None:
        while (one := self._waiting.get()) is not None:
            future, work, names = one
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(names))
            except BaseException as error:
                future.set_exception(error)

    def end(self, running: Iterable[Future[Any]]) -> None:
        """Gives up what has not begun."""
        for future in running:
            future.cancel()
        for _ in range(self.count):
            self._waiting.put(None)


def _put(
    running: dict[Future[list[str | BadSample]], Sequence[str]],
    place: Shelf,
    prefix: str,
    count: _Count,
    bar: Bar[Any],
) -> None:
    """Waits for one call at least and puts its captions away."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    failed: BaseException | None = None
    for future in done:
        names = running.pop(future)
        if (error := future.exception()) is not None:
            failed = error
            continue
        for name, one in zip(names, future.result(), strict=True):
            if isinstance(one, BadSample):
                count.bad.append(data.BadReport(name, str(one)))
            else:
                place.put(name, begun_with(prefix, one))
                count.written += 1
            bar.update()
    if failed is not None:
        raise failed


def begun_with(prefix: str, caption: str) -> str:
    """A caption behind the words that it has to begin with; once, if it does so already."""
    words = " ".join(prefix.split())
    if not words or caption.lower().startswith(words.lower()):
        # "cat" does not begin "cats on a sofa". Chinese is written without spaces.
        ends = (words[-1:], caption[len(words) : len(words) + 1])
        if not all(end.isalnum() and end < _CJK for end in ends):
            return caption
    return f"{words} {caption}"


def _groups(pictures: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _read(root: Path, name: str, side: int) -> writers.Image.Image | BadSample:
    try:
        return writers.shrunk(data.read_image(root / name, name), side)
    except BadSample as error:
        return BadSample(str(error).removeprefix(f"{name}: "))


if __name__ == "__main__":
    sys.argv[1:] = first_word_as("--folder", sys.argv[1:])
    cli.run(main, Args, __doc__)
