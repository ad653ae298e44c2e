"""The tables of benchmarks/evidence.py: which strength was chosen, and what the five seeds show."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from evidence_methods import CANDIDATES, ULD
from tabulate import tabulate

from blur_trainer.report.equal_footing import Bound
from blur_trainer.report.paired import verdict

Row = Mapping[str, Any]
LABELS = {**{name: candidate.label for name, candidate in CANDIDATES.items()}, "uld": ULD.label}
#: what is kept, as shares of what the target knew
KEPT = {
    "retain tokens": "retain_top", "hold tokens": "hold_top", "facts tokens": "facts_top",
    "retain ROUGE": "retain_rouge", "hold ROUGE": "hold_rouge", "facts ROUGE": "facts_rouge",
}  # fmt: skip


def level_bounds(base: Mapping[str, Row]) -> list[Bound]:
    """At the level: at least .9 of the retrained model's forget loss, and a ROUGE within .10 of its."""
    retrained = base["retrain"]
    return [
        Bound("forget_loss", low=0.9 * retrained["forget_loss"]),
        Bound("forget_rouge", low=retrained["forget_rouge"] - 0.1, high=retrained["forget_rouge"] + 0.1),
    ]


def reached(row: Row, base: Mapping[str, Row]) -> bool:
    return "failed" not in row and all(bound.holds(row) for bound in level_bounds(base))


def chosen_strength(rows: Sequence[Row], method: str, base: Mapping[str, Row], seed: int, replay: bool) -> float | None:
    """The rule of choice, the same for all methods. `None`: all its trainings failed, or there is none yet."""
    own = [r for r in rows if (r["method"], r["seed"], r["replay"]) == (method, seed, replay) and "failed" not in r]
    there = [row for row in own if reached(row, base)]
    if there:
        return max(there, key=lambda row: row["choice_top"])["strength"]
    return max(own, key=lambda row: row["forget_loss"])["strength"] if own else None


def _cell(values: Sequence[float], digits: int = 2) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def table(rows: Sequence[Row], base: Mapping[str, Row], tuning_seed: int) -> str:
    """What was tried, what came of it, and which differences the seeds show."""
    parts = []
    for replay in (True, False):
        own = [row for row in rows if row["replay"] is replay]
        if own:
            parts += [f"### {'With' if replay else 'Without'} replay", _results(own, base, tuning_seed)]
            parts += [_verdicts([row for row in own if row["seed"] != tuning_seed], base)]
            parts += ["Tried:", _tried(own, base, tuning_seed)]
    return "\n\n".join(parts)


def _results(rows: Sequence[Row], base: Mapping[str, Row], tuning_seed: int) -> str:
    heads = ["", "strength", "seeds at the level", "forget loss", "forget tokens", "forget ROUGE", *KEPT]
    lines = []
    for name in ("target", "retrain"):
        own = base[name]
        lines.append(
            [name, "", "", f"{own['forget_loss']:.2f}", f"{own['forget_top']:.2f}", f"{own['forget_rouge']:.2f}"]
        )
        lines[-1] += [f"{own[key] / base['target'][key]:.3f}" for key in KEPT.values()]
    for name, label in LABELS.items():
        own = [row for row in rows if row["method"] == name and row["seed"] != tuning_seed]
        if not own:
            continue
        there = sum(reached(row, base) for row in own)
        lines.append([label, f"{own[0]['strength']:g}", f"{there} of {len(own)}"])
        own = [row for row in own if "failed" not in row]  # a ruined model has no numbers
        if not own:
            continue
        lines[-1] += [_cell([row[key] for row in own]) for key in ("forget_loss", "forget_top", "forget_rouge")]
        lines[-1] += [_cell([row[key] / base["target"][key] for row in own], 3) for key in KEPT.values()]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)


def _verdicts(rows: Sequence[Row], base: Mapping[str, Row]) -> str:
    """Of the methods that reach the level with every seed: who keeps most, where the seeds show it."""
    there = [
        name
        for name in LABELS
        if (own := [r for r in rows if r["method"] == name]) and all(reached(r, base) for r in own)
    ]
    lines = [f"At the level with every seed: {', '.join(LABELS[name] for name in there) or 'none'}."]
    for column, key in KEPT.items():
        scores = {LABELS[name]: {row["seed"]: row[key] for row in rows if row["method"] == name} for name in there}
        found = verdict(scores)
        said = found.sentence() if len(scores) > 1 else "nothing to compare"
        without = f"; not compared, for want of a seed: {', '.join(found.left_out)}" if found.left_out else ""
        lines.append(f"* {column}: {said}{without}")
    return "\n".join(lines)


def _tried(rows: Sequence[Row], base: Mapping[str, Row], seed: int) -> str:
    lines = []
    for name, label in LABELS.items():
        own = [row for row in rows if row["method"] == name and row["seed"] == seed]
        best = chosen_strength(own, name, base, seed, own[0]["replay"]) if own else None
        for row in own:
            if "failed" in row:
                lines.append([label if row is own[0] else "", f"{row['strength']:g}", "ruined"])
                continue
            mark = " *" if row["strength"] == best else ""
            lines.append(
                [label if row is own[0] else "", f"{row['strength']:g}{mark}", "yes" if reached(row, base) else "no"]
            )
            lines[-1] += [
                f"{row[key]:.2f}" for key in ("forget_loss", "forget_rouge", "choice_top", "hold_top", "facts_top")
            ]
    heads = [
        "",
        "tried (* chosen)",
        "level",
        "forget loss",
        "forget ROUGE",
        "hold tokens, first half",
        "second half",
        "facts",
    ]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)
