"""The files of a run on one's own data, as `blur-trainer unlearn` leaves them; no model made them."""

import json

from blur_trainer.evaluation.forget_columns import columns_of
from blur_trainer.report.verdict import Verdict, judge

LEVEL = 5.85
NUMBERS = {
    "before": {"forget": (0.95, 0.01), "retain": (0.9, 0.02), "hold": (0.8, 0.03), "unseen": (0.2, 6.0)},
    "BLUR-RMU": {"forget": (0.27, 5.7), "retain": (0.89, 0.05), "hold": (0.78, 0.08), "unseen": (0.19, 6.1)},
    "retrained": {"forget": (0.28, 5.9), "retain": (0.91, 0.02), "hold": (0.8, 0.03), "unseen": (0.2, 6.0)},
}
KINDS = {"before": "target", "BLUR-RMU": "unlearned", "retrained": "retrain"}
LONG = "/" + "a_very_long_name_without_any_blank" * 6
SETS = ("forget", "retain", "hold", "unseen")


def numbers(name):
    found = {}
    for own, (rouge, loss) in NUMBERS[name].items():
        found |= {f"{own}_rouge": rouge, f"{own}_loss": loss, f"{own}_exact": rouge / 2}
    return found | {"membership_auc": 0.52, "degeneration": 0.0, "score": abs(found["forget_loss"] - LEVEL)}


def verdict(names=("before", "BLUR-RMU")) -> Verdict:
    return judge(numbers(names[0]), numbers(names[1]), LEVEL)


def sample(own, text="The answer"):
    responses = {"before": f" {text}", "BLUR-RMU": "", "retrained": f"{text}, or not"}
    return {"prompt": f"Who is in {own}?", "reference": f" {text}", "set": own, "responses": responses}


def metrics(names=("before", "BLUR-RMU", "retrained"), **more):
    rows = [{"name": name, "kind": KINDS[name], "metrics": numbers(name), "seconds": None} for name in names]
    settings = {
        "date": "2026-11-27 13:32 UTC",
        "model_name_or_path": "/somewhere/my-model",
        "method": "BLUR-RMU",
        "lr_scheduler_type": "linear",
        "forget_objective": f"Until(RMU(layer=2), level={LEVEL})",
        "data": {"forget": "forget.csv: 40 rows; `q` -> question; digest e6674956e4ae340d", "hold": f"{LONG}: 3 rows"},
        "environment": {"torch": "2.13.0"},
    }
    return {
        "benchmark": "Your own data",
        "columns": columns_of(SETS, LEVEL, []),
        "plane": {},
        "rows": rows,
        "settings": settings,
        "samples": [sample("unseen"), sample("retain"), sample("forget", LONG)],
        "verdict": json.loads(verdict().to_json()),
    } | more
