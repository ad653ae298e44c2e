"""VerbMem: how much of a text a model completes word for word."""

import datasets
import evaluate

from blur_trainer.metrics.protocols import UNICODE
from blur_trainer.metrics.rouge_l import mean_rouge_l

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
VerbMem (MUSE, criterion 1): mean ROUGE-L F1, x 100 and without stemming, between the continuation that a model writes
after a passage's beginning and the passage's true continuation. On forget data lower is better, on retain data higher.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`):
        Continuations written by the model.
    references (`list[str]`):
        True continuations, one per prediction (MUSE cuts them to the number of tokens that the model may write).
    tokenizer (`str`, *optional*, defaults to `"unicode"`):
        What a word is: `"unicode"`, in every script, or `"original"`, ASCII letters and digits as in `rouge_score`.
        Both agree on Latin script.

Returns:
    `dict`: `{"verbmem": float}`, between 0 and 100. An empty prediction or reference counts 0.

Example:

    >>> from blur_trainer.metrics.verbmem import VerbMem
    >>> verbmem = VerbMem(keep_in_memory=True)
    >>> verbmem.compute(predictions=["the cat sat", ""], references=["the cat sat", "on the mat"])
    {'verbmem': 50.0}

"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VerbMem(evaluate.Metric):
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
        return {"verbmem": mean_rouge_l(predictions, references, tokenizer)}
