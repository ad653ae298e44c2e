"""The contract of every evaluation: MUSE, TOFU, WMDP, lm-evaluation-harness, and your own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from transformers import PreTrainedModel

#: a plain function that measures a model
Measure = Callable[[PreTrainedModel], Mapping[str, float]]


class Column(TypedDict, total=False):
    """How a table shows one metric."""

    name: str  # the key in what the evaluation returns
    label: str  # its heading
    goal: str  # which values are good: "min", "max", "zero" or "near"
    near: float  # the best value, for the goal "near"; left out, it is the retrained model's
    role: str  # "forget" or "retain", where the goal does not say it


class Evaluation:
    """
    Measures a model. A subclass defines `columns` and `__call__`. [`Results`], [`robustness`] and the trainers'
    `benchmarks` use nothing else.

    A trainer calls it on every process, at the same step, with the unwrapped model in evaluation mode. It must return
    the same numbers on each. Under FSDP2 and ZeRO-3 each process holds a part of every parameter: then all processes
    must run equally many forward passes.

    Example:

    ```python
    class Perplexity(bt.Evaluation):
        columns = [{"name": "forget_ppl", "label": "Perplexity forget", "goal": "max"}]

        def __init__(self, batch):
            self.batch = batch

        def __call__(self, model):
            with torch.no_grad():
                return {"forget_ppl": model(**self.batch, labels=self.batch["input_ids"]).loss.exp().item()}
    ```
    """

    @property
    def columns(self) -> Sequence[Column]:
        """The metrics that a table shows, in order: see [`Column`]. The first one is the primary metric."""
        raise NotImplementedError(f"{type(self).__name__} has no `columns`: say which metrics a table shows.")

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """All numbers of one model, by name."""
        raise NotImplementedError(f"{type(self).__name__} has no `__call__`: measure the model there.")

    @property
    def primary_metrics(self) -> list[str]:
        """The most important metrics, for tables with too many columns. Default: all columns."""
        return [column["name"] for column in self.columns]

    @property
    def primary_metric(self) -> str:
        """The metric that `metric_for_best_model` means if it names the evaluation."""
        names = self.primary_metrics
        if not names:
            raise ValueError(
                f"{type(self).__name__} has no columns yet, and so no primary metric: name one of the metrics that it "
                "returns, or make it a `blur_trainer.Evaluation` with `columns`."
            )
        return names[0]

    @property
    def greater_is_better(self) -> bool:
        """Of the primary metric. Raises `ValueError` where neither greater nor less is better."""
        primary = self.primary_metric
        goal = next((column.get("goal") for column in self.columns if column["name"] == primary), None)
        if goal not in ("min", "max"):
            raise ValueError(f"The goal of {primary!r} is {goal!r}, not 'min' or 'max': compare models by another one.")
        return goal == "max"

    def samples(self, n: int = 3) -> list[dict[str, Any]]:
        """Up to `n` prompts per metric, with reference and response of the last evaluated model. Default: none."""
        return []


class FunctionEvaluation(Evaluation):
    """Makes an evaluation of a plain function. Its columns are the returned keys, without a goal."""

    def __init__(self, function: Measure) -> None:
        self.function = function
        self._keys: list[str] = []

    @property
    def columns(self) -> list[Column]:
        return [{"name": key} for key in self._keys]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        metrics = dict(self.function(model))
        self._keys = list(dict.fromkeys([*self._keys, *metrics]))
        return metrics


def as_evaluation(given: Any) -> Evaluation:
    """Returns an evaluation unchanged and wraps a function. Raises `TypeError` for anything else."""
    if isinstance(given, Evaluation):
        return given
    if callable(given) and not isinstance(given, type) and not hasattr(given, "columns"):
        return FunctionEvaluation(given)
    raise TypeError(
        f"An evaluation is a `blur_trainer.Evaluation` or a function from a model to a dict of numbers, got {given!r}. "
        "A class with `columns` of its own derives from `blur_trainer.Evaluation`."
    )
