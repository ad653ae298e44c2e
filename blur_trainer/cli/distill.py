"""`blur-trainer distill MODEL`: what a composed model says, written into ordinary weights."""

import sys
from collections.abc import Sequence

from blur_trainer.cli import unlearn
from blur_trainer.cli.options import help_text
from blur_trainer.pipeline.arguments import UnlearnArguments
from blur_trainer.pipeline.methods import DISTILL

_USAGE = """blur-trainer distill MODEL --forget FILE --retain FILE [--output_dir OUT]
                            [--config YAML] [OPTION ...]"""
_MORE = """MODEL: what ULD, offset or WHP saved, a folder or a name on the Hub. Its target is trained towards what the
whole says, on forget and retain rows and on texts of the target itself; then it is measured as
by `blur-trainer unlearn`, whose options all hold here: --hold, --audit minutes, --replay ..."""


def main(arguments: Sequence[str]) -> int:
    """As `unlearn`, with the method and the model said."""
    words = list(arguments)
    if not words or words[0] in ("--help", "-h"):
        sys.stdout.write(help_text([UnlearnArguments], "distill", _USAGE, _MORE))
        return 0
    named = [] if words[0].startswith("-") else ["--model_name_or_path", words.pop(0)]
    return unlearn.main(["--method", DISTILL, *named, *words], "distill")
