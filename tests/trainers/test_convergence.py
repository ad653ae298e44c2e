"""Where the rules lead: plain gradient descent on quadratics whose answers are known in closed form.

Forget loss `f(x) = 1/2 ||A x - b||^2`, minimized on a whole affine set; retain loss `r(x) = 1/2 (x - c)' Q (x - c)`.
The bi-level answer x* is the minimizer of `r` on that set (its KKT system is solved directly). `docs/theory.md`
states what is found here, with the mathematics; every test below is one of its sentences.
"""

import pytest
import torch
from support.quadratics import DIM, Problem, descend, harmonic, level_problem, linear, problem, zeros
from torch import Tensor

from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Sum

# ---- one constraint: the projection removes all that retain could do against forget ----


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_constraint_blur_reaches_the_bilevel_answer_at_a_constant_step(general, clamp, seed):
    p = problem(1, general=general, seed=seed)
    starts = (zeros(), torch.full((DIM,), 3.0, dtype=torch.float64))
    for start in starts:
        # slow enough in the lower level that its residual stays above rounding (see the test of the exact minimizer)
        x = descend(BLUR(gamma=0.2, clamp=clamp), p, 800, 0.1, start=start)
        assert p.distance(x) < 1e-5
        assert p.distance(start) > 0.5


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_one_constraint_forget_contracts_at_its_own_rate_whatever_retain_wants(gamma, alpha):
    p, lr, x = problem(1, general=True, seed=2), 0.05, zeros()
    for _ in range(50):
        before = p.residual(x)
        x = descend(BLUR(gamma=gamma, alpha=alpha), p, 1, lr, start=x)
        # ||a|| = 1: residual * (1 - lr * gamma), no alpha, no Q, no c
        assert p.residual(x) == pytest.approx(before * (1 - lr * gamma), rel=1e-8)


def test_one_constraint_decaying_steps_converge_too():
    p = problem(1, general=True)
    assert p.distance(descend(BLUR(), p, 4000, 0.5, decay=harmonic(50.0))) < 1e-4


def test_at_an_exact_minimiser_of_forget_the_step_is_the_whole_retain_gradient():
    """rho := 0 where ||g_f|| = 0: the iterate leaves the set once, by lr * alpha * |a . g_r|, and comes back."""
    p = Problem(
        A=torch.eye(1, DIM, dtype=torch.float64),
        b=zeros()[:1],
        Q=torch.eye(DIM, dtype=torch.float64),
        c=torch.ones(DIM, dtype=torch.float64),
    )
    start, lr, alpha = zeros(), 0.1, 2.0  # A x = b exactly
    x = descend(BLUR(alpha=alpha), p, 1, lr, start=start)
    assert torch.equal(x, start - lr * alpha * p.retain_gradient(start))
    assert p.residual(x) == pytest.approx(lr * alpha)
    back = descend(BLUR(alpha=alpha), p, 100, lr, start=x)
    assert p.residual(back) == pytest.approx(lr * alpha * (1 - lr) ** 100)


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0, 100.0])
def test_no_fixed_weight_reaches_it(weight):
    p = problem(1, general=True)
    lr = 1.0 / (1.0 + weight)  # stable: the Hessian's largest eigenvalue is at most 1 + weight
    x = descend(Sum(forget_weight=weight), p, int(60 * (1 + weight)), lr)
    assert torch.allclose(x, p.sum_answer(weight), atol=1e-6)
    assert p.distance(x) > 0.2 / (1.0 + weight)


def test_the_weighted_sum_tends_to_it_as_the_weight_grows_like_one_over_the_weight():
    p = problem(1)
    at_retain_minimum = p.residual(p.c)
    for weight in (0.1, 1.0, 10.0, 1e3, 1e6):  # Q = 1, ||a|| = 1: distance = |a . c - b| / (1 + weight)
        assert p.distance(p.sum_answer(weight)) == pytest.approx(at_retain_minimum / (1 + weight), rel=1e-6)


# ---- several constraints: one rho guards one direction of the range of A ----


