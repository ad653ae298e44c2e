"""Tasks of lm-evaluation-harness (`wmdp_bio`, `wmdp_cyber`, `mmlu`, any other) on a live model -> one flat dict."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.distributed import is_sharded, rank_and_world
from blur_trainer.models.forward import evaluating

#: how tasks begin that test what is to be forgotten: the harness's of WMDP, and those of `write_tasks`
FORGET = ("wmdp_", "forget_")


class LMEval(Evaluation):
    """
    Tasks of lm-evaluation-harness, as a function from a model to numbers: the one that published tables use.

    It runs the model that it is given, in memory, so it can be a benchmark of a trainer. Afterwards the modules' modes,
    the random states and the tokenizer are as they were. Of several processes each does its share, and all of the work
    where the model is sharded (FSDP2, ZeRO-3); all get the same numbers.

    Needs the extra `wmdp`: `pip install "blur_trainer[wmdp]"`. The harness's own tasks load their data from the Hub.

    Args:
        tasks (`Sequence[str]`):
            Names of tasks or groups.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The models' tokenizer.
        include_path (`str` or `Path`, *optional*):
            A folder with task files (`.yaml`) of your own, which `tasks` then names; by default the harness's tasks.
        forget (`Sequence[str]`, *optional*):
            Those of `tasks` that test what is to be forgotten: in tables and figures less is better. By default those
            named `wmdp_*` or `forget_*`.
        num_fewshot (`int`, *optional*):
            Solved examples before each question; by default the task's own number (0 in WMDP).
        limit (`int`, *optional*):
            Only the first so many rows of each task.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward pass.

    Returns:
        Called with a model: `{"wmdp_bio_acc": 0.637, ...}`: each task's (and group's) metrics as `{task}_{metric}`, a
        filter other than `none` in front of the metric; without standard errors.

    Raises:
        `ImportError`: lm-evaluation-harness is not installed.
        `ValueError`: no task, or one that it does not know.

    Example:

    ```python
    trainer = BLURTrainer(..., benchmarks={"wmdp": LMEval(["wmdp_bio", "wmdp_cyber"], tokenizer, limit=200)})
    LMEval(["wmdp_bio", "mmlu"], tokenizer)(model)
    ```
    """

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        include_path: str | os.PathLike[str] | None = None,
        forget: Sequence[str] | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        check_positive(batch_size=batch_size, **({} if limit is None else {"limit": limit}))
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"`tasks` is {tasks!r}; it takes a list of at least one name.")
        # never both: to read the harness's own thousands takes half a minute
        own = {} if include_path is None else {"include_path": str(include_path), "include_defaults": False}
        manager = _harness("lm_eval.tasks").TaskManager(**own)
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            where = "lm-evaluation-harness" if include_path is None else f"include_path {str(include_path)!r}"
            raise ValueError(f"{where} has no tasks {unknown}. `lm-eval ls tasks` lists those of the harness.")
        if forget is not None and (isinstance(forget, str) or not set(forget) <= set(tasks)):
            raise ValueError(f"`forget` is {forget!r}; it takes names out of `tasks`, {list(tasks)}.")
        self.tasks, self.tokenizer, self._manager = list(tasks), tokenizer, manager
        self._forget = {task for task in tasks if task.startswith(FORGET)} if forget is None else set(forget)
        self.num_fewshot, self.limit, self.batch_size = num_fewshot, limit, batch_size

    @property
    def columns(self) -> list[Column]:
        """`{task}_acc` of each task that was asked for, as WMDP and MMLU have it."""
        return [
            {
                "name": f"{task}_acc",
                "label": task.replace("_", " "),
                "goal": "min" if task in self._forget else "max",
                "role": "forget" if task in self._forget else "retain",
            }
            for task in self.tasks
        ]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """The metrics of one model. Of several processes all must call it."""
        rank, world = rank_and_world()
        # a sharded model's forward passes must be equally many, and the harness has no share without a row
        share = world > 1 and not is_sharded(model) and self._fewest_rows() >= world
        with evaluating(model), _as_before(model, self.tokenizer):
            results: Any = _harness("lm_eval").simple_evaluate(
                model=_model_class(share)(
                    pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size, backend="causal"
                ),
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        found = [flat(results["results"]) if rank == 0 else None]  # the harness has results in the first process only
        if world > 1:
            dist.broadcast_object_list(found)
        return found[0] or {}

    def _fewest_rows(self) -> int:
        tasks: Any = self._manager.load(self.tasks)["tasks"]
        return min(len(task.eval_docs) if self.limit is None else self.limit for task in tasks.values())


def _model_class(share: bool) -> Any:
    """The harness's wrapper of a model, which runs a model that it is given on one process; `share`: on all of them."""
    alone = _harness("lm_eval.models.huggingface").HFLM
    if not share:
        return alone

    class Shared(alone):  # type: ignore[misc, valid-type]
        @property
        def rank(self) -> int:
            return dist.get_rank()

        @property
        def world_size(self) -> int:
            return dist.get_world_size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
            dist.all_gather(parts, tensor)
            return torch.stack(parts).flatten()

        def barrier(self) -> None:
            dist.barrier()

    return Shared


def flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`{"wmdp_bio": {"acc,none": 0.6, "acc_stderr,none": "N/A", "alias": ...}}` -> `{"wmdp_bio_acc": 0.6}`."""
    values = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, how = name.partition(",")
            if how and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                values[f"{task}_{metric}" if how == "none" else f"{task}_{how}_{metric}"] = float(value)
    return values


@contextmanager
def _as_before(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """The harness seeds everything and gives the tokenizer a pad token: training must not notice."""
    python, numpy, pad = random.getstate(), np.random.get_state(), tokenizer.pad_token
    cuda = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        tokenizer.pad_token = pad


def _harness(module: str) -> ModuleType:
    # Here and not above: it takes seconds to import, and is an extra.
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"LMEval needs lm-evaluation-harness (with what it runs models by): pip install 'blur_trainer[wmdp]'. "
            f"{type(error).__name__}: {error}"
        ) from error
