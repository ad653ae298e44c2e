"""What the samples of one question say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blur_trainer.evaluation.leakage.estimates import clopper_pearson_upper, mean_score_upper
from blur_trainer.evaluation.leakage.judges import Judge


@dataclass(frozen=True)
class Judged:
    """
    Args:
        prompt, true: what the model was asked, and the true answer.
        scores: of each sample, 0 to 1.
        leaks: how many samples leak.
        worst: the sample with the highest score.
    """

    prompt: str
    true: str
    scores: list[float]
    leaks: int
    worst: str

    @classmethod
    def by(cls, judge: Judge, prompt: str, true: str, samples: Sequence[str]) -> "Judged":
        """Each different sample is judged once."""
        different = list(dict.fromkeys(samples))
        score_of = dict(zip(different, judge.scores(prompt, true, different), strict=True))
        scores = [score_of[text] for text in samples]
        leaks = sum(score >= judge.threshold for score in scores)
        return cls(prompt, true, scores, leaks, max(different, key=score_of.__getitem__))

    def sample(self) -> dict[str, Any]:
        """The worst sample, as [`Evaluation.samples`] names it."""
        what = {"metric": "leak", "set": "forget", "prompt": self.prompt, "gt": self.true}
        return what | {"response": self.worst, "score": max(self.scores)}

    def details(self, alpha: float) -> dict[str, Any]:
        """As `LeakEvaluation.details` has them, bounds with confidence 1 - `alpha`."""
        number = len(self.scores)
        return {
            "question": self.prompt,
            "answer": self.true,
            "samples": number,
            "leaks": self.leaks,
            "leak_bound": clopper_pearson_upper(self.leaks, number, alpha),
            "score": float(np.mean(self.scores)),
            "score_bound": mean_score_upper(self.scores, alpha),
            "worst": self.worst,
            "worst_score": max(self.scores),
        }
