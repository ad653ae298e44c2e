"""The verdict of an unlearning: was it forgotten, and what did that cost? From the numbers before and after it."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from blur_trainer.atomic_write import atomic_write
from blur_trainer.checks import check_fields
from blur_trainer.report.verdict_advice import CAUSES, advice
from blur_trainer.report.verdict_findings import Finding, Reference, find, kept_clauses, level_clause, rouge_clause

Word = Literal["forgotten", "not_forgotten", "over_forgotten", "broken"]
#: the first of these that has a finding is the verdict
ORDER: tuple[Word, ...] = ("broken", "not_forgotten", "over_forgotten")
FILE = "verdict.json"


@dataclass(frozen=True)
class Thresholds:
    """
    What a [`Verdict`] tolerates. "Before" is the model before unlearning.

    Args:
        retain, hold: the least shares of before that ROUGE of these sets must keep. The aims are .97 and .95; a mean of
            100 rows has a standard error, which is taken off here (measured on `hold` of the testbed, where ROUGE had
            fallen to .84 and .81: .025 and .029).
        loss_rise: how far the loss of retain and hold may rise, in nats per token: damage that greedy answers do not
            show yet. .3 makes each token a quarter less likely.
        degeneration: how far the share of empty and repeated answers of retain and hold may rise.
        way: the share of the way from the loss before to the level that must be gone.
        estimated_way: the same where the level is an estimate. That was 1.11 times what the retrained model loses, as a
            mean of eight small models, and up to 1.32 times (docs/evidence.md). So a retrained model would pass.
        near: the level counts as reached within this share of it, however short the way was. The training's own check
            has the same.
        rouge: how far ROUGE of the forget set's answers may be above the retrained model's, or above that of unseen
            rows; and ROUGE of paraphrased questions.
        exact: how far the share of word for word answers may be above that.
        told_apart: how far the membership AUC may be from the retrained model's, or from .5. Beyond it, an attacker
            tells forget rows from unseen ones, as too well known or as too little.
        over: the loss may be so many times the level. RMU on the testbed ended at 1.33 (docs/evidence.md): .02 of its
            tokens were the likeliest ones, and .21 of the retrained model's, so that was not a model that never saw
            the rows. Those that came close to it ended at 1.06 and below.
        unlevelled_rise, unlevelled_rouge: where no level is known: the least rise of the forget loss in nats per token,
            and the largest share of ROUGE before. With an estimated level ROUGE may also be that of the answers with
            exchanged words, in which none of their own words is right.
        noise: differences of ROUGE up to this are none. Sets with ROUGE below .1 before say nothing by their answers.
    """

    retain: float = 0.95
    hold: float = 0.92
    loss_rise: float = 0.3
    degeneration: float = 0.05
    way: float = 0.9
    estimated_way: float = 0.75
    near: float = 0.05
    rouge: float = 0.1
    exact: float = 0.05
    told_apart: float = 0.3
    over: float = 1.25
    unlevelled_rise: float = 1.0
    unlevelled_rouge: float = 0.5
    noise: float = 0.02

    def __post_init__(self) -> None:
        shares = {f.name: "[0, 1]" for f in fields(self)}
        open_ended = {"loss_rise": "[0, inf)", "unlevelled_rise": "[0, inf)", "over": "[1, inf)"}
        check_fields(self, shares | open_ended, owner="Thresholds")


@dataclass(frozen=True)
class Verdict:
    """
    What [`judge`] says. `str(verdict)` is the sentence and what to try.

    Args:
        word: `"forgotten"` (to the level), `"not_forgotten"`, `"over_forgotten"` (far beyond the level: that gives the
            forget set away, too) or `"broken"` (retain, hold or fluency are lost, whatever was forgotten).
        sentence: one sentence with the numbers that decide.
        next: what to try next, concrete settings.
        findings: all that speaks against "forgotten", also what did not decide.
        notes: what a reader must know of the numbers.
        level, level_source: nats per token, and where the level is from; `None` if no level is known.
        thresholds: what was tolerated.
    """

    word: Word
    sentence: str
    next: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    level: float | None = None
    level_source: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __str__(self) -> str:
        return f"{self.sentence} Try: {'; '.join(self.next)}." if self.next else self.sentence

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """What `to_json` wrote. Raises `ValueError` for anything else."""
        try:
            content = json.loads(text)
            own = {name: tuple(content[name]) for name in ("next", "notes")}
            own["findings"] = tuple(Finding(**each) for each in content["findings"])
            return cls(**{**content, **own, "thresholds": Thresholds(**content["thresholds"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"Not the JSON of a `Verdict`: {error!r}. Make it by `to_json`.") from error


def judge(
    before: Mapping[str, float],
    after: Mapping[str, float],
    level: Any = None,
    retrained: Mapping[str, float] | None = None,
    thresholds: Thresholds | None = None,
    options: Collection[str] | None = None,
) -> Verdict:
    """
    Judges an unlearning by what a [`ForgetEvaluation`] measured before and after it. Needs no model.

    Several findings may hold. Then "broken" goes before "not_forgotten", and that before "over_forgotten".

    Args:
        before, after: numbers of one evaluation of both models. Only `forget_loss` is required. Numbers that are
            missing are not judged, and the notes say so.
        level: a [`Level`], or nats per token. Default: the retrained model's `forget_loss`; else `unseen_loss` before.
        retrained: numbers of the same evaluation of a model that was trained without the forget set.
        thresholds: what is tolerated.
        options: the settings that the training reads: what to try names no others. `None`: they are not known.

    Raises:
        `ValueError`: there is no `forget_loss`.

    Example:

    >>> before = {"forget_loss": 0.01, "retain_loss": 0.01, "unseen_loss": 8.1}
    >>> judge(before, {"forget_loss": 2.1, "retain_loss": 0.01}).sentence
    'not_forgotten: the forget set costs 2.1 nats per token, the level is 8.1 (the loss of unseen rows).'
    """
    for name, numbers in (("before", before), ("after", after)):
        if "forget_loss" not in numbers:
            raise ValueError(
                f"`{name}` has no `forget_loss`, it has {sorted(numbers)}: pass what ForgetEvaluation gives."
            )
    limits = Thresholds() if thresholds is None else thresholds
    reference = Reference.of(level, before, retrained, limits)
    findings, notes = find(before, after, reference, limits)
    words = {finding.word for finding in findings}
    word: Word = next((each for each in ORDER if each in words), "forgotten")
    return Verdict(
        word,
        _sentence(word, before, after, reference, findings),
        advice(word, findings, before, after, options),
        tuple(findings),
        tuple(notes),
        reference.level,
        reference.source,
        limits,
    )


def write_verdict(folder: str | os.PathLike[str], verdict: Verdict) -> Path:
    """Writes `verdict.json` atomically. Returns its path."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda partial: partial.write_text(verdict.to_json(), encoding="utf-8"))
    return path


def _sentence(
    word: Word,
    before: Mapping[str, float],
    after: Mapping[str, float],
    reference: Reference,
    findings: list[Finding],
) -> str:
    """What decides comes first, then how well the forget set is known, and what is kept."""
    causes = [finding.text for finding in findings if finding.about in CAUSES]
    own = {finding.about: finding.text for finding in findings if finding.word == word}
    if causes and (word != "broken" or "not_finite" in own):  # then no other number matters
        return f"{word}: {'; '.join(causes)}."
    if "level" in own or "rouge" in own:  # the others say the same of single rows
        own = {about: text for about, text in own.items() if about not in ("exact", "membership")}
    clauses_of = {"level": level_clause, "rouge": rouge_clause}
    known = [clause(after, reference) for about, clause in clauses_of.items() if about not in own]
    kept = [] if word == "broken" else kept_clauses(before, after)
    clauses = dict.fromkeys(clause for clause in (*own.values(), *causes, *known, *kept) if clause)
    return f"{word}: {'; '.join(clauses)}."
