"""Computes TOFU's aggregates from per-question scores of a model or of a published log."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blur_trainer.data.files import read_json
from blur_trainer.evaluation.tofu.examples import CHOICES, Questions
from blur_trainer.evaluation.tofu.reference import LOG_FILES, RetainReference, log_column
from blur_trainer.evaluation.token_scores import AnswerScores
from blur_trainer.metrics.answer_probability import AnswerProbability
from blur_trainer.metrics.exact_memorization import ExactMemorization
from blur_trainer.metrics.extraction_strength import ExtractionStrength
from blur_trainer.metrics.forget_quality import ForgetQuality
from blur_trainer.metrics.model_utility import ModelUtility
from blur_trainer.metrics.protocols import TOFU
from blur_trainer.metrics.truth_ratio import TruthRatio, truth_ratios

UTILITY = [f"{group}_{metric}" for group in ("retain", *CHOICES) for metric in ("probability", "rouge", "truth_ratio")]


@dataclass(frozen=True)
class SplitScores:
    """
    Scores per question of one split.

    Args:
        right: mean negative log-likelihood (nats per token) of the answer.
        paraphrased: the same for the paraphrased answer (on Real Authors and World Facts: for the answer itself).
        perturbed: the same for each perturbed answer.
        rouge: ROUGE-L recall of the model's answer.
    """

    right: Sequence[float]
    paraphrased: Sequence[float] | None
    perturbed: Sequence[Sequence[float]] | None
    rouge: Sequence[float]

    @classmethod
    def of(
        cls, group: str, questions: Questions, scores: Sequence[Sequence[AnswerScores]], rouge: Sequence[float]
    ) -> "SplitScores":
        """Makes it from the scores of a split's answers, in the order of `Questions.variants`."""
        nlls = [[answer.nll for answer in answers] for answers in scores]
        right = [row[0] for row in nlls]
        paraphrased = [row[1] for row in nlls] if questions.paraphrased else right if group in CHOICES else None
        first = 2 if questions.paraphrased else 1
        return cls(right, paraphrased, [row[first:] for row in nlls] if questions.perturbed else None, rouge)

    def truth_ratios(self, protocol: str) -> np.ndarray:
        """Truth ratio of each question. Needs paraphrased and perturbed answers."""
        if self.paraphrased is None or self.perturbed is None:
            raise ValueError("Truth ratios need a paraphrased and perturbed answers to each question.")
        return truth_ratios(self.paraphrased, self.perturbed, protocol)


def aggregate(
    splits: Mapping[str, SplitScores],
    *,
    reference: RetainReference | None = None,
    protocol: str = TOFU,
    normalized: Sequence[str] = CHOICES,
) -> dict[str, float]:
    """
    `{group}_{probability,rouge,truth_ratio}` for the given scores, `model_utility` if all nine numbers are there, and
    `forget_quality` and `forget_quality_log10` with a `reference`.

    Args:
        splits: scores by group: `forget`, `retain`, `real_authors`, `world_facts`.
        reference: numbers of the retain model.
        protocol: `"tofu"` or `"open-unlearning"`.
        normalized: groups whose probability is normalized over the choices.
    """
    values: dict[str, float] = {}
    for group, scores in splits.items():
        if group not in normalized or scores.perturbed is not None:
            values[f"{group}_probability"] = _probability(scores, group in normalized, protocol)
        values[f"{group}_rouge"] = float(np.mean(scores.rouge))
        if scores.paraphrased is not None and scores.perturbed is not None:
            result = TruthRatio(keep_in_memory=True).compute(
                predictions=scores.paraphrased,
                references=scores.perturbed,
                aggregation="forget" if group == "forget" else "retain",
                protocol=protocol,
            )
            values[f"{group}_truth_ratio"] = float(result["truth_ratio"])
    if all(key in values for key in UTILITY):
        result = ModelUtility(keep_in_memory=True).compute(predictions=[values[key] for key in UTILITY])
        values["model_utility"] = float(result["model_utility"])
    if reference is not None:
        values |= forget_quality(splits["forget"].truth_ratios(protocol), reference)
    return values


def forget_quality(ratios: Sequence[float] | np.ndarray, reference: RetainReference) -> dict[str, float]:
    """The test between a model's truth ratios and the retain model's."""
    result = ForgetQuality(keep_in_memory=True).compute(predictions=ratios, references=reference.truth_ratios)
    return {
        "forget_quality": float(result["forget_quality"]),
        "forget_quality_log10": float(result["log10_forget_quality"]),
    }


def memorization(scores: Sequence[AnswerScores], protocol: str) -> dict[str, float]:
    """Memorization metrics of the forget answers, which must be scored in detail."""
    inputs: dict[str, Any] = {
        "predictions": [score.predicted for score in scores],
        "references": [score.tokens for score in scores],
        "protocol": protocol,
    }
    exact = ExactMemorization(keep_in_memory=True).compute(**inputs)
    strength = ExtractionStrength(keep_in_memory=True).compute(**inputs)
    return {
        "forget_exact_memorization": float(exact["exact_memorization"]),
        "forget_extraction_strength": float(strength["extraction_strength"]),
    }


def aggregate_log(
    log: Mapping[str, Any] | str | os.PathLike[str],
    *,
    reference: RetainReference | None = None,
    normalize_forget: bool = False,
) -> dict[str, float]:
    """
    The aggregates of a log in TOFU's own form: one entry per question, without a model.

    Args:
        log (`dict` or path):
            `eval_log_aggregated.json`: the splits `eval_log.json`, `eval_real_author_wo_options.json`,
            `eval_real_world_wo_options.json` and `eval_log_forget.json`, or some of them, each with `avg_gt_loss`,
            `avg_paraphrased_loss`, `average_perturb_loss` and `rougeL_recall`, lists or dictionaries by index.
        reference ([`RetainReference`], *optional*):
            What the retain model said, for the forget quality.
        normalize_forget (`bool`, *optional*, defaults to `False`):
            Whether to normalize the forget set's probability over right and wrong answers too. The tables published
            with the logs (`aggregated_stat.csv`) do so, TOFU's present code does not.

    Returns:
        `dict[str, float]`: see [`aggregate`].
    """
    content = log if isinstance(log, Mapping) else read_json(Path(log))
    splits = {
        group: SplitScores(
            right=log_column(content[file], "avg_gt_loss", file),
            paraphrased=log_column(content[file], "avg_paraphrased_loss", file),
            perturbed=log_column(content[file], "average_perturb_loss", file),
            rouge=log_column(content[file], "rougeL_recall", file),
        )
        for group, file in LOG_FILES.items()
        if file in content
    }
    if not splits:
        raise ValueError(f"The log has none of {list(LOG_FILES.values())}, it has {sorted(content)}.")
    if reference is not None and "forget" not in splits:
        raise ValueError(f"`reference` is for the forget set, but the log lacks {LOG_FILES['forget']!r}: leave it out.")
    return aggregate(splits, reference=reference, normalized=(*CHOICES, "forget") if normalize_forget else CHOICES)


def _probability(scores: SplitScores, normalized: bool, protocol: str) -> float:
    wrong: Sequence[Sequence[float]] = scores.perturbed if normalized and scores.perturbed else [()] * len(scores.right)
    answers = [[right, *others] for right, others in zip(scores.right, wrong, strict=True)]
    result = AnswerProbability(keep_in_memory=True).compute(
        predictions=answers, normalized=normalized, protocol=protocol
    )
    return float(result["probability"])
