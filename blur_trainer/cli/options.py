"""Words of a command line and lines of a YAML file become options: a dict of what was given, and nothing else."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from blur_trainer.pipeline.run_file import read_run


def given_options(classes: Sequence[type], arguments: Sequence[str], command: str) -> dict[str, Any]:
    """
    What the words set, above what `--config FILE` sets. Words that no dataclass has end the program, as argparse does.
    """
    words, chosen = _without_config(list(arguments))
    parser = HfArgumentParser(classes, prog=f"blur-trainer {command}", add_help=False)
    left_out = object()
    names = [each.name for of in classes for each in fields(of) if each.init]
    found = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(names, left_out)))
    set_here = {name: value for name, value in vars(found).items() if value is not left_out}
    return {**(read_run(chosen) if chosen else {}), **set_here}


def _without_config(words: list[str]) -> tuple[list[str], str | None]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(words)
    return rest, found.config


def help_text(classes: Sequence[type], command: str, usage: str, end: str) -> str:
    """One line per option."""
    parser = HfArgumentParser(
        classes, prog=f"blur-trainer {command}", usage=usage, epilog=end, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser.format_help()


class Refused:
    """The exit code of a command: 0, or 2 after a refusal."""

    code = 0


@contextmanager
def refusing(command: str) -> Iterator[Refused]:
    """What is wrong with the user's words or files becomes one line and exit code 2, without a traceback."""
    refused = Refused()
    try:
        yield refused
    except (ValueError, TypeError, OSError) as error:
        refused.code = 2
        sys.stderr.write(f"blur-trainer {command}: {error}\n")
