import pytest
import torch
from support import reference
from support.models import VOCAB, collate, examples

from blur_trainer.models import logps
from blur_trainer.objectives import losses


@pytest.fixture
def batch():
    return collate(examples(4, seed=3))


@pytest.fixture
def logits(batch):
    torch.manual_seed(0)
    return torch.randn(*batch["labels"].shape, VOCAB) * 3


def test_per_token_logps_equal_the_literal_loop_and_are_zero_elsewhere(batch, logits):
    got = logps.per_token_logps(logits, batch["labels"])
    assert got.shape == (4, batch["labels"].shape[1] - 1)
    mask = logps.answer_mask(batch["labels"])
    assert torch.equal(got[~mask], torch.zeros(int((~mask).sum())))
    for row, literal, m in zip(got, reference.log_prob(logits, batch["labels"]), mask, strict=True):
        torch.testing.assert_close(row[m].double(), torch.stack(literal), atol=1e-5, rtol=0)


def test_label_at_position_0_is_no_target(logits):
    labels = torch.full(logits.shape[:2], -100)
    labels[:, 0] = 5
    assert not logps.answer_mask(labels).any()
    assert torch.equal(logps.sequence_logps(logits, labels), torch.zeros(4))


def test_sequence_logps(batch, logits):
    got = logps.sequence_logps(logits, batch["labels"])
    torch.testing.assert_close(got.double(), reference.sequence_log_prob(logits, batch["labels"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(batch, logits, dtype):
    half = logits.to(dtype)
    got = logps.sequence_logps(half, batch["labels"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logps.sequence_logps(half.float(), batch["labels"]))


def test_padding_and_prompt_do_not_enter(batch, logits):
    changed = logits.clone()
    outside = torch.nn.functional.pad(~logps.answer_mask(batch["labels"]), (0, 1), value=True)
    changed[outside] = 1e3 * torch.randn(int(outside.sum()), VOCAB)
    ref = torch.randn_like(logits)
    for loss in (
        lambda z: logps.sequence_logps(z, batch["labels"]),
        lambda z: losses.kl_loss(z, ref, batch["labels"]),
    ):
        torch.testing.assert_close(loss(changed), loss(logits))


def test_gradient_reaches_answer_positions_only(batch, logits):
    z = logits.clone().requires_grad_()
    losses.kl_loss(z, torch.randn_like(z), batch["labels"]).sum().backward()
    inside = torch.nn.functional.pad(logps.answer_mask(batch["labels"]), (0, 1))
    assert z.grad[~inside].abs().max() == 0
    assert (z.grad[inside].abs().sum(-1) > 0).all()


LOGPS = torch.tensor([-0.3, -7.0, -40.0], dtype=torch.float64)
REFS = torch.tensor([-0.5, -2.0, -41.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo(beta):
    torch.testing.assert_close(losses.npo_loss(LOGPS, REFS, beta), reference.npo(LOGPS, REFS, beta))


def test_npo_at_the_reference_has_the_gradient_of_gradient_ascent():
    logps = LOGPS.clone().requires_grad_()
    losses.npo_loss(logps, LOGPS, 0.1).sum().backward()
    torch.testing.assert_close(logps.grad, torch.ones(3, dtype=torch.float64))


def test_npo_is_bounded_below_and_finite_far_away():
    far = losses.npo_loss(torch.tensor([-1e6, 1e3]), torch.zeros(2), 0.1)
    assert far[0] == 0 and torch.isfinite(far).all()


@pytest.mark.parametrize(("beta", "delta"), [(2.5, 0.0), (4.5, 0.0), (1.0, 0.5)])
def test_simnpo(beta, delta):
    lengths = torch.tensor([3, 10, 40])
    got = losses.simnpo_loss(LOGPS, lengths, beta, delta)
    torch.testing.assert_close(got, reference.simnpo(LOGPS, lengths, beta, delta))


def test_dpo():
    args = (LOGPS, REFS, REFS * 1.3, LOGPS * 0.7)
    torch.testing.assert_close(losses.dpo_loss(*args, beta=0.1), reference.dpo(*args, beta=0.1))
    assert losses.dpo_loss(LOGPS, LOGPS, REFS, REFS, beta=0.1) == pytest.approx([20 * 0.6931471805599453] * 3)


def test_kl_equals_the_literal_sum_is_non_negative_and_zero_at_the_reference(batch, logits):
    ref = torch.randn_like(logits)
    got = losses.kl_loss(logits, ref, batch["labels"])
    torch.testing.assert_close(got.double(), reference.kl(logits, ref, batch["labels"]), atol=1e-3, rtol=1e-5)
    assert (got > 0).all()
    assert torch.equal(losses.kl_loss(ref, ref, batch["labels"]), torch.zeros(4))


def test_kl_does_not_see_a_shift_of_the_logits(batch, logits):
    """A "KL" of raw logits, as in MUSE's code, does."""
    ref = torch.randn_like(logits)
    torch.testing.assert_close(
        losses.kl_loss(logits + 7, ref - 3, batch["labels"]), losses.kl_loss(logits, ref, batch["labels"])
    )


def test_grad_ascent_is_minus_nll():
    assert torch.equal(losses.grad_ascent_loss(LOGPS), -losses.nll_loss(LOGPS))


def test_no_loss_waits_for_the_device(batch, logits):
    """On the meta device what reads a number on the host is an error: a mask as an index, `bool`, `item`."""
    z, labels, h = logits.to("meta").requires_grad_(), batch["labels"].to("meta"), torch.zeros(4, 9, 6, device="meta")
    log_probs, mask = logps.sequence_logps(z, labels), torch.ones(4, 9, device="meta")
    known = torch.zeros(4, device="meta")
    found = [
        losses.nll_loss(log_probs),
        losses.grad_ascent_loss(log_probs),
        losses.npo_loss(log_probs, known, 0.1),
        losses.simnpo_loss(log_probs, logps.answer_mask(labels).sum(-1), 2.5, 0.0),
        losses.dpo_loss(log_probs, known, log_probs, known, 0.1),
        losses.kl_loss(z, torch.zeros_like(z), labels),
        losses.uniform_loss(z, labels),
        losses.activation_loss(h, h[:, :1], mask).requires_grad_(),
    ]
    torch.stack([loss.sum() for loss in found]).sum().backward()
    assert z.grad.shape == z.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        z[labels != -100]  # this is how it would show
