import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from blur_trainer.gradients.by_name import RULES
from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Sum

numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


def vectors(size=3):
    return st.lists(numbers, min_size=size, max_size=size).map(lambda v: torch.tensor(v, dtype=torch.float64))


def gramian(g_f, g_r):
    both = torch.stack([g_f, g_r])
    return both @ both.T


def combine(rule, g_f, g_r):
    weights = rule(gramian(g_f, g_r))
    assert weights.shape == (2,)
    return weights[0] * g_f + weights[1] * g_r


def close(a, b, scale):
    return torch.allclose(a, b, atol=1e-6 * max(1.0, float(scale)), rtol=1e-6)


usable = st.tuples(vectors(), vectors()).filter(lambda pair: min(v.norm() for v in pair) > 1e-2)


@given(usable, st.sampled_from(["forget", "retain"]), st.floats(0, 10), st.floats(0, 1000), st.booleans())
def test_blur_is_the_projection_written_out(pair, lower, gamma, alpha, clamp):
    got = combine(BLUR(lower, gamma, alpha, clamp), *pair)
    want = reference.blur_direction(*pair, lower, gamma, alpha, clamp)
    assert close(got, want, max(v.norm() for v in pair) * (alpha + gamma) * 1e3)


@given(usable, st.floats(0, 10), st.floats(0, 1000))
def test_blur_descends_the_lower_level_at_its_own_rate(pair, gamma, alpha):
    """<d, g_l> = gamma ||g_l||^2 whatever the upper level wants."""
    g_f, g_r = pair
    along = torch.dot(combine(BLUR("forget", gamma, alpha), g_f, g_r), g_f)
    scale = (alpha * g_r.norm() + gamma * g_f.norm()) * g_f.norm()
    assert abs(along - gamma * g_f.norm() ** 2) <= 1e-9 * max(1.0, float(scale)) * 1e3


@given(usable, st.floats(-5, 5))
def test_blur_does_not_see_forget_gradient_added_to_the_retain_gradient(pair, c):
    g_f, g_r = pair
    a = combine(BLUR(), g_f, g_r)
    b = combine(BLUR(), g_f, g_r + c * g_f)
    assert close(a, b, 1e3 * (g_r.norm() + abs(c) * g_f.norm()))


def test_the_wdmp_form_is_alpha_times_the_muse_form_with_gamma_over_alpha():
    g = gramian(torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5]))
    torch.testing.assert_close(BLUR(gamma=1, alpha=800)(g), 800 * BLUR(gamma=1 / 800, alpha=1)(g))


def test_blur_with_a_zero_lower_gradient_follows_the_upper_one():
    g = gramian(torch.zeros(2), torch.tensor([3.0, 4.0]))
    assert BLUR(gamma=0.5, alpha=2.0)(g).tolist() == [0.5, 2.0]


def test_clamp_only_acts_where_gradients_agree():
    agree = gramian(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]))
    oppose = gramian(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 0.0]))
    assert BLUR()(agree).tolist() == [-2.0, 1.0] and BLUR(clamp=True)(agree).tolist() == [0.0, 1.0]
    assert BLUR()(oppose).tolist() == BLUR(clamp=True)(oppose).tolist() == [4.0, 1.0]


@given(usable)
def test_pcgrad(pair):
    assert close(combine(PCGrad(), *pair), reference.pcgrad_direction(*pair), 1e3 * max(v.norm() for v in pair))


@settings(max_examples=30)
@given(usable)
def test_mgda_is_the_shortest_vector_of_the_hull(pair):
    got, want = combine(MGDA(), *pair), reference.mgda_direction(*pair)
    assert got.norm() <= want.norm() * (1 + 1e-9) + 1e-9
    assert (want - got).norm() <= 1e-5 * (pair[0] - pair[1]).norm() + 1e-9
    weights = MGDA()(gramian(*pair))
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1.0)


def test_mgda_of_equal_gradients_halves():
    g = torch.tensor([1.0, 2.0])
    assert MGDA()(gramian(g, g)).tolist() == [0.5, 0.5]


def test_sum():
    assert Sum(2.0, 0.5)(torch.eye(2, dtype=torch.float64)).tolist() == [2.0, 0.5]


#: functions of the two gradients alone
PAIRS = [name for name, rule in RULES.items() if not hasattr(rule(), "retain_smoothing")]


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "ngdiff"])  # its sum is of unit vectors
@given(pair=usable, scale=st.floats(1e-3, 1e5))
def test_rules_do_not_see_a_common_scale(name, pair, scale):
    """A loss scaler multiplies both gradients: the step must not turn. (MGDA's weights may, where both are equal.)"""
    g, stacked = gramian(*pair), torch.stack(pair)
    steps = [RULES[name]()(scaled) @ stacked for scaled in (g, g * scale**2)]
    assert close(*steps, 1e3 * max(v.norm() for v in pair))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_not_hidden(name, bad):
    """A loss scaler has to find them in the step that a rule makes."""
    assert not combine(RULES[name](), torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])).isfinite().all()


@pytest.mark.parametrize("name", PAIRS)
def test_a_zero_gradient_gives_finite_weights(name):
    zero, one = torch.zeros(3), torch.ones(3)
    for pair in ((zero, one), (one, zero), (zero, zero)):
        assert RULES[name]()(gramian(*pair)).isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="lower_level"):
        BLUR(lower_level="both")
    with pytest.raises(ValueError, match="gamma"):
        BLUR(gamma=-1)


@pytest.mark.parametrize(("ours", "theirs"), [(PCGrad(), "PCGradWeighting"), (MGDA(), "MGDAWeighting")])
@settings(max_examples=25)
@given(pair=usable)
def test_torchjd_agrees(ours, theirs, pair):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    weighting = getattr(aggregation, theirs)()
    g = gramian(*pair)
    got, want = ours(g), weighting(g)
    stacked = torch.stack(pair)
    # weights may differ where the gradients are collinear; the direction may not
    assert close(got @ stacked, want @ stacked, 1e4 * max(v.norm() for v in pair))
