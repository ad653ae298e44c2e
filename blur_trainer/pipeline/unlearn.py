"""One call from a model and two sets to a model that has forgotten, measured before and after, with a verdict."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel
from trl import get_peft_config

from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.arguments import LEVELS
from blur_trainer.pipeline.preparing import Prepared, prepare
from blur_trainer.pipeline.run_file import write_run
from blur_trainer.pipeline.shown import shown_settings
from blur_trainer.report.results import Results
from blur_trainer.report.verdict import Verdict, judge, write_verdict
from blur_trainer.saving.merging import merge_and_save
from blur_trainer.scripts.levels import with_level
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.output import write_output
from blur_trainer.scripts.running import begin_run, is_finished, train_and_save
from blur_trainer.uld.trainer import ULDTrainer
from blur_trainer.uld.tuning import tune_weight

BEFORE, RETRAINED = "before", "retrained"
_SAID = {
    "retrained": "what the retrained model loses on each row",
    "unseen": "the loss of the unseen rows",
    "exchanged": "an estimate: the loss of answers pieced together from those of other rows; --unseen or --retrained "
    "would say it better",
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
    """

    verdict: Verdict
    metrics: dict[str, dict[str, float]]
    table: str
    output_dir: Path

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.verdict}"


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
    script, args, thresholds = prepared.script, prepared.args, prepared.thresholds
    out = begin_run(args)
    load = ModelLoader(args, prepared.model_args)
    target = str(prepared.model_args.model_name_or_path)
    level = measured_level(prepared, load)
    PartialState().print(f"Forgetting ends at {level.nats:.2f} nats per token: {_SAID[level.source]}.")
    results = Results("Your own data", evaluation_of(prepared, level), samples=0 if script.redact else 3)
    results.add(BEFORE, "target", load(target))
    label, start = prepared.method.label, time.time()
    trainer, model = _trained(prepared, level, load, out)
    results.add(label, "unlearned", model, time.time() - start)
    if script.retrained:
        results.add(RETRAINED, "retrain", load(script.retrained))
    numbers: dict[str, Mapping[str, float]] = {row["name"]: row["metrics"] for row in results.rows}
    verdict = judge(numbers[BEFORE], numbers[label], level, numbers.get(RETRAINED), thresholds)
    results.verdict = verdict
    table = ""
    if PartialState().is_main_process:
        write_verdict(out, verdict)
        write_run(out, prepared)
        settings = shown_settings(prepared, level, trainer)
        trainers = {} if trainer is None else {label: trainer}
        table = write_output(out, results, trainers, settings, columns=results.evaluation.primary_metrics)
        if script.merge:
            merge_and_save(str(out), str(out / "merged"))
    named = {"before": BEFORE, "after": label, "retrained": RETRAINED}
    return Unlearned(verdict, {key: dict(numbers[row]) for key, row in named.items() if row in numbers}, table, out)


def measured_level(prepared: Prepared, load: ModelLoader) -> Level:
    """Where forgetting ends: by the best source that there is, or the one that was asked for."""
    script, args = prepared.script, prepared.args
    asked = script.level or next((name for name in ("retrained", "unseen") if getattr(script, name)), "exchanged")
    if asked not in LEVELS:
        return Level(float(asked))
    how = {"max_length": args.max_length, "qa_template": args.qa_template}
    forget, tokenizer = prepared.sets["forget"].dataset, prepared.tokenizer
    if asked == "retrained":
        return Level.of_retrained(load(str(script.retrained)), forget, tokenizer, **how)
    model = load(str(prepared.model_args.model_name_or_path))
    if asked == "unseen":
        return Level.of_unseen(model, prepared.sets["unseen"].dataset, tokenizer, **how)
    return Level.of_exchanged(model, forget, tokenizer, **how)


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


def _trained(prepared: Prepared, level: Level, load: ModelLoader, out: Path) -> tuple[Any, PreTrainedModel]:
    """Trains and saves. The trainer is `None` where the training had ended before an interrupt."""
    method, args = prepared.method, prepared.args
    if is_finished(args, out):
        return None, load(str(out))
    training: dict[str, Any] = {f"{role}_dataset": prepared.sets[role].dataset for role in ("forget", "retain")}
    if method.leveled and args.forget_level is None:
        args, training = with_level(args, training, level)
    args.model_init_kwargs = load.options
    if method.trainer is ULDTrainer:
        training |= {"augment_forget": "rules", "augment_retain": "none"}
    trainer = method.trainer(
        str(prepared.model_args.model_name_or_path),
        args,
        processing_class=prepared.tokenizer,
        peft_config=get_peft_config(prepared.model_args),
        **training,
    )
    train_and_save(trainer, method.label)
    if not isinstance(trainer, ULDTrainer):
        return trainer, trainer.model
    return trainer, _with_weight(prepared, trainer, level)


def _with_weight(prepared: Prepared, trainer: ULDTrainer, level: Level) -> PreTrainedModel:
    """ULD's strength is a number of the composed model: chosen by the level, on paraphrases where there are some."""
    asked = prepared.sets.get("paraphrased", prepared.sets["forget"]).dataset
    how = {"batch_size": trainer.args.per_device_eval_batch_size, "max_length": trainer.args.max_length}
    model = trainer.unlearned_model()
    tuning = tune_weight(model, asked, prepared.sets["retain"].dataset, level, prepared.tokenizer, **how)
    trainer.args.weight, trainer.args.top_logit_filter = tuning.weight, tuning.top_logit_filter
    trainer.save_model()
    return model
