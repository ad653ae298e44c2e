"""From logits to the log-probabilities of answers: tensors in, tensors out.

Shapes: B batch, T tokens, V vocabulary. `labels` is `(B, T)` int64 with -100 wherever a token is no target (prompt,
padding). A causal model predicts token `t + 1` from position `t`, so everything per token has length `T - 1`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blur_trainer.constants import IGNORE_INDEX


def answer_mask(labels: Tensor) -> Tensor:
    """`(B, T)` labels -> `(B, T-1)` bool: which next-token predictions are answer tokens."""
    return labels[:, 1:] != IGNORE_INDEX


def without_first(labels: Tensor, count: int) -> Tensor:
    """The labels `(B, T)` without the first `count` answer tokens of each example."""
    first = labels[:, :1] != IGNORE_INDEX  # of a text; nothing predicts it
    targets = (labels != IGNORE_INDEX).cumsum(-1) - first.int()
    return labels.masked_fill(targets <= count, IGNORE_INDEX)


def per_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each answer token, 0 elsewhere.

    `logits` `(B, T, V)`, `labels` `(B, T)` -> `(B, T-1)`: `log softmax(logits[b, t])[labels[b, t+1]]`, at least in
    float32: bfloat16 has three digits, and a sequence sums hundreds of terms.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    # Shift the labels, not the logits, because slicing logits would copy them. On the CPU cross entropy takes half the
    # time of TRL's `selective_log_softmax` (measured), and stock training uses it.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nll.view_as(targets)[:, :-1]


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """`log p(answer | prompt)` `(B,)`: the sum of `per_token_logps` over the answer."""
    return per_token_logps(logits, labels).sum(-1)


def answer_sum(values: Tensor, labels: Tensor) -> Tensor:
    """`(B,)`: the sum of `values` `(B, T)`, one per position, over the positions that predict an answer's token."""
    # masked, not indexed: with indexing the host would have to wait for the device
    return values[:, :-1].masked_fill(~answer_mask(labels), 0.0).sum(-1)
