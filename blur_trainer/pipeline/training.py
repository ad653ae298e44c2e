"""The training of a run. However it ends, there is a model to measure: a verdict says what became of it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel
from trl import get_peft_config

from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.scripts.levels import with_level
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.running import is_finished, train_and_save
from blur_trainer.trainers.replay_rows import NoLossFilter, NothingToReplay
from blur_trainer.uld.trainer import ULDTrainer
from blur_trainer.uld.tuning import tune_weight

#: the folder, in `output_dir`, of the whole model
MERGED = "merged"
_ADAPTER = (
    "The adapter alone forgets: the base model still knows, and whoever takes the adapter off has it back. Write the "
    "whole model with `--merge true`, or `blur-trainer merge`."
)
_ASSISTANT = (
    "The assistant alone forgets: the base model still knows, and whoever takes the assistant off has it back. Load "
    "both with `blur_trainer.LogitDifferenceModel.from_pretrained`, or write both into ordinary weights with "
    "`blur-trainer distill`."
)


@dataclass(frozen=True)
class Trained:
    """
    What a training left.

    Args:
        model: to measure.
        trainer: for the model card; `None` if nothing was saved, or if the training had ended before an interrupt.
        seconds: of the training.
        saved: whether the model is in `output_dir`.
        notes: what the user must know beside the verdict.
    """

    model: PreTrainedModel
    trainer: Any
    seconds: float | None
    saved: bool
    notes: tuple[str, ...]


def train(prepared: Prepared, level: Level, load: ModelLoader, out: Path) -> Trained:
    """Trains and saves, or loads what was trained before an interrupt."""
    notes = _base_knows(prepared, out)
    if is_finished(prepared.args, out):
        model = load(str(out))
        if prepared.method.trainer is ULDTrainer:
            _tune(prepared, model, level)
            if PartialState().is_main_process:
                model.config.save_pretrained(out)
        return Trained(model, None, None, True, notes)
    trainer, said = make_trainer(prepared, level, load, prepared.args)
    start = time.time()
    try:
        train_and_save(trainer, prepared.method.label)
    except (FloatingPointError, RuntimeError) as error:  # a model that is ruined, or that nothing has changed
        if not (isinstance(error, FloatingPointError) or trainer.nothing_trained):
            raise
        return Trained(_model_of(trainer), None, time.time() - start, False, (*said, str(error), "No model was saved."))
    model = _model_of(trainer)
    if isinstance(trainer, ULDTrainer):
        tuning = _tune(prepared, model, level)
        trainer.args.weight, trainer.args.top_logit_filter = tuning.weight, tuning.top_logit_filter
        trainer.save_model()
    return Trained(model, trainer, time.time() - start, True, (*said, *notes))


def make_trainer(
    prepared: Prepared, level: Level, load: ModelLoader, args: Any, **more: Any
) -> tuple[Any, tuple[str, ...]]:
    """
    The trainer, and what the user must know. It goes without replay if the model says nothing but what is to be
    forgotten.

    Args:
        args: as of `prepared`, or changed.
        more: arguments of the trainer. With `model_init` among them, no model is given beside it.
    """
    method = prepared.method
    training: dict[str, Any] = {f"{role}_dataset": prepared.sets[role].dataset for role in ("forget", "retain")}
    if method.leveled and args.forget_level is None:
        args, training = with_level(args, training, level)
    args.model_init_kwargs = load.options
    if method.trainer is ULDTrainer:
        training |= {"augment_forget": "rules", "augment_retain": "none"}
    if prepared.teacher is not None:
        training["ref_model"] = load(prepared.teacher)

    before = {str(number): reading.dataset for number, reading in enumerate(prepared.forgotten)}

    def made(args: Any) -> Any:
        if before and args.replay is not None:
            more["forgotten_dataset"] = before
        else:
            more.pop("forgotten_dataset", None)
        return method.trainer(
            None if "model_init" in more else str(prepared.model_args.model_name_or_path),
            args,
            processing_class=prepared.tokenizer,
            peft_config=get_peft_config(prepared.model_args),
            **training,
            **more,
        )

    try:
        return _without_filter(made, args)
    except NothingToReplay as error:
        said = f"Nothing is replayed, so only the retain set protects the rest. {error}"
        PartialState().print(said, file=sys.stderr)
        return made(changed(args, replay=None, replay_kwargs=None)), (said,)


def _without_filter(made: Callable[[Any], Any], args: Any) -> tuple[Any, tuple[str, ...]]:
    """The trainer; if replay cannot filter by loss and nobody asked for that, it filters by words alone."""
    try:
        return made(args), ()
    except NoLossFilter as error:
        if "loss_quantile" in (args.replay_kwargs or {}):
            raise
        said = f"Texts to replay are compared with the forget set by their words alone. {error}"
        PartialState().print(said, file=sys.stderr)
        return made(changed(args, replay_kwargs={**(args.replay_kwargs or {}), "loss_quantile": None})), (said,)


def _model_of(trainer: Any) -> PreTrainedModel:
    return trainer.unlearned_model() if isinstance(trainer, ULDTrainer) else trainer.model


def _tune(prepared: Prepared, model: Any, level: Level) -> Any:
    """ULD's strength is a number of the composed model: chosen by the level, on paraphrases where there are some."""
    asked = prepared.sets.get("paraphrased", prepared.sets["forget"]).dataset
    how = {"batch_size": prepared.args.per_device_eval_batch_size, "max_length": prepared.args.max_length}
    return tune_weight(model, asked, prepared.sets["retain"].dataset, level, prepared.tokenizer, **how)


def _base_knows(prepared: Prepared, out: Path) -> tuple[str, ...]:
    if prepared.method.trainer is ULDTrainer:
        return (_ASSISTANT,)
    if not prepared.model_args.use_peft:
        return ()
    return (f"The whole model without an adapter is in {out / MERGED}.",) if prepared.script.merge else (_ADAPTER,)
