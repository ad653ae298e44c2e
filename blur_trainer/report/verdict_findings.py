"""The rules of a verdict: each looks at the numbers before and after, and says what it finds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Numbers = Mapping[str, float]
#: ROUGE before, below which a set's answers say nothing, because the model did not know them
UNKNOWN = 0.1
#: an estimated level may be off by this share: on eight small models it was .74 to 1.33 times what unseen rows cost
ESTIMATE_OFF = 0.3
_SOURCES = {
    "retrained": "the retrained model's loss",
    "unseen": "the loss of unseen rows",
    "exchanged": "an estimate from exchanged words",
    "given": "as given",
}


@dataclass(frozen=True)
class Finding:
    """
    One thing that speaks against "forgotten".

    Args:
        word: the verdict that it would make.
        about: what it looked at.
        text: a clause with the numbers.
    """

    word: str
    about: str
    text: str


@dataclass(frozen=True)
class Reference:
    """
    What a model has that never saw the forget set.

    Args:
        level: nats per token. `source`: where it is from, in words. `estimated`: by exchanged words.
        rouge, exact, auc: of the retrained model, else of unseen rows before. `whose`: which of the two.
        paraphrased: ROUGE of paraphrased questions.
        exchanged: ROUGE of the answers with exchanged words, in which no own word is right.
    """

    level: float | None
    source: str | None
    estimated: bool
    whose: str
    rouge: float | None
    exact: float | None
    paraphrased: float | None
    auc: float
    exchanged: float | None = None

    def no_own_word(self, limits: Any) -> float:
        """ROUGE up to which none of the own words of an answer need be right; 0 where it is not known."""
        return 0.0 if self.exchanged is None else self.exchanged + limits.noise

    @classmethod
    def of(cls, level: Any, before: Numbers, retrained: Numbers | None, limits: Any) -> "Reference":
        """A `Level` has `nats` and `source`; without one the level comes from the other numbers."""
        kind = getattr(level, "source", "given")
        nats = getattr(level, "nats", level)
        if nats is None and retrained is not None and "forget_loss" in retrained:
            nats, kind = retrained["forget_loss"], "retrained"
        elif nats is None and "unseen_loss" in before:
            nats, kind = before["unseen_loss"], "unseen"
        if nats is not None and not 0 < nats < math.inf:
            raise ValueError(f"The level must be a finite number above 0, nats per token, got {nats!r}: measure it.")
        own, numbers = ("forget", retrained) if retrained is not None else ("unseen", before)
        return cls(
            level=None if nats is None else float(nats),
            source=None if nats is None else _SOURCES[kind],
            estimated=kind == "exchanged",
            whose="the retrained model" if retrained is not None else "unseen rows",
            rouge=numbers.get(f"{own}_rouge"),
            exact=numbers.get(f"{own}_exact"),
            paraphrased=numbers.get("paraphrased_rouge" if retrained is not None else "unseen_rouge"),
            auc=(retrained or {}).get("membership_auc", 0.5),
            exchanged=getattr(level, "rouge", None),
        )


def find(before: Numbers, after: Numbers, reference: Reference, limits: Any) -> tuple[list[Finding], list[str]]:
    """All findings, and what a reader must know of the numbers. `limits`: the `Thresholds`."""
    ruined = list(_ruined(before, after))
    if ruined:
        return ruined, []
    notes: list[str] = []
    findings = [
        *_lost(before, after, reference, limits, notes),
        *_nothing_to_forget(before, after, reference, limits),
        *_too_little(before, after, reference, limits),
        *_told_apart(after, reference, limits),
        *_too_far(after, reference, limits),
    ]
    if reference.level is None:
        notes.append("No level is known: pass `unseen` rows, or a retrained model, to judge how far forgetting went.")
    elif reference.estimated:
        notes.append("The level is an estimate, which may be a third off: a retrained model gives a better one.")
    if after.get("forget_degeneration", 0.0) > 0.5:
        notes.append(f"{after['forget_degeneration']:.0%} of the forget set's answers are empty or repeat themselves.")
    return findings, notes


def _ruined(before: Numbers, after: Numbers) -> Iterator[Finding]:
    for numbers, when in ((before, "before unlearning"), (after, "after unlearning")):
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            yield Finding("broken", "not_finite", f"`{bad[0]}` is {numbers[bad[0]]} {when}")


def _lost(before: Numbers, after: Numbers, reference: Reference, limits: Any, notes: list[str]) -> Iterator[Finding]:
    """What the model was to keep and lost."""
    measured = [name for name in ("retain", "hold") if {f"{name}_loss", f"{name}_rouge"} & set(before) & set(after)]
    if not measured:
        notes.append("Neither `retain` nor `hold` was measured: what the model lost is not known.")
    for name in measured:
        if _says_nothing(name, before, reference, limits):
            notes.append(f"The model did not know `{name}` before: this set says nothing of what was lost.")
        else:
            yield from _lost_set(name, before, after, limits)
    then, now = before.get("degeneration", 1.0), after.get("degeneration", 0.0)
    if now - then > limits.degeneration:
        text = f"{now:.0%} of the answers on retain and hold are empty or repeat themselves ({then:.0%} before)"
        yield Finding("broken", "degeneration", text)


def _lost_set(name: str, before: Numbers, after: Numbers, limits: Any) -> Iterator[Finding]:
    """What is lost of one set: seen in its answers, else in its loss."""
    then, now = before.get(f"{name}_rouge", 0.0), after.get(f"{name}_rouge", math.inf)
    if then >= UNKNOWN and then - now > max((1 - getattr(limits, name)) * then, limits.noise):
        yield Finding("broken", name, f"{name} keeps {now / then:.0%} of its ROUGE ({then:.2f} before, {now:.2f} now)")
        return
    then, now = before.get(f"{name}_loss", math.inf), after.get(f"{name}_loss", 0.0)
    if now - then > limits.loss_rise:
        yield Finding("broken", name, f"{name} costs {nats(now)} nats per token and cost {nats(then)} before")


def _says_nothing(name: str, before: Numbers, reference: Reference, limits: Any) -> bool:
    """Whether a set was as unknown before as text that no model saw."""
    if before.get(f"{name}_rouge", 0.0) >= UNKNOWN or reference.level is None:
        return False
    return before.get(f"{name}_loss", 0.0) >= (1 - limits.near) * reference.level


def _nothing_to_forget(before: Numbers, after: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    shared = set(before) & set(after)
    if all(before[name] == after[name] for name in shared):
        yield Finding("not_forgotten", "unchanged", "every number is as before, so the weights did not change")
    pairs = [(name, f"retain_{name.removeprefix('forget_')}") for name in shared if name.startswith("forget_")]
    pairs = [pair for pair in pairs if pair[1] in shared]
    if pairs and all(numbers[one] == numbers[other] for one, other in pairs for numbers in (before, after)):
        text = "forget and retain have the same numbers: they seem to be the same rows, to be lost and kept at once"
        yield Finding("not_forgotten", "same_rows", text)
    yield from _unknown(before, reference, limits)


def _unknown(before: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    """A forget set that the model knew no better before than text that nobody saw. Then training pushes nothing."""
    off = ESTIMATE_OFF if reference.estimated else limits.near
    if reference.level is None or before["forget_loss"] < (1 - off) * reference.level:
        return
    said = limits.unlevelled_rouge if reference.rouge is None else reference.rouge + limits.rouge
    if before.get("forget_rouge", 0.0) > max(said, reference.no_own_word(limits)):
        return  # it says what it is thought not to know: the level is at fault
    cost = f"{nats(before['forget_loss'])} nats per token, the level is {nats(reference.level)}"
    by = "by the estimate " if reference.estimated else ""
    text = f"{by}the model did not know the forget set before ({cost}), so there was nothing to forget"
    yield Finding("not_forgotten", "unknown", text)


def _too_little(before: Numbers, after: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    then, now, level = before["forget_loss"], after["forget_loss"], reference.level
    if level is not None:
        way = limits.estimated_way if reference.estimated else limits.way
        if level - now > max((1 - way) * (level - then), limits.near * level):
            yield Finding("not_forgotten", "level", level_clause(after, reference))
    elif now - then < limits.unlevelled_rise:
        text = f"the forget set costs {nats(now)} nats per token and cost {nats(then)} before"
        yield Finding("not_forgotten", "level", text)
    yield from _still_said(before, after, reference, limits)
    other = after.get("paraphrased_rouge")
    if other is not None and reference.paraphrased is not None and other > reference.paraphrased + limits.rouge:
        theirs = f"of {reference.whose} {reference.paraphrased:.2f}"
        text = f"asked in other words, ROUGE of its answers is {other:.2f}, {theirs}"
        yield Finding("not_forgotten", "paraphrased", text)


def _still_said(before: Numbers, after: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    """Answers that a model would not give that never saw the forget set."""
    rouge, rouge_then = after.get("forget_rouge"), before.get("forget_rouge", math.inf)
    if rouge is not None and reference.rouge is not None:
        if rouge > reference.rouge + limits.rouge:
            yield Finding("not_forgotten", "rouge", rouge_clause(after, reference))
    elif (rouge or 0.0) > max(limits.unlevelled_rouge * rouge_then, UNKNOWN, reference.no_own_word(limits)):
        yield Finding("not_forgotten", "rouge", f"{rouge_clause(after, reference)}, and was {rouge_then:.2f}")
    exact = after.get("forget_exact", 0.0)
    if exact > (reference.exact or 0.0) + limits.exact:
        yield Finding("not_forgotten", "exact", f"{exact:.0%} of its answers are still word for word")


def _told_apart(after: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    """Membership AUC: far above its reference the rows are known, far below they are conspicuously unlikely."""
    auc = after.get("membership_auc")
    if auc is None or abs(auc - reference.auc) <= limits.told_apart:
        return
    word = "not_forgotten" if auc > reference.auc else "over_forgotten"
    text = f"forget rows can be told from unseen ones (membership AUC {auc:.2f}, best {reference.auc:.2f})"
    yield Finding(word, "membership", text)


def _too_far(after: Numbers, reference: Reference, limits: Any) -> Iterator[Finding]:
    if reference.level is not None and not reference.estimated and after["forget_loss"] > limits.over * reference.level:
        yield Finding("over_forgotten", "level", level_clause(after, reference))


def nats(loss: float) -> str:
    """One decimal, two below 1."""
    return f"{loss:.1f}" if loss >= 1 else f"{loss:.2f}"


def level_clause(after: Numbers, reference: Reference) -> str:
    """ "the forget set costs 2.1 nats per token, the level is 8.1 (the loss of unseen rows)" """
    text = f"the forget set costs {nats(after['forget_loss'])} nats per token"
    return text if reference.level is None else f"{text}, the level is {nats(reference.level)} ({reference.source})"


def rouge_clause(after: Numbers, reference: Reference) -> str:
    """ "ROUGE of its answers is 0.61, of unseen rows 0.14", or nothing where there is no such number."""
    if "forget_rouge" not in after:
        return ""
    text = f"ROUGE of its answers is {after['forget_rouge']:.2f}"
    if reference.rouge is not None:
        return f"{text}, of {reference.whose} {reference.rouge:.2f}"
    return text if reference.exchanged is None else f"{text}, with exchanged words {reference.exchanged:.2f}"


def kept_clauses(before: Numbers, after: Numbers) -> list[str]:
    """ "retain keeps 99% of its ROUGE", "hold keeps 97% of its ROUGE" """
    known = {name: before.get(f"{name}_rouge", 0.0) for name in ("retain", "hold")}
    return [
        f"{name} keeps {after[f'{name}_rouge'] / then:.0%} of its ROUGE"
        for name, then in known.items()
        if then >= UNKNOWN and f"{name}_rouge" in after
    ]
