"""`--optuna N`: searches the strength of forgetting and the learning rate, before the training of the run."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blur_trainer.atomic_write import atomic_write
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.level import Level
from blur_trainer.evaluation.level_check import LevelCheck
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.pipeline.run_file import TRIALS
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.strengths import strength_of
from blur_trainer.trainers.learned_vectors import VECTORS_NAME
from blur_trainer.trainers.level_guard import SAMPLE, sample_rows
from blur_trainer.trainers.replay import REPLAY_NAME

#: how far from what was derived is searched: the rate is derived from the size, the strength is one number for all
_WITHIN = {"learning_rate": 4.0}
_STRENGTH_WITHIN = 10.0
#: so many rows that the verdict does not report are enough to search on
_ENOUGH = 16
_MINIMIZED = "|forget_loss - level| / level + max(0, retain_loss - retain_before) / loss_rise"


def searched(prepared: Prepared) -> dict[str, tuple[float, float]]:
    """
    The settings to search, with their bounds: those that were not given. Around each, what was derived or is default.

    Raises:
        `ValueError`: the search cannot run here, or nothing is left to search.
    """
    script, args = prepared.script, prepared.args
    if find_spec("optuna") is None:
        raise ValueError("`optuna` needs the package: pip install 'blur_trainer[optuna]', or leave the option out.")
    if script.method == "uld":
        raise ValueError("`optuna` is not for uld, whose weight is chosen by the level anyway: leave it out.")
    if PartialState().num_processes > 1:
        raise ValueError(
            "`optuna` searches with one process. Search so, stop after it, and give the `run.yaml` to several."
        )
    dials = {"learning_rate", _strength(script.method, args)} - set(prepared.options)
    if not dials:
        raise ValueError(
            "`optuna` searches learning rate and strength, and both were given: leave `learning_rate` or "
            f"`{_strength(script.method, args)}` out."
        )
    around = {name: (float(getattr(args, name)), _WITHIN.get(name, _STRENGTH_WITHIN)) for name in sorted(dials)}
    return {name: (value / within, value * within) for name, (value, within) in around.items()}


def _strength(method: str, args: Any) -> str:
    """The setting that says how strongly the method forgets. A rule without such a weight leaves the learning rate."""
    of_rule = {"blur": "gamma", "sum": strength_of(method).setting}
    return of_rule.get(args.rule, "learning_rate")


@dataclass(frozen=True)
class Goal:
    """
    What a search minimizes: `|forget_loss - level| / level + max(0, retain_loss - retain_before) / loss_rise`.

    All losses are means in nats per answer token over up to 128 rows of each set. The first term is 0 at the level and
    1 for a model that knows the rows by heart; too much counts as too little does. The second is 1 where the retain
    loss has risen by `loss_rise`, the verdict's own threshold (see `Thresholds`): that is as bad as nothing forgotten.

    Rows: those that the verdict does not report, if there are 16 of them (a set of more than `eval_rows`), else every
    second row. Of `hold`, `unseen` and `paraphrased` none.
    """

    check: LevelCheck
    loss_rise: float
    rows: dict[str, str]

    @classmethod
    def of(cls, prepared: Prepared, level: Level, model: Any) -> "Goal":
        """`model`: before unlearning."""
        script, args = prepared.script, prepared.args
        samples, said = {}, {}
        nats = level.nats
        for role in ("forget", "retain"):
            rows = prepared.sets[role].dataset
            chosen, said[role] = unreported(len(rows), script.eval_rows)
            how = {"max_length": args.max_length, "qa_template": args.qa_template, "drop_empty": args.drop_empty}
            tokenized = tokenize_dataset(rows.select(chosen), prepared.tokenizer, role=role, **how)
            samples[role] = sample_rows(tokenized)
            if role == "forget" and level.per_example is not None:
                nats = float(np.mean([level.per_example[index] for index in chosen]))
        check = LevelCheck(samples["forget"], samples["retain"], nats, None, args.per_device_eval_batch_size)
        check.retain_before = check(model)["retain_loss"]
        return cls(check, prepared.thresholds.loss_rise, said)

    def __call__(self, found: Mapping[str, float]) -> float:
        missing = abs(found["forget_loss"] - self.check.level) / self.check.level
        return missing + max(0.0, self.check.paid(found)) / self.loss_rise


def unreported(size: int, reported: int) -> tuple[list[int], str]:
    """Indices of the rows to search on, and which they are in words."""
    shown = {int(index) for index in np.linspace(0, size - 1, min(size, reported)).round()}
    others = [index for index in range(size) if index not in shown]
    if len(others) >= _ENOUGH:
        return others, f"up to {SAMPLE} of the {len(others)} rows that the verdict does not report"
    return list(range(0, size, 2)), "every second row, which the verdict reports too"


class _AtTheEnd(TrainerCallback):
    """Measures the last weights of each trial, whatever `eval_strategy` says."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def search(prepared: Prepared, goal: Goal, out: Path, make: Callable[..., Any]) -> Prepared:
    """
    Searches, writes `trials.json`, and puts the best settings into the place of those that were derived.

    A resumed run reads the file of a search that had ended; one that was interrupted begins anew. The first trial has
    the settings as derived, so the search does not end worse than these by its own measure. The same seed gives the
    same trials.

    Args:
        make: as `make_trainer`, of the arguments and of what else a search needs.
    """
    kept = _kept(out / TRIALS) if prepared.args.resume_from_checkpoint else None
    best = _run(prepared, goal, out, make) if kept is None else kept
    settings = {**prepared.settings, **best}
    return replace(prepared, args=changed(prepared.args, **best), settings=settings)


