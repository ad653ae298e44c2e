"""`blur-trainer attack`: do the answers come back by a little relearning, or in few bits?"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from blur_trainer.cli.options import help_text, options_of
from blur_trainer.cli.outcome import outcome
from blur_trainer.pipeline.attack import attack
from blur_trainer.pipeline.measure import CLASSES, MeasureArguments, Sets
from blur_trainer.report.tables import format_table, robustness_rows

_USAGE = """blur-trainer attack --model_name_or_path MODEL --forget FILE [--retain FILE]
                           [--retrained MODEL] [--config YAML] [OPTION ...]"""


@dataclass
class AttackArguments:
    """How hard it is attacked."""

    steps: int = field(default=20, metadata={"help": "Steps of relearning."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the relearning."})
    seed: int = field(default=0, metadata={"help": "Of the draw of the rows that are relearned."})


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([MeasureArguments, AttackArguments], "attack", _USAGE, "--help-all: all options."))
        return 0
    if "--help-all" in arguments:
        sys.stdout.write(help_text([*CLASSES, AttackArguments], "attack", _USAGE, ""))
        return 0
    with outcome("attack") as done:
        given = options_of((*CLASSES, AttackArguments), arguments, "attack")
        how = {name: given.pop(name) for name in ("steps", "learning_rate", "seed") if name in given}
        results = attack(Sets(given), **how)
        primary = results.evaluation.primary_metrics
        columns = [column for column in results.columns if column["name"] in primary]
        rows = robustness_rows(results.robustness, results.rows)
        done.say(f"\n{format_table(columns, rows, 120)}")
    return done.code
