"""What to try after a verdict: settings by name, of those that the training reads."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from blur_trainer.report.verdict_findings import Finding

#: retain and hold have kept this share of ROUGE: there is room to forget more strongly
UNTOUCHED = 0.98
#: the weight of the forget gradient: of the rule `blur`, of the rule `sum`. Other rules have none.
STRENGTHS = ("gamma", "forget_weight")
_OPTION = re.compile(r"--(\w+)")
#: what no other setting of forgetting cures
CAUSES = {
    "not_finite": (
        "a lower learning rate (`--learning_rate`, a tenth)",
        "a bounded forget objective (`--method npo` or `blur-target`)",
        "a bounded forget objective (`--forget_objective npo` or `target_loss`)",
        "weights in float32 with `--bf16`",
    ),
    "same_rows": ("take the forget rows out of the retain set",),
    "unknown": (
        "check the sets: are the forget and the retain set exchanged?",
        "check the format: the model must read these rows as it learnt them (its chat template, `--qa_template`)",
    ),
    "unchanged": (
        "a higher learning rate (`--learning_rate`, 10 times)",
        "more steps (`--num_train_epochs`)",
        "a weight of forgetting above 0 ({strength})",
    ),
}
_MORE_EPOCHS = "more epochs (`--num_train_epochs`, twice as many)"
_STRONGER = (
    _MORE_EPOCHS,
    "a higher learning rate (`--learning_rate`, 2 to 5 times)",
    "a larger weight of forgetting ({strength}, 3 times)",
)
_CAREFUL = (
    "more epochs at the same learning rate (`--num_train_epochs`, twice as many)",
    "more texts of the model itself as retain data (`--replay`), and more retain rows",
    "then a larger weight of forgetting ({strength})",
)
_MORE_TO_KEEP = (
    "more texts of the model itself as retain data (`--replay`), and more retain rows of the kind that was lost"
)
_GENTLER = (
    "a lower learning rate (`--learning_rate`, a third)",
    "a smaller weight of forgetting ({strength}, a third)",
)
_END = "an end at the level (`--stop_at_level true --eval_strategy epoch`)"
_OVER = (
    "an objective that also pulls back to the level (`--method blur-target`)",
    "a level (`--forget_level`) that also pulls back: `--forget_objective target_loss` with `two_sided`",
    _END,
    "fewer epochs (`--num_train_epochs`)",
)
_DONE = ("an audit: answers may come back by relearning, quantization or other wordings (`blur-trainer audit`)",)


def advice(
    word: str,
    findings: Sequence[Finding],
    before: Mapping[str, float],
    after: Mapping[str, float],
    options: Collection[str] | None = None,
) -> tuple[str, ...]:
    """
    What to try next, the most promising first. A cause that no setting cures goes before everything else.

    `options`: those that the training reads. `None`: it is not known how it was trained.
    """
    return tuple(_named(_tried(word, findings, before, after), options))


def _tried(
    word: str, findings: Sequence[Finding], before: Mapping[str, float], after: Mapping[str, float]
) -> Sequence[str]:
    about = {finding.about for finding in findings}
    for cause, remedies in CAUSES.items():
        if cause in about:
            return remedies
    if word == "broken":
        # What neither set mentions is lost first. Then the retain set lacks it, and the strength is not at fault.
        tried = [*_GENTLER, _MORE_TO_KEEP] if "retain" in about else [_MORE_TO_KEEP, *_GENTLER]
        words = {finding.word for finding in findings}
        tried += [_MORE_EPOCHS] * ("not_forgotten" in words)
        return (*tried, *([_END] * ("over_forgotten" in words)))
    if word == "not_forgotten":
        return _STRONGER if _untouched(before, after) else _CAREFUL
    return _OVER if word == "over_forgotten" else _DONE


def _named(texts: Iterable[str], options: Collection[str] | None) -> Iterable[str]:
    """The texts with the name of the strength. Those that name an option which the training does not read fall out."""
    known = STRENGTHS if options is None else [name for name in STRENGTHS if name in options]
    strength = " or ".join(f"`--{name}`" for name in known)
    for text in texts:
        named = _OPTION.findall(text)
        unread = "method" in named if options is None else not set(named) <= set(options)
        if not unread and (strength or "{strength}" not in text):
            yield text.format(strength=strength)


def _untouched(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    names = [name for name in ("retain_rouge", "hold_rouge") if before.get(name) and name in after]
    return all(after[name] >= UNTOUCHED * before[name] for name in names)
