"""The command line: `seqpar COMMAND ...`. Each command is the `main(argv)` of a module here."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from seqpar.launch import terminal

COMMANDS = {
    "train": "train a model, alone or on all ranks of torchrun",
    "prepare": "turn texts into a corpus of token ids",
    "eval": "see whether a trained model uses its context, and let it write",
    "plan": "say whether a run fits and how long it takes, without a GPU",
    "doctor": "look whether this machine is ready to train",
}

EXAMPLES = """examples:
  seqpar prepare my_texts/ --output runs/data/mine --held-out 0.02
  seqpar train launch/configs/demo.yaml data.path=runs/data/mine log.folder=runs/mine
  torchrun --nproc-per-node 2 -m seqpar.launch.train launch/configs/demo.yaml
  seqpar completion bash >> ~/.bashrc     (zsh and tcsh likewise)
  seqpar COMMAND --help
"""


def parser() -> argparse.ArgumentParser:
    """The commands, for help and completion; each parses its own words."""
    description = "Trains language models on sequences of millions of tokens."
    top = terminal.command_parser("seqpar", description, EXAMPLES)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, does in COMMANDS.items():
        commands.add_parser(name, help=does).add_argument("words", nargs="*")
    shells = commands.add_parser("completion", help="print a script that completes words")
    shells.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if not name.startswith("-") and name not in (*COMMANDS, "completion"):
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        sys.exit(f"error: {name} is not a command; {hint}commands: {', '.join(COMMANDS)}")
    try:
        if name in COMMANDS:
            terminal.plain_messages()
            import_module(f"seqpar.launch.{name}").main(words[1:])
        else:
            print(_completion(parser().parse_args([name, *words[1:]]).shell))
    except ModuleNotFoundError as error:
        if (error.name or "seqpar").startswith("seqpar"):
            raise
        sys.exit(f"error: {error.name} is not installed: pip install 'seqpar[train]'")


def _completion(shell: str) -> str:
    """A script for `shell` that completes commands, files and settings."""
    import shtab

    from seqpar.launch.config import all_keys

    settings = " ".join(f"{key}=" for key in all_keys() if "." in key)
    files_or_settings = {
        "bash": f'_seqpar_words() {{ compgen -W "{settings}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_seqpar_words() {{ compadd -S '' -- {settings}; _files }}",
    }
    top = parser()
    [commands] = (each for each in top._actions if isinstance(each, argparse._SubParsersAction))
    for name in COMMANDS:
        words: Any = commands.choices[name]._get_positional_actions()[0]
        words.complete = dict.fromkeys(files_or_settings, "_seqpar_words")
    script: str = shtab.complete(top, shell, preamble=files_or_settings)
    return script


if __name__ == "__main__":
    main()
