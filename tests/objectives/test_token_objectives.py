"""WGA, SatImp, JensUn and FLAT: against their literal forms, through either head; where others' code goes astray."""

import math

import pytest
import torch
from support import reference
from support.models import VOCAB, collate, examples, tiny_llama

from blur_trainer.gradients.forward_mode import directional_derivative
from blur_trainer.models.forward import answer_logps, answer_token_logps, choose_head
from blur_trainer.models.logps import answer_mask, per_token_logps
from blur_trainer.objectives import token_losses
from blur_trainer.objectives.contrast import FLAT, JensUn
from blur_trainer.objectives.weighted import WGA, SatImp

ROWS, REFUSALS = examples(5, seed=1), examples(5, seed=2)
OBJECTIVES = {
    "wga": WGA(),
    "wga, other beta": WGA(beta=0.3),
    "satimp": SatImp(),
    "satimp, other betas": SatImp(beta1=0.3, beta2=0.5),
    "jensun": JensUn(),
    "flat": FLAT(),
}


def as_batch(rows, refusals):
    return {**collate(rows), "refusal": collate(refusals)}


def unpadded(model, row):
    ids = torch.tensor([row["input_ids"]])
    return model(input_ids=ids).logits, torch.tensor([row["labels"]])


def token_mean(loss):
    def mean(model, rows):
        count = sum(label != -100 for row in rows for label in row["labels"][1:])
        return sum(loss(*unpadded(model, row)).sum() for row in rows) / count

    return mean


def ascent(weight):
    return token_mean(lambda logits, labels: reference.weighted_ascent(logits, labels, weight))


def mean_flat(model, rows, refusals):
    pairs = zip(rows, refusals, strict=True)
    values = [reference.flat(*unpadded(model, row), *unpadded(model, refusal)) for row, refusal in pairs]
    return sum(values).sum() / len(rows)


#: name -> the mean over a batch, from one unpadded example at a time: (model, rows, refusals) -> scalar
LITERAL = {
    "wga": lambda model, rows, _: ascent(lambda p: p)(model, rows),
    "wga, other beta": lambda model, rows, _: ascent(lambda p: p**0.3)(model, rows),
    "satimp": lambda model, rows, _: ascent(lambda p: p**5 * (1 - p))(model, rows),
    "satimp, other betas": lambda model, rows, _: ascent(lambda p: p**0.3 * (1 - p) ** 0.5)(model, rows),
    "jensun": lambda model, _, refusals: token_mean(reference.jensun)(model, refusals),
    "flat": mean_flat,
}


