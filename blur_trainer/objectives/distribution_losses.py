"""Pure losses on whole distributions over the vocabulary: logits in, one value per example out.

Shapes: B batch, T tokens, V vocabulary. `logits` and `ref_logits` are `(B, T, V)`, `labels` `(B, T)` int64 with -100
where a token is no target (prompt, padding). Position `t` predicts token `t + 1`. Every loss is a sum over the answer's
tokens, `(B,)`, at least in float32; `p` is `softmax(logits)` there, `p_ref` the reference's, `y` the label, H the
entropy in nats. `ref_logits` get no gradient. `losses.py` has KL and the divergence from uniform.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from blur_trainer.models.logps import answer_sum
from blur_trainer.objectives.divergence import js_divergence, missing_entropy, soft_cross_entropy, squared_margin


def undial_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """`CE(q, p)`, `q = softmax(ref_logits - beta * onehot(y))`: the reference with its label's logit lowered.

    Bounded below by `H(q)`. Source: Dong et al. 2024, arXiv 2402.10052.
    Differs from open-unlearning, whose mean includes prompt and padding, where the label -100 lowers entry V - 100.
    """
    return answer_sum(soft_cross_entropy(logits, ref_logits, _next(labels), beta), labels)


def ce_u_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`CE(q, p)`, `q` = `p` without the label: `q_y = 0`, `q_v = p_v / (1 - p_y)`. `q` gets no gradient.

    So the gradient by the logits is `p_y` at the label and `-p_v p_y / (1 - p_y)` elsewhere: bounded by 1, and 0 once
    `p_y` is 0. Source: Yang 2025, arXiv 2503.01224.
    Differs from the authors' code, which leaves out the first answer token (`logps.without_first`).
    """
    return answer_sum(soft_cross_entropy(logits, logits, _next(labels), math.inf), labels)


def clamped_entropy_loss(logits: Tensor, labels: Tensor, tau: float) -> Tensor:
    """`max(0, tau log V - H(p))`: raises the entropy to the share `tau` of the largest one, then does nothing.

    Between 0 and `tau log V`. Source: BLADE, arXiv 2608.22557.
    """
    return answer_sum(missing_entropy(logits, tau * math.log(logits.shape[-1])), labels)


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`(max(z) - mean(z))^2` of the logits `z`: 0 only where all are equal. PDU's forget loss.

    Source: Entesari et al. 2025, arXiv 2506.05314.
    Differs from open-unlearning: its mean includes prompt and padding; an earlier version of it takes the positions of
    the answer's tokens themselves, not those that predict them.
    """
    return answer_sum(squared_margin(logits), labels)


def jsd_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """`JSD(p_ref, p) = (KL(p_ref || m) + KL(p || m)) / 2`, `m = (p_ref + p) / 2`.

    Between 0 and `log 2`, 0 where both agree. Source: Singh et al. 2025, arXiv 2509.02820.
    Differs from the authors' code, whose mean includes prompt and padding, and which cuts probabilities off at 1e-9:
    there the loss has no gradient, and its value is none of a distribution.
    """
    return answer_sum(js_divergence(logits, ref_logits), labels)


def _next(labels: Tensor) -> Tensor:
    """`(B, T)`: the label that each position predicts. Where none counts it is 0, as every vocabulary has it."""
    return F.pad(labels[:, 1:], (0, 1)).clamp(min=0)
