"""How deep unlearning goes: which layers of the target lose an answer with the unlearned model's states in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from blur_trainer.evaluation.batching import buckets, check_positive, pad
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.evaluation.inside.states import Row, check_inside, check_layers, check_rows, collecting
from blur_trainer.evaluation.token_scores import label_logps, rejected, scored_positions
from blur_trainer.models.forward import causal_lm, evaluating, hidden_size
from blur_trainer.models.layers import find_layers
from blur_trainer.models.patched import patched

#: a mask per row; the column that has it; or a function from the row to it
Tokens: TypeAlias = Sequence[Sequence[Any]] | str | Callable[[Mapping[str, Any]], Sequence[Any]]


@dataclass(frozen=True)
class UnlearningDepth:
    """
    What [`unlearning_depth`] found.

    Args:
        score: UDS, 0 (all is intact) to 1 (as in the retrained model); NaN if no row has a layer above the threshold.
        layers: the layers that were patched.
        unlearned, retrained: for each layer the drop of the answer's log-probability with the states of that model, in
            nats per token, mean over the rows.
        scores: the score of each row; `None` where the retrained model's states cost no layer more than `threshold`.
        threshold: what a layer's drop must exceed to count.
    """

    score: float
    layers: list[int]
    unlearned: list[float]
    retrained: list[float]
    scores: list[float | None]
    threshold: float


def unlearning_depth(
    target: PreTrainedModel,
    unlearned: PreTrainedModel,
    retrained: PreTrainedModel,
    examples: Sequence[dict[str, Any]],
    *,
    tokens: Tokens | None = None,
    layers: Sequence[int] | None = None,
    threshold: float = 0.05,
    batch_size: int = 16,
    progress: bool = True,
) -> UnlearningDepth:
    r"""
    The Unlearning Depth Score (UDS): does the answer survive in the target with another model's states in one layer?

    The target runs each row with the output of layer $l$ replaced by that of the retrained model (S1), then by that of
    the unlearned model (S2), at the positions that predict the $T$ scored tokens. What is lost:

    $$D^S_l = \frac{1}{T} \sum_t \left[\log p_{\mathrm{target}}(y_t \mid x, y_{<t}) - \log p_{\mathrm{target},\,
    h_l \leftarrow h^S_l}(y_t \mid x, y_{<t})\right], \qquad
    \mathrm{UDS} = \frac{\sum_{l:\,D^{S1}_l > \tau} D^{S1}_l \, \mathrm{clip}(D^{S2}_l / D^{S1}_l, 0, 1)}
    {\sum_{l:\,D^{S1}_l > \tau} D^{S1}_l}$$

    for each row; the score is the mean over the rows that have a layer with $D^{S1}_l > \tau$. The target's own layers
    and head read the states. So a model that changed its last layers or its head alone scores near 0, whatever it says.

    The target and one of the others run at a time, but all three are in memory.

    Differs from the source, which scores the tokens of an entity in the answer: here all answer tokens are scored
    unless `tokens` names some. Words that any model would say make the drops smaller.

    Source: Lee et al., "Measuring the Depth of LLM Unlearning via Activation Patching" (2026), arXiv 2605.24614.

    Args:
        target ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model before unlearning.
        unlearned, retrained (idem):
            The model after it, and one that never saw the forget set, of the same shape and tokenizer.
        examples (`Dataset` or `Sequence[dict]`):
            `{"input_ids", "labels"}` of the forget set, as [`tokenize_dataset`] makes them.
        tokens (*optional*):
            Which tokens are scored, as a mask of the length of `input_ids`: one per row, or the name of the column that
            has it, or a function from the row to it. They must be answer tokens. Default: all answer tokens.
        layers (`Sequence[int]`, *optional*):
            Layers from 0. Default: all.
        threshold (`float`, *optional*, defaults to `0.05`):
            $\tau$, in nats per token.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar over the rows.

    Returns:
        [`UnlearningDepth`]. All models are bit for bit as before.

    Raises:
        `TypeError`: a model is wrapped, or has no layers that can be told apart.
        `ValueError`: the models differ in layers, width or vocabulary; weights are sharded or offloaded; a row without
        a scored token or too long; no such layer; a wrong threshold.
    """
    check_positive(batch_size=batch_size)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ValueError(f"`threshold` is {threshold!r}; it takes nats per token, 0 or more.")
    check_shapes({"target": target, "unlearned": unlearned, "retrained": retrained})
    chosen = check_layers(target, layers, "unlearning_depth")
    rows = check_rows(target, examples, "examples")
    scored = _scored(examples, rows, tokens)

    def run(indices: list[int]) -> list[np.ndarray]:
        patching = _Batch(target, [rows[i][0] for i in indices], [scored[i] for i in indices])
        found = [patching.drops(source, chosen) for source in (retrained, unlearned)]
        return list(np.stack(found, axis=1))

    batches = buckets([len(ids) for ids, _ in rows], batch_size)
    with evaluating(target), evaluating(unlearned), evaluating(retrained):
        drops = np.stack(in_shares(target, batches, run, "Patching" if progress else None, alone=True))
    scores = [_score(s1, s2, threshold) for s1, s2 in drops]
    known = [score for score in scores if score is not None]
    s1, s2 = drops.mean(0).tolist()
    return UnlearningDepth(float(np.mean(known)) if known else float("nan"), chosen, s2, s1, scores, threshold)


def check_shapes(models: Mapping[str, PreTrainedModel]) -> None:
    """Raises, by name, unless states of one model fit into the layers of the others."""
    shapes = {}
    for name, model in models.items():
        layers = check_inside(model, name)
        vocabulary = causal_lm(model).config.get_text_config(decoder=True).vocab_size
        shapes[name] = {"layers": layers, "width": hidden_size(model), "vocabulary": vocabulary}
    first, *others = shapes
    for other in others:
        if shapes[other] != shapes[first]:
            raise ValueError(
                f"`{other}` has {shapes[other]}, `{first}` has {shapes[first]}: states of one fit into the other only "
                "if they are of one shape."
            )


def _scored(examples: Sequence[dict[str, Any]], rows: list[Row], tokens: Tokens | None) -> list[list[int]]:
    """For each row the positions of its scored tokens."""
    places = [scored_positions(labels) for _, labels in rows]
    if tokens is None:
        return places
    if isinstance(tokens, str):
        lacking = next((i for i, example in enumerate(examples) if tokens not in example), None)
        if lacking is not None:
            raise ValueError(f"`examples[{lacking}]` has no column {tokens!r}: it has {sorted(examples[lacking])}.")
        masks = [example[tokens] for example in examples]
    else:
        masks = [tokens(example) for example in examples] if callable(tokens) else list(tokens)
    if len(masks) != len(rows):
        raise ValueError(f"`tokens` has {len(masks)} masks for {len(rows)} rows; it takes one per row.")
    for index, (mask, (ids, _)) in enumerate(zip(masks, rows, strict=True)):
        if len(mask) != len(ids):
            raise ValueError(f"The mask of `examples[{index}]` has {len(mask)} entries for {len(ids)} tokens.")
        chosen = [t for t, on in enumerate(mask) if on]
        if not chosen or not set(chosen) <= set(places[index]):
            raise ValueError(
                f"`tokens` chooses {chosen} of `examples[{index}]`, whose answer tokens are {places[index]}: choose at "
                "least one, and answer tokens only."
            )
        places[index] = chosen
    return places


class _Batch:
    """Rows that the target runs at a time, with states of other models in its layers."""

    def __init__(self, target: PreTrainedModel, rows: list[list[int]], scored: list[list[int]]) -> None:
        self.target, self.rows, self.lengths = target, rows, [len(positions) for positions in scored]
        pairs = [(number, t) for number, positions in enumerate(scored) for t in positions]
        row, position = torch.tensor(pairs, device=target.device).T
        self.places = (row, position - 1)  # position t - 1 predicts token t
        self.tokens = torch.tensor([rows[number][t] for number, t in pairs], device=target.device)
        self.whole = self._logps(target(**self._inputs(target)).logits)

    def drops(self, source: PreTrainedModel, layers: Sequence[int]) -> np.ndarray:
        """What the scored tokens lose with the source's states in each of the layers, mean per row: (rows, layers)."""
        with collecting(source, layers) as outputs:
            source(**self._inputs(source))
        lost = []
        for layer in layers:
            states = at(outputs.pop(layer), self.places)
            with patched(find_layers(self.target)[2][layer], self.places, states):
                logps = self._logps(self.target(**self._inputs(self.target)).logits)
            lost.append(torch.stack([part.mean() for part in (self.whole - logps).split(self.lengths)]))
        return torch.stack(lost, dim=1).cpu().numpy()

    def _inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        ids, mask = pad(self.rows, 0, "right", model.device)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def _logps(self, logits: Tensor) -> Tensor:
        chosen = at(logits, self.places).float()
        return rejected(label_logps(chosen, self.tokens.to(chosen.device))).double()


def at(values: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """The entries `(N, ...)` of `(B, T, ...)` at some (row, position), whichever devices the two are on."""
    row, position = (index.to(values.device) for index in places)
    return values[row, position]


def _score(retrained: np.ndarray, unlearned: np.ndarray, threshold: float) -> float | None:
    """UDS of one row, from the drops in each layer."""
    counts = retrained > threshold
    if not counts.any():
        return None
    s1, s2 = retrained[counts], unlearned[counts]
    return float((s1 * np.clip(s2 / s1, 0, 1)).sum() / s1.sum())
