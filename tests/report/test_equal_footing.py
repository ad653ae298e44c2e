"""Fronts, areas, intervals over seeds, winners, and the runs at equal forgetting and equal utility."""

import doctest
import math
import random

import pytest
from scipy import stats
from support.reference import student_interval, unbeaten, union_area

from blur_trainer.report import pareto
from blur_trainer.report.equal_footing import Bound, areas, best_within, over_seeds, scores, way_bound
from blur_trainer.report.paired import mean_interval, paired_difference, verdict
from blur_trainer.report.pareto import front_area, pareto_front, share_of_way


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(pareto).failed == 0


# ---- fronts ----


def some_points(seed: int, n: int = 9) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(draw.choice((0, 0.2, 0.5, draw.random())), draw.choice((0, 0.5, draw.random()))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    points = some_points(seed)
    front = [points[i] for i in pareto_front(points)]
    assert set(front) == unbeaten(points) and len(front) == len(set(front))
    assert front == sorted(front)


@pytest.mark.parametrize("reference", [(0.0, 0.0), (0.3, -0.5), (2.0, 0.0)])
@pytest.mark.parametrize("seed", range(8))
def test_the_area_is_that_of_all_rectangles_together(seed, reference):
    points = some_points(seed)
    assert front_area(points, reference) == pytest.approx(union_area(points, reference))


def test_points_that_are_no_numbers():
    assert pareto_front([(math.nan, 1.0), (0.5, math.nan), (0.1, 0.1)]) == [2]
    assert pareto_front([]) == [] and front_area([]) == 0
    with pytest.raises(ValueError, match=r"\(inf, 0.5\) has no finite area: clip"):
        front_area([(math.inf, 0.5)])


def test_the_share_of_a_way():
    assert share_of_way(4.1, 0.0, 8.2) == share_of_way(0.6, 1.0, 0.2) == 0.5
    assert share_of_way(12.5, 0.0, 8.2) == 1 and share_of_way(-1.0, 0.0, 8.2) == 0
    assert share_of_way(12.3, 0.0, 8.2, clip=False) == pytest.approx(1.5)
    assert math.isnan(share_of_way(math.nan, 0.0, 8.2))
    with pytest.raises(ValueError, match=r"From 1\.0 to 1\.0"):
        share_of_way(0.5, 1.0, 1.0)


# ---- intervals and winners ----


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 10])
def test_an_interval_is_students(n):
    draw = random.Random(n)
    numbers = [draw.gauss(0.8, 0.1) for _ in range(n)]
    found = mean_interval(numbers)
    assert (found.low, found.high) == pytest.approx(student_interval(numbers), abs=2e-4)
    assert found.n == n and found.mean == pytest.approx(sum(numbers) / n)
    assert mean_interval(numbers, 0.8).high < found.high


