"""The objectives on whole distributions: against literal references, masks, micro-batches, what they need."""

import math

import pytest
import torch
from support import reference
from support.models import VOCAB, collate, examples, tiny_llama

from blur_trainer.models.logps import without_first
from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives import distribution_losses as losses
from blur_trainer.objectives.distributions import CEU, JSD, KL, UNDIAL, ClampedEntropy, Distillation, Margin, Uniform
from blur_trainer.objectives.losses import kl_loss, uniform_loss
from blur_trainer.trainers.setup import check_objectives, reads_logps_only

#: name on the command line -> its literal form at one token
TOKENS = {
    "undial": reference.undial,
    "ce_u": reference.ce_u,
    "uniform": reference.uniform,
    "clamped_entropy": reference.clamped_entropy,
    "margin": reference.margin,
    "jsd": reference.jsd,
}
#: the same as a loss: logits, the reference's, labels -> (B,)
LOSSES = {
    "undial": lambda z, ref, labels: losses.undial_loss(z, ref, labels, 10.0),
    "ce_u": lambda z, ref, labels: losses.ce_u_loss(z, labels),
    "uniform": lambda z, ref, labels: uniform_loss(z, labels),
    "clamped_entropy": lambda z, ref, labels: losses.clamped_entropy_loss(z, labels, 0.7),
    "margin": lambda z, ref, labels: losses.margin_loss(z, labels),
    "jsd": losses.jsd_loss,
    "kl": kl_loss,
    "distill": kl_loss,
}
OBJECTIVES = {
    "undial": UNDIAL(),
    "ce_u": CEU(),
    "uniform": Uniform(),
    "clamped_entropy": ClampedEntropy(),
    "margin": Margin(),
    "jsd": JSD(),
    "kl": KL(),
    "distill": Distillation(),
}


def literal(name, model, ref_model, rows):
    """The mean over the answer tokens, one unpadded example at a time; `test_objectives.py` compares."""
    values = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits, ref_logits = model(input_ids=ids).logits, ref_model(input_ids=ids).logits.detach()
        values += reference.at_answer_tokens(TOKENS[name], logits, ref_logits, labels)[0]
    return sum(values) / len(values)


@pytest.fixture
def batch():
    return collate(examples(4, seed=3))


def logits(batch, seed=0, scale=2.0):
    torch.manual_seed(seed)
    return (scale * torch.randn(*batch["labels"].shape, VOCAB)).double()


def inside(labels):
    """Positions that predict a token of an answer."""
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


@pytest.mark.parametrize("name", TOKENS)
def test_losses_equal_the_literal_ones_in_value_and_gradient(name, batch):
    z, ref = logits(batch).requires_grad_(), logits(batch, seed=1)
    got = LOSSES[name](z, ref, batch["labels"])
    tokens = reference.at_answer_tokens(TOKENS[name], z, ref, batch["labels"])
    want = torch.stack([sum(row) for row in tokens])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), z, retain_graph=True)[0] for each in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
    if name == "clamped_entropy":
        assert {bool(value > 0) for row in tokens for value in row} == {True, False}, "the clamp is not tried"


@pytest.mark.parametrize("name", LOSSES)
def test_prompt_and_padding_never_count(name, batch):
    labels = batch["labels"]
    z, ref, outside = logits(batch), logits(batch, seed=1), ~inside(labels)
    plain = LOSSES[name](z, ref, labels)
    changed, changed_ref = z.clone(), ref.clone()
    changed[outside] = 1e3 * torch.randn(int(outside.sum()), VOCAB).double()
    changed_ref[outside] = -1e3
    changed.requires_grad_()
    values = LOSSES[name](changed, changed_ref, labels)
    torch.testing.assert_close(values, plain)
    gradient = torch.autograd.grad(values.sum(), changed)[0]
    assert gradient[outside].abs().max() == 0
    nothing = LOSSES[name](changed, changed_ref, torch.full_like(labels, -100))
    assert torch.equal(nothing, torch.zeros(4, dtype=torch.float64))
    assert torch.autograd.grad(nothing.sum(), changed)[0].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device(name, batch):
    z, ref, labels = logits(batch).to("meta").requires_grad_(), logits(batch).to("meta"), batch["labels"].to("meta")
    LOSSES[name](z, ref, labels).sum().backward()
    assert z.grad.shape == z.shape
    assert without_first(labels, 1).shape == labels.shape


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_summed_in_float32(name, batch):
    z, ref = logits(batch).bfloat16(), logits(batch, seed=1).bfloat16()
    got = LOSSES[name](z, ref, batch["labels"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, LOSSES[name](z.float(), ref.float(), batch["labels"]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_alone_in_a_batch_and_in_micro_batches(name):
    objective, rows = OBJECTIVES[name], examples(5, seed=1)
    model, ref = tiny_llama(0), FrozenModel(tiny_llama(1))

    def gradient(batches, count):
        model.zero_grad()
        for part in batches:
            objective(model, part, ref, count).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole, count = collate(rows), objective.num_items(collate(rows))
    alone = torch.stack([objective.losses(model, collate([row]), ref)[0] for row in rows])
    torch.testing.assert_close(objective.losses(model, whole, ref), alone, rtol=1e-5, atol=1e-5)
    windows = [collate(rows[:2]), collate(rows[2:])]
    torch.testing.assert_close(gradient(windows, count), gradient([whole], count), rtol=1e-4, atol=1e-5)


# ---- what each of them is ----


def test_ce_u_moves_a_label_down_and_the_others_up_in_proportion():
    z, labels = torch.randn(1, 2, 6, dtype=torch.float64).requires_grad_(), torch.tensor([[-100, 4]])
    gradient = torch.autograd.grad(losses.ce_u_loss(z, labels).sum(), z)[0][0, 0]
    p = z[0, 0].detach().softmax(-1)
    want = -p * p[4] / (1 - p[4])
    want[4] = p[4]
    torch.testing.assert_close(gradient, want)
    sure = torch.tensor([[[0.0, 50.0, 0.0], [0.0, 0.0, 0.0]]]).requires_grad_()
    loss = losses.ce_u_loss(sure, torch.tensor([[-100, 1]]))
    assert loss.item() == pytest.approx(50)  # where 1 - p is 0 in float32
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), sure)[0][0, 0], torch.tensor([-0.5, 1.0, -0.5]))


