"""Fetches the public models and data sets that the launchers name, into models/ and datas/.

    python -m dojo.download                        what there is
    python -m dojo.download --dry_run naruto       files, size, licence; nothing is fetched
    python -m dojo.download naruto clip-vit-l-14

Everything is told before anything is fetched: where from, where to, how large, under which
licence. Only the files that the scripts read are taken. What was interrupted goes on where it
stopped, inside a file too: huggingface_hub's own download starts a broken file anew since it
writes to a fresh temporary name each time (huggingface_hub#4228), so the listing is its work and
the transfer is done here. HF_ENDPOINT and HF_TOKEN are read by huggingface_hub; a token is never
printed and never sent to another host.
"""

import argparse
import fnmatch
import hashlib
import importlib
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from dojo.bars import Bar
from dojo.models.catalogue import ENTRIES, Entry, File

GITHUB_RAW = "https://raw.githubusercontent.com"
TRUSTED_SIZE = 64 * 10**6  # bytes; smaller files are compared with their checksum on every run
CONTINUES = "what has arrived is kept; the same command goes on from there"


class DownloadError(Exception):
    """Something that the user can act on; its text is all that is shown."""


BY_NAME = {entry.name: entry for entry in ENTRIES}


@dataclass(frozen=True)
class Plan:
    """What fetching an entry means: its files at one revision."""

    entry: Entry
    files: tuple[File, ...] = ()
    revision: str | None = None
    trouble: str | None = None  # why the files could not be listed

    @property
    def size(self) -> int | None:
        """Bytes of all files together; None when one of them is unknown."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if self.files and len(sizes) == len(self.files) else None


def select(
    names: Sequence[str], allow: Sequence[str], ignore: Sequence[str], include: Sequence[str] = ()
) -> list[str]:
    """The file names that are needed, in order: those that `allow` and `include` name.

    Pickled weights (.bin) are dropped from a folder that has the same as safetensors.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    chosen = [
        name
        for name in names
        if matches(name, allow)
        and not matches(name, ignore)
        and (not include or matches(name, include))
    ]
    safe_folders = {os.path.dirname(name) for name in chosen if name.endswith(".safetensors")}
    pickles = (".bin", ".bin.index.json", ".pt", ".pth")
    return [
        name
        for name in chosen
        if not (name.endswith(pickles) and os.path.dirname(name) in safe_folders)
    ]


def human(size: int | None) -> str:
    """Bytes as a person reads them; units are powers of 1000, as on the hub."""
    if size is None:
        return "unknown"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def page(entry: Entry, source: str) -> str:
    """The entry's page for people; a name and password in HF_ENDPOINT are left out."""
    if entry.kind == "github":
        return f"https://github.com/{entry.repo}"
    if entry.kind == "web":
        return f"https://{entry.repo}/"
    if source == "modelscope":
        return f"https://modelscope.cn/models/{entry.modelscope}"
    parts = urllib.parse.urlsplit(constants.ENDPOINT)
    host = parts.netloc.rsplit("@", 1)[-1]
    folder = "datasets/" if entry.kind == "dataset" else ""
    return f"{parts.scheme}://{host}{parts.path}/{folder}{entry.repo}"


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, also where huggingface_hub wrapped it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        if isinstance(error, urllib.error.HTTPError):
            return error.code
        error = error.__cause__
    return None


def explain(entry: Entry, error: Exception) -> str:
    """One sentence or two that say what went wrong and what to do."""
    address = page(entry, "hf")
    status = status_of(error)
    if status in (401, 403):
        asked_with = entry.on_hub and get_token()
        sent = "the token that was sent does not open it" if asked_with else "no token was sent"
        refused = f"{entry.name}: access refused (HTTP {status}; {sent})."
        if not entry.gated and not isinstance(error, GatedRepoError):
            return f"{refused} {address} is not public, or it was renamed or withdrawn."
        return (
            f"{refused} Its licence has to be accepted once: open {address}, log in and accept; "
            "then make a token that may read it in the settings of your account, and run this "
            "again with HF_TOKEN set to it."
        )
    if status == 404:
        return f"{entry.name}: {address} was not found (HTTP 404); it was renamed or withdrawn."
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return f"{entry.name}: HF_HUB_OFFLINE is set: the hub is not asked; unset it to download."
    return f"{entry.name}: {first_line(error)} ({CONTINUES})"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def make_plan(entry: Entry, source: str, include: Sequence[str]) -> Plan:
    """Lists what would be fetched; a hub that does not answer is told in `trouble`, not raised."""
    if not entry.on_hub:
        names = select([file.name for file in entry.files], entry.allow, (), include)
        return Plan(entry, tuple(file for file in entry.files if file.name in names))
    if source == "modelscope":
        return Plan(entry, trouble="ModelScope is not asked beforehand")
    api = HfApi()
    try:
        if entry.kind == "model":
            info = api.model_info(entry.repo, files_metadata=True, timeout=20)
        else:
            info = api.dataset_info(entry.repo, files_metadata=True, timeout=20)
    # What the network raises depends on the HTTP library beneath huggingface_hub, which changes
    # between its versions; whatever it is, the user wants one sentence.
    except Exception as error:
        return Plan(entry, trouble=explain(entry, error))
    listed: dict[str, File] = {}
    for sibling in info.siblings or []:
        checksum = None
        if sibling.lfs is not None:
            checksum = f"sha256:{sibling.lfs.sha256}"
        elif sibling.blob_id is not None:
            checksum = f"git:{sibling.blob_id}"
        listed[sibling.rfilename] = File(sibling.rfilename, sibling.size, checksum)
    names = select(list(listed), entry.allow, entry.ignore, include)
    trouble = None if names else f"{entry.name}: no file of {page(entry, source)} matches"
    return Plan(entry, tuple(listed[name] for name in names), info.sha, trouble)


