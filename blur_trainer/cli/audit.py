"""`blur-trainer audit MODEL`: a battery of attacks with a budget, and a certificate of what came back."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blur_trainer.cli.options import help_text, options_of
from blur_trainer.cli.outcome import Outcome, outcome
from blur_trainer.pipeline.audit import audit
from blur_trainer.pipeline.audit_budget import Name
from blur_trainer.pipeline.audit_report import certificate_table, found_table
from blur_trainer.pipeline.certificate import NAME, check_certificate, read_certificate
from blur_trainer.pipeline.measure import CLASSES, MeasureArguments, Sets
from blur_trainer.report.html import write_report
from blur_trainer.report.later_tables import add_tables

_USAGE = """blur-trainer audit MODEL --forget FILE --output_dir FOLDER [--retrained MODEL]
                          [--unseen FILE] [--retain FILE] [--budget minutes] [OPTION ...]
       blur-trainer audit MODEL --check FOLDER/audit.json [--forget FILE] [OPTION ...]"""


@dataclass
class AuditArguments:
    """How much is tried, and where it is written."""

    output_dir: str | None = field(
        default=None, metadata={"help": "A folder for audit.json and the report. An audit that is there goes on."}
    )
    budget: Name = field(default="minutes", metadata={"help": "How much is tried."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})
    card: bool = field(default=False, metadata={"help": "Also write the table into the README.md of MODEL, a folder."})
    check: str | None = field(
        default=None, metadata={"help": "Only say whether this audit.json is of this model and these data."}
    )
    require: str | None = field(
        default=None, metadata={"choices": ["no_recovery"], "help": "Exit code 1 if anything came back."}
    )


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 for a certificate of something else, or for what `--require` does not accept."""
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([MeasureArguments, AuditArguments], "audit", _USAGE, "--help-all: all options."))
        return 0
    if "--help-all" in arguments:
        sys.stdout.write(help_text([*CLASSES, AuditArguments], "audit", _USAGE, ""))
        return 0
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model_name_or_path")
    refused = False
    with outcome("audit") as done:
        given = options_of((*CLASSES, AuditArguments), words, "audit")
        own = {name: given.pop(name) for name in list(given) if name in AuditArguments.__dataclass_fields__}
        if own.get("check") is not None:
            refused = _checked(done, own["check"], given)
        else:
            refused = _audited(done, AuditArguments(**own), given)
    return done.code or int(refused)


def _checked(done: Outcome, path: str, given: dict[str, Any]) -> bool:
    if not given.get("model_name_or_path"):
        raise ValueError("Give the model beside `check`: blur-trainer audit MODEL --check audit.json.")
    sets = Sets(given) if given.get("forget") else None
    wrong = check_certificate(path, str(given["model_name_or_path"]), sets, given.get("model_revision"))
    done.say(f"{path} is not of this: {'; '.join(wrong)}" if wrong else f"{path} is of this model and these data.")
    done.say(read_certificate(path)["sentence"])
    return bool(wrong)


def _audited(done: Outcome, own: AuditArguments, given: dict[str, Any]) -> bool:
    if own.output_dir is None:
        raise ValueError(f"Give `output_dir`, a folder for {NAME}.")
    folder = Path(str(given.get("model_name_or_path")))
    if own.card and not folder.is_dir():
        raise ValueError(f"`card` writes into the folder of the model, and {str(folder)!r} is none: leave it out.")
    sets = Sets(given)
    for role, reading in sets.readings.items():
        sys.stderr.write(f"{role}: {reading.said}\n")
    found = audit(sets, own.output_dir, own.budget, own.seed)
    done.say(f"\n{found_table(found.certificate)}\n")
    unjudged = [f"{one['name']} is not judged: {one['why']}" for one in found.certificate["attacks"] if "why" in one]
    done.say("Left out:\n" + "".join(f"  {what}\n" for what in [*unjudged, *found.certificate["left_out"]]))
    done.say(found.sentence)
    found.results.save(own.output_dir, {**asdict(sets.script), **sets.said(), "audit": found.sentence})
    done.say(f"Report: {write_report(own.output_dir)}")
    if own.card:
        add_tables(folder, [certificate_table(found.certificate)], any_card=True)
        done.say(f"Card: {folder / 'README.md'}")
    return own.require is not None and bool(found.recovered)
