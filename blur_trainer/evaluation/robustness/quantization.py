"""Quantizes weights to few bits and back, in plain torch."""

from typing import Literal

import torch
from torch import Tensor

BITS = (2, 8)
Bits = int | Literal["nf4"]
#: the quantiles of a normal distribution that 4 bits stand for, Dettmers et al. (2023)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def check_bits(bits: Bits, group_size: int | None) -> None:
    """Raises for values that [`quantize_dequantize`] does not accept."""
    low, high = BITS
    if bits != "nf4" and (isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high):
        raise ValueError(f"`bits` is {bits!r}; it takes {low} to {high}, or 'nf4'.")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"`group_size` is {group_size!r}; it takes a number of weights, or None for whole rows.")


def quantize_dequantize(weight: Tensor, bits: Bits, group_size: int | None = 64) -> Tensor:
    r"""
    Symmetric absmax quantization, row by row in groups of neighboring weights, and back:

    $$s = \max_{i \in g} |w_i| / (2^{b-1} - 1), \qquad \hat w_i = s \cdot \mathrm{round}(w_i / s)$$

    so that $|\hat w_i - w_i| \le s / 2$ (to rounding of the weight's own dtype).

    `"nf4"`: the 4-bit levels of QLoRA, quantiles of a normal distribution, in groups of neighbors of the flattened
    weight: what bitsandbytes stores.

    Source of NF4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023).

    Differs from bitsandbytes: its 8-bit weights keep outlier features of the activations in 16 bits.

    Args:
        weight (`Tensor`): (rows, columns), floating point.
        bits (`int` or `"nf4"`): $b$, from 2 to 8.
        group_size (`int`, *optional*, defaults to `64`): columns per group; the last group may be smaller. None: whole
            rows.

    Returns:
        `Tensor`: $\hat w$, of the same shape and dtype. A group of zeros stays zero.
    """
    check_bits(bits, group_size)
    if bits == "nf4":
        return _nf4(weight, group_size or weight.shape[-1])
    columns = weight.shape[-1]
    groups = weight.float().split(group_size or columns, dim=-1)
    return torch.cat([_rounded(group, 2 ** (bits - 1) - 1) for group in groups], dim=-1).to(weight.dtype)


def _nf4(weight: Tensor, size: int) -> Tensor:
    """To the nearest level of each group, which its largest weight scales."""
    flat = weight.float().flatten()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(_NF4, device=weight.device)
    nearest = torch.bucketize(groups / scale.clamp_min(torch.finfo(flat.dtype).tiny), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def _rounded(group: Tensor, levels: int) -> Tensor:
    scale = group.abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (group / scale.clamp_min(torch.finfo(group.dtype).tiny)).round() * scale, group)
