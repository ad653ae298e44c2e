"""Pure losses of the log-probabilities of single answer tokens: `(B, T-1)` in, one value per example `(B,)` out.

`per_token_logps` are in nats, and 0 where a position is no answer token (prompt, padding), as
`blur_trainer.models.forward.answer_token_logps` gives them. They need no logits, so the fused LM head serves them.
"""

import math

import torch
from torch import Tensor


def wga_loss(per_token_logps: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent: the sum over answer tokens of `sg[p^beta] log p`, `(B,)`. The weight gets no gradient.

    The gradient is that of `p^beta / beta`, which is bounded below by 0 (`beta = 0` is plain ascent, and is not). So
    tokens that are forgotten are let go, and a falling p does not always lower the value: it is least at
    `p = exp(-1/beta)` and 0 again at `p = 0`. Source: Wang et al. 2025, arXiv 2502.19301.
    """
    weights = per_token_logps.detach().exp().pow(beta)
    return (weights * per_token_logps).sum(-1)


def satimp_loss(per_token_logps: Tensor, beta1: float, beta2: float) -> Tensor:
    """SatImp: the sum over answer tokens of `sg[p^beta1 (1-p)^beta2] log p`, `(B,)`. The weight gets no gradient.

    `p^beta1` (saturation) lets go of tokens that are forgotten, `(1-p)^beta2` (importance) of those that are certain.
    The gradient is that of `integral from 0 to p of q^(beta1-1) (1-q)^beta2 dq`, bounded below by 0 for `beta1 > 0`; as
    with `wga_loss` the value itself rises again towards `p = 0`. Source: Yang et al. 2025, arXiv 2505.11953.

    Same numbers as the authors' and open-unlearning's code. The latter's yaml weighs forget by 0.1 and retain by 1;
    its class, like the authors' code, by 1 and 0.1.
    """
    logps = per_token_logps.detach()
    # 1 - p without cancellation. Rounding may put `log p` above 0, and a negative base would give NaN.
    rest = (-torch.expm1(logps)).clamp(min=0.0)
    return (logps.exp().pow(beta1) * rest.pow(beta2) * per_token_logps).sum(-1)


def jensun_loss(per_token_logps: Tensor) -> Tensor:
    """The sum over a refusal's tokens of `JSD(P || onehot(token))`, `(B,)`: each between 0 and log 2.

    `JSD(P || Q) = KL(P || M)/2 + KL(Q || M)/2` with `M = (P + Q)/2`. Against one token it depends on that token's
    probability p alone: `(1-p)/2 log 2 + p/2 log(2p/(1+p)) + 1/2 log(2/(1+p))`. At `p = 1`, and so outside of answers,
    it is exactly 0; its gradient vanishes at `p -> 0`. Source: Singh et al. 2025, arXiv 2509.02820.

    Differs from the authors' code, where every position of the forget text counts, prompt and padding too, and where
    the target gives both tokens of "No idea" probability 1 at once: no distribution. Its loss never reaches 0, and is
    least where each of them has probability 1/2 at every position.
    """
    p = per_token_logps.exp()
    rest = -torch.expm1(per_token_logps)
    # `log p = -inf` would make `p log p` NaN. Where p underflows, far above this bound, the product is 0 already.
    p_log_p = p * per_token_logps.clamp(min=-1e4)
    return (0.5 * (rest * math.log(2.0) + p_log_p - (1.0 + p) * torch.log1p(-0.5 * rest))).sum(-1)


def flat_loss(per_token_logps: Tensor, mask: Tensor, refusal_logps: Tensor, refusal_mask: Tensor) -> Tensor:
    """FLAT with the total variation: `tanh(mean p of the forget answer)/2 - tanh(mean p of the refusal)/2`, `(B,)`.

    `mask`, `refusal_mask` `(B, T-1)` bool: the answer tokens. Between -tanh(1)/2 and tanh(1)/2.
    Source: Wang et al. 2024, arXiv 2410.11143; the total variation is the default of the authors' code.

    Differs from the authors' code, whose mean is over all positions of a padded batch, where prompt and padding count
    as probability 0, and whose tanh is of that one mean. There an example's gradient shrinks with the batch's padding.
    """
    forgotten, refused = _mean_probability(per_token_logps, mask), _mean_probability(refusal_logps, refusal_mask)
    return 0.5 * (forgotten.tanh() - refused.tanh())


def _mean_probability(per_token_logps: Tensor, mask: Tensor) -> Tensor:
    return per_token_logps.exp().masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
