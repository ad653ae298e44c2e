"""Scores of one answer: each token's log-probability and, optionally, statistics of the predicted distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blur_trainer.constants import IGNORE_INDEX

# Log-probability of a token with probability 0 (models may bar tokens with logits of -inf). An infinite loss could not
# be averaged or ranked. The value is far below the log-probabilities of other tokens.
REJECTED = -1000.0


@dataclass(frozen=True)
class AnswerScores:
    r"""
    The scored tokens of one answer, all arrays of shape (T,), T >= 1.

    Args:
        tokens: true token ids $y_t$, int64.
        logps: $\log p_\theta(y_t \mid x_{<t})$ in nats, float32; -1000 for a token of probability 0.
        predicted: the most likely token at each position. This and the following exist only on request.
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
    """Positions of labels that can be scored: not -100, and not the first position, which has no context."""
    return [t for t in range(1, len(labels)) if labels[t] != IGNORE_INDEX]


def score_row(logits: Tensor, positions: Sequence[int], targets: Sequence[int], detailed: bool) -> Tensor:
    """
    Scores one row: float32 on the model's device, (2, T), or (5, T) with details. See [`to_numpy`].

    It works row by row, because one row of logits fits into the processor's cache; for accelerators there is
    [`BatchScores`]. Only scored positions are
    normalized, always in float32.

    Args:
        logits: (positions, V) of one sequence.
        positions: indices of the distributions to score.
        targets: the true token of each.
        detailed: whether to add most likely token, mean and variance.
    """
    first, last = positions[0], positions[-1]
    if last - first + 1 == len(positions):
        rows = logits[first : last + 1].float()  # for float32 logits a view, not a copy
    else:
        rows = logits[torch.tensor(positions, device=logits.device)].float()
    tokens = torch.tensor(targets, device=logits.device)
    columns = [tokens, rejected(label_logps(rows, tokens)), *(distribution(rows) if detailed else ())]
    return torch.stack([column.float() for column in columns])  # float32 holds token ids below 2^24 exactly


def label_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (T,) of tokens (T,), from float32 logits (T, V)."""
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def rejected(logps: Tensor) -> Tensor:
    """A finite number for a token of probability 0. NaN stays, so that a diverged model is noticed."""
    return logps.masked_fill(logps == -torch.inf, REJECTED)


def to_numpy(rows: Sequence[Tensor]) -> list[AnswerScores]:
    """Copies results of [`score_row`] to the host in one transfer and makes [`AnswerScores`]."""
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


def distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Most likely token, mean and variance of log p under p, each (T,), from logits (T, V)."""
    logps = logits.log_softmax(-1)
    p = logps.exp()
    logps = logps.masked_fill(p == 0, 0.0)  # p log p is 0 for p = 0, not 0 times infinity
    means = (p * logps).sum(-1)
    # E[x^2] - E[x]^2 would cancel in float32
    variances = (p * (logps - means[:, None]).square()).sum(-1)
    return logits.argmax(-1), means, variances
