"""Membership inference: one score per text and attack. It is low for a text that the model knows."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.evaluation.batching import check_context, check_example
from blur_trainer.evaluation.distributed import in_shares, is_sharded
from blur_trainer.evaluation.token_scores import AnswerScores, scored_positions
from blur_trainer.metrics.protocols import OPEN_UNLEARNING, TOFU, check_protocol
from blur_trainer.models.forward import evaluating
from blur_trainer.models.logit_difference import LogitDifferenceModel

Scores = dict[str, list[float]]  # attack -> one score per text


def likelihood_attacks(scores: Sequence[AnswerScores], texts: Sequence[str], protocol: str = TOFU) -> Scores:
    """`{"loss": [...], "zlib": [...], "min_k": [...], "min_k_plus_plus": [...]}`: see [`attack_scores`]."""
    # Here and not above: `evaluate` takes seconds to import.
    from blur_trainer.metrics.membership import attack_scores

    rows = []
    for score, text in zip(scores, texts, strict=True):
        if score.means is None or score.variances is None:
            raise ValueError("The attacks need each answer scored in detail: `score_variants(..., details=True)`.")
        rows.append(attack_scores(score.logps, score.means, score.variances, text, protocol))
    return {name: [row[name] for row in rows] for name in rows[0]}


def reference_attack(scores: Sequence[AnswerScores], reference: Sequence[AnswerScores]) -> list[float]:
    """
    Loss of each text minus its loss under a reference model, in nats per token: how much better the model knows it than
    a model that has not seen it. Source: Carlini et al., "Extracting Training Data from Large Language Models" (2021).
    """
    return [score.nll - other.nll for score, other in zip(scores, reference, strict=True)]


def gradient_norms(
    model: PreTrainedModel, examples: Sequence[dict[str, Any]], *, protocol: str = TOFU, desc: str | None = None
) -> list[float]:
    r"""
    Norm of the gradient of each text's loss. It is small for a text that the model was trained on.

    $$s = \left\lVert \nabla_\theta \frac{1}{T} \sum_{t=1}^{T} -\log p_\theta(y_t \mid x_{<t}) \right\rVert_2$$

    over all parameters that require gradients. It makes one backward pass per text and does not change `.grad`.

    Differs in open-unlearning (`protocol="open-unlearning"`): the mean of the parameter tensors' norms, and a loss
    without the last token (the end of sequence).

    Source: Wang et al., "Pandora's White-Box: Precise Training Data Detection and Extraction in Large Language Models"
    (2024).

    Args:
        model: unwrapped and whole; with parameters that require gradients.
        examples: `{"input_ids", "labels"}`, labels -100 on the prompt.
        protocol: see above.
        desc: label of the progress bar; no bar when left out.
    """
    check_protocol(protocol)
    if is_sharded(model):
        raise ValueError(
            "Gradient norms need whole parameters, this model's are sharded (FSDP2 or ZeRO-3): leave `gradnorm` out "
            "during training, and evaluate the saved model."
        )
    if isinstance(model, LogitDifferenceModel):
        raise ValueError(
            "Gradient norms need a model whose loss depends on its parameters; of a `LogitDifferenceModel` only the "
            "assistant's would be seen: leave `gradnorm` out."
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            "Gradient norms need parameters that require gradients, but all are frozen: call "
            "`model.requires_grad_(True)`, or leave `gradnorm` out."
        )
    rows = [check_example(index, example) for index, example in enumerate(examples)]
    check_context(model, [len(input_ids) for input_ids, _ in rows], what="example")

    def run(indices: list[int]) -> list[float]:
        return [_norm(model, parameters, *rows[index], protocol) for index in indices]

    with evaluating(model):
        return in_shares(model, [[index] for index in range(len(rows))], run, desc)


def _norm(
    model: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    input_ids: list[int],
    labels: list[int],
    protocol: str,
) -> float:
    inputs = torch.tensor([input_ids], device=model.device)
    if protocol == OPEN_UNLEARNING:
        last = scored_positions(labels)[-1]
        labels = [*labels[:last], IGNORE_INDEX, *labels[last + 1 :]]
    with torch.enable_grad():
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(labels[1:], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits, targets)  # mean over labels that are not -100
    # not `backward`, because `.grad` may hold training's gradients
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = torch.stack([g.float().norm().to(loss.device) for g in gradients if g is not None])
    return float(norms.mean() if protocol == OPEN_UNLEARNING else norms.norm())
