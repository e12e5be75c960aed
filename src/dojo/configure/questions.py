"""Questions in the terminal, on a pipe or answered by a file; an answer is checked at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.prompt import Prompt

from dojo.cli import UserError

Answers = Mapping[str, str]
"""What was answered so far, by the names of the questions."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question."""

    name: str
    text: str
    choices: Callable[[Answers], Sequence[str]] = lambda answers: ()
    """what may be answered; nothing where any text may be"""
    default: Callable[[Answers], str] | None = None
    """what an empty answer means; without it an answer is needed"""
    check: Callable[[str, Answers], Sequence[str]] = lambda text, answers: ()
    """raises UserError with what is wrong; returns remarks to be shown"""
    when: Callable[[Answers], bool] = lambda answers: True
    """whether it is asked at all"""

    def take(self, text: str, answers: Answers) -> str:
        """An answer as it counts.

        Raises:
            UserError: it cannot be taken.
        """
        text = text.strip()
        if not text and self.default is not None:
            text = self.default(answers)
        elif not text:
            raise UserError("an answer is needed")
        choices = self.choices(answers)
        if choices and text not in choices:
            raise UserError(f"{text!r} is none of {', '.join(choices)}")
        return text


@dataclass
class Asking:
    """Puts questions: to a file of answers, or to the terminal and what is piped into it."""

    given: Mapping[str, Any] | None = None
    """answers by name; None asks the user"""
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    def all(self, questions: Sequence[Question]) -> dict[str, str]:
        """The answers to all questions that apply, each checked.

        Raises:
            UserError: an answer that cannot be asked for again is wrong, or there is one too many.
        """
        answers: dict[str, str] = {}
        for one in questions:
            if one.when(answers):
                answers[one.name] = self._ask(one, answers)
        spare = [name for name in self.given or () if name not in answers]
        if spare:
            known = ", ".join(answers)
            raise UserError(f"answers: {spare[0]} is not asked here (asked are {known})")
        return answers

    def _ask(self, one: Question, answers: Answers) -> str:
        while True:
            text = self._text(one, answers)
            try:
                taken = one.take(text, answers)
                remarks = one.check(taken, answers)
            except UserError as error:
                if self.given is not None or not sys.stdin.isatty():
                    raise UserError(f"{one.name}: {error}") from error
                self.console.print(f"  {error}", style="red", markup=False)
                continue
            for remark in remarks:
                self.console.print(f"  {remark}", markup=False)
            return taken

    def _text(self, one: Question, answers: Answers) -> str:
        if self.given is not None:
            value = self.given.get(one.name, "")
            return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        choices = one.choices(answers)
        shown = f" ({', '.join(choices)})" if choices else ""
        default = one.default(answers) if one.default is not None else None
        usual = f" [{default}]" if default else ""
        try:
            return Prompt.ask(
                f"{one.text}{shown}{usual}", console=self.console, default="", show_default=False
            )
        except EOFError as error:
            raise UserError(f"the answers end before {one.name}: nothing was written") from error
