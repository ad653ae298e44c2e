"""TOFU from its arguments to its report: `blur-trainer tofu`, `examples/run_tofu.py`. To be read from top to bottom."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from datasets import DatasetDict
from trl import get_peft_config

from blur_trainer.data.subset import limit_rows
from blur_trainer.data.tofu import TOFU_MODELS, TOFU_SPLITS, load_tofu
from blur_trainer.data.tofu_templates import apply_template
from blur_trainer.evaluation.robustness.battery import prefixed, robustness
from blur_trainer.evaluation.tofu.reference import RetainReference
from blur_trainer.evaluation.tofu.suite import TOFUEvaluation
from blur_trainer.report.results import Results
from blur_trainer.scripts.attacks import PREFIX, relearning_sets
from blur_trainer.scripts.given import Given, Models, given_by
from blur_trainer.scripts.levels import measured, needs_level, with_level
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import is_finished, train_and_save
from blur_trainer.scripts.tofu import METHODS, configurations, parse, tiny_models, training_sets, with_said
from blur_trainer.trainers.unlearning import UnlearningTrainer

SAID = ("forget_objective", "retain_objective", "rule", "learning_rate", "num_train_epochs", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Unlearns TOFU's fictitious authors by any method; measures forget quality and model utility.

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

    # 2. Data: the questions, and what each method trains on
    data = load_data(given)
    sets = {method: training_sets(method, data, script) for method in configs}

    # 3. Models: the target that knows all, and the one that never saw the forget set. Where forgetting ends
    models = find_models(given, data)
    if "uld" in configs and script.said:
        target = given.load(models.target)
        sets["uld"] = with_said(sets["uld"], script, target, models.tokenizer, args.seed)
    set_levels(given, data, models, configs, sets)

    # 4. Evaluation. Forget quality compares with the model that never saw the forget set
    evaluation = make_evaluation(given, data, models)
    name = f"TOFU {script.split}{' (embedded)' if is_embedded(given) else ''}"
    x = "forget_quality_log10" if evaluation.retain_reference else "forget_probability"
    results = Results(name, evaluation, plane={"x": x, "y": "model_utility"})
    PartialState().print("Evaluating the target", file=sys.stderr)
    results.add("target", "target", given.load(models.target))

    # 5. Unlearn: the method, and those it is compared with
    trainers = {name: unlearn(given, name, config, sets[name], models, results) for name, config in configs.items()}
    if models.retrained:
        results.add("retrain", "retrain", given.load(models.retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt
    if script.robustness:
        results.add_robustness(attack(given, data, models, evaluation))

    # 7. Output: the tables, metrics.json, the model cards, the report
    if PartialState().is_main_process:
        made = {METHODS[name].label: trainer for name, trainer in trainers.items() if trainer}
        said, columns = settings_of(script, args, SAID), evaluation.primary_metrics
        sys.stdout.write(f"{write_output(given.out, results, made, said, columns=columns, attack_width=130)}\n")


def is_embedded(given: Given) -> bool:
    """Whether the authors are invented by us."""
    return given.tiny and given.script.data_dir is None


def load_data(given: Given) -> DatasetDict:
    """TOFU's sets, or the embedded ones."""
    script = given.script
    data = load_tofu("embedded" if is_embedded(given) else "tofu", script.split, script.data_dir)
    if script.max_rows is not None:
        data = limit_rows(data, script.max_rows)  # the same of every seed, which are compared
    if "holdout" not in data:
        PartialState().print("No membership inference, no PrivLeak: the data has no holdout set.", file=sys.stderr)
    return data


def find_models(given: Given, data: DatasetDict) -> Models:
    """Two tiny models, made if they are not there; or the named one and the retain model that belongs to it."""
    script, target = given.script, given.model_args.model_name_or_path
    if target is None:
        return Models(*tiny_models(data, script))
    published = {models.full: models for models in TOFU_MODELS.values()}.get(target)
    retrained = script.retain_model or (published and getattr(published, TOFU_SPLITS[script.split]))
    return Models(given.load.tokenizer(target), target, retrained)


def set_levels(
    given: Given, data: DatasetDict, models: Models, configs: dict[str, Any], sets: dict[str, dict[str, Any]]
) -> None:
    """Gives the methods without an end of their own the level where forgetting ends."""
    script = given.script
    leveled = [
        name for name, config in configs.items() if needs_level(config) or (script.level and name == script.method)
    ]
    if not leveled:
        return
    unseen = apply_template(data["holdout"], script.template) if "holdout" in data else None
    asked = script.level or ("retrained" if unseen is None and models.retrained else "unseen")
    forget, retain = sets[script.method]["forget_dataset"], apply_template(data["retain"], script.template)
    level = measured(asked, forget, retain, unseen, models.target, models.retrained, given.load, models.tokenizer)
    for name in leveled:
        configs[name], sets[name] = with_level(configs[name], sets[name], level)


def _how(given: Given) -> dict[str, Any]:
    """The settings of every evaluation of a run."""
    script = given.script
    how = {"template": script.template, "protocol": script.protocol, "progress": not given.tiny}
    return how | ({"max_new_tokens": 32} if is_embedded(given) else {})


def make_evaluation(given: Given, data: DatasetDict, models: Models) -> TOFUEvaluation:
    """With forget quality if there are numbers of a model that never saw the forget set."""
    how, reference = _how(given), None
    if given.script.retain_log:
        reference = RetainReference.from_tofu_log(given.script.retain_log)
    elif models.retrained:
        reference = TOFUEvaluation(data, models.tokenizer, **how).reference(given.load(models.retrained))
    else:
        PartialState().print("No forget quality: pass --retain_model or --retain_log.", file=sys.stderr)
    return TOFUEvaluation(data, models.tokenizer, reference=reference, **how)


def unlearn(
    given: Given, method: str, config: Any, sets: Mapping[str, Any], models: Models, results: Results
) -> UnlearningTrainer | None:
    """Trains by one method and measures. Returns its trainer; `None` if it had ended before an interrupt."""
    first, start, trainer = method == given.script.method, time.time(), None
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
            benchmarks={"tofu": results.evaluation} if config.eval_strategy != "no" else None,
            **sets,
        )
        train_and_save(trainer, method)
        model = given.load(str(folder)) if method == "uld" else trainer.model
    results.add(METHODS[method].label, "unlearned" if first else "baseline", model, time.time() - start)
    return trainer


def attack(given: Given, data: DatasetDict, models: Models, evaluation: TOFUEvaluation) -> dict[str, Any]:
    """What comes back after attacks on the model as it would be given away: whole, and not in few bits."""
    script, args = given.script, given.args
    beside = "holdout" if "holdout" in data else "retain"
    sets = {f"{name} set": apply_template(data[name], script.template) for name in ("forget", beside)}
    more: dict[str, Any] = {}
    if given.tiny or script.method == "uld":
        more["learning_rate"] = args.learning_rate / 10
    if models.retrained and script.method != "uld":
        more["retrained"] = given.load(models.retrained, to_train=True)
    return robustness(
        given.load(str(given.out), to_train=True),
        evaluation,
        relearning=relearning_sets(sets, models.tokenizer, args),
        prompted={"prefix": TOFUEvaluation(prefixed(data, f"{PREFIX} "), models.tokenizer, **_how(given))},
        **more,
    )
