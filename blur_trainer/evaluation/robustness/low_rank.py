"""Low-rank updates beside the weights (LoRA), for an attack: the weights stay, and a few numbers are trained."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from blur_trainer.evaluation.robustness.attacked import rounded_weights, trainable
from blur_trainer.models.logit_difference import LogitDifferenceModel


@contextmanager
def low_rank(model: nn.Module, rank: int, seed: int = 0) -> Iterator[list[nn.Parameter]]:
    r"""
    Yields the matrices $A$ (rank, in) and $B$ (out, rank) of each layer. Inside, a layer answers $W x + 2 B A x$, and
    only these matrices take gradients. On exit the layers are as before.

    $A$ begins uniform within $\pm 1/\sqrt{in}$, drawn from `seed`, and $B$ at zero: at first nothing changes. Both are
    float32. The layers are those whose weights [`quantized`] rounds.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), with alpha of twice the rank.

    Raises:
        `ValueError`: `rank` is below 1; the model has no such layer, or is a [`LogitDifferenceModel`].
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` is {rank!r}; it takes a whole number of at least 1.")
    if isinstance(model, LogitDifferenceModel):
        raise ValueError("A `LogitDifferenceModel` is trained by its own adapter: leave `rank` out.")
    weights = {id(weight) for weight in rounded_weights(model)}
    layers = [each for each in model.modules() if isinstance(each, nn.Linear) and id(each.weight) in weights]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no `nn.Linear` but its head: no low-rank update fits.")
    generator = torch.Generator().manual_seed(seed)
    pairs = [_pair(layer, rank, generator) for layer in layers]
    with trainable(model) as whole:
        for parameter in whole:
            parameter.requires_grad_(False)
        hooks = [
            layer.register_forward_hook(partial(_updated, *pair)) for layer, pair in zip(layers, pairs, strict=True)
        ]
        try:
            yield [matrix for pair in pairs for matrix in pair]
        finally:
            for hook in hooks:
                hook.remove()


def _pair(layer: nn.Linear, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    bound = 1 / math.sqrt(layer.in_features)
    first = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
    second = torch.zeros(layer.out_features, rank)
    device = layer.weight.device
    return nn.Parameter(first.to(device)), nn.Parameter(second.to(device))


def _updated(first: torch.Tensor, second: torch.Tensor, layer: nn.Module, given: Any, output: torch.Tensor) -> Any:
    update = 2 * nn.functional.linear(nn.functional.linear(given[0].float(), first), second)
    return output + update.to(output.dtype)
