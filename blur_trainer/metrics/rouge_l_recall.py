"""ROUGE-L recall: how much of the true answer a model's answer contains, in its order."""

import datasets
import evaluate

from blur_trainer.metrics.protocols import TOFU_CITATION, UNICODE
from blur_trainer.metrics.rouge_words import rouge_scorer, warn_of_wordless

_DESCRIPTION = """\
ROUGE-L recall (TOFU): length of the longest common subsequence of words over the number of words of the true answer,
averaged, with stemming. Between 0 and 1. On forget data lower is better, elsewhere higher.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`):
        Answers written by the model.
    references (`list[str]`):
        True answers, one per prediction.
    tokenizer (`str`, *optional*, defaults to `"unicode"`):
        What a word is: `"unicode"`, in every script, or `"original"`, ASCII letters and digits as in `rouge_score`.
        Both agree on Latin script.

Returns:
    `dict`: `{"rouge_l_recall": float}`. An empty prediction or reference counts 0.

Example:

    >>> from blur_trainer.metrics.rouge_l_recall import RougeLRecall
    >>> rouge = RougeLRecall(keep_in_memory=True)
    >>> rouge.compute(predictions=["She writes novels, and plays", ""], references=["she wrote a novel", "yes"])
    {'rouge_l_recall': 0.25}

"""


def rouge_l_recall(prediction: str, reference: str, tokenizer: str = UNICODE) -> float:
    """ROUGE-L recall of one answer, between 0 and 1."""
    return rouge_scorer(tokenizer, True).score(target=reference, prediction=prediction)["rougeL"].recall


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RougeLRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=TOFU_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(self, predictions: list[str], references: list[str], tokenizer: str = UNICODE) -> dict[str, float]:
        if not predictions:
            raise ValueError("Got no predictions: a mean over zero examples is undefined. Pass at least one pair.")
        pairs = zip(predictions, references, strict=True)
        recalls = [rouge_l_recall(written, true, tokenizer) for written, true in pairs]
        warn_of_wordless(references, tokenizer)
        return {"rouge_l_recall": sum(recalls) / len(recalls)}