@pytest.mark.parametrize("lr", [0.1, 0.02])
@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("constraints", [2, 3])
def test_several_constraints_a_constant_step_ends_in_a_two_cycle_of_known_size(lr, gamma, constraints):
    """`A A' = 1`, `Q = 1`: residual `lr alpha |h| / sqrt(2 (2 - lr gamma))`, h = the multiplier, whatever the start."""
    p = problem(constraints)
    h = (p.A @ p.retain_gradient(p.bilevel_answer())).norm().item()
    x = descend(BLUR(gamma=gamma), p, int(150 / lr), lr, start=p.bilevel_answer() + 0.5)
    expected = lr * h / (2 * (2 - lr * gamma)) ** 0.5
    assert p.residual(x) == pytest.approx(expected, rel=1e-6)
    following = descend(BLUR(gamma=gamma), p, 1, lr, start=x)
    assert (following - x).norm() > 0.1 * lr * h * (lr * gamma) ** 0.5  # it does not stand still
    assert torch.allclose(descend(BLUR(gamma=gamma), p, 1, lr, start=following), x, atol=1e-8)


@pytest.mark.parametrize(("general", "clamp"), [(False, False), (True, False), (True, True)])
def test_several_constraints_the_remaining_distance_is_proportional_to_the_step(general, clamp):
    p = problem(4, condition=10.0, general=general, seed=1)
    rule = BLUR(gamma=8.0, clamp=clamp)
    coarse = p.distance(descend(rule, p, 1500, 0.05))
    end = descend(rule, p, 4000, 0.0125)
    fine = p.distance(end)
    assert fine > 0.01  # a floor, not slow progress: half as many steps again change nothing ...
    assert p.distance(descend(rule, p, 2000, 0.0125, start=end)) == pytest.approx(fine, rel=0.05)
    assert coarse / fine == pytest.approx(4.0, rel=0.25)  # ... but a quarter of the step divides it by four


def test_several_constraints_the_floor_is_that_of_the_sum_with_the_largest_stable_weight():
    """At the same constant step a weight w is stable up to 2/lr (||A|| = 1), and BLUR ends as if at that edge.

    With one constraint BLUR has no such floor: that is where it beats every stable weighted sum.
    """
    lr = 0.05
    p = problem(4, condition=10.0, seed=1)
    largest = 2.0 / lr - 1.0  # the Hessian's largest eigenvalue is w + 1
    at_edge = p.sum_answer(0.98 * largest)
    near_edge = descend(Sum(forget_weight=0.98 * largest), p, 1500, lr)
    assert torch.allclose(near_edge, at_edge, atol=1e-6)
    assert p.distance(descend(BLUR(gamma=4.0), p, 2500, lr)) == pytest.approx(p.distance(at_edge), rel=0.2)
    beyond = descend(Sum(forget_weight=1.02 * largest), p, 1000, lr)
    assert p.distance(beyond) > 1e6  # diverges
    one = problem(1, general=True, seed=1)
    at_edge = one.sum_answer(0.98 * largest)
    assert one.distance(descend(BLUR(gamma=0.4), one, 800, lr)) < 1e-3 * one.distance(at_edge)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("general", [False, True])
def test_several_constraints_decaying_steps_converge_at_the_rate_of_the_step(general, clamp):
    p = problem(4, condition=10.0, general=general, seed=1)
    lr, decay = 0.4, harmonic(20.0)
    early = descend(BLUR(gamma=4.0, clamp=clamp), p, 1500, lr, decay=decay)
    late = descend(BLUR(gamma=4.0, clamp=clamp), p, 6000, lr, decay=decay)
    assert p.distance(late) < 0.05
    assert p.distance(early) / p.distance(late) == pytest.approx(4.0, rel=0.25)  # O(lr_t), lr_t ~ 1/t


@pytest.mark.parametrize("general", [False, True])
def test_several_constraints_a_linear_schedule_ends_near_and_nearer_the_longer_it_is(general):
    """Distance like 1 / sqrt(steps): what is left after the step has become too small to follow."""
    p, rule = problem(4, condition=10.0, general=general, seed=1), BLUR(gamma=4.0)
    short, long = (p.distance(descend(rule, p, steps, 0.1, decay=linear(steps))) for steps in (500, 2000))
    assert long < 0.1 * p.distance(descend(rule, p, 2000, 0.1))
    assert short / long == pytest.approx(2.0, rel=0.15)


