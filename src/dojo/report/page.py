"""The sections of the report and what they are read from; every text of a run is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape, unescape
from pathlib import Path
from typing import Any

from dojo import files
from dojo.cli import UserError
from dojo.cli.masking import hide, is_secret
from dojo.files import outputs
from dojo.files.pictures import contact_sheet, read
from dojo.files.records import read_if_whole, read_pictures, read_rows
from dojo.report.curves import charts
from dojo.report.html import file_size, picture, table
from dojo.report.style import PAGE, STYLE

Row = Mapping[str, Any]


def write(folder: Path) -> Path:
    """Writes `report.html` into the output folder of a run and returns its path.

    Raises:
        UserError: the folder holds no run (neither args.json nor metrics.jsonl), or another
            report.html.
    """
    if not any((folder / name).is_file() for name in ("args.json", "metrics.jsonl")):
        raise UserError(f"{folder} holds no run: there is neither args.json nor metrics.jsonl")
    path = outputs.own(folder / "report.html")
    files.check_output(path, "report.html", is_ours=lambda text: STYLE[:200] in text)
    record = read_if_whole(folder / "args.json")
    rows, _ = read_rows(folder / "metrics.jsonl")
    card = _read_text(folder / "README.md")
    heading = re.search(r"^# (.+)$", card, re.M)
    title = (
        re.sub(r"\\(\W)", r"\1", unescape(heading[1]))
        if heading
        else f"Run {_name(record) or folder.resolve().name}"
    )
    sections = {
        "Curves": charts(rows),
        "Pictures": _pictures(folder),
        "Data": _data(read_if_whole(folder / "data_report.json")),
        "How to load the result": _code(card),
        "Where the time went": _time(rows),
        "Files": _files(folder),
        "Options": _options(record.get("args", {})),
    }
    body = "\n".join(
        f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text
    )
    last = max((row["step"] for row in rows), default=0)
    head = _head(facts(folder, record, last))
    page = PAGE.format(title=escape(title), style=STYLE, facts=head, body=body)
    path.write_text(page, encoding="utf-8")
    return path


def _name(record: Row) -> str | None:
    """What `--run_name` called the run."""
    run = record.get("args", {}).get("run")
    name = run.get("run_name") if isinstance(run, Mapping) else None
    return str(name) if name else None


def facts(folder: Path, record: Row, last: float) -> dict[str, Any]:
    """What was run, by names in plain words: the head of a page.

    Args:
        record: the run's args.json.
        last: its last step.
    """
    options = {
        name: value
        for group in record.get("args", {}).values()
        if isinstance(group, Mapping)
        for name, value in group.items()
    }
    data = ("dataset_name", "train_data_dir", "instance_data_dir", "data_config")
    began = folder / "args.json"
    # The model card comes with the result, at the end of a run.
    over = any((folder / name).is_file() for name in ("finished.json", "README.md"))
    versions = record.get("versions", {})
    found = {
        "script": record.get("script"),
        "name": _name(record),
        "folder": folder.resolve().name,
        "base model": options.get("pretrained_model_name_or_path"),
        "data": next((options[name] for name in data if options.get(name)), None),
        "steps": last if over else f"{last} so far",
        "started": record.get("started") or (_date(began) if began.is_file() else None),
        "device": record.get("device"),
        "processes": record.get("num_processes"),
        "precision": record.get("mixed_precision"),
        "seed": record.get("seed"),
        "code": record.get("git_revision"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _head(found: Row) -> str:
    parts = []
    for name, value in found.items():
        wide = ' class="wide"' if name == "versions" else ""
        parts.append(f"<div{wide}><dt>{name}</dt><dd>{escape(str(value))}</dd></div>")
    return "".join(parts)


def _date(path: Path) -> str:
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _pictures(folder: Path) -> str:
    """The contact sheets and their prompts, then two other pictures at most (before and after)."""
    parts = []
    sheet_file = folder / "contact_sheet.png"
    # A run that is not over yet has none.
    sheet = read(sheet_file) or contact_sheet(folder / "validation")
    if sheet is not None:
        parts.append(picture("Validation pictures by step", sheet))
    for other in sorted(folder.glob("validation-*")):
        if (sheet := contact_sheet(other)) is not None:
            way = _words(other.name.partition("-")[2])
            parts.append(picture(f"Validation pictures by step, {way}", sheet))
    drawn = read_pictures(folder / "validation")
    columns = ("label", "prompt", "negative", "guidance_scale", "num_inference_steps")
    cells = [[str(row.get(name, "")) for name in columns] for row in drawn]
    if cells:
        rows = table([_words(name) for name in columns], cells)
        parts.append(f"<details><summary>prompts</summary>{rows}</details>")
    others = [path for path in sorted(folder.glob("*.png")) if path != sheet_file]
    for path in others[:2]:
        if (image := read(path)) is not None:
            parts.append(picture(_words(path.stem).capitalize(), image))
    return "".join(parts)


def _data(report: Row) -> str:
    """data_report.json: its single values, then its lists of rows (buckets, what was left out)."""
    single = {name: value for name, value in report.items() if not isinstance(value, list | dict)}
    parts = [table(["", ""], [[_words(name), shown(value)] for name, value in single.items()])]
    for name, value in report.items():
        if isinstance(value, Mapping):
            value = [{"name": key, "value": item} for key, item in value.items()]
        if isinstance(value, list) and value:
            rows = [row if isinstance(row, Mapping) else {"value": row} for row in value]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[row.get(key, "") for key in columns] for row in rows]
            parts.append(f"<h3>{escape(_words(name))} ({len(rows)})</h3>")
            parts.append(table([_words(key) for key in columns], cells))
    return "".join(parts)


def _code(card: str) -> str:
    """The first block of Python in the model card."""
    block = re.search(r"^(```+)python\n(.*?)^\1$", card, re.M | re.S)
    return f"<pre><code>{escape(block[2])}</code></pre>" if block else ""


def _time(rows: Sequence[Row]) -> str:
    """Seconds per phase over the whole run."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("seconds_"):
                totals[key[8:]] = totals.get(key[8:], 0.0) + value
    whole = sum(totals.values())
    cells = [
        [_words(name), f"{value:,.1f} s", f"{value / whole:.0%}"]
        for name, value in sorted(totals.items(), key=lambda item: -item[1])
        if value > 0
    ]
    return table(["phase", "time", "share"], cells)


def _files(folder: Path) -> str:
    """The folder's entries with their sizes; links count as such."""
    cells = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "report.html":
            continue
        folder_of_files = path.is_dir() and not path.is_symlink()
        inside = [p for p in path.rglob("*") if p.is_file()] if folder_of_files else [path]
        size = sum(file.lstat().st_size for file in inside)
        cells.append([path.name + ("/" if folder_of_files else ""), file_size(size)])
    return table(["name", "size"], cells)


def _options(groups: Row) -> str:
    """The resolved options, a table per group."""
    parts = []
    for group, values in groups.items():
        if isinstance(values, Mapping):
            cells = [[name, shown(value)] for name, value in values.items() if not is_secret(name)]
            parts.append(f"<div><h3>{escape(group)}</h3>{table(['', ''], cells)}</div>")
    tables = "".join(parts)
    return (
        f'<details><summary>show all</summary><div class="options">{tables}</div></details>'
        if parts
        else ""
    )


def shown(value: Any) -> str:
    """An option's value as a text, without what is secret in its addresses."""
    if value is None:
        return "unset"
    return hide(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _words(name: str) -> str:
    return name.replace("_", " ")


# -- reading ----------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
