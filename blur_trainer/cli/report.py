"""`blur-trainer report FOLDER`: writes report.html and the figures anew from what a run left in its folder."""

import argparse
from collections.abc import Sequence

from blur_trainer.cli.outcome import outcome
from blur_trainer.report.html import write_report


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("blur-trainer report", description=__doc__)
    parser.add_argument("folder", help="the output_dir of a run")
    words = parser.parse_args(arguments)
    with outcome("report") as done:
        done.say(write_report(words.folder))
    return done.code
