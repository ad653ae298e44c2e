"""Builds, wraps and runs a model without weights on torch's meta device, and counts the memory that it would use.

Nothing is computed from a formula. Parameters are the model's own. Activations are what autograd saves in a real
forward pass, each storage once. So architectures, LoRA, frozen layers and dtypes need no special cases.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from blur_trainer.models.forward import causal_lm
from blur_trainer.models.loading import read_config

_ATTENTION = "blur_trainer_memory"


class _FlashShapes(torch.autograd.Function):
    """Saves what flash attention would save (queries, keys, values, output, one float32 per row). Computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("The model on the meta device is never differentiated.")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FlashShapes.apply(query, key, value), None


AttentionInterface.register(_ATTENTION, _attention)


@dataclass(frozen=True)
class Saved:
    """Bytes of activations: `inputs` and `inside` per decoder layer, and `outside` of the layers.

    A layer below all trained parameters keeps no graph: its `inside` is 0.
    """

    outside: int
    inputs: tuple[int, ...]
    inside: tuple[int, ...]

    def up_to(self, top: int | None) -> "Saved":
        """The same for a pass that ends at layer `top`. Then `outside`, which belongs to the final norm, is 0."""
        return self if top is None else Saved(0, self.inputs[: top + 1], self.inside[: top + 1])

    def total(self, checkpointing: bool) -> int:
        """Bytes held when the backward pass begins. Checkpointing keeps only the input of each layer."""
        return self.outside + sum(self.inputs if checkpointing else self.inside)

    def one_layer(self) -> int:
        """Bytes held while one layer is differentiated or recomputed."""
        return max(self.inside, default=0) + max(self.inputs, default=0)


def load_config(model: str | PreTrainedConfig | PreTrainedModel | PeftModel) -> PreTrainedConfig:
    if isinstance(model, str):
        return read_config(model, {})
    config = causal_lm(model).config if isinstance(model, nn.Module) else model
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"`model` must be a configuration, a model, or a name or path of one, got `{type(model).__name__}`."
        )
    return config


def build(
    model: object, config: PreTrainedConfig, dtype: torch.dtype, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """Builds the model on the meta device. Trainable are the given model's parameters, or those of `peft_config`."""
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else peft_config
    with torch.device("meta"):
        # copies, because building writes the attention into the one and PEFT the target modules into the other
        built: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=_ATTENTION, trust_remote_code=False
        )
        if adapter is not None:
            adapter = copy.deepcopy(adapter)
            adapter.inference_mode = False
            built = get_peft_model(built, adapter)
    if isinstance(model, PreTrainedModel) and adapter is None:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return built.train()


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers: the units that checkpointing recomputes and sharding gathers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def saved_activations(model: nn.Module, batch_size: int, length: int, checkpointing: bool = False) -> Saved:
    """What autograd saves in the backbone's forward pass over `(batch_size, length)` tokens.

    With `checkpointing` transformers makes the embedding's output require a gradient, even if the embedding is frozen.
    So every layer has a graph.
    """
    count: dict[StorageWeakRef, int] = {}
    alive: list[Tensor] = []  # keeps storages alive, because the id of a freed one could be reused
    own = {StorageWeakRef(t.untyped_storage()) for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if StorageWeakRef(storage) not in own:
            count[StorageWeakRef(storage)] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs: list[int] = []
    marks: list[int] = []
    target = causal_lm(model)
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    recording = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with recording, _watching(layers(model), inputs, lambda: marks.append(sum(count.values()))):
        embedded = target.get_input_embeddings()(ids)
        if checkpointing:
            embedded.requires_grad_()
        target.base_model(inputs_embeds=embedded, use_cache=False)
    inside = tuple(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))
    return Saved(sum(count.values()) - sum(inside), tuple(inputs), inside)


@contextmanager
def _watching(modules: list[nn.Module], inputs: list[int], mark: Any) -> Iterator[None]:
    """Calls `mark` before and after each module, and records the bytes of its first input."""

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        inputs.append(hidden.numel() * hidden.element_size())
        mark()

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(lambda *_: mark()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
