"""Small damage to the weights: noise, and the smallest of them set to zero. What it brings back was only hidden."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.evaluation.robustness.attacked import with_weights_changed


def noisy(
    model: PreTrainedModel, evaluation: Evaluation | Measure, *, share: float = 0.02, seed: int = 0
) -> dict[str, float]:
    r"""
    The evaluation with Gaussian noise on the weights, $\hat w_i = w_i + s \, \sigma_W \varepsilon_i$.

    $\sigma_W$ is the standard deviation of the weights of one matrix, $s$ is `share`, and $\varepsilon_i$ is standard
    normal. The matrices are those that [`quantized`] rounds. The model is bit for bit as before afterwards.

    Args:
        share: $s$, above 0.
        seed: of the noise. The same seed gives the same noise on every machine.

    Raises:
        as [`quantized`], and `ValueError` for a wrong `share`.
    """
    check_share("share", share, math.inf)
    generator = torch.Generator().manual_seed(seed)

    def changed(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        return weight.float() + share * weight.float().std() * noise

    return with_weights_changed(model, evaluation, changed)


def pruned(model: PreTrainedModel, evaluation: Evaluation | Measure, *, share: float = 0.2) -> dict[str, float]:
    r"""
    The evaluation with the smallest weights of each matrix set to zero: the $\lfloor s N \rfloor$ of its $N$ weights
    whose size is smallest. The matrices are those that [`quantized`] rounds.

    Args:
        share: $s$, above 0 and below 1.

    Raises:
        as [`quantized`], and `ValueError` for a wrong `share`.
    """
    check_share("share", share, 1)

    def changed(weight: Tensor) -> Tensor:
        flat = weight.float().flatten()
        flat[flat.abs().argsort()[: int(share * len(flat))]] = 0
        return flat.view_as(weight)

    return with_weights_changed(model, evaluation, changed)


def check_share(name: str, share: float, end: float) -> None:
    """Raises for anything but a number above 0 and below `end`."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < end:
        raise ValueError(f"`{name}` is {share!r}; it takes a number above 0{f' and below {end}' if end == 1 else ''}.")
