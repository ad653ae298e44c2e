"""Runs a model with other states in the output of one decoder layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def patched(layer: nn.Module, places: tuple[Tensor, ...], states: Tensor) -> Iterator[None]:
    """Inside, the output `(B, T, H)` of a layer has other states `(N, H)` at some (row, position).

    The layers above see nothing else of these positions. A gradient reaches `states`.
    """

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        old = output[0] if isinstance(output, tuple) else output
        new = old.index_put(tuple(index.to(old.device) for index in places), states.to(old))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
