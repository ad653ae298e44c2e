"""Ends a training at its level, and forgets less strongly where retaining pays too much."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blur_trainer.evaluation.level_check import LevelCheck
from blur_trainer.gradients.rules import FORGET, RETAIN, Rule
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.level import TargetLoss, Until, level_of
from blur_trainer.trainers.config import UnlearningConfig

logger = get_logger(__name__)
#: rows of each set that an evaluation looks at
SAMPLE = 128
#: how often the strength is halved before the training ends
HALVINGS = 3
#: nats by which the retain loss may be higher than before training where a training ends at its level
SETTLED = 0.1
#: the level counts as reached from this share of it below, and as overshot from this many times it (as of a verdict)
NEAR, OVER = 0.05, 1.25
#: keys in `state.log_history`, from which a resumed training goes on
BEFORE, STRENGTH, AFTER = "level/retain_loss_before", "level/strength", "level/forget_loss"
STOPPED = "level/stopped"


def level_check(
    objectives: Mapping[str, Objective], forget: Any, retain: Any, args: UnlearningConfig
) -> LevelCheck | None:
    """What measures a training with a level; `None` without one. Raises for settings that need one."""
    objective = objectives["forget"]
    has_retain = retain is not None and "retain" in objectives
    if not isinstance(objective, TargetLoss | Until):
        for name in ("level_two_sided", "stop_at_level", "retain_bound"):
            if getattr(args, name) not in (False, None):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` needs a level, and {objective} has none: set `forget_level`."
                )
        return None
    if args.retain_bound is not None and not has_retain:
        raise ValueError(f"`retain_bound={args.retain_bound}`, but there is no retain set: leave it out.")
    rows = sample_rows(forget)
    kept = sample_rows(retain) if has_retain else []
    return LevelCheck(rows, kept, level_in(objective, rows), args.retain_bound, args.per_device_eval_batch_size)


def level_in(objective: TargetLoss | Until, rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean level of these rows."""
    return float(np.mean([level_of(objective, row) for row in rows]))


