"""Numbers of a [`ForgetEvaluation`]: what a model knows of each row, and what it answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.forget_sets import Asked
from blur_trainer.metrics.degeneration import degenerates
from blur_trainer.metrics.extraction_strength import extraction_strength
from blur_trainer.metrics.membership import MembershipAUC
from blur_trainer.metrics.privleak import min_k_score
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall


@dataclass(frozen=True)
class Known:
    """
    What a model knows of one row.

    Args:
        logps: log-probabilities of the row's answer tokens, of all its pieces, in nats.
        matches: which of these tokens are the likeliest.
    """

    logps: np.ndarray
    matches: np.ndarray

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Sequence[Asked], batch_size: int, desc: str | None) -> list["Known"]:
        """Of each row. All processes must call it."""
        pieces = [[piece] for row in rows for piece in row.pieces]
        how: dict[str, Any] = {"batch_size": batch_size, "details": True, "desc": desc}
        scores = iter(score_variants(model, pieces, pad_token_id=0, **how))  # masked, so any id will do
        found = []
        for row in rows:
            own = [next(scores)[0] for _ in row.pieces]
            logps = np.concatenate([one.logps for one in own]).astype(np.float64)
            found.append(cls(logps, np.concatenate([one.predicted == one.tokens for one in own])))
        return found

    @property
    def loss(self) -> float:
        return -float(self.logps.mean())


@dataclass(frozen=True)
class Answer:
    """One greedy answer beside the true one."""

    prompt: str
    true: str
    written: str
    rouge: float
    degenerate: bool

    @property
    def exact(self) -> bool:
        return self.written.split() == self.true.split()

    def sample(self) -> dict[str, Any]:
        """As [`Evaluation.samples`] names them."""
        return {"prompt": self.prompt, "gt": self.true, "response": self.written, "score": self.rouge}


def read_answer(tokenizer: PreTrainedTokenizerBase, prompt: list[int], true: list[int], written: list[int]) -> Answer:
    """Reads the tokens of one answer."""
    asked, wanted, said = tokenizer.batch_decode([prompt, true, written], skip_special_tokens=True)
    degenerate = degenerates(written if said.strip() else [], true)
    return Answer(asked, wanted, said, rouge_l_recall(said, wanted), degenerate)


def known_means(known: Sequence[Known]) -> dict[str, float]:
    """`loss`, `probability` and `extraction`; NaN where the model gives NaN."""
    return {
        "loss": float(np.mean([one.loss for one in known])),
        "probability": float(np.mean([np.exp(-one.loss) for one in known])),
        "extraction": float(np.mean([extraction_strength(one.matches) for one in known])),
    }


def said_means(answers: Sequence[Answer]) -> dict[str, float]:
    """`rouge`, `exact` and `degeneration`."""
    return {
        "rouge": float(np.mean([one.rouge for one in answers])),
        "exact": float(np.mean([one.exact for one in answers])),
        "degeneration": float(np.mean([one.degenerate for one in answers])),
    }


def membership_auc(forget: Sequence[Known], unseen: Sequence[Known]) -> float:
    """The AUC of Min-40%; NaN for a model that gives NaN."""
    scores = [min_k_score(one.logps) for one in (*forget, *unseen)]
    if not all(map(math.isfinite, scores)):
        return math.nan
    metric = MembershipAUC(keep_in_memory=True)
    labels = [0] * len(forget) + [1] * len(unseen)
    return float(metric.compute(predictions=scores, references=labels)["membership_auc"])
