"""A command line becomes dataclasses: the benchmark's own, those of the trainer it chooses, those of the model."""

import difflib
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from blur_trainer.checks import check_fields
from blur_trainer.recipes import recipe

Parsed = tuple[Any, Any, ModelConfig, bool]  # script, trainer, model; whether models are tiny
COUNTS = dict.fromkeys(("max_documents", "max_rows", "limit"), "[1, inf)")  # of the scripts' own arguments
OLD_NAMES = ("`torch.distributed", "`is_gradient_checkpointing`")  # DeepSpeed and PEFT call them, at every step


class Parser(TrlParser):
    """Raises `ValueError` where argparse would print the usage of all options and end the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}.")


def parse(
    script_class: Any,
    config_class: Callable[[Any], Any],
    defaults: Callable[[Any, bool], dict[str, Any]],
    recipe_of: Callable[[Any, ModelConfig], tuple[str, str] | None],
    arguments: Sequence[str] | None = None,
) -> Parsed:
    """
    The command line. Its defaults are a recipe's, where one is named; else those of tiny or of real models.

    Args:
        script_class: the benchmark's own arguments, a dataclass.
        config_class: the trainer's, which may depend on the benchmark's.
        defaults: those of the trainer, told the benchmark's arguments and whether models are tiny.
        recipe_of: benchmark and name of the recipe, told the benchmark's and the model's arguments; `None` for none.
        arguments: the words; `None` for those of this process.

    Raises:
        ValueError, TypeError: there is no such option, a setting is out of its range, or a recipe does not fit. No
            model was made until then.

    Returns:
        The three dataclasses, and whether models are tiny: no model was named.
    """
    for message in OLD_NAMES:
        warnings.filterwarnings("ignore", message, FutureWarning)
    words = checked_words(arguments)
    both: Any = (script_class, ModelConfig)
    first = Parser(both, add_help=False)  # what the rest depends on
    first.set_defaults(dtype=None)  # TRL's is float32; the trainer chooses by device and by what is trained
    script, model_args, _ = first.parse_args_and_config(words, return_remaining_strings=True)
    named, given = recipe_of(script, model_args), {}
    if named is not None:
        found = recipe(*named)
        given = {key: found[key] for key in ("model_name_or_path", "method") if key in found}
        first.set_defaults(**given)
        script, model_args, _ = first.parse_args_and_config(words, return_remaining_strings=True)
        if "method" in found and script.method != found["method"]:
            raise ValueError(f"--recipe {named[1]} is of --method {found['method']}: leave --method out.")
        given |= found["arguments"] | found["script"]
    tiny = model_args.model_name_or_path is None
    all_three: Any = (script_class, config_class(script), ModelConfig)
    parser = Parser(all_three)
    parser.set_defaults(**{"dtype": None} | defaults(script, tiny) | given)
    script, args, model_args, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    check_rest(rest, all_three)
    check_fields(script, COUNTS)
    return script, args, model_args, tiny


def checked_words(arguments: Sequence[str] | None) -> list[str]:
    """The words, `--config FILE` in two. Raises `ValueError` for a file that holds no options."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words:
        read_config(words[words.index("--config") + 1 :])
    return words


def read_config(after: Sequence[str]) -> dict[str, Any]:
    """The options of a YAML file, the first of the words after `--config`. Raises as [`checked_words`]."""
    if not after or "--config" in after:
        raise ValueError("`--config` takes one YAML file, once.")
    return read_options(after[0], "method: npo")


def read_options(path: str | Path, example: str) -> dict[str, Any]:
    """The lines of a YAML file. Raises `ValueError` if it holds none; `example` is of such a line."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`--config {path}` cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`--config {path}` is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"`--config {path}` holds no options: write lines such as `{example}`.")
    return {str(name): value for name, value in found.items()}


def with_config_as_words(words: Sequence[str]) -> list[str]:
    """The words, in front of them the options of `--config FILE` as words. Raises as [`checked_words`]."""
    if "--config" not in words:
        return list(words)
    place = words.index("--config")
    stored: list[str] = []
    for name, value in read_config(words[place + 1 :]).items():
        if value is None:
            raise ValueError(f"`{name}` has no value in {words[place + 1]}: leave the line out.")
        many = value if isinstance(value, list) else [value]
        stored += [f"--{name}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in many)]
    return [*stored, *words[:place], *words[place + 2 :]]


def check_rest(rest: Sequence[str], classes: Sequence[Any]) -> None:
    """Raises `ValueError`, with the nearest option, for words that belong to none of these dataclasses."""
    if not rest:
        return
    option = rest[0].partition("=")[0]
    if not option.startswith("--"):
        raise ValueError(f"{option!r} belongs to no option.")
    near = difflib.get_close_matches(option, [f"--{each.name}" for of in classes for each in fields(of)], n=1)
    hint = f"Did you mean {near[0]}?" if near else "--help names the options."
    raise ValueError(f"{option} is no option. {hint}")
