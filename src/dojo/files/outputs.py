"""A folder of results: whose it is, who is at work in it, and what in it may be removed.

    outputs.claim(folder, "run")                          # or the reason why not
    outputs.own(folder / "args.json").write_text(...)     # listed before it is written
    outputs.release(folder)                               # or the process ends

A folder is taken when it is absent or empty, or when it was taken before: then it has a
`manifest.jsonl`, which lists every file that was written into it, each before it is written, so
that a kill leaves nothing unlisted. What is not listed is somebody's own: it is never overwritten
(it gets another name) and never removed. While a process is at work, it holds a lock, `.lock`.
"""

from __future__ import annotations

import atexit
import errno
import fnmatch
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

from dojo import files
from dojo.cli import UserError

Kind = Literal["run", "pictures", "pairs"]
_TITLES: dict[str, str] = {
    "run": "a run",
    "pictures": "pictures drawn by demo.py",
    "pairs": "pairs drawn by dojo.pairs",
}

MANIFEST = "manifest.jsonl"
LOCK = ".lock"
_MARK = "sd_dojo"  # key of the manifest's first line
# What systems and editors leave in any folder; a folder with nothing else is empty.
_NOTHING = (
    *("desktop.ini", "thumbs.db", ".ds_store", ".localized", ".directory", "lost+found"),
    *(".gitkeep", ".gitignore", ".ipynb_checkpoints", LOCK),
)
_PARTIAL, _REMOVED = ".partial", ".removed"


@dataclass
class Claim:
    """A folder that this process has taken."""

    folder: Path
    kind: Kind
    lock: int | None
    """the lock's descriptor; None for one who only adds a file"""
    created: list[Path] = field(default_factory=list)
    """folders that were made for it, the outermost first"""
    fresh: bool = False
    """the manifest is new, and nothing has been written since"""
    adopted: bool = False
    """an earlier version worked here, which kept no list: files in the way are taken for its own"""
    listed: set[str] = field(default_factory=set)
    """paths below the folder; those of folders end in a slash"""
    patterns: set[str] = field(default_factory=set)
    """of files whose names others choose, for fnmatch"""

    @property
    def manifest(self) -> Path:
        """The list's file."""
        return self.folder / MANIFEST

    def add(self, *names: str, pattern: bool = False) -> None:
        """Writes names down, before anything is written under them."""
        known = self.patterns if pattern else self.listed
        new = [name for name in dict.fromkeys(names) if name not in known]
        if not new:
            return
        lines = [json.dumps({"pattern": name} if pattern else name) for name in new]
        with self.manifest.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        known.update(new)
        self.fresh = False

    def lists(self, name: str) -> bool:
        """Whether a file below the folder was written by us."""
        return name in self.listed or any(fnmatch.fnmatchcase(name, p) for p in self.patterns)

    def start_list(self) -> None:
        """A manifest that lists nothing."""
        self.listed.clear()
        self.patterns.clear()
        head = {_MARK: self.kind, "by": _program(), "made": _now(), "adopted": self.adopted}
        temporary = self.folder / f".{MANIFEST}{_PARTIAL}"
        temporary.write_text(json.dumps(head) + "\n", encoding="utf-8")
        temporary.replace(self.manifest)

    def remove(self, below: str = "") -> None:
        """Removes the listed files below a folder of ours, and the folders that this empties."""
        emptied: set[Path] = set()
        for name in [name for name in _walk(self.folder) if name.startswith(below)]:
            if name != MANIFEST and self.lists(name):
                (self.folder / name).unlink()
                emptied.add((self.folder / name).parent)
        for folder in sorted(emptied, key=lambda path: -len(path.parts)):
            _remove_empty(folder, self.folder)

    def sweep(self) -> None:
        """Removes what a killed run left half written: nobody else is at work here."""
        parents = {(self.folder / name).parent for name in self.listed}
        for parent in {self.folder, *parents}:
            for path in parent.glob(".*") if parent.is_dir() else ():
                name, _, end = path.name[1:].rpartition(".")
                if f".{end}" not in (_PARTIAL, _REMOVED) and not end.isdigit():
                    continue
                whole = (parent / name).relative_to(self.folder).as_posix()
                if whole in self.listed or f"{whole}/" in self.listed or name == MANIFEST:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()


