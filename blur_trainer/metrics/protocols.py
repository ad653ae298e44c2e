"""Conventions by name: the two of TOFU's numbers (the benchmark's, open-unlearning's), and the two of ROUGE's words."""

from collections.abc import Iterable, Sequence

import numpy as np

TOFU = "tofu"
OPEN_UNLEARNING = "open-unlearning"
UNICODE, ORIGINAL = "unicode", "original"  # what ROUGE counts as a word: see `blur_trainer.metrics.rouge_words`
EPSILON = 1e-10  # open-unlearning adds it to every denominator

TOFU_CITATION = """\
@inproceedings{maini2024tofu,
  title     = {{TOFU}: A Task of Fictitious Unlearning for {LLMs}},
  author    = {Maini, Pratyush and Feng, Zhili and Schwarzschild, Avi and Lipton, Zachary C. and Kolter, J. Zico},
  booktitle = {Conference on Language Modeling},
  year      = {2024}
}
"""
OPEN_UNLEARNING_CITATION = """\
@article{dorna2025openunlearning,
  title   = {{OpenUnlearning}: Accelerating {LLM} Unlearning via Unified Benchmarking of Methods and Metrics},
  author  = {Dorna, Vineeth and Mekala, Anmol and Zhao, Wenlong and McCallum, Andrew and Lipton, Zachary C. and
             Kolter, J. Zico and Maini, Pratyush},
  journal = {arXiv preprint arXiv:2506.12618},
  year    = {2025}
}
"""


def check_protocol(protocol: str, accepted: Sequence[str] = (TOFU, OPEN_UNLEARNING)) -> None:
    """Raises unless the metric knows `protocol`."""
    if protocol not in accepted:
        raise ValueError(f"`protocol` must be one of {list(accepted)}, got {protocol!r}.")


def check_rouge_tokenizer(name: str) -> str:
    """The name. Raises unless it is `"unicode"` or `"original"`."""
    if name not in (UNICODE, ORIGINAL):
        raise ValueError(f"The tokenizer of ROUGE must be one of {[UNICODE, ORIGINAL]}, got {name!r}.")
    return name


def finite_array(name: str, values: Iterable[float]) -> np.ndarray:
    """Returns `values` in float64. Raises if there are none, or if one is not finite."""
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"`{name}` is empty: a mean over zero examples is undefined. Pass at least one number.")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"`{name}` must be finite, got {array[first]} at index {first}: the model that gave these numbers has "
            "probably diverged. Check its loss before evaluating it."
        )
    return array