def test_several_constraints_the_flow_turns_the_forget_gradient_against_retain_and_falls_at_a_known_rate():
    """Small steps, before the floor: cos(g_f, A'A-range part of g_r) -> -1, so that nothing is left to project,

    and `f` falls like `exp(-2 gamma t |h|^2 / (h' H^-1 h))`, H = A'A on its range: between its extreme eigenvalues.
    """
    p, lr, steps = problem(3, condition=5.0, seed=3), 1e-3, 2000
    onto_range = torch.linalg.pinv(p.A) @ p.A
    h = onto_range @ p.retain_gradient(p.bilevel_answer())
    x = descend(BLUR(gamma=2.0), p, 4000, lr, start=p.bilevel_answer() + 0.3)
    cosine = torch.cosine_similarity(p.forget_gradient(x), onto_range @ p.retain_gradient(x), dim=0)
    assert cosine < -0.99
    later = descend(BLUR(gamma=2.0), p, steps, lr, start=x)
    rate = (h @ h / (h @ torch.linalg.pinv(p.A.T @ p.A) @ h)).item()
    measured = -torch.log(torch.tensor((p.residual(later) / p.residual(x)) ** 2)).item() / (lr * steps)
    assert measured == pytest.approx(2 * 2.0 * rate, rel=0.1)
    assert 1 / 5.0 < rate < 1.0


def test_the_projection_guards_the_batch_gradient_not_every_example():
    """To first order `f` falls by lr * gamma * ||g_f||^2, and yet the loss of a single row of `A` can rise."""
    p, lr = problem(4, seed=1), 1e-8
    x = p.bilevel_answer() + 0.05 * p.A[0]  # only the first example is off
    y = descend(BLUR(), p, 1, lr, start=x)
    drop = (p.residual(x) ** 2 - p.residual(y) ** 2) / 2
    assert drop == pytest.approx(lr * p.forget_gradient(x).norm().item() ** 2, rel=1e-3)
    each_before, each_after = (p.A @ x - p.b).abs(), (p.A @ y - p.b).abs()
    assert each_after[0] < each_before[0]
    assert (each_after[1:] > each_before[1:]).any()


# ---- a lower level with an inequality: the answer is to cost `level` nats, or more ----


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("start", ["retain's minimizer", "zero", "reached"])
def test_blur_reaches_the_best_retain_loss_among_what_has_reached_the_level(start, clamp):
    p = level_problem(3.0)
    x = {"retain's minimizer": p.c, "zero": zeros(), "reached": -3.0 * p.a}[start]
    assert p.nll(p.c) < p.level < p.nll(-3.0 * p.a)  # retain wants what is not allowed: the level binds
    assert p.distance(x) > 0.5
    end = descend(BLUR(gamma=0.5, clamp=clamp), p, 500, 0.3, start=x, decay=harmonic(50.0))
    assert p.distance(end) < 1e-3
    assert p.nll(end).item() == pytest.approx(p.level, abs=1e-3)


def test_at_the_level_the_step_is_the_whole_retain_gradient_and_comes_back():
    p, lr, alpha = level_problem(3.0), 0.1, 1.5
    start = p.answer() - 1e-9 * p.a
    assert p.nll(start) > p.level and not p.forget_gradient(start).any()
    x = descend(BLUR(alpha=alpha), p, 1, lr, start=start)
    torch.testing.assert_close(x, start - lr * alpha * p.retain_gradient(start), rtol=1e-14, atol=1e-15)
    assert p.distance(x) == pytest.approx(lr * alpha * p.retain_gradient(p.answer()).norm().item(), rel=1e-6)
    assert p.distance(descend(BLUR(alpha=alpha), p, 50, lr, start=x)) < 0.1 * p.distance(x)


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_no_fixed_weight_of_target_loss_reaches_the_level(weight):
    """It lacks `multiplier / weight` nats: the push that would hold retain's back is 0 at the level."""
    p = level_problem(3.0)
    x = p.answer()
    multiplier = (p.retain_gradient(x).norm() / (p.a / (1.0 + torch.exp(p.a @ x))).norm()).item()
    end = descend(Sum(weight, 1.0), p, int(40 * (1 + 4 * weight)), 0.5 / (1 + 4 * weight))
    lacks = (p.level - p.nll(end)).item()
    assert lacks == pytest.approx(multiplier / weight, rel=0.05)
    assert p.distance(end) > 0.5 * lacks


