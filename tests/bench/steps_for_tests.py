"""Steps that end in every way that a step can end."""

import subprocess
import sys
import time

from dojo.bench.report import Place, Report, Skip
from dojo.cli import UserError


def holds(report: Report, place: Place) -> None:
    report.claim("one is one", 1, True)
    report.below("an error is small", 0.5, 1.0)
    report.note("answer", 42)
    report.row("A table", {"px": "64", "images/s": "10.0", "command": "`python`"})


def does_not_hold(report: Report, place: Place) -> None:
    report.below("an error is small", float("nan"), 1.0)


def dies(report: Report, place: Place) -> None:
    report.claim("this was found before", 1, True)
    raise ZeroDivisionError("of all things")


def refuses(report: Report, place: Place) -> None:
    raise UserError("--model: there is none")


def is_skipped(report: Report, place: Place) -> None:
    raise Skip("the weather is bad")


def never_ends(report: Report, place: Place) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.note("child", child.pid)
    time.sleep(600)