def describe(plan: Plan, source: str) -> str:
    """The lines that a user reads before anything is fetched."""
    entry = plan.entry
    if plan.size is not None:
        size = f"{human(plan.size)} in {len(plan.files)} files"
    elif plan.files:
        size = f"unknown, {len(plan.files)} files"
    elif entry.size is not None:
        size = f"about {human(entry.size)}"
    else:
        size = "unknown"
    if plan.trouble:
        size += f" ({plan.trouble})"
    gated = " (gated: accept it on the page, then set HF_TOKEN)" if entry.gated else ""
    rows = {
        "what": entry.what,
        "from": page(entry, source),
        "to": entry.folder,
        "licence": entry.licence + (gated if source == "hf" else ""),
        "size": size,
    }
    return "\n".join([entry.name, *(f"  {key:<8} {value}" for key, value in rows.items())])


def table() -> str:
    """All entries, without asking anyone."""
    lines = ["Models and data sets (choose by name; sizes marked ? are asked from the hub):", ""]
    for entry in ENTRIES:
        size = "?" if entry.size is None else human(entry.size)
        lines.append(f"  {entry.name:<25} {size:>9}  {entry.what}")
        lines.append(f"  {'':<25} {'':>9}  licence: {entry.licence}")
    return "\n".join(lines)


def check_space(plan: Plan, target: Path) -> None:
    """Refuses a download that the disk cannot hold; what is there already is not counted again."""
    missing = 0
    for file in plan.files:
        for path in (target / file.name, partial(target / file.name)):
            if path.is_file():
                missing -= path.stat().st_size
        missing += file.size or 0
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise DownloadError(
            f"{plan.entry.name}: {human(missing)} are needed, {human(free)} are free at {existing}."
        )


def address_of(plan: Plan, file: File) -> str:
    """Where a file is fetched from."""
    entry = plan.entry
    if entry.kind == "github":
        base = os.environ.get("DOJO_GITHUB_RAW", GITHUB_RAW).rstrip("/")
        return f"{base}/{entry.repo}/main/{urllib.parse.quote(file.name)}"
    if entry.kind == "web":
        return f"https://{entry.repo}/{urllib.parse.quote(file.name)}"
    # The listed commit rather than "main", which may move while a long download is interrupted.
    return hf_hub_url(entry.repo, file.name, repo_type=entry.kind, revision=plan.revision)


def fetch(plan: Plan, target: Path) -> None:
    """All files of a plan into an ordinary folder."""
    entry = plan.entry
    if not plan.files:
        raise DownloadError(plan.trouble or f"{entry.name}: nothing to fetch.")
    check_space(plan, target)
    # The token is the hub's: nobody else sees it.
    token = get_token() if entry.on_hub else None
    for file in plan.files:
        path = target / file.name
        if not path.resolve().is_relative_to(target.resolve()):
            raise DownloadError(f"{entry.name}: the file name {file.name!r} leaves its folder.")
        try:
            fetch_file(address_of(plan, file), path, file, token)
        except urllib.error.HTTPError as error:
            raise DownloadError(explain(entry, error)) from error


def fetch_modelscope(entry: Entry, target: Path, include: Sequence[str]) -> None:
    """From ModelScope, through its own package."""
    try:
        module = importlib.import_module("modelscope.hub.snapshot_download")
    except ImportError as error:
        raise DownloadError(
            "--source modelscope needs the package modelscope: pip install modelscope"
        ) from error
    try:
        module.snapshot_download(
            entry.modelscope,
            local_dir=str(target),
            allow_patterns=list(include or entry.allow),
            ignore_patterns=[*entry.ignore, *entry.modelscope_ignore],
        )
    except Exception as error:
        raise DownloadError(f"{entry.name}: ModelScope: {first_line(error)}") from error


def partial(path: Path) -> Path:
    """Where a file grows until it is whole."""
    return path.with_name(path.name + ".part")


