"""One call from a model and two sets to a model that has forgotten, measured before and after, with a verdict."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.arguments import LEVELS
from blur_trainer.pipeline.audit import Audit
from blur_trainer.pipeline.audit_report import found_table
from blur_trainer.pipeline.audited import audited
from blur_trainer.pipeline.methods import options_read
from blur_trainer.pipeline.preparing import Prepared, prepare
from blur_trainer.pipeline.publishing import publish
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.pipeline.run_file import write_run
from blur_trainer.pipeline.search import Goal, search, searched
from blur_trainer.pipeline.shown import shown_settings
from blur_trainer.pipeline.steering import with_steering
from blur_trainer.pipeline.trackers import send_results, tracked
from blur_trainer.pipeline.training import MERGED, Trained, make_trainer, train
from blur_trainer.report.results import Results
from blur_trainer.report.verdict import Verdict, judge, write_verdict
from blur_trainer.saving.merging import merge_and_save
from blur_trainer.saving.output_dir import agreed, check_writable
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.output import write_output
from blur_trainer.scripts.running import begin_run
from blur_trainer.trainers.learned_vectors import VECTORS_NAME
from blur_trainer.trainers.replay import REPLAY_NAME

BEFORE, TEACHER, RETRAINED = "before", "composed", "retrained"
SAID = {
    "retrained": "what the retrained model loses on each row",
    "unseen": "the loss of the unseen rows",
    "exchanged": "an estimate: the loss of these rows with words exchanged; --retrained would say it better",
    "given": "as given",
}


@dataclass(frozen=True)
class Unlearned:
    """
    What a run gave.

    Args:
        verdict: with its sentence.
        metrics: the numbers of `before`, `after` and, if there is one, `retrained`.
        table: for the terminal.
        output_dir: with the model, `report.html`, `verdict.json`, `metrics.json`, `run.yaml` and the model card.
        level: where forgetting ends.
        notes: what else one must know, such as that the base model of an adapter still knows.
        audit: of the option `audit`: which attacks brought something back.
    """

    verdict: Verdict
    metrics: dict[str, dict[str, float]]
    table: str
    output_dir: Path
    level: Level
    notes: tuple[str, ...] = ()
    audit: Audit | None = None

    def __str__(self) -> str:
        said = [] if self.audit is None else [f"{found_table(self.audit.certificate)}\n\nAudit: {self.audit}"]
        return "\n\n".join([self.table, str(self.verdict), *self.notes, *said])


def unlearn(model: str, forget: Any, retain: Any, output_dir: str | Path = "unlearned", **options: Any) -> Unlearned:
    """
    Makes a model forget, and says whether it did. The command `blur-trainer unlearn` does the same.

    It measures the model, unlearns with settings that follow from model and data, measures again and judges. The model
    before unlearning also says texts itself, which are retained too ([`replay`]). Forgetting ends at the level.

    Args:
        model (`str`): a folder or a name on the Hub.
        forget, retain: what to forget and what to keep: files, folders, datasets on the Hub, or in memory; see
            [`read_rows`].
        output_dir (`str`): a new folder.
        options: `hold`, `unseen`, `paraphrased` (further sets), `method`, `level`, `retrained`, and all others that
            `blur-trainer unlearn --help-all` lists: of the reading, of the trainer, of the model.

    Returns:
        [`Unlearned`]

    Raises:
        `ValueError`, `TypeError`: an option or a row is wrong; nothing was trained.

    Example:

    ```python
    done = unlearn("my-model", "forget.csv", "chats.jsonl", "out", unseen="unseen.csv")
    print(done.verdict.sentence)
    ```
    """
    sets = {"model_name_or_path": model, "forget": forget, "retain": retain, "output_dir": str(output_dir)}
    if twice := sorted(set(sets) & set(options)):
        raise TypeError(f"`unlearn` got {twice} twice.")
    return run(prepare({**sets, **options}))


def run(prepared: Prepared) -> Unlearned:
    """All steps after the reading, on every process."""
    script, args = prepared.script, prepared.args
    if script.optuna is not None:
        searched(prepared)  # what cannot be searched is refused before a model is loaded
    out = begin_run(args)

    def write(prepared: Prepared) -> None:
        agreed(lambda: write_run(out, prepared), PartialState().is_main_process)

    agreed(lambda: check_writable(str(out)), PartialState().is_main_process)
    write(prepared)
    with quiet(), tracked(args):
        load = ModelLoader(args, prepared.model_args)
        model = load(str(prepared.model_args.model_name_or_path))
        level = measured_level(prepared, model, load)
        PartialState().print(
            f"Forgetting ends at {level.nats:.2f} nats per token: {SAID[level.source]}.", file=sys.stderr
        )
        prepared = with_steering(prepared, model)
        write(prepared)
        results = Results("Your own data", evaluation_of(prepared, level), samples=0 if script.redact else 3)
        results.add(BEFORE, "target", model)
        if prepared.teacher is not None:
            results.add(TEACHER, "unlearned", load(prepared.teacher))
        goal = Goal.of(prepared, level, model) if script.optuna is not None else None
        del model  # the trainer loads its own
        if goal is not None:
            prepared = search(prepared, goal, out, partial(make_trainer, prepared, level, load))
            write(prepared)
        trained = train(prepared, level, load, out)
        results.add(prepared.method.label, "unlearned", trained.model, trained.seconds)
        if script.retrained:
            results.add(RETRAINED, "retrain", load(script.retrained))
        done = _judged(prepared, level, results, trained, out)
        audits = script.audit is not None and trained.saved
        del results, trained  # an audit loads the model again
        audit = audited(prepared, out) if audits else None
    return replace(done, audit=audit)


def _judged(prepared: Prepared, level: Level, results: Results, trained: Trained, out: Path) -> Unlearned:
    """The verdict, and all files beside the model. The main process writes."""
    script, label = prepared.script, prepared.method.label
    numbers: dict[str, Mapping[str, float]] = {row["name"]: row["metrics"] for row in results.rows}
    options = options_read(prepared.method, prepared.args)
    verdict = judge(numbers[BEFORE], numbers[label], level, numbers.get(RETRAINED), prepared.thresholds, options)
    results.verdict = verdict
    named = {"before": BEFORE, "after": label, "retrained": RETRAINED}
    metrics = {key: dict(numbers[row]) for key, row in named.items() if row in numbers}
    table = ""
    if PartialState().is_main_process:
        write_verdict(out, verdict)
        trainers = {} if trained.trainer is None else {label: trained.trainer}
        shown = results.evaluation.primary_metrics
        settings = shown_settings(prepared, level, trained)
        table = write_output(out, results, trainers, settings, columns=shown)
        if script.redact:
            for name in (REPLAY_NAME, VECTORS_NAME):  # what the model says itself may be what it learnt; digests
                (out / name).unlink(missing_ok=True)
        if script.merge and trained.saved:
            merge_and_save(str(out), str(out / MERGED))
        send_results(prepared.args, metrics, verdict)
    notes = publish(prepared, trained, verdict) if prepared.args.push_to_hub else ()
    return Unlearned(verdict, metrics, table, out, level, (*trained.notes, *notes))


def measured_level(prepared: Prepared, model: PreTrainedModel, load: ModelLoader) -> Level:
    """Where forgetting ends: by the best source that there is, or the one that was asked for. `model`: before."""
    script, args = prepared.script, prepared.args
    asked = script.level or next((name for name in ("retrained", "unseen") if getattr(script, name)), "exchanged")
    if asked not in LEVELS:
        return Level(float(asked))
    how = {"max_length": args.max_length, "qa_template": args.qa_template}
    forget, tokenizer = prepared.sets["forget"].dataset, prepared.tokenizer
    if asked == "retrained":
        return Level.of_retrained(load(str(script.retrained)), forget, tokenizer, **how)
    if asked == "unseen":
        return Level.of_unseen(model, prepared.sets["unseen"].dataset, tokenizer, **how)
    return Level.of_exchanged(model, forget, prepared.sets["retain"].dataset, tokenizer, **how)


def evaluation_of(prepared: Prepared, level: Level | None) -> ForgetEvaluation:
    script, args = prepared.script, prepared.args
    return ForgetEvaluation(
        prepared.tokenizer,
        level=level,
        max_length=args.max_length,
        max_rows=script.eval_rows,
        batch_size=args.per_device_eval_batch_size,
        qa_template=args.qa_template,
        lm_eval=script.lm_eval,
        progress=not args.disable_tqdm,
        **{role: reading.dataset for role, reading in prepared.sets.items()},
    )
