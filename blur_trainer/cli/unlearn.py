"""`blur-trainer unlearn`: your own data, one command, a forgotten model, a verdict."""

import sys
from collections.abc import Sequence

from blur_trainer.cli.options import given_options, help_text
from blur_trainer.pipeline.arguments import UnlearnArguments, classes_of
from blur_trainer.pipeline.methods import DEFAULT, METHODS
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.unlearn import run

_USAGE = (
    "blur-trainer unlearn --model_name_or_path MODEL --forget FILE --retain FILE [--output_dir OUT] [--config YAML]"
)
_MORE = (
    "All settings of the reading, the training and the model: --help-all. They follow from model and data if left out."
)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 if the verdict is not the one of `--require`, 2 for wrong options, 130 after Ctrl-C."""
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([UnlearnArguments], "unlearn", _USAGE, _MORE))
        return 0
    method = _method(arguments)
    if "--help-all" in arguments:
        sys.stdout.write(help_text(classes_of(method), "unlearn", _USAGE, ""))
        return 0
    options = given_options(classes_of(method), arguments, "unlearn")
    try:
        prepared = prepare({"output_dir": "unlearned"} | options)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"blur-trainer unlearn: {error}\n")
        return 2
    done = run(prepared)
    sys.stdout.write(f"{done}\n")
    wanted = prepared.script.require
    return 0 if wanted in (None, done.verdict.word) else 1


def _method(arguments: Sequence[str]) -> str:
    """The method decides which options there are."""
    found = given_options([UnlearnArguments], [], "unlearn")
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--method":
            found["method"] = value or after
    method = found.get("method", DEFAULT)
    return method if method in METHODS else DEFAULT
