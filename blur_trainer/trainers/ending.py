"""How a training ended: by a signal, without an effect, or with a model that is probably broken."""

import math
import signal
from collections.abc import Mapping

from torch import nn
from transformers import TrainerState

from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.level import TargetLoss, Until
from blur_trainer.objectives.likelihood import NLL, GradAscent

#: Nats per token that the retain loss may rise: e^2 = 7 times the perplexity. Batches differ by less than one nat.
BROKEN_RETAIN = 2.0
#: Gradient ascent has run away where an answer token costs more than so many times a guess among all tokens, ln(V).
RUNAWAY_FORGET = 3.0
#: The forget loss has not moved if it changed by less than this share of its first value.
UNMOVED_FORGET = 1e-3
#: The share of skipped steps that is worth a line; each has its own, and a loss scaler skips a few at the beginning.
MANY_SKIPPED = 0.5


class TrainingInterrupted(SystemExit):
    """Ends a script after SIGINT or SIGTERM, with the exit code that a shell gives them: 130 or 143.

    A checkpoint has been saved. Catch it to go on in the same process.

    Args:
        where: the step.
        remedy: how to continue.
        number: of the signal.
    """

    def __init__(self, where: str, remedy: str, number: int):
        super().__init__(f"{where}. {remedy}")
        self.where, self.signal = where, signal.Signals(number)
        self.code = 128 + number


def nothing_trained(steps: int, skipped: int, learning_rate: float, model: nn.Module) -> str:
    """The message where no step has changed a weight."""
    if learning_rate == 0:
        why = "because `learning_rate` is 0."
    elif 0 < steps <= skipped:
        why = "all of them were skipped, as their gradient was not finite; see the warnings above."
    else:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
        why = (
            f"the gradient is 0, or the updates are lost in rounding (learning rate {learning_rate:g}, weights in "
            f"{', '.join(dtypes)}): raise `learning_rate`, or load the model in float32 and set `bf16=True`."
        )
    return f"Nothing was trained: none of {steps} steps has changed a weight. No model card is written. Probably {why}"


def last_words(
    state: TrainerState, objectives: Mapping[str, Objective], vocabulary: int, until: int | None = None
) -> list[str]:
    """
    What the logs say of a model that is broken or has forgotten nothing: one line each, none of a normal run.

    Args:
        state: after training. Its first log of a step is compared with its last.
        objectives: by role. Their units decide what can be said.
        vocabulary: the model's number of tokens.
        until: the step whose weights the model has, if these are not the last ones.
    """
    history = [entry for entry in state.log_history if until is None or entry["step"] <= until]
    losses = {role: [e[f"loss/{role}"] for e in history if f"loss/{role}" in e] for role in objectives}
    lines = []
    retain, forget = losses.get("retain", []), losses["forget"]
    if len(retain) > 1 and isinstance(objectives["retain"], NLL | KL) and retain[-1] - retain[0] > BROKEN_RETAIN:
        lines.append(
            f"The retain loss rose from {retain[0]:.3g} to {retain[-1]:.3g} nats per token: the model is probably "
            "broken."
        )
    guess = math.log(vocabulary)
    if forget and isinstance(objectives["forget"], GradAscent) and -forget[-1] > RUNAWAY_FORGET * guess:
        lines.append(
            f"Gradient ascent ran away: {-forget[-1]:.3g} nats per token of the forget set, where guessing costs "
            f"{guess:.3g}. The model is probably broken: stop earlier, or choose a bounded objective (`npo`)."
        )
    levelled = isinstance(objectives["forget"], TargetLoss | Until)  # `LevelCallback` says how that ended
    if not levelled and len(forget) > 1 and abs(forget[-1] - forget[0]) <= UNMOVED_FORGET * abs(forget[0]):
        lines.append(
            f"The forget loss has not moved ({forget[0]:.6g} in the first log, {forget[-1]:.6g} in the last): probably "
            "nothing was forgotten."
        )
    skipped = sum(entry.get("grad/skipped", 0) for entry in history)
    if skipped > MANY_SKIPPED * state.global_step:
        lines.append(f"{skipped:g} of {state.global_step} steps were skipped, as their gradient was not finite.")
    return lines
