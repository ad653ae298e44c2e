"""Objectives of others on the golden batches: equal to open-unlearning's numbers, or to the authors' formula mended.

Formulas of authors are written out here from the logits, as they stand in their code.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from test_golden_training import GOLDEN, batches, model

from blur_trainer.models.logps import answer_mask, per_token_logps
from blur_trainer.objectives.contrast import FLAT, JensUn
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.objectives.token_losses import jensun_loss
from blur_trainer.objectives.weighted import WGA, SatImp

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers are not beside this checkout")


@pytest.fixture(scope="module")
def target():
    return model("target").eval()


@pytest.mark.parametrize(("name", "objective"), [("WGA", WGA()), ("SatImp", SatImp())])
def test_weighted_ascent_of_open_unlearning(name, objective):
    golden = json.loads((GOLDEN / "ou_losses" / "ou_losses.json").read_text())
    trained, arguments = model(golden["model"]).eval(), golden["trainers"][name]["method_args"]
    assert {key: value for key, value in arguments.items() if "beta" in key} == vars(objective)
    for batch, values in zip(batches(), golden["trainers"][name]["values"], strict=True):
        got, retain = objective(trained, batch["forget"]), NLL()(trained, batch["retain"])
        assert got.item() == pytest.approx(values["forget_gamma1_alpha0"], rel=1e-5)
        total = arguments["gamma"] * got + arguments["alpha"] * retain
        assert total.item() == pytest.approx(values["total"], rel=1e-5)
        gradient = torch.autograd.grad(total, list(trained.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm.item() == pytest.approx(values["total_grad_norm"], rel=1e-4)


def satimp_of_its_authors(logits, labels, beta1, beta2):
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    p = (-nll).exp().detach()
    return -(p**beta1 * (1 - p) ** beta2 * nll)[labels[:, 1:].flatten() != -100].mean()


def test_exchanged_exponents_are_another_loss(target):
    """`beta1` belongs to p and `beta2` to 1 - p."""
    for batch in batches():
        logits = target(batch["forget"]["input_ids"], attention_mask=batch["forget"]["attention_mask"]).logits
        got = SatImp(beta1=5.0, beta2=1.0)(target, batch["forget"])
        right, exchanged = (
            satimp_of_its_authors(logits, batch["forget"]["labels"], *betas) for betas in [(5, 1), (1, 5)]
        )
        torch.testing.assert_close(got, right, rtol=1e-5, atol=0)
        assert abs(exchanged / right - 1) > 0.01


def jensun_of_its_authors(logits, tokens):
    """Per position, with their floor under every probability."""
    p = F.softmax(logits, dim=-1)
    peak = torch.zeros_like(p)
    peak[..., tokens] = 1.0
    middle = (0.5 * (p + peak)).clamp(min=1e-9)
    p, peak = p.clamp(min=1e-9), peak.clamp(min=1e-9)
    return 0.5 * ((p * (p.log() - middle.log())).sum(-1) + (peak * (peak.log() - middle.log())).sum(-1))


def test_jensun_of_its_authors_for_one_token(target):
    """At answer tokens alone, and with one token as the target: there it is the divergence. Else it is not."""
    for part in (batch["alternate"] for batch in batches()):
        logits = target(part["input_ids"], attention_mask=part["attention_mask"]).logits.double()
        mask = answer_mask(part["labels"])
        always = torch.where(part["labels"] == -100, -100, 5)
        ours = jensun_loss(per_token_logps(logits, always))
        theirs = jensun_of_its_authors(logits, [5])[:, :-1]
        torch.testing.assert_close((theirs * mask).sum(-1), ours, rtol=1e-5, atol=0)
        loss = JensUn()(target, {"refusal": part}).item()
        assert 0 < loss < 0.6932
        assert abs(jensun_of_its_authors(logits, [5, 7]).mean().item() - loss) > 0.1


def mean_probability_of_flats_authors(logits, labels):
    p = F.nll_loss(F.softmax(logits[:, :-1], -1).transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return -p.mean()


def test_flat_of_its_authors_once_its_mean_is_over_answers(target):
    """Their mean over the batch's positions, times positions over answer tokens, is ours for one example alone."""
    for batch in batches():
        means = {}
        for role in ("forget", "alternate"):
            part = {name: value[:1] for name, value in batch[role].items()}
            logits = target(part["input_ids"], attention_mask=part["attention_mask"]).logits
            theirs, mask = mean_probability_of_flats_authors(logits, part["labels"]), answer_mask(part["labels"])
            means[role] = (theirs, theirs * mask.numel() / mask.sum())
        one = {name: value[:1] for name, value in batch["forget"].items()}
        refusal = {name: value[:1] for name, value in batch["alternate"].items()}
        got = FLAT()(target, {**one, "refusal": refusal})
        as_published, mended = (means["forget"][k].tanh() / 2 - means["alternate"][k].tanh() / 2 for k in (0, 1))
        torch.testing.assert_close(got, mended, rtol=1e-5, atol=1e-7)
        assert abs(as_published - got) > 0.05