def test_ascent_until_the_level_is_reached_by_a_large_fixed_weight_too():
    """`relu(level - nll)` does not flatten out: above the multiplier (0.84 here) the sum ends within a step."""
    p = level_problem(3.0, until=True)
    assert p.distance(descend(Sum(3.0, 1.0), p, 2000, 0.02)) < 0.05
    assert p.distance(descend(Sum(0.4, 1.0), p, 2000, 0.02)) > 1.0


def test_where_retain_wants_to_forget_too_blur_waits_at_the_level_and_with_clamp_goes_on():
    """Without `clamp` the projection also takes what would help: the level is then an equality."""
    p = level_problem(-4.0)
    assert p.nll(p.c) > p.level > p.nll(zeros())
    waits = descend(BLUR(gamma=0.5), p, 200, 0.1)
    assert p.distance(waits) > 1.0
    assert (waits - p.at_the_edge()).norm() < 0.01
    assert p.distance(descend(BLUR(gamma=0.5, clamp=True), p, 200, 0.1)) < 0.01


# ---- retain below, and rules without a hierarchy ----


def test_lower_level_retain_with_one_minimiser_ends_near_it_and_ignores_forget():
    p = problem(3)
    near, nearer = (p.residual(descend(BLUR("retain"), p, 3000, lr)) for lr in (0.02, 0.005))
    at_c = p.residual(p.c)
    assert at_c > 0.5
    assert near == pytest.approx(at_c, rel=0.05)
    assert abs(nearer - at_c) < 0.5 * abs(near - at_c)


def test_lower_level_retain_with_one_constraint_is_the_mirror_image():
    """Roles exchanged: `1/2 (a x - b)^2` is the retain loss now, and the same answer is reached."""
    p = problem(1, general=True)
    rule = BLUR("retain", gamma=0.2)

    def mirrored(gramian: Tensor) -> Tensor:
        return rule(gramian.flip(0, 1)).flip(0)

    assert p.distance(descend(mirrored, p, 800, 0.1)) < 1e-5


@pytest.mark.parametrize("rule", [PCGrad(), MGDA()])
def test_rules_without_a_hierarchy_stop_at_a_pareto_point_that_depends_on_the_start(rule):
    p = problem(1)
    ones = torch.ones(DIM, dtype=torch.float64)
    ends = [descend(rule, p, 2000, 0.05, start=p.c + shift * ones) for shift in (-0.3, 2.0)]
    for end in ends:  # both stand still, at two places: a fixed point is any point from which nothing lowers both
        assert (descend(rule, p, 1, 1.0, start=end) - end).norm() < 1e-6
        assert p.forget_gradient(end) @ p.retain_gradient(end) < 1e-12
    assert (ends[0] - ends[1]).norm() > 0.05
    assert max(p.distance(end) for end in ends) > 0.05
    for end in ends:
        assert p.distance(descend(BLUR(gamma=0.2), p, 800, 0.1, start=end)) < 1e-5


def test_mgda_does_nothing_for_retain_once_forget_is_at_a_minimiser():
    p = problem(1)
    start = p.bilevel_answer() + 2.0 * torch.linalg.svd(p.A).Vh[-1]  # on the set, far from its best point
    assert p.distance(descend(MGDA(), p, 500, 0.1, start=start)) == pytest.approx(2.0, rel=1e-3)
    assert p.distance(descend(BLUR(gamma=0.2), p, 1000, 0.1, start=start)) < 1e-5
