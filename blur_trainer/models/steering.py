"""Runs a model with the output of one decoder layer replaced at some positions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blur_trainer.models.layers import find_layers


@contextmanager
def steered(model: nn.Module, layer: int, at: Tensor, vector: Tensor) -> Iterator[None]:
    """Inside, the output of decoder layer `layer` (0-based) is `vector` `(H,)` where `at` `(B, T)` is true.

    The layers above see nothing else of these positions. A gradient reaches `vector`.
    """

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        where = at.to(hidden.device, torch.bool)[..., None]
        hidden = torch.where(where, vector.to(hidden), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_layers(model)[2][layer].register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
