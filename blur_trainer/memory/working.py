"""Peak memory of a forward pass without a graph: the reference's pass, or layers below all trained parameters.

Counted on the meta device: each operation's output, from its creation until it is freed.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blur_trainer.models.forward import causal_lm


class Living(TorchDispatchMode):
    """Sums up the storages that live inside the context, and records the maximum."""

    def __init__(self, known: set[StorageWeakRef]) -> None:
        super().__init__()
        self.now = self.highest = 0
        self._known = known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.highest = max(self.highest, self.now)
        return answer

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = StorageWeakRef(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: StorageWeakRef, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@torch.no_grad()
def working_bytes(model: nn.Module, batch_size: int, length: int) -> int:
    """Peak bytes of the backbone over `(batch_size, length)` tokens, without parameters."""
    own = [*model.parameters(), *model.buffers()]
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    with Living({StorageWeakRef(tensor.untyped_storage()) for tensor in own}) as living:
        causal_lm(model).base_model(input_ids=ids, use_cache=False)
    return living.highest
