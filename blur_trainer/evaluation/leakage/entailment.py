"""A model for natural-language inference as a judge: does the sampled answer entail the true one?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, pipeline

from blur_trainer.metrics.rouge_l_recall import rouge_l_recall
from blur_trainer.models.loading import check_place, hub_arguments

ENTAILED = "entailment"
LEAST_ROUGE = 0.1


def entailment_scores(name: str, batch_size: int = 16) -> Callable[[str, str, Sequence[str]], list[float]]:
    """
    The probability of "entailment" for each sampled answer: it is the premise, the true answer is the hypothesis. It is
    0 for a sample with less than a tenth of the true words (ROUGE-L recall). Texts that are too long for the model
    are cut. The question is not read, so answers should be sentences.

    Args:
        name: a text classifier with a label "entailment", a folder or a name on the Hub. It is loaded on this
            process's accelerator, if there is one.
        batch_size: pairs per forward pass.

    Raises:
        `OSError`: it is not found. `ValueError`: it has no such label.

    Source: Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models" (2024, arXiv:2410.08109), and
    leak@k's own code, which judges so by `sileod/deberta-v3-base-tasksource-nli`. Differs from both: there a sample
    leaks if "entailment" is the likeliest label, here from a probability on.
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
        near = [text for text in sampled if rouge_l_recall(text, answer) >= LEAST_ROUGE]
        pairs = [{"text": text, "text_pair": answer} for text in near]
        found = classify(pairs, top_k=None, batch_size=batch_size, truncation=True) if pairs else []
        score_of = {
            text: next(one["score"] for one in row if one["label"].lower() == ENTAILED)
            for text, row in zip(near, found, strict=True)
        }
        return [score_of.get(text, 0.0) for text in sampled]

    return scores
