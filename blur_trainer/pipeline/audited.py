"""The audit at the end of a run: the model that it saved is attacked, with the run's own sets."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from blur_trainer.pipeline.arguments import SETS
from blur_trainer.pipeline.audit import Audit, audit
from blur_trainer.pipeline.audit_budget import budget_of
from blur_trainer.pipeline.audit_report import certificate_table
from blur_trainer.pipeline.measure import CLASSES
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.report.html import write_report
from blur_trainer.report.later_tables import add_tables

#: the folder in the run's own
NAME = "audit"


def audited(prepared: Prepared, out: Path, folder: Path | None = None, before: str | None = None) -> Audit:
    """
    Attacks the model in `out`; certificate and report are in `out/audit`, and its table in the run's report and card.

    Sets are those of the run as it read them. The model before unlearning and the retrained one, if there is one, are
    beside it.

    Args:
        out: the folder of the model, with the run's report and card.
        folder: for certificate and report, if another than `out/audit`; then `out` stays as it is.
        before: the model before unlearning, if another than that of the run.
    """
    script, args = prepared.script, prepared.args
    known = {each.name for of in CLASSES for each in fields(of)}
    given: dict[str, Any] = {name: value for name, value in prepared.options.items() if name in known}
    given = {name: value for name, value in given.items() if not _of_the_training(name)}
    given |= {role: prepared.sets[role].dataset for role in SETS if role in prepared.sets}
    before = before or str(prepared.model_args.model_name_or_path)
    given |= {"model_name_or_path": str(out), "before": before, "lm_eval": None}
    given |= {"max_length": args.max_length, "qa_template": args.qa_template}
    own, budget = folder is None, budget_of(str(script.audit)).name
    folder = folder or out / NAME
    found = audit(given, folder, budget, args.seed)
    found.results.save(folder, {"audit": found.sentence, "budget": budget})
    write_report(folder)
    if own:
        add_tables(out, [certificate_table(found.certificate)])
    return found


def _of_the_training(name: str) -> bool:
    """How the sets were read, which is done; the adapter, which is saved; the revision of the model before."""
    read = ("_columns", "_config", "_split")
    return name.endswith(read) or name.startswith(("lora_", "use_peft")) or name in ("limit", "model_revision")
