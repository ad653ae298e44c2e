"""Rules that remember: against their literal forms in the space of the gradients, step after step."""

import pytest
import torch
from support import reference

from blur_trainer.gradients.retain_mean import RetainMean
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained


def pairs(steps: int = 6, size: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, size, generator=generator, dtype=torch.float64)) for _ in range(steps)]


def gramian(*vectors: torch.Tensor) -> torch.Tensor:
    together = torch.stack(vectors)
    return together @ together.T


def before(mean: RetainMean, g_f: torch.Tensor, g_r: torch.Tensor) -> torch.Tensor:
    return gramian(g_f, g_r, torch.zeros_like(g_f) if mean.gradients is None else mean.gradients[0])


# ---- GRU ----


@pytest.mark.parametrize("smoothing", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("retain_weight", [0.0, 0.5])
def test_gru_is_its_literal_form(smoothing, retain_weight):
    rule, literal = GRU(smoothing, retain_weight), reference.GruDirection(smoothing, retain_weight)
    mean, rectified = RetainMean(rule.retain_smoothing), 0
    for g_f, g_r in pairs(12):
        weights = rule(mean.gramian(before(mean, g_f, g_r)))
        mean.update([g_r])
        torch.testing.assert_close(torch.stack([g_f, g_r, mean.gradients[0]]).T @ weights, literal(g_f, g_r))
        rectified += bool(weights[2] != 0)
    assert 0 < rectified < 12, "only one of the two branches was tried"


def test_a_gramian_of_the_mean_changes_nothing():
    mean, (g_f, g_r) = RetainMean(0.8), pairs(1)[0]
    mean.gramian(before(mean, g_f, g_r))
    assert mean.gradients is None


def test_a_zero_mean_gives_the_forget_gradient():
    assert GRU()(torch.zeros(3, 3)).tolist() == [1.0, 0.0, 0.0]


def test_a_parameter_may_miss_a_retain_gradient_in_some_steps():
    mean, one = RetainMean(0.5), torch.ones(2)
    mean.update([one, None, None])
    mean.update([None, one, None])
    assert mean.gradients[0].tolist() == [0.25] * 2
    assert mean.gradients[1].tolist() == [0.5] * 2
    assert mean.gradients[2] is None and one.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("held", [[torch.ones(3)], [torch.ones(2), torch.ones(2)]])
def test_the_mean_of_other_parameters_is_refused(held):
    mean = RetainMean(0.5)
    mean.restore(held)
    with pytest.raises(ValueError, match="the same model, engine and number of processes"):
        mean.fit([torch.ones(2)])


# ---- constraints ----


@pytest.mark.parametrize(
    ("rule", "inner"),
    [
        (Sum(0.5, 1.0), lambda f, r: 0.5 * f + r),
        (BLUR(gamma=0.3), lambda f, r: reference.blur_direction(f, r, "forget", 0.3, 1.0, False)),
    ],
)
def test_a_constraint_is_its_literal_form(rule, inner):
    constrained = Constrained(rule, epsilon=0.3, initial=2.0, rate=1.5)
    literal = reference.ConstrainedDirection(inner, 0.3, 2.0, 1.5)
    seen = []
    for (g_f, g_r), loss in zip(pairs(6), [0.1, 0.9, 0.2, -3.0, 0.1, 2.0], strict=True):
        got = torch.stack([g_f, g_r]).T @ constrained(gramian(g_f, g_r))
        torch.testing.assert_close(got, literal(g_f, g_r))
        constrained.update(torch.tensor([7.0, loss], dtype=torch.float64), epoch=0.0)
        literal.observe(loss)
        seen.append(constrained.multiplier)
        assert constrained.multiplier == pytest.approx(literal.multiplier, rel=1e-12)
    assert seen[3] == 0.0 and seen[5] > 0.0, "it has to reach the bound 0, and to leave it again"


def test_the_multiplier_waits_for_the_end_of_the_warm_up():
    rule = PDU()
    losses = torch.tensor([0.0, 0.5], dtype=torch.float64)
    for epoch in (0.0, 4.999):
        rule.update(losses, epoch)
        assert rule.multiplier == 100.0
    rule.update(losses, 5.0)
    assert rule.multiplier == pytest.approx(100 + 5 * 0.2)


def test_a_state_comes_back():
    rule, fresh = PDU(warmup_epochs=0.0), PDU(warmup_epochs=0.0)
    rule.update(torch.tensor([0.0, 1 / 3], dtype=torch.float64), 0.0)
    fresh.load_state_dict(rule.state_dict())
    rule.update(torch.tensor([0.0, 1 / 3], dtype=torch.float64), 0.0)  # what was handed out does not move
    assert fresh.multiplier != rule.multiplier
    fresh.update(torch.tensor([0.0, 1 / 3], dtype=torch.float64), 0.0)
    assert fresh.multiplier == rule.multiplier


def test_under_the_constraint_descent_ends_on_its_boundary():
    """Forget pulls to 3, retain to 0; retain may lose half: `1/2 x^2 = 1/2`, so x = 1, where lambda = (3 - 1) / 1."""
    rule, x = Constrained(epsilon=0.5, initial=0.0, rate=0.05), torch.zeros((), dtype=torch.float64)
    for _ in range(4000):
        g_f, g_r = (x - 3).view(1), x.view(1)
        x = x - 0.05 * (rule(gramian(g_f, g_r)) @ torch.cat([g_f, g_r]))
        rule.update(torch.stack([(x - 3) ** 2, x**2]) / 2, 0.0)
    assert float(x) == pytest.approx(1.0, abs=1e-3) and rule.multiplier == pytest.approx(2.0, abs=1e-2)


def test_only_a_rule_without_a_state_is_constrained():
    assert not Constrained(Sum()).needs_retain_norm and Constrained(BLUR(lower_level="retain")).needs_retain_norm
    for rule in (GRU(), PDU()):
        with pytest.raises(ValueError, match="no state of its own"):
            Constrained(rule)
    with pytest.raises(TypeError, match=r"`rule` must be a rule such as `Sum\(\)`"):
        Constrained(Sum)
    with pytest.raises(ValueError, match="PDU: `rate` must be a number of at least 0"):
        PDU(rate=-1.0)
