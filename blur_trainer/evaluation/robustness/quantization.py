"""Quantizes weights to few bits and back, in plain torch."""

import torch
from torch import Tensor

BITS = (2, 8)


def check_bits(bits: int, group_size: int | None) -> None:
    """Raises for values that [`quantize_dequantize`] does not accept."""
    low, high = BITS
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
        raise ValueError(f"`bits` is {bits!r}; it takes {low} to {high}.")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"`group_size` is {group_size!r}; it takes a number of weights, or None for whole rows.")


def quantize_dequantize(weight: Tensor, bits: int, group_size: int | None = 64) -> Tensor:
    r"""
    Symmetric absmax quantization, row by row in groups of neighboring weights, and back:

    $$s = \max_{i \in g} |w_i| / (2^{b-1} - 1), \qquad \hat w_i = s \cdot \mathrm{round}(w_i / s)$$

    so that $|\hat w_i - w_i| \le s / 2$ (to rounding of the weight's own dtype).

    Differs from bitsandbytes: its 4-bit levels are those of a normal distribution (NF4), and its 8-bit weights keep
    outlier features of the activations in 16 bits.

    Args:
        weight (`Tensor`): (rows, columns), floating point.
        bits (`int`): $b$, from 2 to 8.
        group_size (`int`, *optional*, defaults to `64`): columns per group; the last group may be smaller. None: whole
            rows.

    Returns:
        `Tensor`: $\hat w$, of the same shape and dtype. A group of zeros stays zero.
    """
    check_bits(bits, group_size)
    columns = weight.shape[-1]
    groups = weight.float().split(group_size or columns, dim=-1)
    return torch.cat([_rounded(group, 2 ** (bits - 1) - 1) for group in groups], dim=-1).to(weight.dtype)


def _rounded(group: Tensor, levels: int) -> Tensor:
    scale = group.abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (group / scale.clamp_min(torch.finfo(group.dtype).tiny)).round() * scale, group)
