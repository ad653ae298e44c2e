"""The command `blur-trainer`."""

import sys
from collections.abc import Sequence

from blur_trainer.importing import import_quickly

#: for what -> command, which is also its module in `blur_trainer.cli` -> what it does
GROUPS = {
    "Your own data": {
        "unlearn": "make a model forget your own data, measure it, and say whether it did",
        "evaluate": "measure any model on your own data; with the model before it also a verdict",
        "audit": "a battery of attacks beside a control, and a certificate of what came back",
        "merge": "make one model of an adapter and its base",
        "distill": "write what ULD's composed model says into ordinary weights, and judge them",
    },
    "Benchmarks, with tiny models or real ones": {
        "muse": "unlearn a MUSE corpus: books or news",
        "tofu": "unlearn TOFU's fictitious authors, by any method",
        "wmdp": "unlearn hazardous knowledge, topic by topic",
        "compare": "run methods of tofu or wmdp over several seeds and strengths: mean and spread",
    },
    "Beside": {
        "report": "write the report of a run anew",
        "estimate": "say how much memory a training needs",
        "recipes": "show published settings",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}
_HEAD = "Make a language model forget.\n\n  blur-trainer COMMAND ...\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 2 for a command or an option that is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("--local_rank="):
        del words[0]  # DeepSpeed's launcher puts it before the command. It is in the environment, too
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{_HEAD}{_listed()}\nEach has --help.\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"blur-trainer has no command {words[0]!r}: choose among {', '.join(COMMANDS)}.\n")
        return 2
    return import_quickly(f"blur_trainer.cli.{words[0]}").main(words[1:])


def _listed() -> str:
    width = max(map(len, COMMANDS))
    groups = (
        f"\n{title}:\n" + "".join(f"  {name:{width}}  {what}\n" for name, what in group.items())
        for title, group in GROUPS.items()
    )
    return "".join(groups)
