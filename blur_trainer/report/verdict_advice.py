"""What to try after a verdict: settings by name."""

from collections.abc import Mapping, Sequence

from blur_trainer.report.verdict_findings import Finding

#: retain and hold have kept this share of ROUGE: there is room to forget more strongly
UNTOUCHED = 0.98
#: what no other setting of forgetting cures
CAUSES = {
    "not_finite": (
        "a lower learning rate (`--learning_rate`, a tenth)",
        "a bounded forget objective (`--forget_objective npo` or `target_loss`)",
        "weights in float32 with `--bf16`",
    ),
    "same_rows": ("take the forget rows out of the retain set",),
    "unknown": (
        "check what `--forget` names: are the forget and the retain set exchanged?",
        "check the format: the model must read these rows as it learnt them (`--chat_template`, `--qa_template`)",
    ),
    "unchanged": ("a higher learning rate (`--learning_rate`, 10 times)", "more steps (`--num_train_epochs`)"),
}
_STRONGER = (
    "more epochs (`--num_train_epochs`, twice as many)",
    "a higher learning rate (`--learning_rate`, 2 to 5 times)",
    "a larger weight of forgetting (`--gamma`, 3 times)",
)
_CAREFUL = (
    "more epochs at the same learning rate (`--num_train_epochs`, twice as many)",
    "texts of the model itself as retain data (`--replay`), and more retain rows",
    "then a larger weight of forgetting (`--gamma`)",
)
_MORE_TO_KEEP = "texts of the model itself as retain data (`--replay`), and more retain rows of the kind that was lost"
_GENTLER = (
    "a lower learning rate (`--learning_rate`, a third)",
    "a smaller weight of forgetting (`--gamma`, a third)",
)
_OVER = (
    "a level (`--forget_level`) that also pulls back: `--forget_objective target_loss` with `two_sided`",
    "an end at the level (`--stop_at_level`)",
    "fewer epochs (`--num_train_epochs`)",
)
_DONE = ("attacks: answers may come back by relearning, quantization or other wordings (`blur-trainer attack`)",)


def advice(
    word: str, findings: Sequence[Finding], before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[str, ...]:
    """What to try next, the most promising first. A cause that no setting cures goes before everything else."""
    about = {finding.about for finding in findings}
    for cause, remedies in CAUSES.items():
        if cause in about:
            return remedies
    if word == "broken":
        # What neither set mentions is lost first. Then the retain set lacks it, and the strength is not at fault.
        tried = [*_GENTLER, _MORE_TO_KEEP] if "retain" in about else [_MORE_TO_KEEP, *_GENTLER]
        words = {finding.word for finding in findings}
        tried += ["more epochs (`--num_train_epochs`, twice as many)"] * ("not_forgotten" in words)
        return (*tried, *([_OVER[1]] * ("over_forgotten" in words)))
    if word == "not_forgotten":
        return _STRONGER if _untouched(before, after) else _CAREFUL
    return _OVER if word == "over_forgotten" else _DONE


def _untouched(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    names = [name for name in ("retain_rouge", "hold_rouge") if before.get(name) and name in after]
    return all(after[name] >= UNTOUCHED * before[name] for name in names)
