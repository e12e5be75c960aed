"""Asks what a run is to do and writes a file for --config, with the command that starts it.

    python -m dojo.configure                              asks
    python -m dojo.configure --answers answers.yaml       takes the answers from a file
    python -m dojo.configure --from_simpletuner config/config.json

Answers are checked against the model, the data and the machine as they are given. They may come
from a pipe, a line each, an empty one for what is proposed. What is interrupted writes nothing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dojo import cli
from dojo.cli import UserError, config, scripts
from dojo.configure import recipe, simpletuner, wizard
from dojo.configure.questions import Asking
from dojo.finetune import fit


@dataclass(frozen=True, kw_only=True)
class ConfigureArgs:
    """Where the answers come from and the file goes."""

    output: Path = Path("run.yaml")
    """the file that is written; several data folders go into NAME_data.yaml beside it"""
    answers: Path | None = None
    """YAML or JSON file with an answer by the name of each question, instead of asking"""
    from_simpletuner: Path | None = None
    """config.json of SimpleTuner to be translated, with the data backends that it names, instead of
    asking"""
    overwrite: bool = False
    """replace files of these names"""

    def __post_init__(self) -> None:
        if self.output.suffix not in (".yaml", ".yml"):
            raise ValueError(f"--output {self.output} must end in .yaml")
        if self.answers is not None and self.from_simpletuner is not None:
            raise ValueError("--answers and --from_simpletuner both say what is wanted: give one")


def main(args: ConfigureArgs) -> None:
    """Writes the files and prints the command.

    Raises:
        UserError: an answer is wrong, or a file is in the way.
    """
    data_config = args.output.with_name(f"{args.output.stem}_data.yaml")
    for path in (args.output, data_config):
        if path.exists() and not args.overwrite:
            raise UserError(
                f"{path} is there already: --overwrite replaces it, --output NAME.yaml "
                "takes another name"
            )
    card = None
    if args.from_simpletuner is not None:
        name, options, entries = simpletuner.translate(args.from_simpletuner, data_config)
    else:
        answers = Asking(_given(args.answers)).all(wizard.QUESTIONS)
        options, entries = wizard.options_of(answers, data_config)
        name = wizard.script_name(answers)
        card = None if answers["card"] == "none" else float(answers["card"])
    texts = {args.output: _text(name, options, card, entries)}
    if entries:
        texts[data_config] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    print(f"what it would take: python {name} --config {args.output} --dry_run")
    print(f"start and go on:    python {name} --config {args.output}")


def _given(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        read = config.read(path)
    except config.ConfigError as error:
        raise UserError(str(error).replace(config.FLAG, "--answers")) from error
    return {name: "" if value is None else value for name, value in read.content.items()}


def _text(
    name: str,
    options: recipe.Options,
    card: float | None,
    entries: list[dict[str, Any]],
) -> str:
    """The file: options that the script takes, with those that make it fit a card."""
    module = scripts.load(scripts.ROOT / name)
    args = cli.parse(module.Args, None, recipe.to_words(options))
    if card is not None:
        args = _fitting(module, args, card, entries)
    return config.written(name, recipe.chosen(args))


def _fitting(module: Any, args: Any, card: float, entries: list[dict[str, Any]]) -> Any:
    """The options with what `--fit` would change for a card of so many GB.

    Raises:
        UserError: nothing fits.
    """
    planned = args
    with tempfile.TemporaryDirectory() as place:
        if entries:  # which are not written yet
            file = Path(place) / "data.yaml"
            file.write_text(yaml.safe_dump(entries))
            planned = replace(args, data=replace(args.data, data_config=file))
        tried = fit.plan(module.main, planned)
        change = fit.choose(tried, card)
    print("\n".join(fit.told(card, change, tried)))
    return fit.changed(args, change)


if __name__ == "__main__":
    cli.run(main, ConfigureArgs, __doc__)
