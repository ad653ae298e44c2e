"""What report and card show of a run on one's own data: the verdict in words, and the numbers by set."""

from collections.abc import Mapping, Sequence
from typing import Any

from blur_trainer.report.tables import best_value, first_of_kind, format_number, goal_of, heading, role_of, values

Items = Sequence[Mapping[str, Any]]
#: of each verdict: its badge, and what it means
WORDS = {
    "forgotten": (
        "✓ Forgotten",
        "The forget set is known no better than by a model that never saw it. The rest is kept.",
    ),
    "not_forgotten": ("✗ Not forgotten", "The model still knows of the forget set what it should not."),
    "over_forgotten": (
        "! Forgotten too far",
        "The forget set is less likely than text that the model never saw. That gives it away, too.",
    ),
    "broken": ("✗ Broken", "The model lost what it was to keep, whatever it forgot."),
}
#: of each set: its title, and what its numbers should do
SETS = {
    "forget": ("Forget", "to be forgotten: as a model that never saw it"),
    "paraphrased": ("Paraphrased", "the same in other words: to be forgotten, too"),
    "retain": ("Retain", "to be kept as before"),
    "hold": ("Hold", "in no set of the training: to be kept as before"),
    "unseen": ("Unseen", "no model saw it: how text looks that is not known"),
    "": ("All sets", "what no single set shows"),
}
#: of each metric: its name, and what it is
METRICS = {
    "rouge": (
        "ROUGE",
        "the share of the true answer's words that the model's answer has, in their order (ROUGE-L)",
    ),
    "loss": ("Loss", "what a token of the true answer costs, in nats: 0 is known by heart; the level is on this scale"),
    "probability": ("Probability", "of a token of the true answer, geometric mean: 1 is known by heart"),
    "exact": ("Exact", "the share of answers that are the true one, word for word"),
    "extraction": ("Extraction", "how much of the true answer, from its end, the model completes without an error"),
    "membership_auc": ("Membership AUC", "how well an attacker tells forget rows from unseen ones: 0.5 is not at all"),
    "degeneration": ("Degeneration", "the share of the answers on retain and hold that are empty or repeat themselves"),
    "forget_degeneration": ("Degeneration, forget", "the same of the forget set's answers"),
    "score": (
        "Score",
        "the distance of forget's loss from the level, plus retain's loss: less is better",
    ),
}

#: only an evaluation of one's own sets has these
_OF_SETS = {"forget_rouge", "forget_loss", "forget_extraction"}


def verdict_texts(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """
    The verdict for readers.

    Args:
        verdict: as in metrics.json.

    Returns:
        `word`, `badge`, `meaning`, `sentence` (without the word), `next`, `also` (findings that the sentence lacks),
        `notes`, `level` (with its source, or empty).
    """
    word = verdict["word"]
    badge, meaning = WORDS.get(word, (word, ""))
    sentence = verdict["sentence"].removeprefix(f"{word}: ")
    level = verdict.get("level")
    return {
        "word": word if word in WORDS else "other",
        "badge": badge,
        "meaning": meaning,
        "sentence": sentence[:1].upper() + sentence[1:],
        "next": list(verdict.get("next") or []),
        "also": [finding["text"] for finding in verdict.get("findings") or [] if finding["text"] not in sentence],
        "notes": list(verdict.get("notes") or []),
        "level": f"{level:.4g} nats per token: {verdict.get('level_source') or 'as given'}." if level else "",
    }


def own_columns(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """
    The columns of a run on one's own data, the forget loss with the verdict's level if it has none; none of other runs.
    """
    columns: list[Mapping[str, Any]] = list(metrics.get("columns") or [])
    level = (metrics.get("verdict") or {}).get("level")
    if not metrics.get("verdict") and not {column["name"] for column in columns} >= _OF_SETS:
        return []
    return [{"near": level, **c} if level and c["name"] == "forget_loss" else c for c in columns]


def split(name: str) -> tuple[str, str]:
    """Set and metric of a column; of what no single set has, "" and the column."""
    own, _, metric = name.partition("_")
    return (own, metric) if own in SETS and metric in METRICS and name not in METRICS else ("", name)


def aim(column: Mapping[str, Any], rows: Items) -> tuple[float | None, str]:
    """
    The value that is best, and whose it is. Of what is to be forgotten: the level, else the retrained model's, else
    that of unseen rows before. Of what is to be kept: the value before.
    """
    own, metric = split(column["name"])
    before = first_of_kind(rows, "target")
    if goal_of(column) == "near":
        if column.get("near") is not None:
            return best_value(column, rows), "level" if metric == "loss" else "chance"
        if (retrained := best_value(column, rows)) is not None:
            return retrained, "retrained"
        unseen = values({"name": f"unseen_{metric}"}, before) if own else []
        return next(iter(unseen), None), "unseen"
    kept = values(column, before) if role_of(column) == "retain" else []
    return next(iter(kept), None), "before"


def by_set(columns: Items, rows: Items) -> list[dict[str, Any]]:
    """
    The numbers of all rows, one line per metric, grouped by set. Metrics without any number are left out.

    Returns:
        `{"title", "note", "lines"}` per set, with lines `{"column", "label", "texts", "aim", "whose"}`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for column in columns:
        numbers = values(column, rows)
        if all(number is None for number in numbers):
            continue
        own, metric = split(column["name"])
        best, whose = aim(column, rows)
        digits = _digits([*numbers, best])
        title, note = SETS[own]
        group = groups.setdefault(own, {"title": title, "note": note, "lines": []})
        line = {
            "column": column,
            "label": METRICS[metric][0] if metric in METRICS else heading({**column, "goal": None}),
            "texts": [format_number(number, digits) for number in numbers],
            "aim": "" if best is None else format_number(best, digits),
            "whose": whose,
        }
        group["lines"].append(line)
    return [groups[own] for own in SETS if own in groups]


def meanings(columns: Items, rows: Items) -> list[tuple[str, str]]:
    """Name and meaning of each metric that has a number, once."""
    shown = [column["name"] for column in columns if any(number is not None for number in values(column, rows))]
    metrics = {split(name)[1] for name in shown}
    found = [METRICS[metric] for metric in METRICS if metric in metrics]
    tasks = any(name.startswith("lm_eval_") for name in shown)
    return [*found, ("lm_eval", "as lm-evaluation-harness measures it")] if tasks else found


def _digits(numbers: Sequence[float | None]) -> int:
    """Three decimals: a loss of 0.002 beside one of 8.171 is a result. One where a number is 100 or more."""
    return 1 if any(number is not None and abs(number) >= 100 for number in numbers) else 3
