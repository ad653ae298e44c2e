"""The readings of a sweep: what counts as forgotten and kept, the tables, the figure of fronts, the page."""

import json
import math

import pytest

from blur_trainer.report import html as report
from blur_trainer.report.figures.front import draw_front
from blur_trainer.report.figures.style import DARK, LIGHT, row_colors
from blur_trainer.report.html import write_report
from blur_trainer.report.readings import Yardstick, check_shares, read_sweep

KEYS = {"forget_verbmem": "min", "forget_knowmem": "min", "retain_knowmem": "max", "hold_knowmem": "max", "auc": None}
COLUMNS = [{"name": key, "label": key.replace("_", " "), "goal": goal} for key, goal in KEYS.items()]
TARGET = {"forget_verbmem": 100.0, "forget_knowmem": 80.0, "retain_knowmem": 90.0, "hold_knowmem": 50.0, "auc": 0.1}
RETRAINED = {"forget_verbmem": 20.0, "forget_knowmem": 10.0, "retain_knowmem": 90.0, "hold_knowmem": 50.0, "auc": 0.5}


def yardstick(**options):
    return Yardstick(COLUMNS, TARGET, RETRAINED, **options)


def run(method, strength, seed, verbmem, knowmem, retain, hold):
    names = dict(zip(KEYS, (verbmem, knowmem, retain, hold), strict=False))
    return {"method": method, "setting": "gamma", "strength": strength, "seed": seed, **names}


RUNS = [run("A", 1.0, seed, 24.0, 0.0, 81.0, 40.0 + seed) for seed in range(3)]
RUNS += [run("B", 1.0, seed, 24.0, 12.0, 72.0 - seed, 30.0) for seed in range(3)]
RUNS += [run("C", 1.0, 0, 60.0, 12.0, 90.0, 50.0), run("C", 3.0, 0, None, 12.0, 90.0, 50.0)]


def test_what_counts_as_forgotten_and_as_kept():
    found = yardstick()
    assert found.forgotten == ("forget_verbmem", "forget_knowmem")
    assert found.kept == ("retain_knowmem", "hold_knowmem")
    measured = found.measure(RUNS[0])
    assert measured["way"] == pytest.approx((100 - 24) / 80), "of what is least forgotten"
    assert measured["kept"] == pytest.approx((81 / 90 + 40 / 50) / 2)
    assert found.measure(RUNS[-1])["way"] is None and found.measure(RUNS[-1])["kept"] == 1
    assert found.measure(run("A", 1.0, 0, 24.0, 0.0, math.nan, 40.0))["kept"] is None
    only = yardstick(forgotten=("forget_knowmem",), kept=("hold_knowmem",)).measure(RUNS[0])
    assert (only["way"], only["kept"]) == (1.0, pytest.approx(0.8))


