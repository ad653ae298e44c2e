"""The curve of leak@k: heights, bounds and words are those of the JSON."""

import pytest
from matplotlib import pyplot
from matplotlib.collections import PolyCollection

from blur_trainer.report.figures import LIGHT, draw_all
from blur_trainer.report.figures.leakage import draw_leakage

KS = (1, 8, 64)
COLUMNS = [
    {"name": "forget_rouge", "label": "ROUGE forget", "goal": "min"},
    *({"name": f"leak@{k}", "label": f"Leak@{k}", "goal": "min", "role": "forget"} for k in reversed(KS)),
    {"name": "leak_bound", "label": "Leak@1 at most (99 %)", "goal": "min", "role": "forget"},
]


def row(name, kind, heights, bound=None, **more):
    metrics = {f"leak@{k}": height for k, height in zip(KS, heights, strict=False)}
    return {"name": name, "kind": kind, "metrics": {"forget_rouge": 0.5, **metrics, "leak_bound": bound}} | more


METRICS = {
    "columns": COLUMNS,
    "rows": [
        row("target", "target", [0.9, 1.0, 1.0], 0.95),
        row("BLUR-NPO", "unlearned", [0.02, 0.12, 0.4], 0.03),
        row("retrained", "retrain", [0.0, 0.0, 0.0], 0.001),
    ],
}


def drawn(metrics=METRICS):
    found = draw_leakage(metrics, LIGHT)
    return found, found.figure.axes[0]


def test_heights_and_bounds_are_those_of_the_rows():
    _, ax = drawn()
    assert [tuple(line.get_xdata()) for line in ax.lines] == [KS] * 3
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.9, 1, 1], [0.02, 0.12, 0.4], [0, 0, 0]]
    assert [line.get_linestyle() for line in ax.lines] == ["--", "-", ":"]
    shades = [shade for shade in ax.collections if isinstance(shade, PolyCollection)]
    tops = [[max(y for x, y in shade.get_paths()[0].vertices if x == k) for k in KS] for shade in shades]
    for bound, top in zip((0.95, 0.03, 0.001), tops, strict=True):
        assert top == pytest.approx([1 - (1 - bound) ** k for k in KS])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "8", "64"]


def test_words_for_who_cannot_see_it():
    found, _ = drawn()
    assert "Leak@8: target 1.000, BLUR-NPO 0.120, retrained 0.000." in found.numbers
    assert "Leak@1 at most (99 %): target 0.950, BLUR-NPO 0.030, retrained 0.001." in found.numbers
    assert "Dashed: the model before unlearning. Dotted: the model that never saw the forget set." in found.caption
    assert 'Shaded: what the samples do not rule out, by "Leak@1 at most (99 %)".' in found.caption


def test_one_k_is_no_curve_and_a_curve_is_in_no_bars():
    two = {**METRICS, "columns": COLUMNS[:1] + COLUMNS[3:]}
    assert draw_leakage(two, LIGHT) is None
    bars = {drawing.name: drawing for drawing in draw_all([], two, LIGHT)}["before_after"]
    assert "Leak@1" in bars.numbers
    found = {drawing.name: drawing for drawing in draw_all([], METRICS, LIGHT)}
    assert set(found) == {"before_after", "leakage"}
    assert "Leak" not in found["before_after"].numbers and "ROUGE" in found["before_after"].numbers
    assert draw_leakage({"columns": COLUMNS, "rows": []}, LIGHT) is None
    assert draw_leakage({}, LIGHT) is None


def test_gaps_spreads_and_missing_bounds():
    rows = [
        row("some", "unlearned", [0.1, float("nan"), 0.3]),
        row("seeds", "unlearned", [0.2, 0.4, 0.6], 0.3, runs=3, spread={f"leak@{k}": 0.05 for k in KS}),
        row("none", "unlearned", []),
    ]
    found, ax = drawn({**METRICS, "rows": rows})
    assert not [shade for shade in ax.collections if isinstance(shade, PolyCollection)]
    assert "Shaded" not in found.caption and "over 3 seeds" in found.caption
    assert len(found.figure.legends[0].get_texts()) == 2
    assert pyplot.get_fignums() == []
