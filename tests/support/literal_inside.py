"""Slow literal forms of what is measured inside a Llama: one example at a time, layer by layer, token by token."""

import copy
import math

import torch
from torch import nn
from transformers import LlamaForCausalLM


@torch.no_grad()
def run(model: LlamaForCausalLM, ids: list[int], layer: int | None = None, replaced=()) -> tuple[list, torch.Tensor]:
    """The output (T, H) of each layer, and the logits (T, V). `replaced`: states by position, put behind `layer`."""
    states = model.model.embed_tokens(torch.tensor([ids]))
    places = torch.arange(len(ids))[None]
    angles = model.model.rotary_emb(states, places)
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
    seen = []
    for number, block in enumerate(model.model.layers):
        states = block(states, attention_mask=mask, position_ids=places, position_embeddings=angles)
        if number == layer:
            for position, new in dict(replaced).items():
                states[0, position] = new
        seen.append(states[0].clone())
    return seen, model.lm_head(model.model.norm(states))[0]


def logp(logits: torch.Tensor, token: int) -> float:
    """From logits (V,), in double precision, without `log_softmax`."""
    highest = logits.double().max()
    return float(logits[token].double() - highest - (logits.double() - highest).exp().sum().log())


def drop(target, source, ids: list[int], scored: list[int], layer: int) -> float:
    """What the scored tokens lose on average with the source's states in one layer of the target."""
    other = run(source, ids)[0][layer]
    plain = run(target, ids)[1]
    patched = run(target, ids, layer, {t - 1: other[t - 1] for t in scored})[1]
    lost = 0.0
    for t in scored:
        lost += logp(plain[t - 1], ids[t]) - logp(patched[t - 1], ids[t])
    return lost / len(scored)


def score(retrained: list[float], unlearned: list[float], threshold: float) -> float | None:
    """UDS of one row, from its drops layer by layer."""
    above = below = 0.0
    for s1, s2 in zip(retrained, unlearned, strict=True):
        if s1 > threshold:
            above += s1 * min(max(s2 / s1, 0.0), 1.0)
            below += s1
    return above / below if below else None


class LiteralProbe:
    """A probe of one layer of a Llama: its own RMS norm and head, in plain tensors."""

    def __init__(self, model: LlamaForCausalLM, layer: int) -> None:
        self.model, self.layer, self.eps = model, layer, model.model.norm.variance_epsilon
        self.norm = nn.Parameter(model.model.norm.weight.detach().clone())
        self.head = nn.Parameter(model.lm_head.weight.detach().clone())

    def token_losses(self, row: dict) -> list[torch.Tensor]:
        states = run(self.model, row["input_ids"])[0][self.layer]
        losses = []
        for t in range(1, len(row["labels"])):
            if row["labels"][t] != -100:
                state = states[t - 1]
                normed = self.norm * state / torch.sqrt((state * state).sum() / len(state) + self.eps)
                losses.append(-(self.head @ normed).log_softmax(-1)[row["labels"][t]])
        return losses

    def loss(self, rows: list[dict]) -> float:
        """Mean over the rows of each row's mean."""
        with torch.no_grad():
            return sum(float(sum(self.token_losses(row))) / len(self.token_losses(row)) for row in rows) / len(rows)

    def fit(self, train: list[dict], held_out: list[dict], rate: float, max_epochs: int, patience: int) -> int:
        """All rows are one batch: no order to agree on. Returns the best epoch and keeps its weights."""
        optimizer = torch.optim.AdamW([self.norm, self.head], lr=rate, weight_decay=0.0)
        best, at, kept = self.loss(held_out), 0, copy.deepcopy((self.norm, self.head))
        for epoch in range(1, max_epochs + 1):
            optimizer.zero_grad()
            losses = [loss for row in train for loss in self.token_losses(row)]
            (sum(losses) / len(losses)).backward()
            optimizer.step()
            now = self.loss(held_out)
            if now < best:
                best, at, kept = now, epoch, copy.deepcopy((self.norm, self.head))
            elif epoch - at >= patience or math.isnan(now):
                break
        self.norm, self.head = kept
        return at