def test_a_metric_without_a_way_is_left_out():
    same = Yardstick(COLUMNS, TARGET, {**RETRAINED, "forget_knowmem": 80.0})
    assert same.forgotten == ("forget_verbmem",)
    for target, retrained in ((TARGET, TARGET), ({**TARGET, "retain_knowmem": 0, "hold_knowmem": 0}, RETRAINED)):
        with pytest.raises(ValueError, match="Nothing to compare"):
            Yardstick(COLUMNS, target, retrained)
    for wrong in ({"tolerance": 1.0}, {"tolerance": -0.1}, {"utility": 0.0}, {"utility": 1.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: pass a share"):
            check_shares(**wrong)


def test_who_is_named():
    forgetting, utility, fronts = read_sweep(RUNS, yardstick(tolerance=0.1, utility=0.8))["readings"]
    said = {row["name"]: row.get("said") for row in forgetting["rows"]}
    assert said["A"] == "forgets enough in 3 of 3 seeds, with gamma 1, 1, 1"
    assert said["C"] == "never forgets enough, with gamma 1, 3"
    assert [v["column"] for v in forgetting["verdicts"]] == ["retain knowmem", "hold knowmem"]
    # 9, 10, 11 more: 10 +- 4.303 / sqrt 3
    assert forgetting["verdicts"][0]["text"] == "A, by 10.0 (7.5 to 12.5) over B (3 seeds)"
    assert forgetting["verdicts"][0]["left_out"] == ["C"]
    assert {row["name"]: row.get("said") for row in utility["rows"]}["B"] == "never keeps enough, with gamma 1"
    assert utility["verdicts"][0]["text"] == "only A has a value for each of 3 seeds"
    areas = {row["name"]: row["metrics"]["area"] for row in fronts["rows"]}
    assert areas["C"] == pytest.approx(0.5) and areas["A"] == pytest.approx(0.95 * (0.9 + 41 / 50) / 2)
    assert "at least 90% of the way" in forgetting["note"] and "at least 80% of the target's" in utility["note"]


def test_forgetting_more_than_the_retrained_model_wins_nothing():
    beyond = [run("A", 1.0, seed, 0.0, 0.0, 90.0, 50.0) for seed in range(3)]
    at = [run("B", 1.0, seed, 20.0, 10.0 + seed / 10, 90.0, 50.0) for seed in range(3)]
    verbmem, knowmem = read_sweep(beyond + at, yardstick())["readings"][1]["verdicts"]
    assert verbmem["text"] == "no difference shown (3 seeds)" and knowmem["winner"] is None


def test_of_two_that_forget_alike_the_one_that_keeps_more():
    runs = [run("A", strength, 0, 20.0, 0.0, kept, 50.0) for strength, kept in ((1.0, 86.0), (0.3, 88.0), (3.0, 87.0))]
    [_, row, _] = read_sweep(runs, yardstick(utility=0.9))["readings"][1]["rows"]
    assert row["said"] == "keeps enough in 1 of 1 seed, with gamma 0.3"


def test_the_figure_shows_each_run():
    metrics = {"footing": read_sweep(RUNS, yardstick())}
    drawing = draw_front(metrics, LIGHT)
    assert "mean and standard deviation over 3 seeds" in drawing.caption
    xs = sorted(x for line in drawing.figure.axes[0].lines for x in line.get_xdata() if line.get_markersize() == 3.5)
    assert xs == pytest.approx([0.95] * 6), "C has one seed, and one run without a value"
    side = drawing.figure.axes[1]
    kept = {line.get_ydata()[0]: line.get_xdata() for line in side.lines if line.get_markersize() == 7.5}
    assert kept == {0: pytest.approx([(0.9 + 41 / 50) / 2]), 1: pytest.approx([(71 / 90 + 0.6) / 2])}
    assert [text.get_text() for text in side.texts] == ["never forgets enough"] and side.texts[0].xy[1] == 2
    [legend] = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["A", "B", "C"]
    assert draw_front({}, LIGHT) is None and draw_front({"footing": {"points": []}}, DARK) is None


def test_a_broken_model_does_not_squeeze_the_others():
    drawing = draw_front({"footing": read_sweep([*RUNS, run("D", 9.0, 0, 0.0, 0.0, 0.0, 0.0)], yardstick())}, LIGHT)
    assert drawing.figure.axes[0].get_ylim()[0] > 0.5 and "are not shown" in drawing.caption
    assert [text.get_text() for text in drawing.figure.axes[1].texts] == ["never forgets enough", "keeps 0%"]
    assert "are not shown" not in draw_front({"footing": read_sweep(RUNS, yardstick())}, LIGHT).caption


def test_many_methods_look_different():
    runs = [run(f"M{i}", 1.0, 0, 20.0 + i, 0.0, 90.0, 50.0) for i in range(20)]
    handles = draw_front({"footing": read_sweep(runs, yardstick())}, LIGHT).figure.legends[0].legend_handles
    looks = {(h.get_color(), h.get_marker(), h.get_linestyle(), h.get_markerfacecolor()) for h in handles}
    assert len(looks) == 20
    assert len({(h.get_color(), h.get_marker(), h.get_markerfacecolor()) for h in handles[:16]}) == 16


def test_strengths_of_a_method_have_its_color():
    rows = [{"name": f"A {i}", "method": "A"} for i in range(3)] + [{"name": "B", "method": "B"}, {"name": "C"}]
    colors = row_colors([{"name": "target", "kind": "target"}, *rows], LIGHT)
    assert colors == [LIGHT.target, *[LIGHT.methods[0]] * 3, *LIGHT.methods[1:3]]


def test_the_page_has_tables_and_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DPI", 20)
    rows = [{"name": "target", "kind": "target", "metrics": TARGET}]
    metrics = {"benchmark": "MUSE", "columns": COLUMNS, "rows": rows, "footing": read_sweep(RUNS, yardstick())}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(tmp_path).read_text()
    assert page.count('<table class="results">') == 4 and "never forgets enough, with gamma 1, 3" in page
    assert "A, by 10.0 (7.5 to 12.5) over B (3 seeds); not compared, for want of a seed: C" in page
    for broken in ([1], {"readings": [{"columns": [], "rows": [1], "verdicts": []}]}):
        (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "footing": broken}))
        with pytest.raises(ValueError, match=r'"footing"|"rows" must be a list'):
            write_report(tmp_path)
