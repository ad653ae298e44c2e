"""What the metrics read of one answer: each token's log-probability and, in detail, the distribution it came from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blur_trainer.constants import IGNORE_INDEX

# Log-probability of a token whose probability is 0, as of a model that bars tokens (logits of -inf): an infinite loss
# has no order among others and no mean. Far below what models give to tokens that they do not bar.
REJECTED = -1000.0


@dataclass(frozen=True)
class AnswerScores:
    r"""
    The scored tokens of one answer, all arrays of shape (T,), T >= 1.

    Args:
        tokens: true token ids $y_t$, int64.
        logps: $\log p_\theta(y_t \mid x_{<t})$ in nats, float32; -1000 for a token of probability 0.
        predicted: the most likely token at each position. This and what follows only where asked for.
        means: $\mathbb{E}_{v \sim p_t}[\log p_t(v)]$, the negative entropy.
        variances: $\mathrm{Var}_{v \sim p_t}[\log p_t(v)]$.
    """

    tokens: np.ndarray
    logps: np.ndarray
    predicted: np.ndarray | None = None
    means: np.ndarray | None = None
    variances: np.ndarray | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return -float(self.logps.mean(dtype=np.float64))


def scored_positions(labels: Sequence[int]) -> list[int]:
    """Where the labels are that a model can be scored on: not -100, and with a context."""
    return [t for t in range(1, len(labels)) if labels[t] != IGNORE_INDEX]


def score_row(logits: Tensor, positions: Sequence[int], targets: Sequence[int], detailed: bool) -> Tensor:
    """
    What [`to_numpy`] makes an [`AnswerScores`] of, on the model's device, float32, (2, T) or in detail (5, T).

    Row by row, not all rows of a batch at once: a row of logits is small enough to stay in the processor's cache, and
    only the scored positions are normalized, in float32 whatever the model's dtype.

    Args:
        logits: (positions, V) of one sequence.
        positions: indices of the distributions to score.
        targets: the true token of each.
        detailed: whether to add most likely token, mean and variance.
    """
    first, last = positions[0], positions[-1]
    if last - first + 1 == len(positions):
        rows = logits[first : last + 1].float()  # a view in float32, no copy
    else:
        rows = logits[torch.tensor(positions, device=logits.device)].float()
    tokens = torch.tensor(targets, device=logits.device)
    logps = -torch.nn.functional.cross_entropy(rows, tokens, reduction="none")
    logps = logps.masked_fill(logps == -torch.inf, REJECTED)  # NaN stays: a diverged model must be found out
    columns = [tokens, logps, *(_distribution(rows) if detailed else ())]
    return torch.stack([column.float() for column in columns])  # token ids below 2^24 are exact in it


def to_numpy(rows: Sequence[Tensor]) -> list[AnswerScores]:
    """The results of [`score_row`], brought to the host in one go."""
    flat = torch.cat([row.flatten() for row in rows]).cpu().numpy()
    found, begin = [], 0
    for row in rows:
        tokens, logps, *more = flat[begin : begin + row.numel()].reshape(row.shape)
        begin += row.numel()
        predicted, *moments = more or (None,)
        found.append(
            AnswerScores(
                tokens.astype(np.int64),
                logps.copy(),
                None if predicted is None else predicted.astype(np.int64),
                *(moment.copy() for moment in moments),
            )
        )
    return found


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Most likely token, mean and variance of log p under p, each (T,), from logits (T, V)."""
    logps = logits.log_softmax(-1)
    p = logps.exp()
    logps = logps.masked_fill(p == 0, 0.0)  # p log p is 0 there, not 0 times infinity
    means = (p * logps).sum(-1)
    # not E[x^2] - E[x]^2, which cancels in float32
    variances = (p * (logps - means[:, None]).square()).sum(-1)
    return logits.argmax(-1), means, variances