_claims: dict[Path, Claim] = {}


# -- taking a folder ----------------------------------------------------------------------------


def check(folder: Path, kind: Kind, *, overwrite: bool = False, flag: str = "--output_dir") -> None:
    """Refuses a folder whose files nobody but their owner may touch; writes nothing.

    Raises:
        UserError: it is a file, or holds other files than those of such a program.
    """
    with _explained(folder, flag):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{flag} {folder} is a file; name a folder")
        if (head := _head(folder)) is not None:
            if head[_MARK] != kind:
                there = _TITLES[str(head[_MARK])]
                raise UserError(f"{flag} {folder} holds {there}; choose another folder")
        elif _is_of_earlier_version(folder, kind):
            if overwrite:
                raise UserError(
                    f"{flag} {folder} holds a run of an earlier version, which kept no list of "
                    "its files, so nothing is removed: continue it with --resume_from_checkpoint "
                    "latest, remove the folder yourself, or choose another"
                )
        elif some := _others(folder):
            shown = ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
            raise UserError(
                f"{flag} {folder} is not empty, and what is in it ({shown}) was not written by "
                "SD Dojo: choose a new or an empty folder"
            )


def claim(
    folder: Path, kind: Kind, *, overwrite: bool = False, flag: str = "--output_dir"
) -> Claim:
    """Takes a folder for this process, until `release` or its end; makes it where it is absent.

    Args:
        overwrite: what was written there before is to be removed; `Claim.remove` does that.
    Raises:
        UserError: see `check`; another process is at work in it; it cannot be written.
    """
    folder = folder.absolute()
    check(folder, kind, overwrite=overwrite, flag=flag)
    with _explained(folder, flag):
        held = _claims.get(folder)
        if held is not None and held.lock is not None and (folder / LOCK).exists():
            return held  # an earlier run of this process, which is over
        if held is not None:
            _unlock(held)  # its folder is gone
        missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
        folder.mkdir(parents=True, exist_ok=True)
        made = Claim(folder, kind, _lock(folder, flag), created=missing)
        try:
            check(folder, kind, overwrite=overwrite, flag=flag)  # now that nobody else writes
            _read(made)
        except BaseException:
            _unlock(made)
            raise
        _claims[folder] = made
    return made


def join(folder: Path) -> None:
    """Lets `own` list files in a folder that was taken before; in another one it lists nothing."""
    folder = folder.absolute()
    head = _head(folder)
    if head is not None and folder not in _claims:
        kind = cast(Kind, head[_MARK])
        joined = Claim(folder, kind, None, adopted=bool(head.get("adopted")))
        _read_list(joined)
        _claims[folder] = joined


def release(folder: Path) -> None:
    """Gives a folder back; one that was new and got nothing is as it was before."""
    held = _claims.pop(folder.absolute(), None)
    if held is None or held.lock is None:
        return
    unused = held.fresh and (held.adopted or not _others(held.folder))
    if unused:
        held.manifest.unlink(missing_ok=True)
    _unlock(held)
    for path in reversed(held.created if unused else []):
        with suppress(OSError):
            path.rmdir()


def _read(made: Claim) -> None:
    """What the manifest says, or a new manifest."""
    head = _head(made.folder)
    if head is None:
        made.adopted = _is_of_earlier_version(made.folder, made.kind)
        made.start_list()
        if made.adopted and made.kind == "run":
            made.add(*_files_of_earlier_version(made.folder))
        made.fresh = True
        return
    made.adopted = bool(head.get("adopted"))
    _read_list(made)
    made.sweep()


