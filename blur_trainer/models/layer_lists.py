"""The module lists of a model that have one module per layer. It stands alone, so that a saved folder can carry it."""

from typing import Any

from torch import nn


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """All module lists whose length is the configuration's number of layers. Usually there is one."""
    count = layer_count(model)
    base: Any = model.base_model
    return [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]


def layer_count(model: Any) -> int | None:
    """`num_hidden_layers` of the decoder, or `None`."""
    return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
