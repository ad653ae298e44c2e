"""ROUGE-L F1 between two strings: what VerbMem and KnowMem average."""

from blur_trainer.metrics.protocols import UNICODE
from blur_trainer.metrics.rouge_words import rouge_scorer, warn_of_wordless


def rouge_l_f1(prediction: str, reference: str, tokenizer: str = UNICODE) -> float:
    r"""
    ROUGE-L F1 of two strings, between 0 and 1.

    $P$ and $R$ are the words of prediction and reference (lower case, no stemming). $L$ is the length of their longest
    common subsequence.

    $$F_1 = \frac{2pr}{p+r}, \qquad p = \frac{L}{|P|}, \qquad r = \frac{L}{|R|}$$

    It is 0 if either side has no word.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), as coded in `rouge_score`, with the
    options of [MUSE](https://github.com/swj0419/muse_bench) (stemmer off).

    Args:
        prediction (`str`):
            What the model wrote.
        reference (`str`):
            What it is compared with.
        tokenizer (`str`, *optional*, defaults to `"unicode"`):
            `"unicode"`: words of every script ([`~blur_trainer.metrics.rouge_words.UnicodeTokenizer`]). `"original"`:
            those of `rouge_score`, where every character outside of `[a-z0-9]` separates words. Both agree on Latin
            script, accents included.

    Returns:
        `float`: The F1, symmetric in its two arguments.

    Example:

    ```python
    >>> from blur_trainer.metrics.rouge_l import rouge_l_f1
    >>> rouge_l_f1("the cat sat", "The cat, it sat!")
    0.8571428571428571

    ```
    """
    for name, text in (("prediction", prediction), ("reference", reference)):
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a string, got {type(text).__name__}. Decode token ids first.")
    return float(rouge_scorer(tokenizer, False).score(target=reference, prediction=prediction)["rougeL"].fmeasure)


def mean_rouge_l(predictions: list[str], references: list[str], tokenizer: str = UNICODE) -> float:
    """Mean of [`rouge_l_f1`] over the pairs, x 100. Warns of references without a word."""
    if not predictions:
        raise ValueError("Got no predictions: a mean over zero examples is undefined. Pass at least one pair.")
    scores = [rouge_l_f1(p, r, tokenizer) for p, r in zip(predictions, references, strict=True)]
    warn_of_wordless(references, tokenizer)
    return 100 * sum(scores) / len(scores)
