"""The command `blur-trainer`."""

import importlib
import sys
from collections.abc import Sequence

#: command -> its module in `blur_trainer.cli`, and what it does
COMMANDS = {
    "unlearn": ("unlearn", "make a model forget your own data, measure it, and say whether it did"),
    "evaluate": ("evaluate", "measure any model on your own data; with the model before it also a verdict"),
    "attack": ("attack", "try to bring the answers back: relearning, few bits"),
    "report": ("report", "write the report of a run anew"),
    "merge": ("merge", "make one model of an adapter and its base"),
    "estimate": ("estimate", "say how much memory a training needs"),
    "recipes": ("recipes", "show published settings"),
}
_HEAD = "Make a language model forget.\n\n  blur-trainer COMMAND ...\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 2 for a command or an option that is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listed = "".join(f"\n  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
        sys.stdout.write(f"{_HEAD}{listed}\n\nEach has --help.\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"blur-trainer has no command {words[0]!r}: choose among {', '.join(COMMANDS)}.\n")
        return 2
    module = importlib.import_module(f"blur_trainer.cli.{COMMANDS[words[0]][0]}")
    return module.main(words[1:])
