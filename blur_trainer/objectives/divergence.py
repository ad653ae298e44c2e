"""Divergences of distributions over the vocabulary, and other values of whole logits: one number per token.

Shapes: B batch, T tokens, V vocabulary. Each is a pair of a value and its derivative by the logits `z`
(`objectives.sliced`). `p` is `softmax(z)`, `p_ref` the reference's, `y` the token's label. Every function returns
`(B, T)`, at least in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blur_trainer.objectives.sliced import Formula, per_token


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`KL(p_ref || p)`. `ref_logits` get no gradient."""
    return per_token(_KL, logits, ref_logits)


def uniform_divergence(logits: Tensor) -> Tensor:
    """`KL(U || p) = logsumexp(z) - mean(z) - log V`, `U` uniform."""
    return per_token(_UNIFORM, logits)


def js_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`JSD(p_ref, p) = (KL(p_ref || m) + KL(p || m)) / 2`, `m = (p_ref + p) / 2`. `ref_logits` get no gradient.

    Between 0 and `log 2`, exactly 0 where both agree. It stays finite where a probability underflows.
    """
    return per_token(_JS, logits, ref_logits)


def soft_cross_entropy(logits: Tensor, goal_logits: Tensor, targets: Tensor, less: float) -> Tensor:
    """`CE(q, p) = -sum_v q_v log p_v`, `q = softmax(goal_logits - less * onehot(y))`. `q` gets no gradient.

    `targets` `(B, T)` int64 are the labels `y`, each in `[0, V)`. `less=inf` takes the label out.
    """
    return per_token(_SOFT_CROSS_ENTROPY, logits, goal_logits, targets, less)


def missing_entropy(logits: Tensor, level: float) -> Tensor:
    """`max(0, level - H(p))`, `H` the entropy, in nats. Where it is 0 its gradient is 0."""
    return per_token(_MISSING_ENTROPY, logits, level)


def squared_margin(logits: Tensor) -> Tensor:
    """`(max(z) - mean(z))^2`. Of several highest logits the first has the derivative."""
    return per_token(_SQUARED_MARGIN, logits)


def _kl(z: Tensor, ref: Tensor) -> Tensor:
    logp, ref_logp = F.log_softmax(z, dim=-1), F.log_softmax(ref, dim=-1)
    return F.kl_div(logp, ref_logp, log_target=True, reduction="none").sum(-1)


def _kl_slope(z: Tensor, weight: Tensor, ref: Tensor) -> Tensor:
    return (z.softmax(-1) - ref.softmax(-1)) * weight


def _uniform(z: Tensor) -> Tensor:
    return z.logsumexp(-1) - z.mean(-1) - math.log(z.shape[-1])


def _uniform_slope(z: Tensor, weight: Tensor) -> Tensor:
    return (z - z.logsumexp(-1, keepdim=True)).exp() * weight - weight / z.shape[-1]


def _log_over(p: Tensor, mean: Tensor) -> Tensor:
    """`log(p / mean)`: exactly 0 where both are equal, and finite where `p` is 0 (there it is multiplied by `p`)."""
    return (p / mean).clamp_min(torch.finfo(p.dtype).tiny).log()


def _mean(p: Tensor, q: Tensor) -> Tensor:
    return ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)


def _js(z: Tensor, ref: Tensor) -> Tensor:
    p, q = z.softmax(-1), ref.softmax(-1)
    mean = _mean(p, q)
    return (torch.linalg.vecdot(p, _log_over(p, mean)) + torch.linalg.vecdot(q, _log_over(q, mean))) / 2


def _js_slope(z: Tensor, weight: Tensor, ref: Tensor) -> Tensor:
    p = z.softmax(-1)
    over = _log_over(p, _mean(p, ref.softmax(-1)))
    return p * (over - torch.linalg.vecdot(p, over).unsqueeze(-1)) * (weight / 2)


def _goal(goal: Tensor, target: Tensor, less: float) -> Tensor:
    return goal.scatter_add(-1, target, goal.new_full(target.shape, -less)).softmax(-1)


def _soft_cross_entropy(z: Tensor, goal: Tensor, target: Tensor, less: float) -> Tensor:
    return F.cross_entropy(z, _goal(goal, target, less), reduction="none")


def _soft_cross_entropy_slope(z: Tensor, weight: Tensor, goal: Tensor, target: Tensor, less: float) -> Tensor:
    return (z.softmax(-1) - _goal(goal, target, less)) * weight


def _missing_entropy(z: Tensor, level: float) -> Tensor:
    logp = F.log_softmax(z, dim=-1)
    return (level + (logp.exp() * logp).sum(-1)).relu()


def _missing_entropy_slope(z: Tensor, weight: Tensor, level: float) -> Tensor:
    logp = F.log_softmax(z, dim=-1)
    p = logp.exp()
    negative = (p * logp).sum(-1, keepdim=True)
    return p * (logp - negative) * (weight * (level + negative > 0))


def _squared_margin(z: Tensor) -> Tensor:
    return (z.amax(-1) - z.mean(-1)).square()


def _squared_margin_slope(z: Tensor, weight: Tensor) -> Tensor:
    highest, first = z.max(-1, keepdim=True)
    twice = 2 * weight * (highest - z.mean(-1, keepdim=True))
    return (-twice / z.shape[-1]).expand_as(z).scatter_add(-1, first, twice)


_KL = Formula(_kl, _kl_slope)
_UNIFORM = Formula(_uniform, _uniform_slope)
_JS = Formula(_js, _js_slope)
_SOFT_CROSS_ENTROPY = Formula(_soft_cross_entropy, _soft_cross_entropy_slope)
_MISSING_ENTROPY = Formula(_missing_entropy, _missing_entropy_slope)
_SQUARED_MARGIN = Formula(_squared_margin, _squared_margin_slope)
