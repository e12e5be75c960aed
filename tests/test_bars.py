"""Claims about bars: drawn on a terminal, lines in a log."""

import io
import sys

import diffusers
import pytest
import transformers
from tqdm import tqdm

from dojo import bars
from dojo.bars import Bar


class Clock:
    """Time as the test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(bars, "clock", lambda: self.now)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_gets_lines_and_no_carriage_returns(clock: Clock) -> None:
    log = io.StringIO()
    with Bar(desc="steps", total=6, file=log, mininterval=0, miniters=1) as bar:
        for _ in range(6):
            clock.now += bars.SECONDS / 2
            bar.update(1)
            bar.set_postfix(loss="0.5")
    *lines, last, end = log.getvalue().split("\n")
    assert [line.split(" [")[0] for line in lines] == ["steps: 2/6", "steps: 4/6", "steps: 6/6"]
    assert last.startswith("steps: 6/6 [")
    assert "loss=0.5" in last
    assert end == ""
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()


def test_a_short_bar_that_does_not_stay_leaves_nothing_in_a_log(clock: Clock) -> None:
    log = io.StringIO()
    assert list(Bar(range(3), "validation", 3, leave=False, file=log)) == [0, 1, 2]
    assert log.getvalue() == ""


def test_a_long_bar_that_does_not_stay_leaves_its_lines(clock: Clock) -> None:
    log = io.StringIO()
    for _ in Bar(range(4), "validation", 4, leave=False, file=log, mininterval=0, miniters=1):
        clock.now += bars.SECONDS
    assert log.getvalue().count("\n") == log.getvalue().count("validation: ") == 4


def test_a_message_draws_no_line_of_a_bar_in_a_log(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar(desc="steps", total=2, leave=False) as bar:
        bar.update(1)
        Bar.write("a message")
    printed = capsys.readouterr()
    assert printed.out == "a message\n"
    assert printed.err == ""


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    screen = Terminal()
    with Bar(desc="steps", total=2, file=screen, left=lambda: 90.0) as bar:
        bar.update(2)
    assert screen.getvalue().count("\r") >= 2
    assert "100%|" in screen.getvalue()
    assert "<01:30," in screen.getvalue()


@pytest.mark.parametrize(("left", "shown"), [(3661.0, "<1:01:01,"), (None, "<?,")])
def test_the_time_left_is_what_the_owner_says(clock: Clock, left: float | None, shown: str) -> None:
    log = io.StringIO()
    Bar(desc="steps", total=2, file=log, left=lambda: left).close()
    assert shown in log.getvalue()


def test_a_bar_without_a_total_or_a_title_is_a_line_too(clock: Clock) -> None:
    log = io.StringIO()
    Bar(file=log).close()
    assert log.getvalue().startswith("0/? [")


def test_a_disabled_bar_writes_nothing() -> None:
    log = io.StringIO()
    with Bar(total=2, file=log, disable=True) as bar:
        bar.update(1)
        bar.refresh()
        bar.clear()
    assert log.getvalue() == ""
    assert isinstance(bar, tqdm)


@pytest.mark.parametrize(("stream", "drawn"), [(Terminal(), True), (io.StringIO(), False)])
def test_bars_of_the_libraries_are_drawn_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, drawn: bool
) -> None:
    libraries = (transformers, diffusers)
    before = [library.utils.logging.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.utils.logging.enable_progress_bar()
        monkeypatch.setattr(sys, "stderr", stream)
        bars.leave_out_others_in_logs()
        for library in libraries:
            assert library.utils.logging.is_progress_bar_enabled() == drawn
    finally:
        for library, shown in zip(libraries, before, strict=True):
            if not shown:
                library.utils.logging.disable_progress_bar()
