"""Finds the parameters that get a gradient from an objective. The others use no memory in its slot."""

from typing import Any

import torch
from torch import nn

from blur_trainer.models.early_exit import ending_at
from blur_trainer.objectives.base import Objective


def reached(model: nn.Module, objective: Objective) -> list[nn.Parameter]:
    """Parameters of a model on the meta device that autograd reaches from the objective's last layer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if objective.top_layer is None:
        return trained
    with ending_at(model, objective.top_layer):
        hidden = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    seen: set[Any] = set()
    ahead: list[Any] = [hidden.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return [p for p in trained if id(p) in leaves]
