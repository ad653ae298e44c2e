"""WMDP from its arguments to its report: `blur-trainer wmdp`, `examples/run_wmdp.py`. To be read from top to bottom."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from trl import get_peft_config

from blur_trainer.data.wmdp import load_wmdp, load_wmdp_questions
from blur_trainer.evaluation.base import Evaluation
from blur_trainer.evaluation.lm_eval import LMEval
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.evaluation.robustness.battery import robustness
from blur_trainer.evaluation.wmdp import WMDPEvaluation
from blur_trainer.report.results import Results
from blur_trainer.scripts.attacks import relearning_sets
from blur_trainer.scripts.given import Given, Models, given_by, of_tiny
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import is_finished, train_and_save
from blur_trainer.scripts.wmdp import METHODS, configurations, parse, tiny_models
from blur_trainer.trainers.unlearning import UnlearningTrainer

SAID = ("forget_objective", "retain_objective", "rule", "alpha", "learning_rate", "num_train_epochs", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Unlearns hazardous knowledge, topic by topic, by BLUR-RMU or another method; judges by multiple-choice questions.

    Args:
        arguments: the words of the command line; `None` for those of this process.

    Raises:
        ValueError, TypeError, OSError: something is wrong with the arguments. Nothing was trained until then.
        TrainingInterrupted: on Ctrl+C or SIGTERM, after the checkpoint of the step.
    """
    # 1. Arguments: what is wrong with them is found before anything is trained
    parsed = script, args, _, tiny = parse(arguments)
    configs = configurations(script, args, tiny)
    given = given_by(parsed)

    # 2. Data: what to forget, topic by topic, and what to keep
    corpora = load_wmdp(corpus="embedded" if tiny else "wmdp", topics=script.forget_topics, data_dir=script.data_dir)
    topics = {key.removeprefix("forget_"): rows for key, rows in corpora.items() if key.startswith("forget_")}
    sets = {"forget_dataset": topics, "retain_dataset": corpora["retain"]}

    # 3. Models: the target that knows too much; among the tiny ones also one that never saw what is to be forgotten
    models = find_models(given, topics)

    # 4. Evaluation: the harness, whose numbers are the published ones; of the invented questions the same without it
    questions = load_questions(topics) if tiny else {}
    evaluation = make_evaluation(given, questions, topics, models)
    names = evaluation.primary_metrics
    results = Results("WMDP (invented)" if tiny else "WMDP", evaluation, plane={"x": names[0], "y": names[-1]})
    PartialState().print("Evaluating the target", file=sys.stderr)
    results.add("target", "target", given.load(models.target))

    # 5. Unlearn: the method, and those it is compared with
    trainers = {method: unlearn(given, method, config, sets, models, results) for method, config in configs.items()}
    if models.retrained:
        results.add("retrain", "retrain", given.load(models.retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits
    if script.robustness:
        results.add_robustness(attack(given, sets, models, evaluation))

    # 7. Output: the tables, metrics.json, the model cards, the report, the questions for `lm_eval`
    if PartialState().is_main_process:
        made = {METHODS[method].label: trainer for method, trainer in trainers.items() if trainer}
        sys.stdout.write(f"{write_output(given.out, results, made, settings_of(script, args, SAID))}\n")
        if tiny:
            folder = given.out / "tasks"
            tasks = ",".join(write_tasks(folder, questions))
            sys.stdout.write(f"Questions for lm_eval: --include_path {folder} --tasks {tasks}\n")


def find_models(given: Given, topics: Mapping[str, Dataset]) -> Models:
    """Two tiny models, made if they are not there; or the named one."""
    target = given.model_args.model_name_or_path
    if target is None:
        return Models(*tiny_models(given.script, topics))
    return Models(given.load.tokenizer(target), target, None)


def load_questions(topics: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Those on the invented topics that are forgotten, and on the one that is kept."""
    questions = {f"forget_{topic}": load_wmdp_questions(topic) for topic in topics}
    return {**questions, "retain_dishes": load_wmdp_questions("dishes")}


def make_evaluation(
    given: Given, questions: Mapping[str, Dataset], topics: Mapping[str, Dataset], models: Models
) -> Evaluation:
    """By our own questions if there are some and no tasks are named; else by lm-evaluation-harness."""
    script = given.script
    if questions and not script.tasks:
        return WMDPEvaluation(questions, models.tokenizer, progress=False)
    tasks = script.tasks or [*(f"wmdp_{topic}" for topic in topics), "mmlu"]
    return LMEval(tasks, models.tokenizer, include_path=script.tasks_dir, limit=script.limit)


def unlearn(
    given: Given, method: str, config: Any, sets: Mapping[str, Any], models: Models, results: Results
) -> UnlearningTrainer | None:
    """Trains by one method and measures. Returns its trainer; `None` if it had ended before an interrupt."""
    first, start, trainer, label = method == given.script.method, time.time(), None, METHODS[method].label
    folder = given.out if first else given.out / method
    model: Any
    if is_finished(given.args, folder):
        model = given.load(str(folder))
    else:
        trainer = METHODS[method].trainer(
            models.target,
            changed(config, output_dir=str(folder), model_init_kwargs=given.load.options),
            processing_class=models.tokenizer,
            peft_config=get_peft_config(given.model_args),
            benchmarks={"wmdp": results.evaluation} if config.eval_strategy != "no" else None,
            **sets,
        )
        PartialState().print(f"{label}: {trainer.trained}", file=sys.stderr)
        train_and_save(trainer, label)
        model = trainer.model
    results.add(label, "unlearned" if first else "baseline", model, time.time() - start)
    return trainer


def attack(given: Given, sets: Mapping[str, Any], models: Models, evaluation: Evaluation) -> dict[str, Any]:
    """What comes back after attacks on the model as it would be given away."""
    forget, retain = concatenate_datasets(list(sets["forget_dataset"].values())), sets["retain_dataset"]
    return robustness(
        given.load(str(given.out), to_train=True),
        evaluation,
        relearning=relearning_sets({"forget set": forget, "retain set": retain}, models.tokenizer, given.args),
        **of_tiny(given, models),
    )