def sample_rows(tokenized: Any, count: int = SAMPLE) -> list[dict[str, Any]]:
    """Up to `count` rows, always the same: at equal distances, from each topic as many; the first ones of a stream."""
    if isinstance(tokenized, Mapping):
        share = max(1, count // len(tokenized))
        return [row for rows in tokenized.values() for row in sample_rows(rows, share)]
    if isinstance(tokenized, datasets.IterableDataset):
        return list(islice(tokenized, count))
    size = len(tokenized)
    return [tokenized[int(index)] for index in np.linspace(0, size - 1, min(size, count)).round()]


def with_level_check(benchmarks: Mapping[str, Any], check: LevelCheck | None) -> dict[str, Any]:
    """The benchmarks, and the one of the level. Raises `ValueError` if a user's own has its name."""
    if check is None:
        return dict(benchmarks)
    if "level" in benchmarks:
        raise ValueError("The name `level` in `benchmarks` is taken by the forget level: choose another one.")
    return {"level": check, **benchmarks}


def weakens(rule: Rule) -> bool:
    """Whether half of the forget objective gives its gradient less of the step, asked with orthogonal gradients.

    Not so with [`NGDiff`], which normalizes both, and [`MGDA`], which prefers the shorter one.
    """

    def shares(strength: float) -> tuple[float, float]:
        size = 3 if hasattr(rule, "retain_smoothing") else 2
        gramian = torch.eye(size, dtype=torch.float64)
        gramian[FORGET, FORGET] = strength**2
        weights = rule(gramian).abs().tolist()
        forget, others = strength * weights[FORGET], sum(weights[RETAIN:])
        return forget, forget / max(forget + others, 1e-12)

    (whole, share), (half, less) = shares(1.0), shares(0.5)
    return less < share - 1e-9 or (share == less == 1.0 and half < whole)


class LevelCallback(TrainerCallback):
    """Looks at each evaluation, and says at the end whether the level was reached and what retaining paid.

    Args:
        check: the measurement.
        args: of the trainer.
        method: returns objectives and rules (one per topic) of this training.
        model: returns the model to measure.
        interrupted: whether a signal ends the training: then there is no time for last words.
    """

    def __init__(
        self,
        check: LevelCheck,
        args: UnlearningConfig,
        method: Callable[[], tuple[Mapping[str, Objective], Sequence[Rule]]],
        model: Callable[[], Any],
        interrupted: Callable[[], bool],
    ):
        self.check, self.method, self.model, self.interrupted = check, method, model, interrupted
        self.stops, self.bound = args.stop_at_level, args.retain_bound
        self.strength, self._running = 1.0, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the retain loss before training, or reads it back where a training is resumed."""
        objective: Any = self.method()[0]["forget"]  # a trial may have another one, by `forget_objective_kwargs`
        self.check.level = level_in(objective, self.check.sets["forget"])
        self.strength = _last(state, STRENGTH, 1.0)
        self.check.retain_before = _last(state, BEFORE, None)
        if self.check.retain_before is None and self.check.sets["retain"]:
            before = self._measure()["retain_loss"]
            self.check.retain_before = before
            _note(state, {BEFORE: before})
        self._running = True
        if _last(state, STOPPED, 0.0):  # the checkpoint of the step after which training was to end
            control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not self._running or "eval_level_forget_loss" not in (metrics or {}):
            return
        if state.global_step == 0:  # `eval_on_start`: nothing was trained yet
            return
        found = {
            name: metrics[key] for name in ("forget_loss", "retain_loss") if (key := f"eval_level_{name}") in metrics
        }
        if self.bound is not None and self.check.paid(found) > self.bound:
            self._weaken_or_stop(args, state, control, found)
        elif self.stops and found["forget_loss"] >= self.check.level and not self._recovers(state, found):
            self._stop(state, control)
            logger.warning(f"Step {state.global_step}: the level is reached, training ends. {self._numbers(found)}")

    def _recovers(self, state: TrainerState, found: Mapping[str, float]) -> bool:
        """Whether retaining is still far from where it was: fast forgetting passes its level while the model is upset,
        and the rest of the training brings the retain set back."""
        if self.bound is not None or self.check.retain_before is None or self.check.paid(found) <= SETTLED:
            return False
        logger.warning(
            f"Step {state.global_step}: the level is reached, but retaining pays more than {SETTLED} nats: training "
            f"goes on. {self._numbers(found)}"
        )
        return True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last words, of the weights that stay: those of the best checkpoint if that was loaded."""
        self._running = False
        if self.interrupted():
            return
        found = self._measure()
        _note(state, {AFTER: found["forget_loss"], "level/nats": self.check.level})
        level, loss = self.check.level, found["forget_loss"]
        reached = loss >= (1 - NEAR) * level
        said = "was overshot" if loss > OVER * level else "was reached" if reached else "was not reached"
        logger.warning(f"The forget level {said}. {self._numbers(found)}")

    @staticmethod
    def _stop(state: TrainerState, control: TrainerControl) -> None:
        control.should_training_stop = True
        _note(state, {STOPPED: 1.0})

    def _measure(self) -> dict[str, float]:
        return self.check(self.model())

    def _weaken_or_stop(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, found: Mapping[str, float]
    ) -> None:
        rules = self.method()[1]
        weaker = all(map(weakens, rules))
        where = f"Step {state.global_step}: the retain loss is beyond its bound of {self.bound:g} nats"
        if weaker and self.strength > 0.5**HALVINGS:
            self.strength /= 2
            _note(state, {STRENGTH: self.strength})
            logger.warning(f"{where}, the strength of forgetting is {self.strength:g} now. {self._numbers(found)}")
            return
        self._stop(state, control)
        why = f"and {HALVINGS} halvings of the strength did not help"
        if not weaker:
            why = f"and the rule {rules[0]} forgets as strongly whatever the size of the forget gradient"
        kept = "the best checkpoint so far is restored"
        if not args.load_best_model_at_end:
            kept = (
                "these weights stay; `load_best_model_at_end=True` (with `metric_for_best_model='level'` and "
                "`save_strategy` as `eval_strategy`) would restore the best checkpoint"
            )
        logger.warning(f"{where}, {why}: training ends, {kept}. {self._numbers(found)}")

    def _numbers(self, found: Mapping[str, float]) -> str:
        forget = f"Nats per token: forget {found['forget_loss']:.3g}, level {self.check.level:.3g}"
        if self.check.retain_before is None:
            return f"{forget}."
        return f"{forget}; retain {found['retain_loss']:.3g}, before training {self.check.retain_before:.3g}."


def _last(state: TrainerState, key: str, default: Any) -> Any:
    return next((entry[key] for entry in reversed(state.log_history) if key in entry), default)


def _note(state: TrainerState, values: dict[str, float]) -> None:
    """Into the history, which every checkpoint holds."""
    state.log_history.append({**values, "step": state.global_step, "epoch": float(state.epoch or 0.0)})
