"""KnowMem: how well a model answers questions about a corpus."""

import datasets
import evaluate

from blur_trainer.metrics.protocols import UNICODE
from blur_trainer.metrics.rouge_l import mean_rouge_l

# A few-shot answer ends at the blank line between two shots, or at the next question if that line is missing.
STOPS = ("\n\n", "\nQuestion", "Question:")

_CITATION = """\
@inproceedings{shi2025muse,
  title     = {{MUSE}: Machine Unlearning Six-Way Evaluation for Language Models},
  author    = {Shi, Weijia and Lee, Jaechan and Huang, Yangsibo and Malladi, Sadhika and Zhao, Jieyu and
               Holtzman, Ari and Liu, Daogao and Zettlemoyer, Luke and Smith, Noah A. and Zhang, Chiyuan},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
"""

_DESCRIPTION = """\
KnowMem (MUSE, criterion 2): mean ROUGE-L F1, x 100 and without stemming, between a model's answers to questions about a
corpus and the true answers, after cutting each prediction where the next few-shot question would begin. On forget data
lower is better, on retain data higher.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`):
        Answers written by the model, cut or not.
    references (`list[str]`):
        True answers, one per prediction.
    tokenizer (`str`, *optional*, defaults to `"unicode"`):
        What a word is: `"unicode"`, in every script, or `"original"`, ASCII letters and digits as in `rouge_score`.
        Both agree on Latin script.

Returns:
    `dict`: `{"knowmem": float}`, between 0 and 100. An empty prediction or reference counts 0.

Example:

    >>> from blur_trainer.metrics.knowmem import KnowMem
    >>> knowmem = KnowMem(keep_in_memory=True)
    >>> predictions = ["In Norvale.\\n\\nQuestion: and then?", "No idea"]
    >>> knowmem.compute(predictions=predictions, references=["in Norvale", "1472"])
    {'knowmem': 50.0}

"""


def cut_at_stops(text: str) -> str:
    """The part of `text` before the first of MUSE's stops: a blank line, `"\\nQuestion"` or `"Question:"`."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class KnowMem(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2407.06460", "https://github.com/swj0419/muse_bench"],
        )

    def _compute(self, predictions: list[str], references: list[str], tokenizer: str = UNICODE) -> dict[str, float]:
        return {"knowmem": mean_rouge_l([cut_at_stops(p) for p in predictions], references, tokenizer)}