def is_right(path: Path, checksum: str | None) -> bool:
    """Whether a file's content is what its home says it is."""
    if checksum is None:
        return True
    kind, expected = checksum.split(":")
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest().startswith(expected)


def is_there(path: Path, file: File) -> bool:
    """Whether a whole copy is in place, so that there is nothing to do.

    A large file has its name only because its checksum was right once; it is not read again.
    """
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return path.stat().st_size > TRUSTED_SIZE or is_right(path, file.checksum)


def fetch_file(
    url: str,
    target: Path,
    file: File,
    token: str | None = None,
    attempts: int = 5,
    pause: float = 1.0,
) -> None:
    """One file over HTTP, resumed by Range from its partial file, accepted by its checksum.

    Gives up after `attempts` connections in a row that brought nothing, with pauses (seconds)
    between them that grow. An address that is refused is raised at once.
    """
    if is_there(target, file):
        print(f"{target} is there already.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = partial(target)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        total, trouble = file.size, "the connection ended early"
        if total is None or before < total:
            try:
                total = stream(url, part, before, file, token)
            except urllib.error.HTTPError as error:
                # A wrong or closed address does not become right by asking again.
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise
                trouble = f"HTTP {error.code}"
            except OSError as error:
                trouble = str(error)
        after = part.stat().st_size if part.exists() else 0
        if total is not None and after == total and is_right(part, file.checksum):
            keep_aside(target)
            part.replace(target)
            return
        if (total is not None and after >= total) or trouble == "HTTP 416":
            part.unlink(missing_ok=True)
            trouble = "the content is not what was announced; it changed or was damaged on its way"
            failures += 1
        elif after > before:
            failures = 0
        else:
            failures += 1
        if failures >= attempts:
            raise DownloadError(f"{url}: {trouble} ({CONTINUES})")
        time.sleep(pause * failures)


def keep_aside(path: Path) -> None:
    """Gives another name to what is in a download's place: changed here, or of an earlier date."""
    if path.is_file():
        kept = path.with_name(f"{path.stem}.kept{path.suffix}")
        path.replace(kept)
        print(f"{path} was another file: it is {kept.name} now")


def stream(url: str, part: Path, done: int, file: File, token: str | None) -> int | None:
    """Appends to `part` what the server sends after byte `done`; returns the whole file's size."""
    request = urllib.request.Request(
        url, headers={"User-Agent": "sd-dojo", "Accept-Encoding": "identity"}
    )
    if token:
        # "Unredirected": hubs send on to storage of other hosts, which have no business with it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=30) as response:
        # 200 instead of 206: the server ignored the range and sends everything.
        start = done if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = file.size if length is None else start + int(length)
        with (
            part.open("ab" if start else "wb") as output,
            Bar(total=total, initial=start, unit="B", unit_scale=True, desc=file.name) as progress,
        ):
            while chunk := response.read(1 << 20):
                output.write(chunk)
                progress.update(len(chunk))
    # A stream without a length has no other sign of its end than its end.
    return part.stat().st_size if total is None else total


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description="Fetches models into models/ and data sets into datas/.",
        epilog=table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what to fetch; none: what there is"
    )
    parser.add_argument("--source", choices=("hf", "modelscope"), default="hf", help="which hub")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only files whose name matches, for example 'data/validation_unique*'; repeatable",
    )
    parser.add_argument(
        "--root", type=Path, default=Path(), help="folder that holds models/ and datas/"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in BY_NAME]
    if unknown:
        known = ", ".join(BY_NAME)
        parser.error(f"unknown name: {', '.join(unknown)}. Known: {known}")
    if args.source == "modelscope":
        elsewhere = [
            name for name in args.names if BY_NAME[name].on_hub and BY_NAME[name].modelscope is None
        ]
        if elsewhere:
            parser.error(
                f"no place on ModelScope is known for: {', '.join(elsewhere)}; use --source hf"
            )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when something could not be fetched."""
    args = parse(argv)
    if not args.names:
        print(table())
        return 0
    plans = [
        make_plan(BY_NAME[name], args.source, args.include) for name in dict.fromkeys(args.names)
    ]
    for plan in plans:
        print(describe(plan, args.source) + "\n", flush=True)
    if args.dry_run:
        return 0
    for plan in plans:
        entry = plan.entry
        target = args.root / entry.folder
        try:
            if args.source == "modelscope" and entry.on_hub:
                fetch_modelscope(entry, target, args.include)
            else:
                fetch(plan, target)
        except KeyboardInterrupt:
            print(f"\ndownload: stopped; {CONTINUES}.", file=sys.stderr)
            return 130
        except DownloadError as error:
            text = str(error)
            token = get_token()
            print("download: " + (text.replace(token, "***") if token else text), file=sys.stderr)
            return 1
        print(f"{entry.name} is in {target}.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
