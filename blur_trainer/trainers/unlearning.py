"""The one trainer: two passes over the accumulation window, one rule, one optimizer step."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.engines import check_engine, choose_backend
from blur_trainer.gradients.rules import Rule
from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.saving import output_dir as saving
from blur_trainer.saving.checkpoints import CheckpointCallback, resume_point
from blur_trainer.trainers import setup
from blur_trainer.trainers.callbacks import InterruptCallback, PairingCallback
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.datasets import pair, tokenize_all
from blur_trainer.trainers.evaluation import EvaluationMixin, settle_benchmarks
from blur_trainer.trainers.references import PrecomputeCallback, make_reference, shard_reference
from blur_trainer.trainers.saving import SavingMixin
from blur_trainer.trainers.single_buffer import check_forward_mode, check_single_buffer, one_buffer_step
from blur_trainer.trainers.step import Step, two_slot_step
from blur_trainer.trainers.step_log import StepLog
from blur_trainer.trainers.template_day import day_callbacks
from blur_trainer.trainers.topics import settle_topics
from blur_trainer.trainers.trainable import choose_trainable


class UnlearningTrainer(EvaluationMixin, SavingMixin, Trainer):
    """Unlearning = a forget objective x a retain objective x a gradient rule, inside `transformers.Trainer`.

    Each optimizer step makes one pass over the accumulation window for the forget objective and one for the retain
    objective. The rule turns the Gramian of both gradients into two weights, and `.grad` becomes the weighted sum.
    Clipping, optimizer, scheduler, checkpoints and everything else are Trainer's own. The logged `loss` is
    `w_forget * loss/forget + w_retain * loss/retain`; with fixed weights, its gradient is what the optimizer receives.

    Args:
        model: a model, a `PeftModel`, or a name or path for `from_pretrained`.
        args: an [`UnlearningConfig`], or any `TrainingArguments`. Default: the defaults of the class.
        forget_dataset: what to forget, a `Dataset`, `IterableDataset` or list with the columns `text`,
            `prompt`/`completion`, `messages`, `question`/`answer` or `input_ids`(/`labels`). Or a mapping of topics to
            datasets: optimizer steps go through the topics in turns, see `UnlearningConfig.topics`.
        retain_dataset: what to keep, in the same formats. With topics: one for each, or one for all. Optional only with
            `Sum(retain_weight=0)`.
        eval_dataset: a dataset, or a dict of datasets, whose NLL is evaluated on the schedule of `eval_strategy`.
        processing_class: the tokenizer. Default: the one beside the model.
        peft_config: wraps the model, e.g. in LoRA. The reference model is then the model with the adapter off.
        ref_model: the reference model. Default: the model before training, see `blur_trainer.models.reference`.
        forget_objective, retain_objective: an [`Objective`]. Default: from `args`.
        rule: `(2, 2)` Gramian -> `(2,)` weights, e.g. [`BLUR`] or a TorchJD `Weighting`. Default: from `args`.
        benchmarks: name -> [`Evaluation`], or a function from the model to a flat dict of numbers. Runs with every
            evaluation; the numbers are logged as `eval_{name}_{key}`. `metric_for_best_model` may be one of these
            keys, or the name of an [`Evaluation`] alone: then it is its primary metric.
        callbacks, optimizers: as in `Trainer`.
    """

    config_class: ClassVar[type[UnlearningConfig]] = UnlearningConfig
    args: UnlearningConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
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
        benchmarks: Mapping[str, Evaluation | Measure] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = setup.resolve_args(self.config_class, args, model)
        self.rule = args.build_rule() if rule is None else rule
        setup.check_rule(self.rule)
        self.objectives = {
            "forget": args.build_forget_objective() if forget_objective is None else forget_objective,
            "retain": args.build_retain_objective() if retain_objective is None else retain_objective,
        }
        if retain_dataset is None:
            setup.check_retain_free(self.rule)
            del self.objectives["retain"]
        setup.check_objectives(self.objectives, args.precompute_ref_logps)
        check_single_buffer(args, self.rule, self.objectives)
        self._topic_rules = settle_topics(self.objectives, self.rule, forget_dataset, args)
        set_seed(args.seed)  # adapters are initialized before Trainer sets the seed
        source = (model, args.model_init_kwargs)
        model = self._load_model(model, args, peft_config)
        self.trained = choose_trainable(model, args.train_layers, args.train_parameters, self.objectives)
        tokenizer = setup.load_tokenizer(processing_class, model)
        setup.check_models(model, tokenizer, ref_model)
        forget, retain, eval_dataset = tokenize_all(
            forget_dataset, retain_dataset, eval_dataset, model, tokenizer, args, self.objectives["forget"]
        )
        self.benchmarks = settle_benchmarks(benchmarks or {}, args)
        self.interrupt, self.checkpoints, others = InterruptCallback(), CheckpointCallback(), callbacks or []
        self.reference = make_reference(model, ref_model, self.objectives, args, source)
        super().__init__(
            model=model,
            args=args,
            data_collator=UnlearningCollator(setup.pad_token_id(model, tokenizer)),
            train_dataset=pair(forget, retain, args),
            # Trainer needs a dataset for its schedule; benchmarks have their own data
            eval_dataset={} if eval_dataset is None and self.benchmarks else eval_dataset,
            processing_class=tokenizer,
            callbacks=[PairingCallback(), self.interrupt, self.checkpoints, *day_callbacks(args, tokenizer), *others],
            optimizers=optimizers,
        )
        self._settle_engine(ref_model)
        self._backend: GradientBackend | None = None
        self._window: list[dict[str, Any]] = []
        self.step_log = StepLog(self.accelerator, args.max_skipped_steps)

    def _load_model(self, model: Any, args: Any, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
        """The model to train."""
        return setup.load_model(model, args, peft_config)

    def _settle_engine(self, ref_model: PreTrainedModel | None) -> None:
        check_engine(self.accelerator, self.args)
        check_forward_mode(self.model, self.args, self.accelerator.distributed_type)
        setup.choose_heads(self.args, self.model, self.reference, ref_model)
        if isinstance(self.reference, FrozenModel):
            self.reference.model = shard_reference(self.accelerator, self.reference.model)
        self._precompute = PrecomputeCallback(
            self.accelerator,
            self.data_collator,
            self.train_dataset,
            self.reference,
            ref_model,
            wrapped_model=lambda: self.model_wrapped,
        )
        if self.args.precompute_ref_logps:
            self.add_callback(self._precompute)

    # ---- the step ----

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, Batch]], dict[str, Tensor] | None]:
        """The accumulation window, and per role the number of items over all processes, which divides its loss."""
        if self.control.should_training_stop:  # resumed from the last step: Trainer would make one more
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = []
        if not batches:
            return batches, None
        counts = [
            torch.stack([objective.num_items(batch[role]) for batch in batches]).sum()
            for role, objective in self.objectives.items()
        ]
        totals = self.accelerator.reduce(torch.stack(counts).to(device), "sum")
        return batches, dict(zip(self.objectives, totals.unbind(), strict=True))

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Keeps the micro-batch. On the last one of the window, runs the whole step up to `.grad`."""
        # Trainer's `_prepare_inputs` would cast `ref_logps` to a DeepSpeed model's bf16, which is too coarse
        self._window.append(send_to_device(inputs, self.args.device))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        prepare_optimizer = getattr(self.optimizer, "train", None)  # schedule-free optimizers have one
        if callable(prepare_optimizer):
            prepare_optimizer()
        if self._backend is None or self._backend.model is not model:
            self._backend = self.create_backend(model)
        run = one_buffer_step if self.args.single_gradient_buffer else two_slot_step
        loss = run(self._step(self._backend, num_items_in_batch or {}))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def create_backend(self, model: nn.Module) -> GradientBackend:
        """Where the two gradients are kept, by engine. Override it for a backend of your own."""
        return choose_backend(self.accelerator, model, self.args, self.args.offload_forget_gradient)

    def _step(self, backend: GradientBackend, counts: Mapping[str, Tensor]) -> Step:
        """What this optimizer step reads; the window is empty afterwards."""
        window, self._window = self._window, []

        def topic_rule(gramian: Tensor) -> Tensor:  # the topic is read here, where the host waits for the device anyway
            return self._topic_rules[int(window[0]["forget"]["topic"][0])](gramian)

        return Step(
            number=self.state.global_step + 1,
            window=window,
            counts=counts,
            objectives=self.objectives,
            reference=self.reference,
            rule=topic_rule if self._topic_rules else self.rule,
            backend=backend,
            accelerator=self.accelerator,
            autocast=self.compute_loss_context_manager,
            log=self.step_log,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the values of the steps since the last log to each training log."""
        if "loss" in logs:
            logs |= self.step_log.drain()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The operations of both roles in a micro-batch."""
        return sum(int(super(UnlearningTrainer, self).floating_point_ops(inputs[role])) for role in self.objectives)

    # ---- beginning and end ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Overwrites nothing in `output_dir`. Resuming ignores incomplete checkpoints."""
        given, fresh = resume_from_checkpoint, self.state.global_step == 0
        start = saving.agreed(lambda: resume_point(self.output_dir, given, fresh), self.args.should_save)
        self._precompute.resumed_from = start
        if start is not None:
            self._load_objectives(start)
        try:
            with self.checkpoints.guard():
                return super().train(start, *args, **kwargs)
        finally:
            self.interrupt.restore()
