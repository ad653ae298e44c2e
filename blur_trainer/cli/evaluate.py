"""`blur-trainer evaluate`: how well a model knows your own sets; with `--before MODEL` also a verdict."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from blur_trainer.cli.options import help_text, options_of
from blur_trainer.cli.outcome import outcome
from blur_trainer.pipeline.measure import CLASSES, MeasureArguments, Sets, measure
from blur_trainer.report.html import write_report
from blur_trainer.report.tables import format_table
from blur_trainer.saving.output_dir import check_output_dir

_USAGE = """blur-trainer evaluate --model_name_or_path MODEL --forget FILE [--retain FILE]
                             [--before MODEL] [--config YAML] [OPTION ...]"""


@dataclass
class EvaluateArguments:
    """What is written."""

    report: str | None = field(
        default=None, metadata={"help": "A new folder: also write metrics.json and report.html there."}
    )
    redact: bool = field(default=False, metadata={"help": "Leave prompts and answers out of them."})


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        shown = help_text([MeasureArguments, EvaluateArguments], "evaluate", _USAGE, "--help-all: all options.")
        sys.stdout.write(shown)
        return 0
    if "--help-all" in arguments:
        sys.stdout.write(help_text([*CLASSES, EvaluateArguments], "evaluate", _USAGE, ""))
        return 0
    with outcome("evaluate") as done:
        given = options_of([*CLASSES, EvaluateArguments], arguments, "evaluate")
        folder, redact = given.pop("report", None), given.pop("redact", False)
        if folder is not None:
            check_output_dir(folder)
        sets = Sets(given)
        for role, reading in sets.readings.items():
            sys.stderr.write(f"{role}: {reading.said}\n")
        found = measure(sets, samples=0 if redact else 3)
        primary = found.results.evaluation.primary_metrics
        columns = [column for column in found.results.columns if column["name"] in primary]
        done.say(f"\n{format_table(columns, found.results.rows, 100)}")
        if found.verdict is not None:
            done.say(f"\n{found.verdict}")
        if folder is not None:
            found.results.save(folder, {**asdict(sets.script), **sets.said()})
            done.say(f"\nReport: {write_report(folder)}")
    return done.code
