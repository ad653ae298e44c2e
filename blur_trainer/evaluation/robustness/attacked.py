"""A model for the time of an attack: what an attacker holds of it, and all of it as before afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from blur_trainer.evaluation.distributed import is_sharded
from blur_trainer.models.forward import evaluating
from blur_trainer.models.logit_difference import LogitDifferenceModel


def check_attackable(model: nn.Module) -> None:
    """Raises for a model whose weights are not all here, as floating point numbers that can be changed."""
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"`model` is a `{type(model).__name__}`; it takes a loaded model, a `PreTrainedModel` or a `PeftModel`. "
            "Unwrap it: `accelerator.unwrap_model(model)`."
        )
    if is_sharded(model):
        raise ValueError("The weights are sharded (FSDP2 or ZeRO-3): attack the saved model, loaded whole.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Some weights are offloaded (`device_map`): attack the model where all of it fits.")
    if any(isinstance(part, PreTrainedModel) and getattr(part, "is_quantized", False) for part in model.modules()):
        raise ValueError(
            "The weights are stored in few bits (`quantization_config`), which nothing can be added to: load the "
            "model without it. An adapter that was trained on such a base: `merge_and_save` makes a whole model of it."
        )


@contextmanager
def under_attack(model: nn.Module) -> Iterator[None]:
    """
    Inside, parameters and buffers may be changed, and the adapters in use are merged into what they adapt: whoever is
    given the model has one set of weights. Whatever happens, afterwards all is bit for bit as before, in place.

    Not merged are those of a [`LogitDifferenceModel`], which share what they adapt with the target.
    """
    check_attackable(model)
    tensors = [*model.parameters(), *model.buffers()]  # a shared one once
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]  # the accelerator's memory is for the attack
    layers = [] if isinstance(model, LogitDifferenceModel) else _in_use(model)
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)


@contextmanager
def trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """
    The weights that fine-tuning changes, with `requires_grad` and no gradient; the model in evaluation mode, autograd
    off but where it is enabled. Afterwards flags, gradients and modes are as before.

    They are all that are floating point, and of a [`LogitDifferenceModel`] the adapter's: no gradient passes through
    its target.
    """
    adapters, of_adapter = adapter_weights(model), isinstance(model, LogitDifferenceModel)
    chosen = [p for p in model.parameters() if p.is_floating_point() and (id(p) in adapters) == of_adapter]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        with evaluating(model):
            yield chosen
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def adapter_weights(model: nn.Module) -> set[int]:
    """The `id` of each parameter that an adapter adds to a layer."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    base = {id(parameter) for layer in layers for parameter in layer.get_base_layer().parameters()}
    return {id(parameter) for layer in layers for parameter in layer.parameters()} - base


def rounded_weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights that quantizers round: of each `nn.Linear` but output embeddings and adapters, a shared one once."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    heads = [head for part in parts if (head := part.get_output_embeddings()) is not None]
    spared = {id(parameter) for head in heads for parameter in head.parameters()} | adapter_weights(model)
    weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for key, weight in weights.items() if key not in spared]


def _in_use(model: nn.Module) -> list[BaseTunerLayer]:
    """Layers with an adapter that is switched on and not merged yet."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if not layer.merged and not layer.disable_adapters]
