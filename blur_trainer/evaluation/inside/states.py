"""The outputs of decoder layers at some tokens: what the tests inside a model read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.evaluation.batching import buckets, check_context, check_example, pad
from blur_trainer.evaluation.distributed import in_shares, is_sharded
from blur_trainer.evaluation.token_scores import scored_positions
from blur_trainer.models.early_exit import ending_at
from blur_trainer.models.forward import evaluating
from blur_trainer.models.layers import check_layer, find_layers
from blur_trainer.models.logit_difference import LogitDifferenceModel

Row = tuple[list[int], list[int]]


def check_inside(model: nn.Module, name: str = "model") -> int:
    """Returns the number of layers. Raises unless the model is whole on this process and has layers to read."""
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"`{name}` is a `{type(model).__name__}`; it takes a loaded model, a `PreTrainedModel` or a `PeftModel`. "
            "Unwrap it: `accelerator.unwrap_model(model)`."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"The adapter of `{name}` puts virtual tokens before the text: what it knows is in no layer.")
    if isinstance(model, LogitDifferenceModel):
        raise TypeError(f"`{name}` is two models, whose logits are combined: look inside `{name}.target`.")
    if is_sharded(model):
        raise ValueError(f"The weights of `{name}` are sharded (FSDP2 or ZeRO-3): load the saved model whole.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"Some weights of `{name}` are offloaded (`device_map`): load it where all of it fits.")
    return len(find_layers(model)[2])


def check_layers(model: nn.Module, layers: Sequence[int] | None, asks: str) -> list[int]:
    """The layers to read in rising order: all of them for `None`."""
    if layers is None:
        return list(range(len(find_layers(model)[2])))
    chosen = list(layers)
    if not chosen or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in chosen):
        raise ValueError(f"{asks}: `layers` is {layers!r}; it takes numbers of layers, at least one, or None for all.")
    for layer in chosen:
        check_layer(model, layer, asks)
    return sorted(set(chosen))


def check_rows(model: PreTrainedModel, examples: Sequence[dict[str, Any]], name: str, least: int = 1) -> list[Row]:
    """The `(input_ids, labels)` of each example. Raises for too few of them, and for one without an answer."""
    rows = [check_example(index, example) for index, example in enumerate(examples)]
    if len(rows) < least:
        raise ValueError(f"`{name}` has {len(rows)} rows; it takes {least} or more.")
    for index, (ids, labels) in enumerate(rows):
        scored = scored_positions(labels)
        if not scored:
            raise ValueError(f"`{name}[{index}]` has no label behind its first token: leave it out.")
        if any(ids[t] != labels[t] for t in scored):
            raise ValueError(f"`{name}[{index}]` has labels that are neither {IGNORE_INDEX} nor its input_ids.")
    check_context(model, [len(ids) for ids, _ in rows], what="example")
    return rows


def layer_states(
    model: PreTrainedModel,
    rows: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int,
    desc: str | None = None,
) -> list[list[Tensor]]:
    """
    The outputs of some layers at some positions of each row, in one pass that ends at the highest of the layers. For
    the last layer: before the final norm.

    Args:
        rows: the token ids of each sequence.
        places: for each row its positions.
        layers: numbers of layers.
        batch_size: rows at a time.
        desc: label of the progress bar; no bar when left out.

    Returns:
        For each row one tensor (positions, H) per layer, on the model's device and in its dtype.
    """

    def run(indices: list[int]) -> list[list[Tensor]]:
        ids, mask = pad([rows[i] for i in indices], 0, "right", model.device)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return [
            [outputs[layer][number, torch.tensor(places[i], device=outputs[layer].device)] for layer in layers]
            for number, i in enumerate(indices)
        ]

    with evaluating(model), collecting(model, layers) as outputs, ending_at(model, max(layers)):
        return in_shares(model, buckets([len(row) for row in rows], batch_size), run, desc, alone=True)


@contextmanager
def collecting(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a call of the model puts the output `(B, T, H)` of each of the layers into the dictionary."""
    outputs: dict[int, Tensor] = {}
    modules = find_layers(model)[2]

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