def _read_list(made: Claim) -> None:
    text = made.manifest.read_text(encoding="utf-8")
    for line in text.splitlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:  # a kill cut it off: nothing was written under that name
            continue
        known = made.patterns if isinstance(entry, dict) else made.listed
        known.add(entry["pattern"] if isinstance(entry, dict) else entry)
    if made.lock is not None and not text.endswith("\n"):
        with made.manifest.open("a", encoding="utf-8") as file:
            file.write("\n")


# -- writing ------------------------------------------------------------------------------------


def own(path: Path) -> Path:
    """Lists a file that is about to be written, and returns its path.

    A file of somebody else's that has the name gets another one. Outside a folder that this process
    has taken, and in the hidden folders in which others are made whole, nothing happens.
    """
    held, name = _holder(path)
    if held is not None and name not in held.listed:
        if os.path.lexists(path) and not held.adopted:
            _spare(path)
        held.add(name)
    return path


def own_folder(folder: Path) -> None:
    """Lists a folder that is about to be made, so that its half is known after a kill."""
    held, name = _holder(folder)
    if held is not None:
        held.add(f"{name}/")


def own_pattern(folder: Path, *patterns: str) -> None:
    """Lists what a library will write below a folder under names of its own (fnmatch's `*`)."""
    held, _ = _holder(folder / "any")
    if held is not None:
        held.add(*patterns, pattern=True)


def fill(folder: Path, write: Callable[[Path], object]) -> bool:
    """Lets `write` make a folder anew: what we wrote into it before goes, other files stay.

    Returns:
        Whether there is anything in it.
    """
    held, name = _holder(folder)
    own_folder(folder)
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    if held is not None:
        held.remove(f"{name}/")
    made = list(_walk(partial)) if partial.is_dir() else []
    for inside in made:
        target = own(folder / inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / inside).replace(target)
    shutil.rmtree(partial, ignore_errors=True)
    return bool(made)


def discard(path: Path) -> None:
    """Removes a file if it was written by us; in a folder that nobody has taken, nothing."""
    held, name = _holder(path)
    if held is not None and (held.lists(name) or held.adopted):
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes what we wrote into a folder of pictures before."""
    held, name = _holder(folder)
    if held is not None:
        held.remove(f"{name}/")


def rescue(folder: Path) -> None:
    """Moves what is not ours out of a folder that is about to be removed, to `NAME.kept`."""
    held, name = _holder(folder)
    if held is None:
        return
    for inside in list(_walk(folder)):
        if not held.lists(f"{name}/{inside}"):
            target = _free(folder.with_name(f"{folder.name}.kept") / inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).rename(target)
            _say(f"{folder / inside} is not the run's: it is {target} now")


def others(folder: Path) -> list[str]:
    """The files in a folder of ours that are not listed, but for caches."""
    held = _claims[folder.absolute()]
    known = {MANIFEST, LOCK}
    return [name for name in _walk(held.folder) if name not in known and not held.lists(name)]


def _holder(path: Path) -> tuple[Claim | None, str]:
    """The claim on the innermost folder that holds a path, and the path's name below it."""
    path = path.absolute()
    for parent in path.parents:
        if (held := _claims.get(parent)) is not None:
            name = path.relative_to(parent)
            hidden = any(part.startswith(".") for part in name.parts)
            return (None if hidden else held), name.as_posix()
    return None, ""


def _spare(path: Path) -> None:
    target = _free(path.with_name(f"{path.stem}.kept{path.suffix}"))
    path.rename(target)
    _say(f"{path} was not written by a run: it is {target.name} now")


def _free(path: Path) -> Path:
    """The path, or one with a number that is not taken."""
    number, found = 2, path
    while os.path.lexists(found):
        number, found = number + 1, path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def _say(text: str) -> None:
    print(text, flush=True)


# -- what is in a folder ------------------------------------------------------------------------