def test_a_difference_is_paired():
    ours, theirs = {0: 0.9, 1: 0.5, 2: 0.7, 9: 5.0}, {2: 0.66, 1: 0.47, 0: 0.85, 8: -5.0}
    found = paired_difference(ours, theirs)
    low, high = stats.ttest_rel([0.9, 0.5, 0.7], [0.85, 0.47, 0.66]).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 3)
    assert found.excludes_zero, "0.04 each time, although the seeds differ by 0.4"
    assert not paired_difference(ours, {0: 0.85, 1: 0.6, 2: 0.66}).excludes_zero
    with pytest.raises(ValueError, match="No seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_few_and_equal_numbers():
    one = mean_interval([0.5])
    assert (one.low, one.high, one.excludes_zero) == (-math.inf, math.inf, False)
    same = mean_interval([0.1] * 3)
    assert same.low == same.high == 0.1 and same.excludes_zero
    for numbers in ([], [0.1, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="finite numbers, one per seed"):
            mean_interval(numbers)
    with pytest.raises(ValueError, match="confidence=95"):
        mean_interval([1.0, 2.0], 95)


BETTER = {"a": {0: 0.90, 1: 0.80, 2: 0.85}, "b": {0: 0.86, 1: 0.77, 2: 0.81}, "c": {0: 0.5, 1: 0.4, 2: 0.3}}


def test_a_winner_is_better_than_each_other():
    found = verdict(BETTER)
    assert (found.winner, found.leader, found.second, found.tied, found.n) == ("a", "a", "b", (), 3)
    assert found.difference == paired_difference(BETTER["a"], BETTER["b"])
    assert found.sentence() == "a, by 0.037 (0.022 to 0.051) over b (3 seeds)"
    wide = verdict({**BETTER, "c": {0: 1.2, 1: 0.2, 2: 0.9}})
    assert wide.winner is None and wide.leader == "a" and wide.second == "b" and wide.tied == ("c",)
    assert wide.difference.excludes_zero, "the second alone would have made it the winner"
    assert wide.sentence() == "no difference shown (3 seeds)"


def test_the_goal_turns_it_round():
    assert verdict(BETTER, goal="min").winner == "c"
    near = verdict({"near": {0: 0.5, 1: 0.54}, "below": {0: 0.0, 1: 0.05}, "above": {0: 1.0, 1: 1.1}}, aim=0.52)
    assert near.leader == "near" and near.second == "below"
    assert near.difference.mean == pytest.approx(0.495 - 0.02)
    with pytest.raises(ValueError, match=r"one of \['max', 'min'\], but got 'zero'"):
        verdict(BETTER, goal="zero")


@pytest.mark.parametrize("missing", [{0: 0.99, 1: 0.99}, {0: 0.99, 1: 0.99, 2: None}, {0: 0.99, 1: 0.99, 2: math.nan}])
def test_who_lacks_a_seed_does_not_compete(missing):
    found = verdict({**BETTER, "lucky": missing})
    assert found.winner == "a" and found.left_out == ("lucky",)
    alone = verdict({"a": BETTER["a"], "lucky": missing})
    assert alone.winner is None and alone.sentence() == "only a has a value for each of 3 seeds"
    nobody = verdict({"lucky": missing, "other": {2: 0.1}})
    assert nobody.leader is None and nobody.sentence() == "no method has a value for each of 3 seeds"


def test_one_seed_names_nobody():
    found = verdict({"a": {0: 1.0}, "b": {0: 0.0}})
    assert found.winner is None and found.leader == "a" and found.sentence() == "no difference shown (1 seed)"


def test_equals_rarely_have_a_winner():
    draw = random.Random(0)
    named = 0
    for _ in range(300):
        named += verdict({m: {seed: draw.gauss(0, 1) for seed in range(5)} for m in "ab"}).winner is not None
    assert 0 < named <= 0.1 * 300


# ---- runs on an equal footing ----


def run(method, strength, seed, rouge, kept, **more):
    return {"method": method, "strength": strength, "seed": seed, "forget_rouge": rouge, "retain": kept, **more}


RUNS = [
    run("A", 0.1, 0, 0.90, 0.99), run("A", 1.0, 0, 0.60, 0.95), run("A", 3.0, 0, 0.30, 0.70),
    run("A", 0.1, 1, 0.95, 0.99), run("A", 1.0, 1, 0.70, 0.96), run("A", 3.0, 1, 0.50, 0.80),
    run("B", 0.1, 0, 0.80, 0.99), run("B", 1.0, 0, 0.75, 0.90), run("B", 0.1, 1, math.nan, 1.00),
]  # fmt: skip


def test_at_equal_forgetting_the_best_of_what_is_kept():
    chosen = best_within(RUNS, [Bound("forget_rouge", high=0.62)], "retain")
    strengths = {m: {seed: run and run["strength"] for seed, run in seeds.items()} for m, seeds in chosen.items()}
    assert strengths == {"A": {0: 1.0, 1: 3.0}, "B": {0: None, 1: None}}
    assert scores(chosen, "retain") == {"A": {0: 0.95, 1: 0.80}, "B": {0: None, 1: None}}
    both = [Bound("forget_rouge", high=0.62), Bound("retain", low=0.9)]
    assert scores(best_within(RUNS, both, "retain"), "forget_rouge")["A"] == {0: 0.60, 1: None}


def test_at_equal_utility_the_least_that_is_known():
    chosen = best_within(RUNS, [Bound("retain", low=0.9)], "forget_rouge", goal="min")
    assert scores(chosen, "forget_rouge") == {"A": {0: 0.60, 1: 0.70}, "B": {0: 0.75, 1: None}}
    with pytest.raises(ValueError, match="but got 'zero'"):
        best_within(RUNS, [], "retain", goal="zero")


def test_a_bound_by_the_way_to_the_retrained_model():
    down, up = way_bound("forget_rouge", 1.0, 0.5, 0.1), way_bound("forget_loss", 0.0, 8.2, 0.1)
    assert (down.low, down.high) == (-math.inf, pytest.approx(0.55))
    assert (up.low, up.high) == (pytest.approx(7.38), math.inf)
    assert up.holds({"forget_loss": 12.5}) and not up.holds({"forget_loss": 7.0})
    assert not up.holds({"forget_loss": math.nan}) and not up.holds({"forget_loss": None}) and not up.holds({})
    with pytest.raises(ValueError, match=r"tolerance=10"):
        way_bound("forget_rouge", 1.0, 0.5, 10)
    with pytest.raises(ValueError, match=r"'forget_rouge' is 0.5 at the start and 0.5 at the aim"):
        way_bound("forget_rouge", 0.5, 0.5, 0.1)


def test_areas_of_each_seed():
    runs = [{**run, "forgotten": 1 - run["forget_rouge"]} for run in RUNS]
    found = areas(runs, "forgotten", "retain")
    assert found["A"][0] == pytest.approx(union_area([(0.1, 0.99), (0.4, 0.95), (0.7, 0.7)], (0, 0)))
    assert found["B"] == {0: pytest.approx(0.2 * 0.99 + 0.05 * 0.9), 1: 0}
    assert areas([{"method": "A", "seed": 0, "forgotten": 1.0}], "forgotten", "retain") == {"A": {0: 0}}
    assert over_seeds({0: 0.5, 1: None, 2: 0.7, 3: math.nan}).mean == pytest.approx(0.6)
    assert over_seeds({0: None}) is None
