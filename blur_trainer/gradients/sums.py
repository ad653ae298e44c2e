"""The weighted sum of two gradients, each a list of tensors."""

import torch
from torch import Tensor

from blur_trainer.gradients.retain_mean import Gradients


def add_scaled(mine: Gradients, others: Gradients, weight: float, keep: bool = False) -> Gradients:
    """`mine + weight * others`, in place. A parameter may have a gradient in only one of the two.

    `keep`: `others` stay as they are; else they are used up.
    """
    together = [(m, o) for m, o in zip(mine, others, strict=True) if m is not None and o is not None]
    if together and all(m.device == o.device for m, o in together):  # foreach refuses empty lists
        torch._foreach_add_([m for m, _ in together], [o for _, o in together], alpha=weight)
    else:
        for m, o in together:  # one tensor at a time, so that an offloaded slot is never on the device as a whole
            m.add_(o.to(m.device, non_blocking=True), alpha=weight)
    scale = torch.mul if keep else Tensor.mul_
    return [scale(o, weight) if m is None and o is not None else m for m, o in zip(mine, others, strict=True)]