@pytest.fixture(scope="module")
def model():
    """float64, but Llama normalizes in float32."""
    return tiny_llama(0).double()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_literal_ones(name, model):
    got = OBJECTIVES[name](model, as_batch(ROWS, REFUSALS))
    want = LITERAL[name](model, ROWS, REFUSALS)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    for a, b in zip(reference.full_gradient(model, got), reference.full_gradient(model, want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_example_alone_is_the_one_in_a_padded_batch(name, model):
    batch = as_batch(ROWS, REFUSALS)
    assert not batch["attention_mask"].all() and not batch["refusal"]["attention_mask"].all()
    together = OBJECTIVES[name].losses(model, batch, None)
    alone = [OBJECTIVES[name].losses(model, as_batch([a], [b]), None) for a, b in zip(ROWS, REFUSALS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-9)


# ---- the probabilities of tokens ----


def test_tokens_add_up_to_the_answer_and_are_zero_elsewhere(model):
    batch = collate(ROWS)
    got = answer_token_logps(model, batch)
    assert got.shape == (5, batch["labels"].shape[1] - 1)
    assert (got[~answer_mask(batch["labels"])] == 0).all()
    assert torch.equal(got.sum(-1), answer_logps(model, batch))
    for row, values in zip(ROWS, got, strict=True):
        (literal,) = reference.log_prob(*unpadded(model, row))
        prompt = len(row["labels"]) - len(literal)
        torch.testing.assert_close(values[prompt - 1 : prompt - 1 + len(literal)], torch.stack(literal))


def test_the_fused_head_gives_the_same_tokens_and_gradients():
    batch, results = collate(ROWS), []
    for fused in (False, True):
        model = tiny_llama(0)
        choose_head(model, fused, torch.device("cpu"))
        logps = answer_token_logps(model, batch)
        weighted = logps * torch.linspace(0.5, 2.0, logps.numel()).view_as(logps)  # each token has its own weight
        results.append((logps.detach(), reference.full_gradient(model, weighted.sum())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wga", "satimp", "jensun", "flat"])
def test_forward_mode_gives_the_inner_product_with_the_gradient(name, model):
    """A weight without a gradient has no tangent either."""
    batch = as_batch(ROWS[:2], REFUSALS[:2])
    gradient = reference.full_gradient(model, OBJECTIVES[name](model, batch))
    along = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    want = sum((g * along[key]).sum() for (key, _), g in zip(model.named_parameters(), gradient, strict=True))
    got = directional_derivative(model, along, lambda m: OBJECTIVES[name](m, batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


# ---- the losses alone ----


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_wga_descends_a_power_of_the_probability(beta):
    """Which is bounded. The value that is logged is least in between, and 0 at both ends."""
    logps = torch.linspace(-8, 0, 97, dtype=torch.float64)[:, None].requires_grad_()
    values = token_losses.wga_loss(logps, beta)
    (got,) = torch.autograd.grad(values.sum(), logps)
    (want,) = torch.autograd.grad((logps.exp() ** beta / beta).sum(), logps)
    torch.testing.assert_close(got, want)
    assert values.min().item() == pytest.approx(-1 / (math.e * beta), rel=1e-2) and values[-1] == 0


def test_wga_without_a_weight_is_gradient_ascent():
    logps = torch.tensor([[-3.0, -0.1, 0.0]])
    assert token_losses.wga_loss(logps, 0.0) == token_losses.satimp_loss(logps, 0.0, 0.0) == logps.sum()


def test_satimp_descends_an_integral():
    """Simpson's rule over small steps, between 0 and p."""
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    logps = p.log()[:, None].requires_grad_()
    (got,) = torch.autograd.grad(token_losses.satimp_loss(logps, 5.0, 1.0).sum(), logps)
    step = 1e-5

    def integral(end):
        return end**5 / 5 - end**6 / 6

    slope = (integral(p + step) - integral(p - step)) / (2 * step)
    torch.testing.assert_close(got[:, 0], slope * p, rtol=1e-6, atol=1e-12)


def test_a_log_probability_that_rounding_puts_above_zero_has_a_weight():
    logps = torch.tensor([[1e-7, -1e-7]], requires_grad=True)
    loss = token_losses.satimp_loss(logps, 5.0, 0.3)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logps.grad).all()


def test_jensun_is_bounded_and_has_a_gradient_everywhere():
    logps = torch.tensor([0.0, -1e-7, -1e-3, -1.0, -20.0, -200.0, -1e5, -math.inf])[:, None].requires_grad_()
    values = token_losses.jensun_loss(logps)
    values.sum().backward()
    assert values[0] == 0 and (values >= 0).all() and (values.diff() >= 0).all()
    torch.testing.assert_close(values[-4:], torch.full((4,), math.log(2.0)), atol=1e-6, rtol=0)
    assert (logps.grad <= 0).all() and torch.equal(logps.grad[-3:], torch.zeros(3, 1))


@pytest.mark.parametrize("rest", [1e-6, 1e-4, 1e-2])
def test_jensun_keeps_its_digits_near_certainty(rest):
    """In float32. The formula as it stands in the docstring is wrong by 1e-3 at `1 - p = 1e-4`, by 0.07 at 1e-6."""
    logps = torch.tensor([[math.log1p(-rest)]], dtype=torch.float64)
    p = 1 - rest
    want = rest / 2 * math.log(2) + (p * math.log(2 * p / (1 + p)) + math.log(2 / (1 + p))) / 2
    assert token_losses.jensun_loss(logps.float()).item() == pytest.approx(want, rel=1e-5)


def test_flat_is_bounded_by_certain_answers():
    yes, no = torch.tensor([[0.0, 0.0]]), torch.tensor([[-math.inf, -200.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    low, high = token_losses.flat_loss(no, mask, yes, mask), token_losses.flat_loss(yes, mask, no, mask)
    assert high == -low == pytest.approx(math.tanh(1) / 2)


def test_padding_and_prompt_get_no_gradient():
    batch, refusal = collate(ROWS), collate(REFUSALS)
    torch.manual_seed(0)
    z, y = (torch.randn(*part["labels"].shape, VOCAB).double().requires_grad_() for part in (batch, refusal))
    logps, others = per_token_logps(z, batch["labels"]), per_token_logps(y, refusal["labels"])
    masks = answer_mask(batch["labels"]), answer_mask(refusal["labels"])
    losses = [token_losses.wga_loss(logps, 1.0), token_losses.satimp_loss(logps, 5.0, 1.0)]
    losses += [token_losses.jensun_loss(others), token_losses.flat_loss(logps, masks[0], others, masks[1])]
    sum(loss.sum() for loss in losses).backward()
    for gradient, mask in ((z.grad, masks[0]), (y.grad, masks[1])):
        inside = torch.nn.functional.pad(mask, (0, 1))
        assert (gradient[~inside] == 0).all() and (gradient[inside].abs().sum(-1) > 0).all()


def test_no_loss_waits_for_the_device():
    """On the meta device what reads a number on the host is an error."""
    logps, mask = torch.zeros(4, 9, device="meta", requires_grad=True), torch.ones(4, 9, device="meta").bool()
    losses = [token_losses.wga_loss(logps, 1.0), token_losses.satimp_loss(logps, 5.0, 1.0)]
    losses += [token_losses.jensun_loss(logps), token_losses.flat_loss(logps, mask, logps, mask)]
    sum(loss.sum() for loss in losses).backward()
    assert logps.grad.shape == logps.shape and all(loss.shape == (4,) for loss in losses)


@pytest.mark.parametrize(("kind", "name"), [(WGA, "beta"), (SatImp, "beta1"), (SatImp, "beta2")])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_exponents_are_not_negative(kind, name, value):
    with pytest.raises(ValueError, match=f"{kind.__name__}: `{name}` must be"):
        kind(**{name: value})


# ---- where others' code goes astray ----


def authors_flat(logps, mask, refusal_logps, refusal_mask):
    """As in the code of FLAT's authors: one mean over all positions of the batch, the others counted as 0."""
    bad, good = ((x.exp() * m).mean() for x, m in ((logps, mask), (refusal_logps, refusal_mask)))
    return bad.tanh() / 2 - good.tanh() / 2


def test_flat_does_not_see_padding_and_its_authors_code_does():
    generator = torch.Generator().manual_seed(0)
    logps, mask = -torch.rand(3, 6, generator=generator), torch.ones(3, 6, dtype=torch.bool)
    refused = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    padded = torch.nn.functional.pad(logps, (0, 6)), torch.nn.functional.pad(mask, (0, 6))
    ours = token_losses.flat_loss(logps, mask, *refused)
    torch.testing.assert_close(token_losses.flat_loss(*padded, *refused), ours)
    theirs, longer = authors_flat(logps, mask, *refused), authors_flat(*padded, *refused)
    assert theirs.item() == pytest.approx(ours.mean().item(), abs=0.01) and abs(longer - theirs) > 0.1


def test_jensuns_authors_aim_at_no_distribution():
    """They give both tokens of "No idea" probability 1 at every position. The best answer says neither for certain."""
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    answers = torch.stack([shares, 1 - shares, torch.zeros(101)], dim=1)
    theirs = torch.stack([reference.jensen_shannon(answer, [1.0, 1.0, 0.0]) for answer in answers])
    assert theirs.min() > 0.08 and shares[theirs.argmin()] == 0.5
    certain = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert reference.jensen_shannon(certain, [1.0, 0.0, 0.0]) == token_losses.jensun_loss(torch.zeros(1, 1)) == 0