def test_ce_u_can_leave_out_the_first_answer_tokens():
    rows, model = examples(4, seed=1), tiny_llama(0)
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100], [5, 6, 7, 8, 9, 4]])
    assert without_first(labels, 2).tolist() == [[-100] * 4 + [7, -100], [-100, -100, -100, 8, 9, 4]]
    assert torch.equal(without_first(labels, 0)[:, 1:], labels[:, 1:])
    # of a text the first token is a label too, but nothing predicts it
    assert without_first(torch.tensor([[3, 4, 5]]), 1)[0, 1:].tolist() == [-100, 5]
    objective, batch = CEU(skip=1), collate(rows)
    assert objective.num_items(batch) == CEU().num_items(batch) - 4
    values = []
    for row in rows:
        z = model(input_ids=torch.tensor([row["input_ids"]])).logits
        values += reference.at_answer_tokens(reference.ce_u, z, z, torch.tensor([row["labels"]]), skip=1)[0]
    assert objective(model, batch).item() == pytest.approx((sum(values) / len(values)).item(), rel=1e-5)


def test_undial_ends_at_its_goal():
    """The gradient is 0 where the model is the reference with the label's logit lowered."""
    batch = collate(examples(3, seed=2))
    ref, labels = logits(batch), batch["labels"]
    goal = ref.clone()
    goal[:, :-1].scatter_add_(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1), torch.full_like(goal[:, :-1, :1], -10.0))
    goal.requires_grad_()
    assert torch.autograd.grad(losses.undial_loss(goal, ref, labels, 10.0).sum(), goal)[0].abs().max() < 1e-12


def test_entropy_above_the_level_has_no_gradient():
    z, labels = logits(collate(examples(3))).float().requires_grad_(), collate(examples(3))["labels"]
    for tau, moves in ((0.02, False), (1.0, True)):
        loss = losses.clamped_entropy_loss(z, labels, tau)
        assert ((loss > 0) == moves).all() and bool(torch.autograd.grad(loss.sum(), z)[0].any()) == moves
    assert losses.clamped_entropy_loss(torch.ones(1, 2, 9), torch.tensor([[-100, 1]]), 1.0).item() < 1e-6


def test_jsd_is_0_at_the_reference_and_at_most_log_2_per_token():
    batch = collate(examples(4, seed=3))
    labels, z = batch["labels"], 1e4 * logits(batch).float()
    assert torch.equal(losses.jsd_loss(z, z, labels), torch.zeros(4))
    far = losses.jsd_loss(z, -z, labels)
    torch.testing.assert_close(far, inside(labels).sum(-1) * math.log(2), rtol=1e-5, atol=0)


def test_what_they_need():
    assert {name for name, each in OBJECTIVES.items() if each.needs_reference} == {"undial", "jsd", "kl", "distill"}
    assert all(each.needs_logits and not reads_logps_only(each) for each in OBJECTIVES.values())
    check_objectives({"forget": UNDIAL(), "retain": JSD()}, precompute=False)
    with pytest.raises(ValueError, match=r"reads no reference log-probabilities \(UNDIAL.*choose `npo`"):
        check_objectives({"forget": UNDIAL(), "retain": JSD()}, precompute=True)


@pytest.mark.parametrize("name", ["undial", "jsd", "kl"])
def test_a_missing_reference_is_an_error(name):
    with pytest.raises(ValueError, match=f"{type(OBJECTIVES[name]).__name__} needs a reference model's logits"):
        OBJECTIVES[name](tiny_llama(0), collate(examples(2)), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNDIAL(beta=0.0), "UNDIAL: `beta` must be a number above 0"),
        (lambda: CEU(skip=-1), "CEU: `skip` must be a number of at least 0"),
        (lambda: ClampedEntropy(tau=0.0), "ClampedEntropy: `tau` must be a number above 0 and of at most 1"),
        (lambda: ClampedEntropy(tau=1.5), "ClampedEntropy: `tau`"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
