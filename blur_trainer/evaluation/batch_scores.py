"""Scores all rows of a batch at once, on an accelerator, where kernels for each row would keep the host busy.

On a CPU `token_scores.score_row` is faster, row by row: the logits of one row fit into its cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blur_trainer.evaluation.token_scores import AnswerScores, distribution, label_logps, rejected

_ELEMENTS = 2**26  # logits that are widened to float32 at a time: 256 MiB


@dataclass(frozen=True)
class ScoredRow:
    """What to score in one row of a batch: the columns of its distributions, and the true token of each."""

    columns: Sequence[int]
    targets: Sequence[int]
    detailed: bool = False


class Positions:
    """The scored positions of a batch. Make them before the forward pass: a copy to a device waits for what it does."""

    def __init__(self, rows: Sequence[ScoredRow], device: torch.device) -> None:
        self.lengths = [len(row.columns) for row in rows]
        flat = [
            (number, *pair) for number, row in enumerate(rows) for pair in zip(row.columns, row.targets, strict=True)
        ]
        self.flat = torch.tensor(flat, dtype=torch.long).view(-1, 3).T.contiguous().to(device)  # row, column, target

    def pieces(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The distributions of all positions as float32 `(N, V)` and the true tokens `(N,)`, some at a time."""
        for part in self.flat.to(logits.device).split(max(1, _ELEMENTS // logits.shape[-1]), dim=1):
            row, column, target = part
            yield logits[row, column].float(), target


def batch_logps(logits: Tensor, positions: Positions) -> list[np.ndarray]:
    """Log-probabilities of the true tokens, an array per row, from logits `(B, T, V)`."""
    logps = torch.cat([label_logps(rows, targets) for rows, targets in positions.pieces(logits)]).cpu()
    return [part.numpy().copy() for part in logps.split(positions.lengths)]


class BatchScores:
    """[`AnswerScores`] of each row. Make it before the forward pass, call it on the logits `(B, T, V)`."""

    def __init__(self, rows: Sequence[ScoredRow], device: torch.device) -> None:
        self.rows = rows
        self.all = Positions(rows, device)
        plain = ScoredRow([], [])
        self.detailed = Positions([row if row.detailed else plain for row in rows], device)

    def __call__(self, logits: Tensor) -> list[AnswerScores]:
        logps = torch.cat([rejected(label_logps(rows, targets)) for rows, targets in self.all.pieces(logits)])
        columns = [torch.stack(_floats(distribution(rows))) for rows, _ in self.detailed.pieces(logits)]
        details = torch.cat(columns, dim=1)
        host = torch.cat([logps, details.flatten()]).cpu()  # the one wait
        found = host[: len(logps)].split(self.all.lengths)
        more = host[len(logps) :].view(3, -1).split(self.detailed.lengths, dim=1)
        return [_scores(row, *parts) for row, *parts in zip(self.rows, found, more, strict=True)]


def _floats(columns: Sequence[Tensor]) -> list[Tensor]:
    return [column.float() for column in columns]  # float32 holds token ids below 2^24 exactly


def _scores(row: ScoredRow, logps: Tensor, details: Tensor) -> AnswerScores:
    tokens, values = np.array(row.targets, dtype=np.int64), logps.numpy().copy()
    if not row.detailed:
        return AnswerScores(tokens, values)
    predicted, means, variances = details.numpy()
    return AnswerScores(tokens, values, predicted.astype(np.int64), means.copy(), variances.copy())
