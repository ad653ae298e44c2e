"""The backend for FSDP2. `.grad` is a `DTensor`; each process keeps its own shard of both gradients."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from blur_trainer.gradients.backend import GradientBackend, Gradients


class FSDPBackend(GradientBackend):
    """Slots hold local shards. The three inner products are summed over the processes once per optimizer step."""

    sharded = True

    def __init__(self, accelerator: Accelerator, model: nn.Module, offload_forget_gradient: bool = False):
        _reshard(model)
        super().__init__(accelerator, model, offload_forget_gradient)
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in self.parameters:
            if not isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"{names[id(parameter)]} is trainable but not sharded by FSDP, which then does not reduce its "
                    "gradient: leave its module out of `fsdp_ignored_modules`, or freeze it."
                )
            if parameter.device_mesh.ndim != 1:
                raise NotImplementedError(
                    f"{names[id(parameter)]} is sharded over {parameter.device_mesh}: only plain FSDP2 (one mesh "
                    "dimension) is supported, not hybrid sharding."
                )

    def _read(self) -> Iterator[Tensor | None]:
        yield from (p.grad.to_local() if isinstance(p.grad, DTensor) else None for p in self.parameters)

    def _put(self, gradients: Gradients) -> None:
        for index, parameter in enumerate(self.parameters):
            shard, gradients[index] = gradients[index], None
            if shard is not None:
                # Fill an empty tensor: `from_local` would move the shard of a CPU-offloaded parameter to the GPU.
                gradient = torch.empty_like(parameter)
                gradient.to_local().copy_(shard)  # type: ignore[attr-defined]
                parameter.grad = gradient

    def _weights(self) -> Iterator[Tensor]:
        _reshard(self.model)
        yield from (p.data.to_local() for p in self.parameters)  # type: ignore[attr-defined]

    def shared(self, products: Tensor) -> Tensor:
        return self.accelerator.reduce(products.to(self.accelerator.device), "sum").cpu()


def _reshard(model: nn.Module) -> None:
    """Frees parameters that are still gathered, as the last units' are after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
