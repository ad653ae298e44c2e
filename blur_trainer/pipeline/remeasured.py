"""How well a request is forgotten now: its rows are measured again, and judged as they were then."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blur_trainer.data.reading import Reading
from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.audit import Audit
from blur_trainer.pipeline.ledger import Request, now
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.pipeline.unlearn import evaluation_of
from blur_trainer.report.verdict import Verdict, judge

_KEPT = ("retain", "hold")


def state_of(number: int, verdict: Verdict, numbers: Mapping[str, float], audit: Audit | None = None) -> dict[str, Any]:
    """What the ledger has of a request as it is after the request `number`."""
    known = [finding.text for finding in verdict.findings if finding.word == "not_forgotten"]
    because = known or [finding.text for finding in verdict.findings if finding.word == verdict.word]
    return {
        "after": number,
        "date": now(),
        "verdict": verdict.word,
        "sentence": verdict.sentence,
        "known": bool(known),
        "because": because,
        "numbers": dict(numbers),
        "audit": None if audit is None else {"sentence": audit.sentence, "recovered": list(audit.recovered)},
    }


def remeasured(prepared: Prepared, old: Request, last: Request, rows: Reading, model: Any) -> dict[str, Any]:
    """
    The state of an old request now. Only its own rows and the unseen ones are measured; nothing is trained.

    What is kept was measured after the last request. It is judged against what it was before the old one, if both had
    the same rows.

    Args:
        prepared: of the last request.
        rows: of the old one.
        model: that the last one left.
    """
    sets = {"forget": rows} | {role: each for role, each in prepared.sets.items() if role == "unseen"}
    script = replace(prepared.script, lm_eval=None)
    numbers = dict(evaluation_of(replace(prepared, sets=sets, script=script), None)(model))
    same = [role for role in _KEPT if role in old["data"] and old["data"][role] == last["data"].get(role)]
    other = [role for role in _KEPT if role not in same]
    after = last["states"][0]["numbers"]
    numbers |= {name: value for name, value in after.items() if name.startswith(tuple(same))} if same else {}
    left_out = (*(f"{role}_" for role in other), *(["degeneration"] if other and "degeneration" in after else []))
    before = {name: value for name, value in old["before"].items() if not name.startswith(left_out)}
    if not other and "degeneration" in after:
        numbers["degeneration"] = after["degeneration"]
    level = Level(old["level"]["nats"], source=old["level"]["source"], rouge=old["level"].get("rouge"))
    verdict = judge(before, numbers, level, old["retrained"], prepared.thresholds)
    return state_of(last["number"], verdict, numbers)
