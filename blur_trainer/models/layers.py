"""Finds the decoder layers of a causal language model by its structure, not by attribute names."""

from torch import nn
from transformers import PreTrainedModel

from blur_trainer.models.forward import causal_lm
from blur_trainer.models.layer_lists import layer_count, layer_lists


def find_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """
    Returns the module that runs the decoder layers, the name of its attribute that holds them, and the list of layers.

    The model may be wrapped: PEFT, DDP, FSDP2, DeepSpeed's engine, `torch.compile`.

    Raises:
        `TypeError`: there is no `PreTrainedModel` inside, or not exactly one list of its layers.
    """
    lm = causal_lm(model)
    if not isinstance(lm, PreTrainedModel):
        raise TypeError(f"`{type(model).__name__}` has no `PreTrainedModel` inside, whose layers could be told apart.")
    found = layer_lists(lm)
    if len(found) != 1:
        raise TypeError(
            f"`{type(lm).__name__}` has {len(found)} lists of {layer_count(lm)} layers where one is expected: what "
            "needs its layers works on decoder-only models (Llama, Mistral, Qwen2, GPT-NeoX and the like)."
        )
    for owner in lm.modules():
        for name, child in owner.named_children():
            if child is found[0]:
                return owner, name, found[0]
    raise TypeError(f"`{type(lm).__name__}` has its layers under no name.")


def check_layer(model: nn.Module, layer: int, asks: str) -> None:
    """Raises `ValueError` if the model has no layer of that number. `asks` names the caller in the message."""
    count = len(find_layers(model)[2])
    if not 0 <= layer < count:
        raise ValueError(f"{asks}: the model has the layers 0 to {count - 1}, and no layer {layer}.")
