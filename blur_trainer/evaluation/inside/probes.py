"""Generative probes: what a layer knows is what a new norm and head, trained on its states, can say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.batching import check_context, check_positive
from blur_trainer.evaluation.distributed import rank_and_world
from blur_trainer.evaluation.inside.fitting import Answers, Fit, fit_probe, read
from blur_trainer.evaluation.inside.states import Row, check_inside, check_layers, check_rows, layer_states
from blur_trainer.evaluation.inside.top import Place, Top
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.evaluation.token_scores import scored_positions
from blur_trainer.models.forward import evaluating

KINDS = {"unlearned": "unlearned", "target": "target", "retrained": "retrain"}


@dataclass(frozen=True)
class ModelProbes:
    """The probes of one model, a number per layer in the order of [`LayerProbes`]`.layers`. Losses: nats per token."""

    name: str
    kind: str
    forget_loss: list[float]
    forget_accuracy: list[float]  # share of the answer tokens that are the likeliest
    held_out_loss: list[float]  # on pairs of `train` that no probe was trained on
    epochs: list[int]
    forget_rouge: list[float] | None = None


@dataclass(frozen=True)
class LayerProbes:
    """What [`probe_layers`] found. `gaps`, `errors` and `knowing` are `None` without a retrained model."""

    layers: list[int]
    models: list[ModelProbes]
    tolerance: float
    gaps: list[float] | None = None  # forget loss of the retrained model minus that of `model`, mean over the pairs
    errors: list[float] | None = None  # standard error of each gap
    knowing: list[int] | None = None


def probe_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Sequence[dict[str, Any]],
    forget: Sequence[dict[str, Any]],
    retrained: PreTrainedModel | None = None,
    target: PreTrainedModel | None = None,
    layers: Sequence[int] | None = None,
    learning_rate: float = 5e-5,
    max_epochs: int = 50,
    patience: int = 3,
    held_out: float = 0.2,
    batch_size: int = 16,
    tolerance: float = 0.1,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerProbes:
    r"""
    Reads what each layer knows of the forget set, with a probe per layer.

    A probe of layer $l$ is a copy of the model's final norm and head. It is trained on the layer's states $h_l$ of
    pairs that the model knows, the retain set, while the model is frozen. Then it reads the forget set:

    $$-\frac{1}{|y|} \sum_t \log p_{\mathrm{probe}\,l}(y_t \mid h_l(x, y_{<t})), \quad \text{mean over the pairs.}$$

    A layer *knows* if this loss is below that of the retrained model's probe by more than `tolerance`, and more answer
    tokens are the likeliest ones; both still hold after two standard errors of the difference (paired over the pairs)
    are taken off. The loss alone would not do: of answers that nobody knows it also falls when a probe is less sure of
    itself. A model that changed its last layers alone still knows in the layers below them.

    A layer in which nothing is found may know in a way that such a probe cannot read. Give the `target` too: where its
    own probes read little, the test says little.

    Source: generative probes of arXiv 2609.36612 (AdamW at 5e-5, early stopping on held-out pairs).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The unlearned model, whole and unwrapped. It is bit for bit as before afterwards.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the answers.
        train, forget (`Dataset` or `Sequence[dict]`):
            `{"input_ids", "labels"}`, as [`tokenize_dataset`] makes them: pairs of the retain and of the forget set.
        retrained ([`~transformers.PreTrainedModel`], *optional*):
            A model that never saw the forget set. Its probes say what one can guess.
        target ([`~transformers.PreTrainedModel`], *optional*):
            The model before unlearning. Its probes say what can be read where all is known.
        layers (`Sequence[int]`, *optional*):
            Layers from 0. Default: all.
        learning_rate (`float`, *optional*, defaults to `5e-5`):
            Constant, of AdamW without weight decay. Tiny models need more.
        max_epochs (`int`, *optional*, defaults to `50`), patience (`int`, *optional*, defaults to `3`):
            Training ends after so many passes in all, or without a lower loss on the held-out pairs. The best weights
            are used.
        held_out (`float`, *optional*, defaults to `0.2`):
            Share of `train` that is held out.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs per step and per forward pass.
        tolerance (`float`, *optional*, defaults to `0.1`):
            In nats per token.
        max_new_tokens (`int`, *optional*):
            If given, each probe also writes greedy answers of so many tokens: `forget_rouge`, their ROUGE-L recall.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice of held-out pairs and the order of the others.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar over the probes.

    Returns:
        [`LayerProbes`]

    Raises:
        `TypeError`: a model is wrapped, or has no layers that can be told apart.
        `ValueError`: weights are sharded or offloaded; the head is of few bits; too few pairs; a pair without an answer
        or too long; no such layer; a model has another number of layers; wrong numbers. All before any training.
    """
    check_positive(max_epochs=max_epochs, patience=patience, batch_size=batch_size)
    _check_numbers(learning_rate, held_out, tolerance)
    given = {"unlearned": model, "target": target, "retrained": retrained}
    models = {name: one for name, one in given.items() if one is not None}
    counts = {name: check_inside(one, "model" if one is model else name) for name, one in models.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"The models have other numbers of layers ({counts}): compare models of one shape.")
    chosen = check_layers(model, layers, "probe_layers")
    how = Fit(learning_rate, max_epochs, patience, batch_size, seed)
    probers = {}
    for name, one in models.items():
        pairs = check_rows(one, train, "train", least=2), check_rows(one, forget, "forget", least=2)
        if max_new_tokens is not None:
            check_positive(max_new_tokens=max_new_tokens)
            lengths = [len(ids) for ids in _prompts(pairs[1])]
            check_context(one, lengths, what="forget prompt", max_new_tokens=max_new_tokens)
        probers[name] = _Prober(one, tokenizer, *pairs, how, held_out, max_new_tokens)
    found, rows = [], {}
    hidden = not progress or rank_and_world()[0] > 0
    with tqdm(desc="Probes", total=len(models) * len(chosen), disable=hidden) as bar:
        for name, prober in probers.items():
            lines = []
            for layer in chosen:
                bar.set_description(f"Probes: {name}, layer {layer}")
                lines.append(prober(layer))
                bar.update()
            rows[name] = np.stack([line.pop("rows") for line in lines])
            found.append(ModelProbes(name, KINDS[name], **{key: [line[key] for line in lines] for key in lines[0]}))
    return LayerProbes(chosen, found, tolerance, **_compare(rows, chosen, tolerance))


class _Prober:
    """Trains and reads the probe of a layer of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: list[Row],
        forget: list[Row],
        how: Fit,
        held_out: float,
        max_new_tokens: int | None,
    ) -> None:
        self.model, self.tokenizer, self.train, self.forget, self.how = model, tokenizer, train, forget, how
        self.max_new_tokens, self.top = max_new_tokens, Top(model)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(how.seed)).tolist()
        count = min(max(1, round(held_out * len(train))), len(train) - 1)
        self.held_out, self.trained = sorted(order[:count]), sorted(order[count:])

    def __call__(self, layer: int) -> dict[str, Any]:
        train, forget, size = self._answers(self.train, layer), self._answers(self.forget, layer), self.how.batch_size
        with evaluating(self.model):
            weights, epochs, loss = fit_probe(self.top, train.rows(self.trained), train.rows(self.held_out), self.how)
            with self.top.alone(weights) as run:
                rows = read(run, forget, size)
        losses, hits = rows.mean(1).tolist()
        found = {"rows": rows, "forget_loss": losses, "forget_accuracy": hits, "held_out_loss": loss, "epochs": epochs}
        if self.max_new_tokens is None:
            return found
        return found | {"forget_rouge": self._rouge(layer, weights, self.max_new_tokens)}

    def _answers(self, rows: list[Row], layer: int) -> Answers:
        places = [scored_positions(labels) for _, labels in rows]
        before = [[t - 1 for t in positions] for positions in places]  # position t - 1 predicts token t
        states = layer_states(self.model, [ids for ids, _ in rows], before, [layer], batch_size=self.how.batch_size)
        tokens = [[ids[t] for t in positions] for (ids, _), positions in zip(rows, places, strict=True)]
        return Answers([row[0] for row in states], [torch.tensor(row, device=self.model.device) for row in tokens])

    def _rouge(self, layer: int, weights: dict[Place, nn.Parameter], new_tokens: int) -> float:
        # Here and not above: `evaluate` takes seconds to import, and only decoding needs it.
        from blur_trainer.metrics.rouge_l_recall import rouge_l_recall

        prompts, size = _prompts(self.forget), self.how.batch_size
        with self.top.behind(layer, weights):
            written = generate_ids(self.model, self.tokenizer, prompts, max_new_tokens=new_tokens, batch_size=size)
        true = [[ids[t] for t in scored_positions(labels)] for ids, labels in self.forget]
        texts = [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (written, true)]
        return float(np.mean([rouge_l_recall(*pair) for pair in zip(*texts, strict=True)]))


