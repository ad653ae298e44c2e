"""Pure loss functions: tensors in, one value per example out.

Shapes: B batch, T tokens, V vocabulary. `labels` is `(B, T)` int64, with -100 where a token is no target (prompt,
padding). A causal model predicts token `t + 1` from position `t`, so values per token have length `T - 1`.
Log-probabilities are in nats. Every loss returns `(B,)`; the caller reduces it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blur_trainer.models.logps import answer_sum
from blur_trainer.objectives.divergence import kl_divergence, uniform_divergence


def nll_loss(logps: Tensor) -> Tensor:
    """`-log p(answer | prompt)` `(B,)`, summed over the answer's tokens."""
    return -logps


def grad_ascent_loss(logps: Tensor) -> Tensor:
    """`log p(answer | prompt)` `(B,)`: minimizing it is gradient ascent on the NLL. Unbounded below."""
    return logps


def npo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Negative preference optimization, `-(2/beta) log sigmoid(-beta (log p_theta - log p_ref))` `(B,)`.

    Bounded below by 0; at the reference its value is `(2/beta) log 2` and its gradient that of gradient ascent.
    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3, on sequence log-probabilities as in the authors' code.
    Differs from MUSE and BLUR/MUSE (raw logits of the whole vocabulary, labels never read) and from BLUR/TOFU (NLL
    averaged over the batch before the sigmoid).
    """
    return -(2.0 / beta) * F.logsigmoid(-beta * (logps - ref_logps))


def simnpo_loss(logps: Tensor, lengths: Tensor, beta: float, delta: float) -> Tensor:
    """SimNPO, reference-free, length-normalized: `-(2/beta) log sigmoid(beta (-log p_theta / length - delta))` `(B,)`.

    `lengths` `(B,)`: answer tokens. Source: Fan et al. 2024, arXiv 2410.07163, the sign and place of `delta` as in the
    authors' code.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * (-logps / lengths - delta))


def target_loss(logps: Tensor, lengths: Tensor, level: Tensor | float, two_sided: bool) -> Tensor:
    """`1/2 relu(level - nll)^2` `(B,)`, `nll = -logps / length` in nats per token; `two_sided`: `1/2 (level - nll)^2`.

    `lengths` `(B,)`: answer tokens. `level`: a number, or `(B,)`. Both value and gradient vanish at the level.
    """
    missing = level + logps / lengths
    return 0.5 * (missing if two_sided else missing.relu()).square()


def dpo_loss(
    chosen_logps: Tensor, chosen_ref_logps: Tensor, rejected_logps: Tensor, rejected_ref_logps: Tensor, beta: float
) -> Tensor:
    """DPO with a refusal as the chosen and the forget answer as the rejected completion, all `(B,)`.

    `-(2/beta) log sigmoid(beta ((log p_theta - log p_ref)(chosen) - (log p_theta - log p_ref)(rejected)))`.
    Source: Rafailov et al. 2023, arXiv 2305.18290; the factor `2/beta` as in NPO's and open-unlearning's code.
    Differs from TOFU's code, which leaves the factor out.
    """
    margin = (chosen_logps - chosen_ref_logps) - (rejected_logps - rejected_ref_logps)
    return -(2.0 / beta) * F.logsigmoid(beta * margin)


def kl_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """`KL(p_ref || p_theta)` over the vocabulary, summed over the answer tokens, `(B,)`.

    `logits`, `ref_logits` `(B, T, V)`, `labels` `(B, T)`. Non-negative, 0 exactly where both distributions agree.
    `ref_logits` get no gradient. Differs from MUSE and BLUR/MUSE (`kl_div` of raw logits: no divergence, unbounded
    below) and from TOFU, ULD and open-unlearning (a real KL, but over prompt and padding too).
    """
    return answer_sum(kl_divergence(logits, ref_logits), labels)


def uniform_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`sum over answer tokens of KL(U || p_theta)`, `U` uniform over the vocabulary.

    `logits` `(B, T, V)`, `labels` `(B, T)` -> `(B,)`: per position `logsumexp(z) - mean(z) - log V`, which is 0 where
    all logits are equal and stays finite where a probability underflows. Source: 2406.08607.

    Differs from ULD's code, whose mean includes prompt and padding. There a batch's loss depends on the length of its
    longest example, and the assistant also learns to be uniform on the prompt.
    """
    return answer_sum(uniform_divergence(logits), labels)


def activation_loss(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """`sum over tokens of mean over hidden units of (hidden - target)^2`, `(B,)`: RMU's forget and retain loss.

    `hidden` `(B, T, H)`; `target` the same, or `(B, 1, H)`; `mask` `(B, T)`, 0 at padding, or `None` for all positions.
    At least in float32. Source: Li et al. 2024, arXiv 2403.03218, eq. 1 and 2.
    Differs from the WMDP authors' and BLUR's code, whose mean includes padding (`mask=None`). There a batch's loss
    depends on the attention output of fully masked rows, which differs between releases of transformers.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    squares = (hidden.to(dtype) - target.to(dtype)).square().mean(-1)
    return squares.sum(-1) if mask is None else squares.masked_fill(mask == 0, 0.0).sum(-1)
