"""Degeneration: the share of answers that are empty, or that say the same again and again."""

from collections.abc import Sequence

import datasets
import evaluate

_CITATION = """\
@inproceedings{welleck2020neural,
  title     = {Neural Text Generation With Unlikelihood Training},
  author    = {Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and
               Weston, Jason},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}
"""

_DESCRIPTION = """\
Degeneration: the share of answers that are empty or repeat themselves. An answer repeats itself if less than half of
the 4-grams of its last 64 tokens are distinct, and the true answer does not do that too. Between 0 and 1, lower is
better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`):
        The tokens of each answer that the model wrote, without the end of the sequence.
    references (`list[list[int]]`):
        The tokens of each true answer.

Returns:
    `dict`: `{"degeneration": float}`.

Example:

    >>> from blur_trainer.metrics.degeneration import Degeneration
    >>> degeneration = Degeneration(keep_in_memory=True)
    >>> degeneration.compute(predictions=[[7] * 9, [3, 4, 5, 6]], references=[[3, 4, 5, 6], [3, 4, 5, 6]])
    {'degeneration': 0.5}

"""

GRAM, WINDOW, LEAST = 4, 64, 0.5


def distinct_share(tokens: Sequence[int]) -> float:
    r"""
    Distinct 4-grams over all 4-grams of the last 64 tokens; 1 where there is none.

    It counts tokens, not words, because some scripts put no blanks between words. It looks at the end, because a loop
    is there, and because the share falls with the length of a text that does not repeat itself.

    Differs from Welleck et al.: their `seq-rep-4`, 1 minus this, counts the 4-grams of the whole answer, so that long
    answers seem worse.
    """
    last = tuple(tokens[-WINDOW:])
    grams = [last[start : start + GRAM] for start in range(len(last) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def degenerates(tokens: Sequence[int], true: Sequence[int]) -> bool:
    """Whether an answer is empty, or repeats itself where the true one does not."""
    return len(tokens) == 0 or (distinct_share(tokens) < LEAST <= distinct_share(true))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Degeneration(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("int64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1908.04319"],
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        if not predictions:
            raise ValueError("Got no predictions: a mean over zero examples is undefined. Pass at least one pair.")
        found = [degenerates(written, true) for written, true in zip(predictions, references, strict=True)]
        return {"degeneration": sum(found) / len(found)}
