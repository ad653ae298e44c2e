"""The one trainer: two passes over the accumulation window, one rule, one optimizer step."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from blur_trainer.constants import ROLES
from blur_trainer.data.row_collator import RowCollator
from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.gradients.engines import check_engine
from blur_trainer.gradients.rules import Rule
from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives.base import Objective
from blur_trainer.saving import output_dir as saving
from blur_trainer.trainers import setup
from blur_trainer.trainers.arguments import check_unknown
from blur_trainer.trainers.callbacks import PairingCallback
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.datasets import pair, tokenize_all
from blur_trainer.trainers.effect import check_effect, settings_read
from blur_trainer.trainers.evaluation import EvaluationMixin, settle_benchmarks
from blur_trainer.trainers.given_back import restoring
from blur_trainer.trainers.last_words import LastWordsCallback, has_stream
from blur_trainer.trainers.learned_vectors import settle_vectors
from blur_trainer.trainers.level_guard import LevelCallback, level_check, with_level_check
from blur_trainer.trainers.masking import MaskCallback
from blur_trainer.trainers.method_choice import MethodChoice
from blur_trainer.trainers.model import ModelMixin
from blur_trainer.trainers.procedures import Procedure, warn_of_rounding
from blur_trainer.trainers.references import PrecomputeCallback, make_reference, shard_reference
from blur_trainer.trainers.rule_state import RuleStateCallback
from blur_trainer.trainers.saving import SavingMixin
from blur_trainer.trainers.schedule_free import to_averaged_point
from blur_trainer.trainers.single_buffer import check_forward_mode
from blur_trainer.trainers.step_log import StepLog
from blur_trainer.trainers.stepping import StepMixin
from blur_trainer.trainers.template_day import day_callbacks
from blur_trainer.trainers.topics import topic_names
from blur_trainer.trainers.trials import Settings, TrialMixin


class UnlearningTrainer(ModelMixin, StepMixin, TrialMixin, EvaluationMixin, SavingMixin, Trainer):
    """Unlearning = a forget objective x a retain objective x a gradient rule, inside `transformers.Trainer`.

    Each optimizer step makes one pass over the accumulation window for the forget objective and one for the retain
    objective. The rule turns the Gramian of both gradients into two weights, and `.grad` becomes the weighted sum.
    Clipping, optimizer, scheduler, checkpoints and everything else are Trainer's own. The logged `loss` is
    `w_forget * loss/forget + w_retain * loss/retain`; with fixed weights, its gradient is what the optimizer receives.

    Args:
        model: a model, a `PeftModel`, or a name or path for `from_pretrained`. Or give `model_init`.
        args: an [`UnlearningConfig`], or any `TrainingArguments`. Default: the defaults of the class.
        forget_dataset: what to forget, a `Dataset`, `IterableDataset` or list with the columns `text`,
            `prompt`/`completion`, `messages`, `question`/`answer` or `input_ids`(/`labels`). Or a mapping of topics to
            datasets: optimizer steps go through the topics in turns, see `UnlearningConfig.topics`.
        retain_dataset: what to keep, in the same formats, or a mapping of names to such sets, which are joined, see
            `UnlearningConfig.retain_set_weights`. With topics: one for each, or one for all. Optional only with
            `Sum(retain_weight=0)`.
        eval_dataset: a dataset, or a dict of datasets, whose NLL is evaluated on the schedule of `eval_strategy`.
        processing_class: the tokenizer. Default: the one beside the model.
        peft_config: wraps the model, e.g. in LoRA. The reference model is then the model with the adapter off.
        ref_model: the reference model. Default: the model before training, see `blur_trainer.models.reference`.
        forget_objective, retain_objective: an [`Objective`]. Default: from `args`.
        rule: `(2, 2)` Gramian -> `(2,)` weights, e.g. [`BLUR`] or a TorchJD `Weighting`. Default: from `args`.
        forget_procedure: how the forget gradient is made, e.g. [`SAM`]. Default: from `args`, else by one pass.
        benchmarks: name -> [`Evaluation`], or a function from the model to a flat dict of numbers. Runs with every
            evaluation; the numbers are logged as `eval_{name}_{key}`. `metric_for_best_model` may be one of these
            keys, or the name of an [`Evaluation`] alone: then it is its primary metric.
        model_init: instead of `model`: makes it, for each training and trial anew, as in `Trainer`. What it answers is
            taken as `model` would be, with `peft_config`. The reference is made anew too.
        forgotten_dataset: what the model forgot before, or a mapping of names to such sets. It is not trained on; texts
            to replay that repeat it are dropped.
        data_collator: pads the rows of one role, e.g. `DataCollatorForSeq2Seq`. Default: [`UnlearningCollator`].
        callbacks, optimizers, optimizer_cls_and_kwargs, compute_metrics, preprocess_logits_for_metrics: as in
            `Trainer`. The two last are about `eval_dataset`.
    """

    config_class: ClassVar[type[UnlearningConfig]] = UnlearningConfig
    #: whether a training without a level is to say by losses what it has done: see [`LastWordsCallback`]
    speaks_of_losses: ClassVar[bool] = True
    args: UnlearningConfig

    @restoring
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: UnlearningConfig | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        *,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: PreTrainedModel | None = None,
        forget_objective: Objective | None = None,
        retain_objective: Objective | None = None,
        rule: Rule | None = None,
        forget_procedure: Procedure | None = None,
        benchmarks: Mapping[str, Evaluation | Measure] | None = None,
        model_init: Callable[..., Any] | None = None,
        forgotten_dataset: Any = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        **unknown: Any,
    ):
        check_unknown(type(self), unknown)
        objects = (rule, forget_procedure, forget_objective, retain_objective)
        self._choice = MethodChoice(*objects, topic_names(forget_dataset), retains=retain_dataset is not None)
        args = setup.resolve_args(self.config_class, args, model, self._choice.unread)
        self._settle_method(args)
        own_optimizer = any(optimizers) or optimizer_cls_and_kwargs is not None
        check_effect(args, self._topic_rules or [self.rule], own_optimizer, "retain" in self.objectives)
        set_seed(args.seed)  # adapters are initialized before Trainer sets the seed
        given = self._given_model(model, model_init)
        model = self._load_model(given, args, peft_config)
        tokenizer = self._settle_model(model, args, processing_class, ref_model, optimizers[0])
        forget, retain, eval_dataset = tokenize_all(
            *(forget_dataset, retain_dataset, eval_dataset, model, tokenizer, args, self.objectives),
            *(self.speaker, forgotten_dataset),
        )
        self._tokenized = (forget, retain)
        settle_vectors(self.objectives["forget"], forget, retain, lambda: self.speaker(model), tokenizer, args)
        self.benchmarks = self._settle_benchmarks(benchmarks or {}, args)
        self.reference = make_reference(model, ref_model, self.objectives, args, given)
        self._first_model = None if model_init is None else model
        super().__init__(
            model=model if model_init is None else None,
            model_init=model_init,
            args=args,
            data_collator=RowCollator(setup.pad_token_id(model, tokenizer), rows=data_collator),
            train_dataset=pair(forget, retain, args),
            # Trainer needs a dataset for its schedule; benchmarks have their own data
            eval_dataset={} if eval_dataset is None and self.benchmarks else eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=[PairingCallback(), *self.make_frame(args), *day_callbacks(args, tokenizer), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        # what a fresh model needs; without `model_init`, a `ref_model` may go when its numbers are precomputed
        self._models = (peft_config, None if model_init is None else ref_model)
        self._settle_engine(ref_model)
        self._settings, self._backend, self._window = Settings(args), None, []
        self.step_log = StepLog(self.accelerator, args.max_skipped_steps, self.check_weights)

    def _settle_engine(self, ref_model: PreTrainedModel | None) -> None:
        check_engine(self.accelerator, self.args)
        if self.args.tf32 is False:  # accelerate switches it on for compiled models, whatever was asked
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        warn_of_rounding(self.forget_procedure, self.model, self.args.bf16 or self.args.fp16)
        check_forward_mode(self.model, self.args, self.accelerator.distributed_type)
        setup.choose_heads(self.args, self.model, self.reference, ref_model)
        if isinstance(self.reference, FrozenModel):
            shard_reference(self.accelerator, self.reference)
        self._precompute = PrecomputeCallback(
            self.accelerator,
            self.data_collator,
            self.train_dataset,
            self.reference,
            ref_model,
            wrapped_model=lambda: self.model_wrapped,
            keeps=self.model_init is not None,
        )
        self._rule_state = RuleStateCallback(lambda: self._topic_rules or [self.rule])
        self.add_callback(self._rule_state)
        self._masking = MaskCallback(self.args, self.data_collator, lambda: self.train_dataset, lambda: self.objectives)
        self.add_callback(self._masking)
        if self.args.precompute_ref_logps:
            self.add_callback(self._precompute)
        if self._level is not None:
            self.add_callback(self._level)
        elif self.speaks_of_losses and not has_stream(self._tokenized):
            sets = {role: rows for role, rows in zip(ROLES, self._tokenized, strict=True) if role in self.objectives}
            options = settings_read(self.args, self._choice.unread)
            self.add_callback(
                LastWordsCallback(sets, self.benchmarked_model, lambda: self.interrupt.interrupted, options)
            )

    def _settle_benchmarks(self, given: Mapping[str, Evaluation | Measure], args: UnlearningConfig) -> dict[str, Any]:
        """Those of the user, and that of the level with its callback, if there is a level."""

        def method() -> Any:
            return self.objectives, self._topic_rules or [self.rule]

        def interrupted() -> bool:
            return self.interrupt.interrupted

        check = level_check(self.objectives, *self._tokenized, args)
        self._level = None
        if check is not None:
            self._level = LevelCallback(check, args, method, self.benchmarked_model, interrupted)
        return settle_benchmarks(with_level_check(given, check), args)

    # ---- beginning and end ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`. Overwrites nothing in `output_dir`. Resuming ignores incomplete checkpoints.

        After SIGINT or SIGTERM it saves a checkpoint and raises [`TrainingInterrupted`]. It raises if no weight has
        changed, or if the weights are ruined.
        """
        saving.agreed(lambda: self.check_trial(trial), self.args.should_save)
        with self.running(resume_from_checkpoint) as start:
            self._precompute.resumed_from = self._rule_state.resumed_from = self._masking.resumed_from = start
            if start is not None:
                self._load_objectives(start)
            try:
                with self.frozen():
                    output = super().train(start, trial, *args, **kwargs)
            finally:
                to_averaged_point(self.optimizer)  # also after an exception: the model is there to be measured
        return output._replace(training_loss=output.metrics["train_loss"])  # without skipped steps
