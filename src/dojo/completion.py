"""Prints what completes the flags of all scripts in a shell.

    source <(python -m dojo.completion bash)      in ~/.bashrc, or for one terminal
    source <(python -m dojo.completion zsh)

A training script or demo.py is found wherever it stands on the line: behind python, accelerate
launch, torchrun, `python -m dojo.launch`, or as its launcher behind bash.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dojo import cli
from dojo.cli import config, scripts

_SHELLS = ("bash", "zsh")
_COMMANDS = "python python3 accelerate torchrun bash"

# Of the words before the cursor the script's name picks its flags; behind a flag with choices these
# are offered, behind any other flag files.
_FUNCTION = """\
_sd_dojo() {
    local word script="" before="${COMP_WORDS[COMP_CWORD-1]}" now="${COMP_WORDS[COMP_CWORD]}"
    for word in "${COMP_WORDS[@]:1:$((COMP_CWORD - 1))}"; do
        case "${word##*/}" in
            train_*.py | train_*.sh | demo.py | demo.sh) script="${word##*/}" ;;
        esac
    done
    script="${script%.*}"
    COMPREPLY=()
    if [[ -n "$script" && "$now" == -* ]]; then
        case "$script" in
FLAGS
        esac
    elif [[ -n "$script" && "$before" == --* ]]; then
        case "$script $before" in
CHOICES
        esac
    fi
}
complete -o default -F _sd_dojo COMMANDS"""

# zsh's emulation of bash's completion, and its own beneath, where ~/.zshrc has not begun it.
_ZSH = """\
(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""


def text(shell: str) -> str:
    """What a shell has to read.

    Args:
        shell: bash or zsh, which reads bash's by its own emulation.
    """
    found = [(path.stem, list(_options(path))) for path in scripts.every()]
    flags = "\n".join(_case(name, [f"--{flag}" for flag, _ in own]) for name, own in found)
    offered = {
        f'"{name} --{flag}"': choices for name, own in found for flag, choices in own if choices
    }
    choices = "\n".join(_case(what, words) for what, words in offered.items())
    body = _FUNCTION.replace("FLAGS", flags).replace("CHOICES", choices)
    body = body.replace("COMMANDS", _COMMANDS)
    return (_ZSH if shell == "zsh" else "") + body


def _options(script: Path) -> Iterator[tuple[str, list[str]]]:
    """The flags of a script, with what may stand behind them where that is a choice."""
    yield from ((flag.removeprefix("--"), []) for flag in ("--help", config.FLAG))
    for name, hint in cli.options(scripts.load(script).Args):
        yield name, list(_choices(hint))


def _choices(hint: Any) -> Iterator[str]:
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            yield from map(str, get_args(one))


def _case(what: str, words: Sequence[str]) -> str:
    return f'            {what}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$now")) ;;'


def main(argv: Sequence[str]) -> int:
    """The exit code of the command."""
    if list(argv) not in [[shell] for shell in _SHELLS]:
        print(__doc__, file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    print(text(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
