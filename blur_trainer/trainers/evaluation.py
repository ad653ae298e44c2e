"""Evaluation during training: Trainer's own on datasets, and `benchmarks` on the same schedule."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from blur_trainer.evaluation.base import Evaluation, as_evaluation
from blur_trainer.trainers.schedule_free import to_averaged_point

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def settle_benchmarks(given: Mapping[str, Any], args: TrainingArguments) -> dict[str, Evaluation]:
    """The benchmarks as evaluations. `metric_for_best_model` may name one of them: then it is its primary metric."""
    benchmarks = {name: as_evaluation(benchmark) for name, benchmark in given.items()}
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if best in benchmarks:
        args.metric_for_best_model = f"{best}_{benchmarks[best].primary_metric}"
        args.greater_is_better = benchmarks[best].greater_is_better
    return benchmarks


class EvaluationMixin(_Base):
    """Gives a `Trainer` the attribute `benchmarks`, run with every evaluation.

    Their numbers are logged as `{prefix}_{name}_{key}`, reach the callbacks as an evaluation of their own, and are part
    of what `evaluate` returns: so `metric_for_best_model`, `load_best_model_at_end` and early stopping see them.

    Each is called on every process, at the same step: see [`Evaluation`] for what it must keep to.
    """

    benchmarks: dict[str, Evaluation]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's evaluation of `eval_dataset`, and the benchmarks where no dataset is given here."""
        # evaluations draw random numbers, which must not change the dropout of training
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            metrics = self._evaluate_datasets(eval_dataset, ignore_keys, metric_key_prefix)
            if eval_dataset is None and self.benchmarks:
                metrics |= self._run_benchmarks(metric_key_prefix)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As Trainer's, but several processes give the loss of one with the same `per_device_eval_batch_size`.

        Differs from transformers 5.23: there a batch's loss is divided by the tokens of all processes, and the rows
        that are repeated to fill the last batches count in both sums.
        """
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = send_to_device(inputs, self.args.device)
        loader = self.accelerator.gradient_state
        if loader.end_of_dataloader and loader.remainder > 0:  # rows in the last batches, without repeats
            count = len(inputs["labels"])
            real = min(max(loader.remainder - count * self.args.process_index, 1), count)
            inputs = {name: value[:real] for name, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _evaluate_datasets(self, override: Any, ignore_keys: list[str] | None, prefix: str) -> dict[str, float]:
        datasets: Any = self.eval_dataset if override is None else override
        if datasets is None:
            return {}
        if not isinstance(datasets, Mapping):
            return super().evaluate(override, ignore_keys, prefix)
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            metrics |= super().evaluate(name if override is None else dataset, ignore_keys, f"{prefix}_{name}")
        return metrics

    def benchmarked_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _run_benchmarks(self, prefix: str) -> dict[str, float]:
        to_averaged_point(self.optimizer)
        model = self.benchmarked_model()
        model.eval()  # as Trainer's own evaluation leaves it; `training_step` switches back
        metrics = {
            f"{prefix}_{name}_{key}": float(value)
            for name, benchmark in self.benchmarks.items()
            for key, value in benchmark(model).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