def _head(folder: Path) -> dict[str, object] | None:
    """The manifest's first line; None where there is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) and head.get(_MARK) in _TITLES else None


def _others(folder: Path) -> list[str]:
    """Names of what makes a folder not empty: no system's files, no caches, no manifest of ours."""
    if not folder.is_dir():
        return []
    ours = {MANIFEST, f".{MANIFEST}{_PARTIAL}"} if _head(folder) else {f".{MANIFEST}{_PARTIAL}"}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.lower() not in _NOTHING
        and not path.name.startswith(("._", ".nfs"))
        and path.name not in ours
        and not (path / "CACHEDIR.TAG").is_file()
    )


def _is_of_earlier_version(folder: Path, kind: Kind) -> bool:
    """Whether a folder without a manifest was written before there were manifests."""
    if kind == "pairs":
        return False
    if kind == "pictures":
        names = ("prompts.json", "versus.json")
        return any("options" in _json(folder / name) for name in names)
    has_args = {"script", "args", "seed"} <= _json(folder / "args.json").keys()
    return has_args or any(folder.glob("checkpoint-*/state.json"))


def _files_of_earlier_version(folder: Path) -> list[str]:
    """Of such a run: what a new one takes away or writes anew; all else is left alone."""
    own = [path for name in ("args", "finished") for path in folder.glob(f"{name}.json")]
    own += folder.glob("metrics.jsonl")
    for mark in folder.glob("checkpoint-*/state.json"):
        own += [p for kind in ("json", "pt", "safetensors") for p in mark.parent.rglob(f"*.{kind}")]
    return [path.relative_to(folder).as_posix() for path in own]


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _walk(folder: Path) -> Iterator[str]:
    """All files below a folder but caches' and what is in hidden folders; links are files."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = [
            name
            for name in folders
            if name not in links
            and not name.startswith(".")
            and not os.path.isfile(os.path.join(place, name, "CACHEDIR.TAG"))
        ]
        for name in [*names, *links]:
            yield Path(place, name).relative_to(folder).as_posix()


def _remove_empty(folder: Path, top: Path) -> None:
    """Removes a folder of ours and those above it as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


# -- the lock -----------------------------------------------------------------------------------


def _lock(folder: Path, flag: str) -> int:
    path = folder / LOCK
    try:
        descriptor = files.open_locked(path)
    except BlockingIOError:
        raise UserError(
            f"{flag} {folder} is in use by {_who(_json(path))}: wait until it has ended, end it, "
            "or choose another folder"
        ) from None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "by": _program()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    if not files.is_locked(descriptor):
        _say(
            f"warning: the file system of {folder} knows no locks, so that nobody would notice a "
            "second run in it: start one at a time"
        )
    return descriptor


def _who(holder: dict[str, object]) -> str:
    if not holder:
        return "another process, which has just begun"
    return "{by} (process {pid} on {host}, since {since})".format(**holder)


def _unlock(held: Claim) -> None:
    if held.lock is not None:
        if files.is_at(held.folder / LOCK, held.lock):
            (held.folder / LOCK).unlink()  # before it is free: whoever comes next looks for a name
        os.close(held.lock)
        held.lock = None


def _program() -> str:
    """The script's name; its flags may hold tokens."""
    return Path(sys.argv[0]).name or "python"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def _explained(folder: Path, flag: str) -> Iterator[None]:
    """Says in a sentence why a folder cannot be used."""
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename and str(error.filename) != str(folder) else ""
        what = error.strerror or str(error)
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            what = "a file is in the way"
        raise UserError(f"{flag} {folder} cannot be used: {what} {where}".rstrip()) from error


def _release_all() -> None:
    for folder in list(_claims):
        with suppress(OSError):
            release(folder)


def _forget_after_fork() -> None:
    """A child, such as a data loader's worker, must not keep its dead parent's lock."""
    for held in _claims.values():
        if held.lock is not None:
            os.close(held.lock)
    _claims.clear()


atexit.register(_release_all)
os.register_at_fork(after_in_child=_forget_after_fork)