def _kept(path: Path) -> dict[str, float] | None:
    return json.loads(path.read_text(encoding="utf-8"))["best"] if path.is_file() else None


def _run(prepared: Prepared, goal: Goal, out: Path, make: Callable[..., Any]) -> dict[str, float]:
    """The best settings. The folder of the trials is gone afterwards; texts to replay stay for the training."""
    import optuna  # of the extra `optuna`

    bounds, folder = searched(prepared), out / "trials"
    shutil.rmtree(folder, ignore_errors=True)  # of a search that was interrupted
    args = changed(
        prepared.args, output_dir=str(folder), report_to="none", save_strategy="no", push_to_hub=False,
        load_best_model_at_end=False, resume_from_checkpoint=None,
    )  # fmt: skip
    model = str(prepared.model_args.model_name_or_path)
    trainer, _ = make(args, model_init=lambda: model, callbacks=[_AtTheEnd()], benchmarks={"search": goal.check})
    trainer.remove_callback(ProgressCallback)
    storage, name = optuna.storages.InMemoryStorage(), "strength and rate"
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
    study.enqueue_trial({setting: float(getattr(args, setting)) for setting in bounds})
    running: list[optuna.Trial] = []

    def space(trial: optuna.Trial) -> dict[str, float]:
        running.append(trial)
        return {setting: trial.suggest_float(setting, *ends, log=True) for setting, ends in bounds.items()}

    def objective(metrics: Mapping[str, float]) -> float:
        found = {key: float(metrics[f"eval_search_{key}"]) for key in ("forget_loss", "retain_loss")}
        for key, value in found.items():
            running[-1].set_user_attr(key, value)
        return goal(found)

    try:
        trainer.hyperparameter_search(
            space, objective, n_trials=prepared.script.optuna, direction="minimize", backend="optuna",
            storage=storage, study_name=name, load_if_exists=True, catch=(FloatingPointError,),
            sampler=optuna.samplers.TPESampler(seed=args.seed), pruner=optuna.pruners.NopPruner(),
        )  # fmt: skip
        for name in (REPLAY_NAME, VECTORS_NAME):
            if (folder / name).exists():
                shutil.copyfile(folder / name, out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _written(out / TRIALS, goal, study)


def _written(path: Path, goal: Goal, study: Any) -> dict[str, float]:
    ended = [trial for trial in study.trials if trial.value is not None]
    if not ended:
        raise ValueError("`optuna`: all trials ruined the weights. Give a lower `learning_rate`.")
    content = {
        "minimized": _MINIMIZED,
        "level": goal.check.level,
        "retain_before": goal.check.retain_before,
        "loss_rise": goal.loss_rise,
        "rows": goal.rows,
        "trials": [
            {"number": each.number, **each.params, "minimized": each.value, **each.user_attrs, "state": each.state.name}
            for each in study.trials
        ],
        "best": study.best_trial.params,
    }
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return dict(study.best_trial.params)
