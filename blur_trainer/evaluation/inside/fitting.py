"""Trains one probe on the states of one layer, and reads what a probe says of an answer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blur_trainer.evaluation.inside.top import Place, Top
from blur_trainer.evaluation.token_scores import label_logps

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answers:
    """
    The answers of a set as one layer sees them: for each row the states `(T, H)` at the positions that predict its
    answer tokens, and these tokens `(T,)`.
    """

    states: Sequence[Tensor]
    tokens: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, indices: Sequence[int]) -> "Answers":
        return Answers([self.states[i] for i in indices], [self.tokens[i] for i in indices])

    def batches(self, size: int, order: Sequence[int] | None = None) -> "list[Answers]":
        order = range(len(self)) if order is None else order
        return [self.rows(order[start : start + size]) for start in range(0, len(order), size)]

    def logps(self, run: Run) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens by a function from states to logits, and whether each is the likeliest."""
        logits = run(torch.cat(list(self.states)).float()).float()
        tokens = torch.cat(list(self.tokens)).to(logits.device)
        return label_logps(logits, tokens), logits.argmax(-1) == tokens


@dataclass(frozen=True)
class Fit:
    """How a probe is trained: see [`~blur_trainer.evaluation.inside.probes.probe_layers`]."""

    learning_rate: float
    max_epochs: int
    patience: int
    batch_size: int
    seed: int


def fit_probe(top: Top, train: Answers, held_out: Answers, how: Fit) -> tuple[dict[Place, nn.Parameter], int, float]:
    """Returns the weights with the lowest loss on the held-out answers, after how many epochs that was, and the loss.

    0 epochs: no training made the model's own norm and head better.
    """
    weights = top.copies()
    optimizer = torch.optim.AdamW(weights.values(), lr=how.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(how.seed)
    with top.alone(weights) as run:
        best, epochs, kept = _mean_loss(run, held_out, how.batch_size), 0, _values(weights)
        for epoch in range(1, how.max_epochs + 1):
            for batch in train.batches(how.batch_size, torch.randperm(len(train), generator=generator).tolist()):
                with torch.enable_grad():
                    (-batch.logps(run)[0].mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
            loss = _mean_loss(run, held_out, how.batch_size)
            if loss < best:
                best, epochs, kept = loss, epoch, _values(weights)
            elif epoch - epochs >= how.patience or not math.isfinite(loss):
                break
    return {place: nn.Parameter(value) for place, value in kept.items()}, epochs, best


def read(run: Run, answers: Answers, batch_size: int) -> np.ndarray:
    """(2, rows): the mean loss of each row's answer tokens, in nats, and the share of them that are the likeliest."""
    losses, hits = [], []
    for batch in answers.batches(batch_size):
        logps, right = batch.logps(run)
        lengths = [len(tokens) for tokens in batch.tokens]
        losses += [-part.mean() for part in logps.double().split(lengths)]
        hits += [part.mean() for part in right.double().split(lengths)]
    return torch.stack([*losses, *hits]).view(2, -1).cpu().numpy()


def _mean_loss(run: Run, answers: Answers, batch_size: int) -> float:
    return float(read(run, answers, batch_size)[0].mean())


def _values(weights: dict[Place, nn.Parameter]) -> dict[Place, Tensor]:
    return {place: weight.detach().clone() for place, weight in weights.items()}
