"""Words of a command line and lines of a YAML file become options: a dict of what was given, and nothing else."""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from blur_trainer.pipeline.run_file import read_run
from blur_trainer.scripts.command_line import Parser

WIDTH = 100


def settings_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without `--config FILE`, and the options of that file. Raises `ValueError` if it cannot be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?")
    found, rest = parser.parse_known_args(list(arguments))
    chosen = found.config or []
    if len(chosen) > 1 or None in chosen:
        raise ValueError("`--config` takes one YAML file, once.")
    return rest, read_run(chosen[0]) if chosen else {}


def named(option: str, words: Sequence[str], stored: Mapping[str, Any], default: Any) -> Any:
    """The value of one option, before it is known which others there are: of the words, else of the file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{option}", nargs="?")
    return getattr(parser.parse_known_args(list(words))[0], option) or stored.get(option, default)


def given_options(
    classes: Sequence[Any], words: Sequence[str], stored: Mapping[str, Any], check_name: Callable[[str], None]
) -> dict[str, Any]:
    """
    What the words set, above what the file sets. Texts in the file are read as words are: YAML takes 1e-5 for a text.

    Raises:
        `ValueError`, `TypeError`: a value is wrong, or there is no such option; `check_name` says which is nearest.
    """
    names = [each.name for of in classes for each in fields(of) if each.init]
    left_out = object()

    def parsed(some: Sequence[str]) -> dict[str, Any]:
        parser = Parser(list(classes), add_help=False, allow_abbrev=False)
        found, rest = parser.parse_known_args(list(some), argparse.Namespace(**dict.fromkeys(names, left_out)))
        for word in rest:
            if word.startswith("--"):
                check_name(word[2:].split("=")[0].replace("-", "_"))
            raise ValueError(f"{word!r} belongs to no option.")
        return {name: value for name, value in vars(found).items() if value is not left_out}

    texts = [f"--{name}={value}" for name, value in stored.items() if isinstance(value, str) and name in names]
    return {**stored, **parsed(texts), **parsed(words)}


def options_of(classes: Sequence[Any], arguments: Sequence[str], command: str) -> dict[str, Any]:
    """[`given_options`] of a command whose options do not depend on others."""
    known = [each.name for of in classes for each in fields(of) if each.init]

    def check_name(name: str) -> None:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"`blur-trainer {command} --help-all` lists all."
            raise TypeError(f"`{name}` is no option of {command}. {hint}")

    words, stored = settings_file(arguments)
    for name in stored:
        check_name(name)
    return given_options(classes, words, stored, check_name)


def help_text(classes: Sequence[Any], command: str, usage: str, end: str) -> str:
    """One line per option."""
    parser = HfArgumentParser(
        list(classes), prog=f"blur-trainer {command}", usage=usage, epilog=end, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=WIDTH),
    )  # fmt: skip
    return parser.format_help()