def _prompts(rows: list[Row]) -> list[list[int]]:
    return [ids[: scored_positions(labels)[0]] for ids, labels in rows]


def _compare(rows: dict[str, np.ndarray], layers: list[int], tolerance: float) -> dict[str, Any]:
    """Gaps to the retrained model, their standard errors, and the layers that know. `rows`: see [`read`], by layer."""
    if "retrained" not in rows:
        return {}
    losses, hits = np.moveaxis(rows["retrained"] - rows["unlearned"], 1, 0)  # each (layers, pairs)
    gaps, errors = _mean_and_error(losses)
    more, doubt = _mean_and_error(-hits)
    known = (gaps - 2 * errors > tolerance) & (more - 2 * doubt > 0)
    knowing = [layer for layer, knows in zip(layers, known, strict=True) if knows]
    return {"gaps": gaps.tolist(), "errors": errors.tolist(), "knowing": knowing}


def _mean_and_error(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return numbers.mean(1), numbers.std(1, ddof=1) / math.sqrt(numbers.shape[1])


def _check_numbers(learning_rate: float, held_out: float, tolerance: float) -> None:
    ends = {"learning_rate": (learning_rate, math.inf), "held_out": (held_out, 1), "tolerance": (tolerance, math.inf)}
    for name, (value, end) in ends.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < end or (value == 0 and name != "tolerance"):
            raise ValueError(f"`{name}` is {value!r}; it takes a number above 0{' and below 1' if end == 1 else ''}.")
