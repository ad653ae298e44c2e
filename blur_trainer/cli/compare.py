"""`blur-trainer compare`: methods over several seeds, mean and spread. As `examples/compare.py`."""

import sys
from collections.abc import Sequence

from blur_trainer.cli.options import help_text
from blur_trainer.scripts import compare
from blur_trainer.scripts.running import ended

_USAGE = "blur-trainer compare [OPTION ...] [OPTION OF THE RUNS ...]"
_MORE = """All other options go to the runs: those of `blur-trainer tofu`, with --benchmark wmdp of `blur-trainer wmdp`.
  --config YAML                 Options from a file, of the comparison and of the runs. Words go above it."""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 if no run finished, 2 for wrong options, 130 after Ctrl+C."""
    if {"--help", "--help-all", "-h"} & set(arguments):
        sys.stdout.write(help_text([compare.CompareArguments], "compare", _USAGE, _MORE))
        return 0
    return ended("blur-trainer compare", lambda: compare.main(arguments))
