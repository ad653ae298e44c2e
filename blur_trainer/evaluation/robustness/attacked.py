"""Prepares a model for an attack and restores it afterwards, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.evaluation.distributed import is_sharded
from blur_trainer.models.forward import evaluating
from blur_trainer.models.logit_difference import LogitDifferenceModel


def check_attackable(model: nn.Module) -> None:
    """Raises unless all weights of the model are on this process, as floating point numbers that can be changed."""
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
    Inside, parameters and buffers may be changed, and active adapters are merged into their layers, as an attacker who
    has the model could do. On exit everything is restored in place, bit for bit, even after an exception.

    The adapters of a [`LogitDifferenceModel`] are not merged, because their layers are shared with the target.
    """
    check_attackable(model)
    tensors = [*model.parameters(), *model.buffers()]  # a shared tensor appears once
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]  # saves the accelerator's memory
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
    Yields the weights that fine-tuning changes. They require gradients and have none yet. The model is in evaluation
    mode, and autograd is off unless it is enabled inside. On exit flags, gradients and modes are restored.

    These are all floating point weights; for a [`LogitDifferenceModel`] only the adapter's, because no gradient passes
    through its target.
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
    """The weights that quantizers round: those of each `nn.Linear` except output embeddings and adapters, each once."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    heads = [head for part in parts if (head := part.get_output_embeddings()) is not None]
    spared = {id(parameter) for head in heads for parameter in head.parameters()} | adapter_weights(model)
    weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for key, weight in weights.items() if key not in spared]


def _in_use(model: nn.Module) -> list[BaseTunerLayer]:
    """Layers with an adapter that is switched on and not merged yet."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if not layer.merged and not layer.disable_adapters]


def with_weights_changed(
    model: PreTrainedModel, evaluation: Evaluation | Measure, change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    """
    The evaluation while each matrix `(out, in)` of [`rounded_weights`] is what `change` makes of it.

    Raises:
        As [`check_attackable`]; `ValueError`: the model has no such matrix.
    """
    check_attackable(model)
    weights = rounded_weights(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no `nn.Linear` but its head: there is nothing to change.")
    with under_attack(model):
        with torch.no_grad():
            for weight in weights:
                weight.copy_(change(weight))
        return dict(evaluation(model))
