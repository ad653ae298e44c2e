"""Learns the vectors of RMU's `own_words`: with them the model says other rows' words in place of an answer's own."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import evaluating, forward, hidden_size
from blur_trainer.models.layers import find_layers
from blur_trainer.models.logps import answer_mask
from blur_trainer.models.patched import patched
from blur_trainer.objectives.base import Batch
from blur_trainer.objectives.rmu import RMU

#: steps of Adam, and the first one's size as a share of the vector's length; it falls to 0 linearly
STEPS, RATE = 40, 0.2
#: random starts
STARTS = 4
_MEASURED = 8  # batches from which the length of activations is read, and by which a start is chosen


@dataclass(frozen=True)
class Words:
    """
    Args:
        begins: for each token whether it begins a word, `(V,)` bool.
        instead: what may be said instead of a token of each kind that continues a word, and of one that begins one,
            `(kinds, 2, V)` bool.
    """

    begins: Tensor
    instead: Tensor

    def other_than(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        """What may be said instead of tokens `(N,)` of these kinds, `(N, V)` bool; all, where that is nothing else."""
        others = self.instead[kinds, self.begins[tokens].long()].scatter(-1, tokens[:, None], False)
        return others | ~others.any(-1, keepdim=True)


def learned_vectors(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: RMU,
    words: Words,
    length: float | None = None,
    show: bool = False,
) -> Tensor:
    r"""
    The vectors `(kinds, H)`, float32, on the model's device, for one topic of an [`RMU`] with `own_words`.

    With $h_t = v_k$ at the steered positions, $k$ the kind of the token to be said, and all else of the model as it
    is, the $v_k$ descend together

    $$-\min(\ell_y, 2 \ln V) - \log \sum_{w \in W_y} p(w) + \ell_o$$

    $\ell_y$: the loss of an own token $y$; $W_y$: the words of its kind that retain answers have; $\ell_o$: the
    loss of an answer's other tokens. Each is a mean. So the model says something else with certainty there, as one
    does that never saw the row, and the rest as before. No weight moves, and none gets a gradient.

    Where they end depends on where they start: on the words that are said, and on how answers go on after them. Of some
    random starts, one vector for all kinds, the one is taken that has the lowest loss where the own words in the text
    are those that it says.

    Args:
        model: whole, before unlearning, on the device where it is to run.
        batches: on the same device, as training reads them; they are taken in turn.
        objective: which layer and which positions are steered.
        words: $W$.
        length: of each vector. Default: the mean length of the activations that are steered.
        show: a progress bar.

    Source: ours.
    """
    batches = [batch for batch in batches if objective.mask(batch).any()]
    if not batches:
        raise ValueError(
            "RMU: no token of the forget set is its own and not in a start that is left out, so there is no place to "
            "steer: take `answers_only` instead of `own_words`, or leave `skip_shared_start` out."
        )
    with evaluating(model), _frozen(model):
        length = length or _mean_length(model, batches[:_MEASURED], objective)
        generator = torch.Generator().manual_seed(objective.seed)
        found = []
        for _ in tqdm(range(STARTS), desc="Learned vector", unit=" starts", disable=not show):
            start = torch.randn(hidden_size(model), generator=generator).repeat(len(words.instead), 1)
            vectors = _descended(model, batches, objective, words, start, length)
            spoken = [_as_said(model, batch, objective, vectors) for batch in batches[:_MEASURED]]
            losses = [_loss(model, batch, objective, words, vectors) for batch in spoken]
            found.append((torch.stack(losses).mean().item(), vectors))
    return min(found, key=lambda each: each[0])[1]


def _descended(
    model: nn.Module, batches: Sequence[Batch], objective: RMU, words: Words, start: Tensor, length: float
) -> Tensor:
    vectors = start.to(batches[0]["input_ids"].device).requires_grad_(True)
    optimizer = torch.optim.Adam([vectors])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS) * (vectors.norm() / vectors.numel() ** 0.5).item()
        with torch.enable_grad():
            loss = _loss(model, batches[step % len(batches)], objective, words, length * F.normalize(vectors, dim=-1))
        (vectors.grad,) = torch.autograd.grad(loss, vectors)
        optimizer.step()
    return length * F.normalize(vectors.detach(), dim=-1)


def _as_said(model: nn.Module, batch: Batch, objective: RMU, vectors: Tensor) -> Batch:
    """The batch with what the model says itself in place of the own words. The labels stay."""
    logits, own = _steered_logits(model, batch, objective, vectors)
    inputs = batch["input_ids"].clone()
    inputs[:, 1:] = torch.where(own, logits.argmax(-1), inputs[:, 1:])
    return {**batch, "input_ids": inputs}


def _steered_logits(model: nn.Module, batch: Batch, objective: RMU, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of the next tokens, `(B, T-1, V)`, and which of these are own words, `(B, T-1)`."""
    at = objective.mask(batch).bool()
    places = at.nonzero(as_tuple=True)
    with patched(find_layers(model)[2][objective.layer], places, vectors[objective.said(batch)[places] - 1]):
        return forward(model, batch)[:, :-1], at[:, :-1]


def _loss(model: nn.Module, batch: Batch, objective: RMU, words: Words, vectors: Tensor) -> Tensor:
    logits, own = _steered_logits(model, batch, objective, vectors)
    answers = answer_mask(batch["labels"])
    logps = logits[answers].float().log_softmax(-1)
    own = own[answers]
    truth = batch["labels"][:, 1:][answers]
    losses = -logps.gather(-1, truth[:, None])[:, 0]
    others = words.other_than(truth[own], objective.said(batch)[:, :-1][answers][own] - 1)
    said = logps[own].masked_fill(~others, -math.inf).logsumexp(-1)
    rest = losses[~own].mean() if (~own).any() else 0.0
    return -(losses[own].clamp(max=2 * math.log(logps.shape[-1])) + said).mean() + rest


@torch.no_grad()
def _mean_length(model: nn.Module, batches: Sequence[Batch], objective: RMU) -> float:
    lengths = [
        activations(model, batch, objective.layer)[objective.mask(batch).bool()].float().norm(dim=-1)
        for batch in batches
    ]
    return torch.cat(lengths).mean().item()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside no weight asks for a gradient, so that a backward pass keeps less."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
