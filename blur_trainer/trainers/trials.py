"""`model_init`, `hyperparameter_search` and `auto_find_batch_size`: several trainings by one trainer.

Each begins with what a new trainer would have: a fresh model, its reference, its pairs, an empty log.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from blur_trainer.data.grouping import GroupedDataset
from blur_trainer.data.pairing import PairedIterableDataset
from blur_trainer.data.topics import TopicDataset
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.rules import Rule
from blur_trainer.models.reference import FrozenModel, Reference
from blur_trainer.objectives.base import Objective
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.datasets import pair
from blur_trainer.trainers.learned_vectors import carry_vectors
from blur_trainer.trainers.method_choice import MethodChoice
from blur_trainer.trainers.procedures import Procedure, warn_of_rounding
from blur_trainer.trainers.references import PrecomputeCallback, make_reference, shard_reference
from blur_trainer.trainers.step_log import StepLog

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

#: settings of ours that are read in time; those of the method are `MethodChoice.variable`, all others at construction
_READ_IN_TIME = {"max_skipped_steps", "offload_forget_gradient", "weight", "top_logit_filter"}


class Settings:
    """This package's settings that a training began with. A subclass's own are read by whoever wrote it."""

    def __init__(self, args: UnlearningConfig):
        classes: list[Any] = [cls for cls in type(args).__mro__ if cls.__module__.startswith("blur_trainer.")]
        names = {f.name for cls in classes if is_dataclass(cls) for f in fields(cls)}
        own = names - {f.name for f in fields(TrainingArguments)} - _READ_IN_TIME
        self.own = {name: copy.deepcopy(getattr(args, name)) for name in own}
        self.pairs: tuple[Any, ...] | None = pairs_of(args)

    def changed(self, args: UnlearningConfig) -> set[str]:
        return {name for name, value in self.own.items() if getattr(args, name) != value}


def pairs_of(args: UnlearningConfig) -> tuple[Any, ...]:
    """The settings that the pairs depend on."""
    return args.seed, args.data_seed, args.max_steps, args.train_sampling_strategy


class TrialMixin(_Base):
    """Gives a `Trainer` a new beginning for each training, trial, and attempt with a smaller batch."""

    args: UnlearningConfig
    rule: Rule
    forget_procedure: Procedure | None
    objectives: dict[str, Objective]
    reference: Reference | None
    step_log: StepLog
    trained: str
    _backend: GradientBackend | None
    _choice: MethodChoice
    _first_model: Any  # until Trainer, which is constructed with `model_init`, asks for it
    _models: tuple[PeftConfig | None, PreTrainedModel | None]  # `peft_config` and `ref_model` as given
    _precompute: PrecomputeCallback
    _settings: Settings
    _tokenized: tuple[Any, Any]  # forget and retain
    _topic_rules: list[Rule]
    _window: list[dict[str, Any]]

    def _given_model(self, model: Any, model_init: Any) -> Any:
        """`model`, or the first one of `model_init`."""
        if model is None and model_init is None:
            raise TypeError(
                "`model` must be a model name, a `PreTrainedModel` or a `PeftModel`, got `NoneType`. Or pass "
                "`model_init`."
            )
        if model is not None and model_init is not None:
            raise ValueError("Pass either `model` or `model_init`, which makes it for each training anew, not both.")
        self.model_init, self._first_model = model_init, None
        return model if model_init is None else super().call_model_init()

    def call_model_init(self, trial: Any = None) -> Any:
        """As Trainer's: a fresh model for each training and trial, made ready as `model` is, with its reference."""
        if self._first_model is not None:
            model, self._first_model = self._first_model, None
            return model
        peft_config, ref_model = self._models
        given, self._backend = super().call_model_init(trial), None
        model = self._load_model(given, self.args, peft_config)  # type: ignore[attr-defined]
        self.choose_trainable(model, self.args)  # type: ignore[attr-defined]
        if ref_model is None:
            self.reference = make_reference(model, None, self.objectives, self.args, given)
            if isinstance(self.reference, FrozenModel):
                shard_reference(self.accelerator, self.reference)
        setup.choose_heads(self.args, model, self.reference)
        self._settings.pairs = None  # a new reference may have other log-probabilities
        return model

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's. It is where Trainer begins each training, trial and attempt with another batch size."""
        if self.is_in_train:
            self._begin_anew()
        dataset = self.train_dataset
        with _in_order(self.args) if isinstance(dataset, GroupedDataset | TopicDataset) else nullcontext():
            loader: Any = super().get_train_dataloader()
        if isinstance(dataset, TopicDataset):
            dataset.resize(loader.total_batch_size * self.args.gradient_accumulation_steps)
        elif isinstance(dataset, PairedIterableDataset):
            dataset.block = loader.batch_size * self.accelerator.num_processes
        if self.args.dataloader_persistent_workers:
            # Workers that stay alive draw their seeds once. From the global generator, a resumed training would draw
            # another time, and its dropout would differ.
            getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _settle_method(self, args: UnlearningConfig) -> None:
        self.rule, self.objectives, self._topic_rules = self._choice.settle(args)
        self.forget_procedure = self._choice.procedure(args)

    def _begin_anew(self) -> None:
        """What a new trainer would have, with the settings as they are now."""
        args = self.args
        changed = self._settings.changed(args)
        if fixed := sorted(changed - self._choice.variable):
            read = sorted(self._choice.variable - {"topics"})
            raise ValueError(
                f"The settings {fixed} were changed after the trainer was made, which does not read them again: make a "
                f"new trainer. Of this package's settings, {read} may change between trainings."
            )
        if changed:
            before = self.objectives["forget"]
            self._settle_method(args)
            carry_vectors(before, self.objectives["forget"])
            warn_of_rounding(self.forget_procedure, self.model, args.bf16 or args.fp16)
        if self._settings.pairs != pairs_of(args):
            self.train_dataset = self._precompute.dataset = pair(self._tokenized[0], self._tokenized[1], args)
        self._settings = Settings(args)
        self._precompute.accelerator, self._precompute.reference = self.accelerator, self.reference
        self._backend, self._window = None, []
        self.step_log = StepLog(self.accelerator, args.max_skipped_steps, self.check_weights)  # type: ignore[attr-defined]

    def check_trial(self, trial: Any) -> None:
        """Raises if the folder of the trial's checkpoints holds another run. `output_dir` is checked by itself."""
        if trial is not None and self.hp_search_backend == HPSearchBackend.OPTUNA:
            name = f"run-{trial.number}" if self.hp_name is None else self.hp_name(trial)
            check_output_dir(str(Path(str(self.args.output_dir), name)))


@contextmanager
def _in_order(args: TrainingArguments) -> Iterator[None]:
    """The dataset has an order of its own: Trainer reads it as it is."""
    given, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"
    try:
        yield
    finally:
        args.train_sampling_strategy = given
