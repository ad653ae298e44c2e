"""`blur-trainer evaluate`: how well a model knows your own sets; with `--before MODEL` also a verdict."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from blur_trainer.cli.options import help_text, options_of, refusing
from blur_trainer.pipeline.measure import CLASSES, MeasureArguments, Sets, measure
from blur_trainer.report.html import write_report
from blur_trainer.report.tables import format_table

_USAGE = "blur-trainer evaluate --model_name_or_path MODEL --forget FILE [--retain FILE] [--before MODEL]"
_MORE = "--report DIR: also write metrics.json and report.html there. --help-all: all options."


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([MeasureArguments], "evaluate", _USAGE, _MORE))
        return 0
    if "--help-all" in arguments:
        sys.stdout.write(help_text(CLASSES, "evaluate", _USAGE, ""))
        return 0
    words, folder = _without_report(list(arguments))
    with refusing("evaluate") as refused:
        given = options_of(CLASSES, words, "evaluate")
        sets = Sets(given)
        for role, reading in sets.readings.items():
            sys.stdout.write(f"{role}: {reading.said}\n")
        found = measure(sets)
        primary = found.results.evaluation.primary_metrics
        columns = [column for column in found.results.columns if column["name"] in primary]
        sys.stdout.write(f"\n{format_table(columns, found.results.rows, 100)}\n")
        if found.verdict is not None:
            sys.stdout.write(f"\n{found.verdict}\n")
        if folder is not None:
            found.results.save(folder, settings={**asdict(sets.script), **sets.said()})
            sys.stdout.write(f"\nReport: {write_report(folder)}\n")
    return refused.code


def _without_report(words: list[str]) -> tuple[list[str], str | None]:
    if "--report" not in words:
        return words, None
    place = words.index("--report")
    return words[:place] + words[place + 2 :], words[place + 1] if place + 1 < len(words) else "evaluated"
