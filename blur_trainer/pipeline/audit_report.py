"""An audit in tables: for the terminal, and for the report."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.pipeline.audit_judged import ALPHA
from blur_trainer.report.results import Results
from blur_trainer.report.tables import MISSING

_WORDS = {True: "recovered", False: "no", None: "not judged"}
_HEADS = ["attack", "number", "model", "control", "difference at least", "recovered"]
_LABELS = {
    "rouge": "ROUGE forget",
    "probability": "Probability forget",
    "leak_bound": f"Leak@1 at most ({100 * (1 - ALPHA):g} %)",
}


def found_table(content: Mapping[str, Any]) -> str:
    """
    Of each attack the numbers of the model and of its control, how much the difference is at least, and what it means:
    "recovered" stands beside the number that shows it.

    Args:
        content: of `audit.json`.
    """
    aligned = ["left", "left", "right", "right", "right", "left"]
    return tabulate(_found_rows(content), _HEADS, disable_numparse=True, colalign=aligned)


def certificate_table(content: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate as a table of the report and of the model card: `title`, `said`, `heads`, `rows`."""
    subject = content["subject"]
    model, data = subject["models"]["model"], subject["data"]
    sets = ", ".join(f"{role} {each['rows']} ({each['digest']})" for role, each in data.items())
    said = [
        f"{content['sentence'][:1].upper()}{content['sentence'][1:]}.",
        f"Of {content['date']}, budget {subject['budget']['name']}. Control: {content['control']['what']}.",
        f"Weights: SHA-256 {model['sha256']}. Rows, with their digests: {sets}.",
        *(f"{one['name']} is not judged: {one['why']}" for one in content["attacks"] if "why" in one),
    ]
    if content["left_out"]:
        said.append(f"Left out: {'; '.join(content['left_out'])}.")
    return {"title": "Audit", "said": said, "heads": _HEADS, "rows": _found_rows(content)}


def _found_rows(content: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in content["attacks"]:
        for place, name in enumerate(one["numbers"] or {"": None}):
            compared = one["compared"].get(name) or one["compared"].get(f"1 - {name}") or {}
            numbers = [one["numbers"].get(name), one["control"].get(name), compared.get("lower")]
            name_once, word = one["name"] * (place == 0), _WORDS[_shows(one, compared)]
            rows.append([name_once, name or "", *(_cell(number) for number in numbers), word])
    return rows


def _shows(attack: Mapping[str, Any], compared: Mapping[str, Any]) -> bool | None:
    """Whether this number says what the attack says. Some attacks have a rule of their own, beside their numbers."""
    by_number = any(each.get("above") for each in attack["compared"].values())
    return compared.get("above", False) if attack["recovered"] and by_number else attack["recovered"]


def _cell(number: float | None) -> str:
    return MISSING if number is None else f"{number:.3f}"


class _Audited(Evaluation):
    """The columns of an audit's table. Its numbers are there already."""

    def __init__(self, columns: list[Column]) -> None:
        self._columns = columns

    @property
    def columns(self) -> list[Column]:
        return self._columns


def results_of(content: Mapping[str, Any]) -> Results:
    """The rows of the model and of the retrained one, and the table of the attacks, for metrics.json and the report."""
    attacks = content["attacks"]
    leaks = [one for one in attacks if one["kind"] == "leak" and one.get("more")]
    many = leaks[0]["more"] if leaks else {}
    columns: list[Column] = [
        {"name": f"forget_{name}", "label": _LABELS[name], "goal": "near", "role": "forget"}
        for name in ("rouge", "probability")
    ]
    columns += [
        {"name": name, "label": _LABELS.get(name, name.capitalize()), "goal": "min", "role": "forget"}
        for name in many.get("unlearned", {})
    ]
    results = Results("Your own data, audited", _Audited(columns), samples=0)
    plain = next((one for one in attacks if one["kind"] == "plain"), None)
    if plain is not None:
        results.rows.append(_row("model", "unlearned", plain["numbers"], many.get("unlearned")))
        if content["control"]["kind"] == "retrained":
            results.rows.append(_row("retrained", "retrain", plain["control"], many.get("retrained")))
    results.tables, results.trained = [certificate_table(content)], False
    for one in attacks:
        results.inside |= one.get("inside", {})
    return results


def _row(name: str, kind: str, numbers: Mapping[str, float], leaks: Mapping[str, float] | None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "metrics": _named(numbers) | dict(leaks or {}), "seconds": None}


def _named(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"forget_{name}": value for name, value in numbers.items()}
