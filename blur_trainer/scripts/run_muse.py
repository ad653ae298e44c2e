"""MUSE from its arguments to its report: `blur-trainer muse`, `examples/run_muse.py`. To be read from top to bottom."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel
from trl import get_peft_config

from blur_trainer.data.formats import chunk_documents
from blur_trainer.data.muse import AUC_RETRAIN, limit_documents, load_muse, muse_stages
from blur_trainer.evaluation.muse import MUSEEvaluation
from blur_trainer.evaluation.robustness.battery import prefixed, robustness
from blur_trainer.report.results import Results
from blur_trainer.scripts.attacks import PREFIX, relearning_sets
from blur_trainer.scripts.given import Given, Models, given_by, of_tiny
from blur_trainer.scripts.levels import measured, needs_level, with_level
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.muse import PUBLISHED, check_resuming, label_of, parse, tiny_models
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import is_finished, train_and_save
from blur_trainer.toy.muse import training_texts
from blur_trainer.trainers.blur import BLURTrainer

SAID = ("forget_objective", "retain_objective", "rule", "gamma", "replay", "learning_rate", "num_train_epochs", "seed")


class Texts(NamedTuple):
    """What is forgotten, in named stages, and what is retained."""

    stages: list[tuple[str, Any]]
    retain: Any


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Unlearns a MUSE corpus to the level of a model that never saw it; measures what is forgotten, kept and damaged.

    Args:
        arguments: the words of the command line; `None` for those of this process.

    Raises:
        ValueError, TypeError, OSError: something is wrong with the arguments. Nothing was trained until then.
        TrainingInterrupted: on Ctrl+C or SIGTERM, after the checkpoint of the step.
    """
    # 1. Arguments: what is wrong with them is found before anything is trained
    parsed = script, args, _, tiny = parse(arguments)
    given = given_by(parsed)
    check_resuming(args, given.out)

    # 2. Data: a corpus, all of it at once or in the stages of a protocol
    corpus = "news" if script.data_dir and script.corpus == "embedded" else script.corpus
    data = load_muse(corpus, script.data_dir)
    if script.max_documents is not None:
        data = limit_documents(data, script.max_documents, seed=args.seed)
    folds = muse_stages(data, script.protocol) if script.protocol else None

    # 3. Models: the target that knows all, the one retrained without the forget set. What to forget, and to retain
    models = find_models(given, data)
    texts = tiny_texts(data, folds) if tiny else chunked_texts(given, data, folds, models)

    # 4. Evaluation. PrivLeak's zero is the retrained model: ours, or the published one
    evaluation = make_evaluation(given, data, models, AUC_RETRAIN.get(corpus))
    results = Results(f"MUSE ({corpus})", evaluation, plane={"x": "forget_knowmem", "y": "retain_knowmem"})
    PartialState().print("Evaluating the target", file=sys.stderr)
    results.add("target", "target", given.load(models.target))

    # 5. Unlearn, stage after stage: the method, and BLUR-NPO as published
    trainers = {label_of(args): unlearn(given, given.out, args, data, texts, models, results)}
    if script.baseline and "BLUR-NPO" not in trainers:
        published = changed(args, **PUBLISHED)
        trainers["BLUR-NPO"] = unlearn(given, given.out / "baseline", published, data, texts, models, results)
    if models.retrained:
        results.add("retrain", "retrain", given.load(models.retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt
    if script.robustness:
        results.add_robustness(attack(given, data, texts, models, evaluation))

    # 7. Output: the tables, metrics.json, the model cards, the report
    if PartialState().is_main_process:
        made = {label: trainer for label, trainer in trainers.items() if trainer}
        sys.stdout.write(f"{write_output(given.out, results, made, settings_of(script, args, SAID))}\n")


def find_models(given: Given, data: DatasetDict) -> Models:
    """Two tiny models, made if they are not there; or the named one."""
    target = given.model_args.model_name_or_path
    if target is None:
        return Models(*tiny_models(data, given.out))
    return Models(given.load.tokenizer(given.script.tokenizer or target), target, None)


def tiny_texts(data: DatasetDict, folds: Any) -> Texts:
    """The answers too: a tiny model has learnt them apart. The folds of a protocol are articles."""
    if folds:
        return Texts(folds, data["raw_retain"])
    return Texts([("all", training_texts(data, ["forget"]))], training_texts(data, ["retain"]))


def chunked_texts(given: Given, data: DatasetDict, folds: Any, models: Models) -> Texts:
    """Documents, in pieces of the greatest length."""

    def chunked(texts: Any) -> Any:
        return chunk_documents(texts["text"], models.tokenizer, given.args.max_length)

    stages = folds or [("all", data["raw_forget"])]
    return Texts([(name, chunked(texts)) for name, texts in stages], chunked(data["raw_retain"]))


def _how(given: Given) -> dict[str, Any]:
    """The settings of every evaluation of a run: solved examples only distract a tiny model."""
    return {"icl": not given.tiny, "progress": not given.tiny}


def make_evaluation(given: Given, data: DatasetDict, models: Models, published: float | None) -> MUSEEvaluation:
    """`published`: the AUC of a retrained model, where there is none here."""
    auc = published
    if models.retrained:
        zero = MUSEEvaluation(data, models.tokenizer, **_how(given))
        auc = zero.privleak_auc(given.load(models.retrained))
    return MUSEEvaluation(data, models.tokenizer, auc_retrain=auc, **_how(given))


def unlearn(
    given: Given, folder: Path, config: Any, data: DatasetDict, texts: Texts, models: Models, results: Results
) -> BLURTrainer | None:
    """
    Trains by one method, stage after stage, and measures.

    A stage begins where the last one ended, with `--scale` with the target. The last one is in `folder`. Returns its
    trainer; `None` if it had ended before an interrupt.
    """
    own, label, start = folder == given.out, label_of(config), time.time()
    first: Any = models.target
    model: Any
    for index, (stage, forget) in enumerate(texts.stages):
        is_last = index == len(texts.stages) - 1
        into = folder if is_last else folder / stage.replace(" ", "_")
        if given.script.scale:
            first = models.target
        trainer = None
        if is_finished(given.args, into):
            model = load_stage(given, models, into)
        else:
            leveled, sets = config, {"forget_dataset": forget, "retain_dataset": texts.retain}
            if needs_level(config) or (given.script.level and own):
                leveled, sets = to_the_level(given, config, sets, data, models)
            by_name = isinstance(first, str)
            trainer = BLURTrainer(
                first,
                changed(leveled, output_dir=str(into), model_init_kwargs=given.load.options if by_name else None),
                processing_class=models.tokenizer,
                peft_config=get_peft_config(given.model_args) if by_name else None,
                benchmarks={"muse": results.evaluation},
                **sets,
            )
            train_and_save(trainer, label if stage == "all" else f"{label}, {stage}")
            model = trainer.model
        first = model if given.model_args.use_peft else str(into)  # saved whole; the model may be in shards
        if len(texts.stages) > 1 and own:
            results.add_stage(stage, results.evaluation(model))
    results.add(label, "unlearned" if own else "baseline", model, time.time() - start)
    return trainer


def to_the_level(
    given: Given, config: Any, sets: dict[str, Any], data: DatasetDict, models: Models
) -> tuple[Any, dict[str, Any]]:
    """The arguments and the sets of a training that ends where a model is that never saw the forget set."""
    asked = given.script.level or ("retrained" if models.retrained else "unseen")
    unseen, forget = data.get("privleak_holdout"), sets["forget_dataset"]
    level = measured(
        asked, forget, sets["retain_dataset"], unseen, models.target, models.retrained, given.load, models.tokenizer
    )
    return with_level(config, sets, level)


def load_stage(given: Given, models: Models, folder: Path) -> PreTrainedModel | PeftModel:
    """The model of a stage that had ended before an interrupt; an adapter is trained further."""
    if not given.model_args.use_peft:
        return given.load(str(folder))
    return PeftModel.from_pretrained(given.load(models.target), folder, is_trainable=True, torch_device="cpu")


def attack(given: Given, data: DatasetDict, texts: Texts, models: Models, evaluation: MUSEEvaluation) -> dict[str, Any]:
    """What comes back after attacks on the model as it would be given away: whole, and not in few bits."""
    beside = "hold" if "raw_hold" in data else "retain"
    sets = {"forget set": [row for _, rows in texts.stages for row in rows], f"{beside} set": data[f"raw_{beside}"]}
    anew = MUSEEvaluation(prefixed(data, f"{PREFIX}\n\n"), models.tokenizer, **_how(given))
    return robustness(
        given.load(str(given.out), to_train=True),
        evaluation,
        relearning=relearning_sets(sets, models.tokenizer, given.args),
        prompted={"prefix": anew},
        **of_tiny(given, models),
    )
