"""`TargetLoss` and `Until`: against their literal forms, what they ask of a trainer, and where they stop pushing."""

from functools import partial

import pytest
import torch
from support import reference
from support.models import collate, examples, tiny_llama

from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES
from blur_trainer.objectives.level import TargetLoss, Until, answer_nll, with_level, without_level
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.losses import target_loss
from blur_trainer.objectives.preference import DPO, NPO
from blur_trainer.objectives.rmu import RMU

ROWS, REFUSALS = examples(6, seed=1), examples(6, seed=2)
SMALL = {**FORGET_OBJECTIVES, "rmu": partial(RMU, layer=0)}
WRAPPED = [name for name in SMALL if name != "target_loss"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def nll(model):
    pairs = [reference.row_log_prob(model, row) for row in ROWS]
    return torch.stack([-logp / count for logp, count in pairs]).detach()


def batch(levels=None):
    made = {**collate(ROWS), "refusal": collate(REFUSALS)}
    return made if levels is None else made | {"forget_level": torch.as_tensor(levels, dtype=torch.float32)}


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_loss_is_the_literal_one_and_its_gradient_is_what_the_level_lacks(two_sided):
    torch.manual_seed(0)
    logps = (-5 * torch.rand(7, dtype=torch.float64) - 1).requires_grad_()
    lengths, levels = torch.arange(1, 8), torch.linspace(0.2, 3.0, 7, dtype=torch.float64)
    got = target_loss(logps, lengths, levels, two_sided)
    want = reference.target_loss(logps, lengths, levels.tolist(), two_sided)
    assert ((got > 0).sum() == 7) if two_sided else (0 < (got > 0).sum() < 7)
    torch.testing.assert_close(got, want)
    for slope, lack, length in zip(
        torch.autograd.grad(got.sum(), logps)[0], (levels + logps.detach() / lengths).tolist(), lengths, strict=True
    ):
        assert slope.item() == pytest.approx((lack if two_sided else max(lack, 0.0)) / int(length))


def test_the_gradient_vanishes_at_the_level_from_both_sides(nll, model):
    for shift, pushes in ((0.1, True), (-0.1, False)):
        loss = TargetLoss()(model, batch(nll + shift), None)
        gradient = torch.cat([g.flatten() for g in reference.full_gradient(model, loss)])
        assert (gradient.norm() > 0) == pushes


@pytest.mark.parametrize("two_sided", [False, True])
def test_one_level_for_all_is_the_column_of_that_number(two_sided, model):
    one = TargetLoss(4.0, two_sided)(model, batch(), None)
    assert one == TargetLoss(two_sided=two_sided)(model, batch([4.0] * 6), None) > 0
    assert one == TargetLoss(4.0, two_sided)(model, batch([9.0] * 6), None)  # its own level is the one that counts


@pytest.mark.parametrize("name", WRAPPED)
def test_examples_at_their_level_are_left_out_of_the_sum_and_stay_in_the_divisor(name, model, nll):
    objective, ref = SMALL[name](), FrozenModel(tiny_llama(1))
    reached = torch.tensor([True, False, True, False, False, True])
    levels = torch.where(reached, nll * 0.999, nll * 1.001)
    whole, until = batch(levels), Until(objective)
    assert until.num_items(whole) == objective.num_items(whole)
    losses = objective.losses(model, whole, ref)
    assert torch.equal(until.losses(model, whole, ref), torch.where(reached, 0.0, losses))
    kept = [i for i in range(6) if not reached[i]]
    part = {**collate([ROWS[i] for i in kept]), "refusal": collate([REFUSALS[i] for i in kept])}
    alone = objective(model, part, ref, objective.num_items(whole))
    for a, b in zip(
        reference.full_gradient(model, until(model, whole, ref)), reference.full_gradient(model, alone), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ascent_until_is_the_literal_one(model, nll):
    levels = (nll * torch.tensor([0.9, 1.1, 0.8, 1.2, 1.0001, 0.9999])).float()
    rows = [row | {"forget_level": level} for row, level in zip(ROWS, levels.tolist(), strict=True)]
    got, want = Until(GradAscent())(model, batch(levels), None), reference.ascent_until(model, rows)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_what_went_beyond_is_drawn_back_to_the_frozen_model(model, nll):
    """Row by row: RMU's distance below the level; above it the distance to the frozen activations, times how far."""
    rmu, ref, counts = RMU(0, seed=3, answers_only=True), FrozenModel(tiny_llama(1)), RMU(0, answers_only=True)
    ratios = torch.tensor([0.5, 0.999, 1.001, 1.3, 1.9, 2.5])  # the third lies just above, and is left alone
    levels = (nll / ratios).float()
    got = Until(rmu, two_sided=True).losses(model, batch(levels), ref)
    steered = rmu.target(16, batch(), None)[0, 0]
    for row, ratio, loss in zip(ROWS, ratios.tolist(), got, strict=True):
        hidden, frozen = (reference.layer_output(each, row, 0) for each in (model, ref.model))
        answer = [place for place, label in enumerate(row["labels"]) if label != -100]
        places = {*answer, *(place - 1 for place in answer if place)}
        goal = frozen if ratio > 1 else steered.expand_as(frozen)
        want = sum((hidden - goal)[place].square().mean() for place in places)
        assert loss.item() == pytest.approx(want.item() * (1 if ratio < 1 else min(max(ratio - 1.25, 0), 1)), rel=1e-3)
    assert Until(rmu, two_sided=True).num_items(batch(levels)) == counts.num_items(batch())


def test_only_rmu_brings_answers_back():
    until = Until(RMU(0), 3.0, two_sided=True)
    assert until.needs_reference and until.needs_reference_logits and until.top_layer == 0
    assert not Until(RMU(0), 3.0).needs_reference
    assert with_level(RMU(0), 3.0, two_sided=True) == until
    assert with_level(TargetLoss(), 3.0, two_sided=True) == TargetLoss(3.0, True)
    assert with_level(Until(RMU(0), 3.0), None, two_sided=True) == until, "a level of its own"
    assert with_level(NPO(), None, two_sided=True) == NPO(), "without a level the trainer refuses it"
    with pytest.raises(ValueError, match=r"`two_sided` needs .*`RMU`, got NPO"):
        with_level(NPO(), 3.0, two_sided=True)


def test_when_all_have_arrived_the_gradient_is_exactly_zero(model):
    for objective in (Until(NPO(), 0.1), TargetLoss(0.1)):
        loss = objective(model, batch(), FrozenModel(tiny_llama(1)))
        assert all(not g.any() for g in reference.full_gradient(model, loss))


def test_the_level_is_read_without_dropout_and_leaves_the_modes_alone():
    model = tiny_llama(0, dropout=0.5).train()
    model.lm_head.eval()
    assert torch.equal(answer_nll(model, batch()), answer_nll(model, batch()))
    assert model.training and not model.lm_head.training
    assert not answer_nll(model, batch()).requires_grad


@pytest.mark.parametrize("name", WRAPPED)
def test_it_asks_of_a_trainer_what_its_objective_asks(name):
    objective = SMALL[name]()
    until = Until(objective, 3.0)
    for attribute in ("per", "top_layer", *(a for a in dir(objective) if a.startswith("needs_") and "level" not in a)):
        assert getattr(until, attribute) == getattr(objective, attribute)
    assert not until.needs_level and Until(objective).needs_level
    assert without_level(until) is objective


def test_the_state_of_its_objective_goes_through_a_checkpoint(tmp_path, model):
    Until(RMU(0, seed=3)).save_state(tmp_path, model)
    other = Until(RMU(0, seed=4))
    other.load_state(tmp_path, model)
    assert torch.equal(other.objective.vectors(16), RMU(0, seed=3).vectors(16))


def test_a_missing_level_is_an_error(model):
    for objective in (TargetLoss(), Until(NLL())):
        with pytest.raises(ValueError, match="forget_level"):
            objective(model, batch(), None)


@pytest.mark.parametrize("kind", [TargetLoss, partial(Until, NPO())])
@pytest.mark.parametrize("level", [0.0, -1.0, float("nan"), float("inf"), "4"])
def test_levels_that_cannot_be(kind, level):
    with pytest.raises((TypeError, ValueError), match="`level`"):
        kind(level)


@pytest.mark.parametrize("inner", [TargetLoss(3.0), Until(NPO()), "npo", NPO])
def test_what_until_cannot_wrap(inner):
    with pytest.raises(TypeError, match="Until"):
        Until(inner)


def test_with_level_sets_a_level_or_wraps_and_refuses_two():
    assert with_level(NPO(), None) == NPO() and with_level(TargetLoss(3.0), None) == TargetLoss(3.0)
    assert with_level(DPO(), 3.0) == Until(DPO(), 3.0) and with_level(DPO(), "column") == Until(DPO())
    assert with_level(TargetLoss(two_sided=True), 3.0) == TargetLoss(3.0, True)
    assert with_level(TargetLoss(3.0), 3.0) == TargetLoss(3.0) and with_level(TargetLoss(), "column") == TargetLoss()
    assert with_level(Until(NPO()), 3.0) == Until(NPO(), 3.0)
    for objective in (TargetLoss(3.0), Until(NPO(), 3.0)):
        for other in (4.0, "column"):
            with pytest.raises(ValueError, match="one place only"):
                with_level(objective, other)
