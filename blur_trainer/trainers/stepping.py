"""The optimizer step inside `Trainer`: the window it gathers, the loss of a role, the engine's backend, the log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer

from blur_trainer.constants import ROLES
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.engines import check_unchanged, choose_backend
from blur_trainer.gradients.rules import Rule, Sum
from blur_trainer.models.reference import Reference
from blur_trainer.objectives.base import Batch, Objective
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.level_guard import LevelCallback
from blur_trainer.trainers.masking import MaskCallback
from blur_trainer.trainers.procedures import Procedure
from blur_trainer.trainers.references import PrecomputeCallback
from blur_trainer.trainers.rule_state import RuleStateCallback
from blur_trainer.trainers.schedule_free import to_averaged_point, to_training_point
from blur_trainer.trainers.single_buffer import one_buffer_step
from blur_trainer.trainers.step import Step, two_slot_step
from blur_trainer.trainers.step_log import StepLog

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

Window = list[dict[str, Any]]
logger = get_logger(__name__)
_STREAM_BEGINS_ANEW = (
    "The stream of examples is shorter than what the interrupted training had read: Trainer does not know how many "
    "times it was gone through, and the resumed training begins it anew. It reads other examples than an "
    "uninterrupted one, unless that had just come to the stream's end."
)


class StepMixin(_Base):
    """Gives a `Trainer` the step with two objectives: `compute_loss` and `training_step` are what to override."""

    args: UnlearningConfig
    objectives: dict[str, Objective]
    reference: Reference | None
    rule: Rule
    forget_procedure: Procedure | None
    step_log: StepLog
    _topic_rules: list[Rule]
    _backend: GradientBackend | None
    _level: LevelCallback | None
    _precompute: PrecomputeCallback
    _rule_state: RuleStateCallback
    _masking: MaskCallback
    _window: Window

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Window, dict[str, Tensor] | None]:
        """The accumulation window, and per role the number of items over all processes, which divides its loss."""
        self._window = []
        if self.control.should_training_stop:  # resumed from the last step: Trainer would make one more
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            if self.step_log.steps == 0 and self._precompute.resumed_from is not None:
                logger.warning_once(_STREAM_BEGINS_ANEW)
            return batches, None
        counts = self._count_items(batches)
        # Trainer steps after `num_batches`. So where a stream ends in mid-window, the rest of it is empty.
        batches += [{} for _ in range(num_batches - len(batches))]
        if self.args.include_num_input_tokens_seen != "no":
            batches = [batch | _flat(batch) for batch in batches]
        return batches, counts

    def _count_items(self, batches: Sequence[Mapping[str, Batch]]) -> dict[str, Tensor]:
        counts = [
            torch.stack([objective.num_items(batch[role]) for batch in batches]).sum()
            for role, objective in self.objectives.items()
        ]
        totals = torch.stack(counts).to(self.args.device)
        if self.args.average_tokens_across_devices:
            totals = self.accelerator.reduce(totals, "sum")
        else:  # the mean of the processes' means
            totals = totals * self.accelerator.num_processes
        return dict(zip(self.objectives, totals.unbind(), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """
        The loss of one role's batch, of a pair, or of a plain batch. Override it: every pass of a step asks it.

        | `inputs` | answer |
        |---|---|
        | `{"forget": batch}` or `{"retain": batch}` | that objective's loss: its sum over `num_items_in_batch` |
        | `{"forget": batch, "retain": batch}` | `w_forget * forget + w_retain * retain`, what is logged as `loss` |
        | `{"input_ids": ..., "labels": ...}` | what `Trainer` answers: evaluation asks so |

        Args:
            model: the model to call: the engine's wrapper, not always `self.model`.
            return_outputs: with the losses by role beside the loss; for a plain batch, with the model's outputs.
            num_items_in_batch: the divisor, for a pair one per role. In training it counts the whole window, on all
                processes. `None`: the batch's own.

        The weights of a pair are those of the last step, or of the rule `Sum`, which are always the same.
        """
        roles = [role for role in ROLES if role in inputs]
        if not roles:
            return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        if absent := [role for role in roles if role not in self.objectives]:
            raise ValueError(f"`compute_loss` got a {absent[0]} batch, but this training has no {absent[0]} objective.")
        counts = num_items_in_batch if isinstance(num_items_in_batch, Mapping) else {roles[0]: num_items_in_batch}
        if len(roles) == 2 and counts.get(roles[0]) is not None and roles[1] not in counts:
            raise ValueError(f"`num_items_in_batch` of a pair is one number per role, got {num_items_in_batch!r}.")
        losses = {r: self.objectives[r](model, inputs[r], self.reference, counts.get(r)) for r in roles}
        loss = losses[roles[0]] if len(roles) == 1 else self._weighted(losses, self._rule_of(inputs["forget"]))
        return (loss, losses) if return_outputs else loss

    def _rule_of(self, batch: Batch) -> Rule:
        """The rule, of the batch's topic if there are topics."""
        return self._topic_rules[int(batch["topic"][0])] if self._topic_rules else self.rule

    def _weighted(self, losses: Mapping[str, Tensor], rule: Rule) -> Tensor:
        weights = rule(torch.zeros(2, 2, dtype=torch.float64)) if isinstance(rule, Sum) else self.step_log.weights
        if weights is None:
            raise ValueError(
                f"The weights of {rule} come from both gradients, and no step was made yet: give `compute_loss` one "
                "role's batch, as `{'forget': batch}`."
            )
        return torch.stack([losses[role] * weight for role, weight in zip(ROLES, weights.tolist(), strict=False)]).sum()

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Keeps the micro-batch. On the last one of the window, runs the whole step up to `.grad`."""
        batch = {role: inputs[role] for role in self.objectives if role in inputs}
        if batch:  # not behind the end of a stream
            # Trainer's `_prepare_inputs` would cast `ref_logps` to a DeepSpeed model's bf16, which is too coarse
            self._window.append(send_to_device(batch, self.args.device))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        to_training_point(self.optimizer)
        run = one_buffer_step if self.args.single_gradient_buffer else two_slot_step
        counts = self._count_items(self._window) if num_items_in_batch is None else num_items_in_batch
        step = self._step(self._backend_of(model), counts)
        self._masking.before(step, self.optimizer)
        loss = run(step)
        self._masking.after(step)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def create_backend(self, model: nn.Module) -> GradientBackend:
        """Where the two gradients are kept, by engine. Override it for a backend of your own."""
        return choose_backend(self.accelerator, model, self.args, self.args.offload_forget_gradient)

    def _backend_of(self, model: nn.Module) -> GradientBackend:
        backend = self._backend
        if backend is None or backend.model is not model:
            backend = self.create_backend(model)
        elif changed := backend.changed():
            check_unchanged(self.accelerator, model, changed, self.optimizer)
            self._rule_state.parameters_changed()
            self._masking.parameters_changed()
            backend = self.create_backend(model)
        backend.retain_mean, backend.mask = self._rule_state.mean, self._masking.mask
        self._backend = backend
        return backend

    def _step(self, backend: GradientBackend, counts: Mapping[str, Tensor]) -> Step:
        """What this optimizer step reads; the window is empty afterwards."""
        window, self._window = self._window, []

        def rule() -> Rule:  # asked behind the Gramian, where the host has waited for the device anyway
            return self._rule_of(window[0]["forget"])

        def loss(model: nn.Module, role: str, batch: Batch, count: Tensor) -> Tensor:
            return self.compute_loss(model, {role: batch}, num_items_in_batch=count)

        return Step(
            number=self.state.global_step + 1,
            epoch=float(self.state.epoch or 0.0),
            window=window,
            counts=counts,
            loss=loss,
            rule=rule,
            forget_pass=self.forget_procedure,
            backend=backend,
            accelerator=self.accelerator,
            autocast=self.compute_loss_context_manager,
            log=self.step_log,
            strength=1.0 if self._level is None else self._level.strength,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the values of the steps since the last log to each training log. Skipped steps are in no loss."""
        if "loss" in logs:
            logs |= self.step_log.drain(logs["loss"])
        if "train_loss" in logs:  # the end; the best model is loaded after it
            logs["train_loss"] = self.step_log.train_loss(logs["train_loss"])
            to_averaged_point(self.optimizer)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The operations of both roles in a micro-batch."""
        present = [role for role in self.objectives if role in inputs]
        return sum(int(super(StepMixin, self).floating_point_ops(inputs[role])) for role in present)


def _flat(batch: Mapping[str, Batch]) -> dict[str, Tensor]:
    """The tokens of all roles in one row, where Trainer counts them: `include_num_input_tokens_seen`."""
    tokens = {}
    for name in ("input_ids", "attention_mask"):
        parts = [part[name].flatten() for part in batch.values()]
        tokens[name] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return tokens
