"""A model for natural-language inference as a judge: does the sampled answer entail the true one?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, pipeline

from blur_trainer.models.loading import check_place, hub_arguments

ENTAILED = "entailment"


def entailment_scores(name: str, batch_size: int = 16) -> Callable[[str, str, Sequence[str]], list[float]]:
    """
    The probability of "entailment" for each sampled answer: premise is question and sampled answer, hypothesis is
    question and true answer. Both have the question, because a short answer says nothing without it. Texts that are
    too long for the model are cut.

    Args:
        name: a text classifier with a label "entailment", a folder or a name on the Hub. It is loaded on this
            process's accelerator, if there is one.
        batch_size: pairs per forward pass.

    Raises:
        `OSError`: it is not found. `ValueError`: it has no such label.

    Source: Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models" (2024, arXiv:2410.08109),
    entailment score. Differs from it in the question, which is left out there.
    """
    check_place(name, "entailment model")
    labels = AutoConfig.from_pretrained(name, **hub_arguments({})).id2label
    if not any(label.lower() == ENTAILED for label in labels.values()):
        raise ValueError(
            f"The entailment model {name!r} has the labels {sorted(labels.values())}, and none is {ENTAILED!r}: pass "
            "one that was trained on natural-language inference, with its labels in `id2label` of its configuration."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    classify: Any = pipeline("text-classification", model=name, device=device, **hub_arguments({}))

    def scores(question: str, answer: str, sampled: Sequence[str]) -> list[float]:
        pairs = [{"text": f"{question} {text}", "text_pair": f"{question} {answer}"} for text in sampled]
        found = classify(pairs, top_k=None, batch_size=batch_size, truncation=True)
        return [next(one["score"] for one in row if one["label"].lower() == ENTAILED) for row in found]

    return scores
