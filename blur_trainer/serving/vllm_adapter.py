"""A LoRA as low-rank additions to vLLM's linear layers, which stay as they are and may belong to another model, too."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import set_weight_attrs

from blur_trainer.serving.adapter_tensors import Pair, place_among, plain_lora

Place = int | None  # 0, 1, 2 of q, k, v where vLLM fuses these into one layer; None: the whole layer


class LowRank(nn.Module):
    """`s B A x` of one layer, or of one of those that vLLM fuses into one. This process's share of A and B only."""

    def __init__(self, base: Any, place: Place, pair: Pair) -> None:
        super().__init__()
        first, second, self.scale = pair
        rows = isinstance(base, RowParallelLinear)
        self.reduce = rows and base.reduce_results and base.tp_size > 1
        sizes = base.output_partition_sizes
        self.size = sum(sizes) if place is None else sizes[place]
        # `weight_loader` of a fused layer fills the rows of one layer in a weight of all: so B begins as that
        whole = self._share(base, (sum(sizes), second.shape[1]), output_dim=0)
        if rows:
            self.A = self._share(base, (first.shape[0], base.input_size_per_partition), input_dim=1)
            base.weight_loader(self.A, first)
            whole.data.copy_(second)
        else:
            self.A = self._share(base, tuple(first.shape))
            self.A.data.copy_(first)
            shard = () if place is None else ("qkv"[place] if isinstance(base, QKVParallelLinear) else place,)
            base.weight_loader(whole, second, *shard)
        start = 0 if place is None else sum(sizes[:place])
        self.B = nn.Parameter(whole.data[start : start + self.size].clone(), requires_grad=False)

    @staticmethod
    def _share(base: Any, shape: tuple[int, ...], **cut: int) -> nn.Parameter:
        empty = torch.empty(shape, dtype=base.params_dtype, device=base.weight.device)
        parameter = nn.Parameter(empty, requires_grad=False)
        set_weight_attrs(parameter, cut)
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.A) * self.scale
        if self.reduce:
            low = tensor_model_parallel_all_reduce(low)
        return nn.functional.linear(low, self.B)


class LowRankLinear(nn.Module):
    """
    A linear layer of vLLM plus `s B A x`. vLLM fuses several layers into one (q, k, v): then each has its own addition.

    Under tensor parallelism A is cut where the layer cuts its inputs, B where it cuts its outputs, by the layer's own
    `weight_loader`. Of a row-parallel layer the `(T, r)` numbers between A and B are summed over the processes.

    A and B get the dtype of the layer. Differs from PEFT, which computes in the adapter's.

    Args:
        base: the layer, one of vLLM's `LinearBase`. It is called as it is.
        pairs: A, B and s by place.
    """

    requires_unquantized_input = True

    def __init__(self, base: Any, pairs: Mapping[Place, Pair]) -> None:
        super().__init__()
        self.base = base
        places: list[Place] = [None] if None in pairs else list(range(len(base.output_partition_sizes)))
        self.sizes = [base.output_partition_sizes[place] for place in places if place is not None]
        self.additions = nn.ModuleList(
            LowRank(base, place, pairs[place]) if place in pairs else nn.Identity() for place in places
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, nn.Parameter | None]:
        """As the layer's: the output, or the output and a bias that is added elsewhere."""
        result = self.base(x)
        if len(self.additions) == 1:
            added = self.additions[0](x)
        else:
            pieces = [
                addition(x) if isinstance(addition, LowRank) else x.new_zeros(*x.shape[:-1], size)
                for addition, size in zip(self.additions, self.sizes, strict=True)
            ]
            added = torch.cat(pieces, dim=-1)
        return (result[0] + added, result[1]) if isinstance(result, tuple) else result + added


def put_adapter(model: nn.Module, tensors: Mapping[str, Tensor], lora: LoraConfig) -> set[str]:
    """
    Puts a LoRA over the layers of a vLLM model. Returns the names of the new parameters.

    Args:
        model: of a class of vLLM whose layers have the names that they have in transformers, fused ones
            (`packed_modules_mapping`) apart.
        tensors, lora: as for [`plain_lora`].

    Raises:
        `ValueError`: it is no plain LoRA, or the model has no such layer.
    """
    layers: dict[str, dict[Place, Pair]] = defaultdict(dict)
    for name, pair in plain_lora(tensors, lora).items():
        layer, place = place_among(getattr(model, "packed_modules_mapping", {}), name)
        layers[layer][place] = pair
    names = set()
    for layer, pairs in layers.items():
        over = LowRankLinear(_linear(model, layer), pairs)
        model.set_submodule(layer, over)
        names |= {f"{layer}.{name}" for name, _ in over.named_parameters() if name.startswith("additions.")}
    return names


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)):
        found = "no such layer" if layer is None else f"a `{type(layer).__name__}` there"
        raise ValueError(f"The adapter is on {name}; vLLM's `{type(model).__name__}` has {found}: not supported.")
    if layer.tp_size > 1 and (getattr(layer, "gather_output", False) or not getattr(layer, "input_is_parallel", True)):
        raise ValueError(f"The adapter is on {name}, which gathers or cuts its inputs: use one process.")
    return layer
