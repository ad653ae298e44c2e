"""Membership inference between TOFU's forget and holdout answers: one AUC per attack, and PrivLeak."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.tofu.attacks import Scores, gradient_norms, likelihood_attacks, reference_attack
from blur_trainer.evaluation.tofu.examples import Questions
from blur_trainer.evaluation.token_scores import AnswerScores


class Membership:
    """
    Computes `mia_{attack}` and, with the retain model's AUC, `privleak`, from a model and its scores of each answer.

    Args:
        forget, holdout: the questions. The true answer of each is attacked.
        protocol: `"tofu"` or `"open-unlearning"`.
        gradnorm: whether to attack by gradient norms.
        reference_model: the model for the attack `reference`. It is run once.
        batch_size: texts per forward pass of the reference model.
        progress: whether to show bars.
    """

    def __init__(
        self,
        forget: Questions,
        holdout: Questions,
        *,
        protocol: str,
        gradnorm: bool,
        reference_model: PreTrainedModel | None,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.sides = {"forget": forget, "holdout": holdout}
        self.protocol, self.gradnorm, self.reference_model = protocol, gradnorm, reference_model
        self.batch_size, self.progress = batch_size, progress
        self._reference: dict[str, list[AnswerScores]] = {}

    def __call__(
        self,
        model: PreTrainedModel,
        forget: Sequence[Sequence[AnswerScores]],
        holdout: Sequence[Sequence[AnswerScores]],
        min_k_auc: float | None = None,
    ) -> dict[str, float]:
        """Each question's first answer must be the true one, scored in detail. `min_k_auc` is the retain model's."""
        from blur_trainer.metrics.privleak import PrivLeak

        scores = {name: self._attacks(model, name, rows) for name, rows in (("forget", forget), ("holdout", holdout))}
        values = {
            f"mia_{attack}": _auc(scores["forget"][attack], scores["holdout"][attack]) for attack in scores["forget"]
        }
        if min_k_auc is not None:
            # PrivLeak's AUC has the opposite order: it is 1 if every forget text is less likely.
            pair = _labelled(scores["forget"]["min_k"], scores["holdout"]["min_k"])
            result = PrivLeak(keep_in_memory=True).compute(**pair, auc_retrain=1 - min_k_auc)
            values["privleak"] = float(result["privleak"])
        return values

    def min_k_auc(self, forget: Sequence[Sequence[AnswerScores]], holdout: Sequence[Sequence[AnswerScores]]) -> float:
        """`mia_min_k` alone."""
        return _auc(self._likelihood("forget", forget)["min_k"], self._likelihood("holdout", holdout)["min_k"])

    def _likelihood(self, name: str, rows: Sequence[Sequence[AnswerScores]]) -> Scores:
        return likelihood_attacks([answers[0] for answers in rows], self.sides[name].answers, self.protocol)

    def _attacks(self, model: PreTrainedModel, name: str, rows: Sequence[Sequence[AnswerScores]]) -> Scores:
        scores = self._likelihood(name, rows)
        if self.gradnorm:
            examples = [answers[0] for answers in self.sides[name].variants]
            scores["gradnorm"] = gradient_norms(
                model, examples, protocol=self.protocol, desc=self._desc(f"{name} gradients")
            )
        if self.reference_model is not None:
            scores["reference"] = reference_attack(
                [answers[0] for answers in rows], self._by_reference(name, self.reference_model)
            )
        return scores

    def _by_reference(self, name: str, model: PreTrainedModel) -> list[AnswerScores]:
        if name not in self._reference:
            found = score_variants(
                model,
                self.sides[name].variants,  # all in the same batches, so that a model against itself is an exact tie
                pad_token_id=0,  # masked: any id does
                batch_size=self.batch_size,
                desc=self._desc(f"{name}, reference model"),
            )
            self._reference[name] = [answers[0] for answers in found]
        return self._reference[name]

    def _desc(self, what: str) -> str | None:
        return f"TOFU {what}" if self.progress else None


def _labelled(forget: Sequence[float], holdout: Sequence[float]) -> dict[str, Any]:
    return {"predictions": [*forget, *holdout], "references": [0] * len(forget) + [1] * len(holdout)}


def _auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Probability that a forget text scores lower than a holdout text."""
    # Here and not above: `evaluate` takes seconds to import.
    from blur_trainer.metrics.membership import MembershipAUC

    return float(MembershipAUC(keep_in_memory=True).compute(**_labelled(forget, holdout))["membership_auc"])
