"""Judges: how much of the true answer a sampled answer gives away, from 0 to 1, and from where on it is a leak."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from blur_trainer.evaluation.leakage.entailment import entailment_scores
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall
from blur_trainer.metrics.rouge_words import UnicodeTokenizer

#: of a question and its true answer, the score of each sampled answer
Scores = Callable[[str, str, Sequence[str]], list[float]]
#: what a user may give: of question, true answer and sampled answer, whether it leaks, or a score from 0 to 1
Judgment = Callable[[str, str, str], bool | float]

ENTAILMENT = "entailment:"
ACCEPTED = (
    f'"rouge", "exact", "{ENTAILMENT}MODEL" (a text classifier for natural-language inference, a folder or a name on '
    "the Hub), or a function of question, true answer and sampled answer"
)
#: from where on a score is a leak
THRESHOLDS = {"rouge": 0.9, "exact": 1.0}


@dataclass(frozen=True)
class Judge:
    """
    Args:
        scores: of question, true answer and several sampled answers, a number from 0 to 1 for each of these.
        threshold: a score of at least this is a leak.
        reads_words: whether a true answer needs a word.
    """

    scores: Scores
    threshold: float
    reads_words: bool = False

    @classmethod
    def of(cls, given: str | Judgment, threshold: float | None) -> "Judge":
        """
        The judge that is meant. Raises `TypeError` or `ValueError` for anything else.

        Args:
            given: as `judge` of [`~blur_trainer.evaluation.leakage.leak.LeakEvaluation`].
            threshold: default .9 for ROUGE, .5 for an entailment model and for a function.
        """
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"`threshold` is {threshold!r}: scores are from 0 to 1, and it is above 0 and at most 1.")
        if isinstance(given, str) and given in THRESHOLDS:
            scores = _rouge if given == "rouge" else _exact
            return cls(scores, THRESHOLDS[given] if threshold is None else threshold, reads_words=True)
        limit = 0.5 if threshold is None else threshold
        if isinstance(given, str) and given.startswith(ENTAILMENT):
            return cls(entailment_scores(given.removeprefix(ENTAILMENT)), limit, reads_words=True)
        if isinstance(given, str) or not callable(given):
            raise (ValueError if isinstance(given, str) else TypeError)(f"`judge` is {given!r}; it is {ACCEPTED}.")
        return cls(_one_by_one(given), limit)

    def check(self, answers: Sequence[str]) -> None:
        """Raises `ValueError` for a true answer that no sampled one could leak."""
        wordless = [index for index, text in enumerate(answers) if self.reads_words and not _words(text)]
        if wordless:
            raise ValueError(
                f"Row {wordless[0]} of the `forget` rows that are measured has the answer {answers[wordless[0]]!r}, "
                "without a word: this judge reads words, and sees no leak of it. Take the row out, or pass a "
                "function as `judge`."
            )


def _words(text: str) -> list[str]:
    return UnicodeTokenizer().tokenize(text)


def _rouge(question: str, answer: str, sampled: Sequence[str]) -> list[float]:
    return [rouge_l_recall(text, answer) for text in sampled]


def _exact(question: str, answer: str, sampled: Sequence[str]) -> list[float]:
    """Whether the words of the true answer stand in a sampled one, together and in their order."""
    wanted = _words(answer)
    return [float(_contains(_words(text), wanted)) for text in sampled]


def _contains(words: list[str], wanted: list[str]) -> bool:
    size = len(wanted)
    return any(words[start : start + size] == wanted for start in range(len(words) - size + 1))


def _one_by_one(given: Judgment) -> Scores:
    def scores(question: str, answer: str, sampled: Sequence[str]) -> list[float]:
        return [_number(given(question, answer, text)) for text in sampled]

    return scores


def _number(said: Any) -> float:
    number = float(said) if isinstance(said, Real | np.bool_) else math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"The `judge` said {said!r}: it returns True or False, or a number from 0 to 1.")
    return number
