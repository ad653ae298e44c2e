"""Open-unlearning's numbers for UNDIAL, CE-U and PDU: by their published formulas, by ours, and where they differ.

What is beside this file knows the formulas only: logits come from the model, everything else is written out here.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from test_golden_training import GOLDEN, batches, model

from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives import distribution_losses as losses
from blur_trainer.objectives.distributions import CEU, JSD, UNDIAL, ClampedEntropy, Margin, Uniform

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers are not beside this checkout")


@pytest.fixture(scope="module")
def values():
    return json.loads((GOLDEN / "ou_losses" / "ou_losses.json").read_text())["trainers"]


@pytest.fixture(scope="module")
def models():
    golden = json.loads((GOLDEN / "ou_losses" / "ou_losses.json").read_text())
    return model(golden["model"]).eval(), model(golden["ref_model"]).eval()


def forget_batches(models):
    """Batch, logits of both models."""
    for batch in batches():
        part = batch["forget"]
        inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            both = [each(**inputs).logits for each in models]
        yield part, *both


def cross_entropy(goal, z):
    return -(goal * F.log_softmax(z, -1)).sum(-1)


def lowered(ref, labels, beta):
    """`softmax(ref - beta * onehot)` of each position that predicts something, `(B, T-1, V)`."""
    return (ref[:, :-1] - beta * F.one_hot(labels[:, 1:], ref.shape[-1])).softmax(-1)


def test_undial_counts_prompt_and_padding_there(values, models):
    """Its -100 lowers entry V - 100 of every token of prompt and padding, and all of them are in the mean."""
    reference = FrozenModel(models[1])
    for (batch, z, ref), golden in zip(forget_batches(models), values["UNDIAL"]["values"], strict=True):
        labels = batch["labels"]
        theirs = labels.where(labels >= 0, z.shape[-1] - 100)
        assert cross_entropy(lowered(ref, theirs, 10.0), z[:, :-1]).mean().item() == pytest.approx(
            golden["forget_gamma1_alpha0"], rel=1e-5
        )
        everything = losses.undial_loss(z, ref, theirs, 10.0).sum() / labels[:, 1:].numel()
        assert everything.item() == pytest.approx(golden["forget_gamma1_alpha0"], rel=1e-5)
        answers = labels[:, 1:] != -100
        want = cross_entropy(lowered(ref, labels.clamp(min=0), 10.0), z[:, :-1])[answers].mean()
        ours = UNDIAL()(models[0], batch, reference)
        assert ours.item() == pytest.approx(want.item(), rel=1e-5)
        assert ours.item() > 1.2 * golden["forget_gamma1_alpha0"]


def test_ce_u_leaves_out_the_first_token_there(values, models):
    for (batch, z, _), golden in zip(forget_batches(models), values["CEU"]["values"], strict=True):
        labels = batch["labels"]
        loss = CEU(skip=1)(models[0], batch)
        assert loss.item() == pytest.approx(golden["forget"], rel=1e-5)
        gradient = torch.autograd.grad(loss, list(models[0].parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm.item() == pytest.approx(golden["total_grad_norm"], rel=1e-4)
        answers = labels[:, 1:] != -100
        others = z[:, :-1].masked_fill(F.one_hot(labels[:, 1:].clamp(min=0), z.shape[-1]).bool(), -torch.inf)
        want = cross_entropy(others.softmax(-1), z[:, :-1])[answers].mean()
        ours = CEU()(models[0], batch)
        assert ours.item() == pytest.approx(want.item(), rel=1e-5)
        assert abs(ours.item() - golden["forget"]) > 1e-3


def test_pdu_reads_other_positions_there(values, models):
    """These numbers are of the version with a mask: the positions of the answer's tokens. A later one has no mask."""
    apart, unmasked = [], []
    for (batch, z, _), golden in zip(forget_batches(models), values["PDU"]["values"], strict=True):
        labels, gaps = batch["labels"], (z.amax(-1) - z.mean(-1)).square()
        assert gaps[labels != -100].mean().item() == pytest.approx(golden["forget_gamma1_alpha0"], rel=1e-5)
        # our loss, told that position t predicts what position t has: one more position, labels moved by one
        moved = F.pad(labels, (1, 0), value=-100)
        theirs = losses.margin_loss(F.pad(z, (0, 0, 0, 1)), moved).sum() / (labels != -100).sum()
        assert theirs.item() == pytest.approx(golden["forget_gamma1_alpha0"], rel=1e-5)
        ours = Margin()(models[0], batch)
        assert ours.item() == pytest.approx(gaps[:, :-1][labels[:, 1:] != -100].mean().item(), rel=1e-5)
        apart.append(abs(ours.item() / golden["forget_gamma1_alpha0"] - 1))
        unmasked.append(abs(ours.item() / gaps.mean().item() - 1))
    assert max(apart) > 1e-3 and min(unmasked) > 1e-3


def test_the_others_equal_their_published_formulas(models):
    """Maximal entropy, clamped entropy and JensUn's divergence: nobody's numbers are here, but the tensors are."""
    reference = FrozenModel(models[1])
    for batch, z, ref in forget_batches(models):
        answers = batch["labels"][:, 1:] != -100
        p, q = z[:, :-1][answers].double().softmax(-1), ref[:, :-1][answers].double().softmax(-1)
        size, middle = p.shape[-1], (p + q) / 2
        entropy = -(p * p.log()).sum(-1)
        divergence = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
        wanted = {
            Uniform(): (torch.full_like(p, 1 / size) * (1 / size / p).log()).sum(-1),
            ClampedEntropy(): (0.7 * torch.tensor(size).double().log() - entropy).clamp(min=0),
            JSD(): divergence,
        }
        for objective, tokens in wanted.items():
            got = objective(models[0], batch, reference)
            assert got.item() == pytest.approx(tokens.mean().item(), rel=2e-5), objective
