from functools import partial

import pytest
import torch
from support import reference
from support.models import collate, examples, tiny_llama
from test_distribution_objectives import TOKENS as OF_DISTRIBUTIONS
from test_distribution_objectives import literal as literal_of_distributions
from test_token_objectives import LITERAL as OF_TOKENS

from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES
from blur_trainer.objectives.contrast import FLAT, JensUn
from blur_trainer.objectives.control_vectors import control_vector
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, SimNPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.objectives.weighted import WGA, SatImp

ALL = {**FORGET_OBJECTIVES, **RETAIN_OBJECTIVES}
#: the model has two layers, and their default layer is the eighth
SMALL = {**ALL, "rmu": partial(RMU, layer=0), "activation_match": partial(ActivationMatch, layer=0)}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def ref_model():
    return tiny_llama(1)


def make_batch(rows, refusals):
    levels = torch.tensor([level(row) for row in rows])
    return {**collate(rows), "refusal": collate(refusals), "forget_level": levels}


def level(row):
    """Above the loss of some rows and below that of others."""
    return 4.0 + len(row["input_ids"]) % 3


ROWS, REFUSALS = examples(5, seed=1), examples(5, seed=2)


def literal(name, model, ref_model, rows, refusals):
    """Every objective from one unpadded example at a time."""

    def logps(m, rs):
        pairs = [reference.row_log_prob(m, row) for row in rs]
        return torch.stack([p for p, _ in pairs]), torch.tensor([n for _, n in pairs])

    logp, lengths = logps(model, rows)
    ref = logps(ref_model, rows)[0].detach()
    if name == "nll":
        return -logp.sum() / lengths.sum()
    if name == "grad_ascent":
        return logp.sum() / lengths.sum()
    if name == "npo":
        return reference.npo(logp, ref, 0.1).mean()
    if name == "simnpo":
        return reference.simnpo(logp, lengths, 4.5, 0.0).mean()
    if name == "idk":
        refused, counts = logps(model, refusals)
        return -refused.sum() / counts.sum()
    if name in ("dpo", "altpo"):
        return reference.dpo(logps(model, refusals)[0], logps(ref_model, refusals)[0].detach(), logp, ref, 0.1).mean()
    if name == "target_loss":
        return reference.target_loss(logp, lengths, [level(row) for row in rows]).mean()
    if name == "rmu":
        return reference.token_mean_distance(0, reference.towards(control_vector("forget", 16, 0), 6.5))(model, rows)
    if name == "activation_match":
        return reference.token_mean_distance(0, reference.as_frozen(ref_model, 0))(model, rows)
    if name in OF_TOKENS:
        return OF_TOKENS[name](model, rows, refusals)
    if name in OF_DISTRIBUTIONS:
        return literal_of_distributions(name, model, ref_model, rows)
    total = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        total = total + reference.kl(model(input_ids=ids).logits, ref_model(input_ids=ids).logits.detach(), labels)
    return total.sum() / lengths.sum()


@pytest.mark.parametrize("name", ALL)
def test_objective_equals_the_literal_one_value_and_gradient(name, model, ref_model):
    got = SMALL[name]()(model, make_batch(ROWS, REFUSALS), FrozenModel(ref_model))
    want = literal(name, model, ref_model, ROWS, REFUSALS)
    torch.testing.assert_close(got.double(), want.double(), atol=1e-4, rtol=1e-5)
    for a, b in zip(reference.full_gradient(model, got), reference.full_gradient(model, want), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_with_the_windows_count_add_up_to_the_window(name, model, ref_model):
    objective, ref = SMALL[name](), FrozenModel(ref_model)
    whole = make_batch(ROWS, REFUSALS)
    parts = [make_batch(ROWS[i:j], REFUSALS[i:j]) for i, j in ((0, 1), (1, 4), (4, 5))]
    count = sum(objective.num_items(part) for part in parts)
    assert count == objective.num_items(whole)
    summed = sum(objective(model, part, ref, count) for part in parts)
    torch.testing.assert_close(summed, objective(model, whole, ref), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, o in ALL.items() if o.needs_reference and not o.needs_reference_logits])
def test_a_precomputed_reference_is_used_and_needs_no_model(name, model, ref_model):
    objective = ALL[name]()
    batch = make_batch(ROWS, REFUSALS)
    live = objective(model, batch, FrozenModel(ref_model))
    with torch.no_grad():
        for part in (batch, batch["refusal"]):
            logits = ref_model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
            part["ref_logps"] = reference.sequence_log_prob(logits, part["labels"]).float()
    torch.testing.assert_close(objective(model, batch, None), live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [NPO(), KL(), DPO()])
def test_a_missing_reference_is_an_error(objective, model):
    with pytest.raises(ValueError, match="reference"):
        objective(model, make_batch(ROWS, REFUSALS), None)


@pytest.mark.parametrize("objective", [NPO, SimNPO, DPO])
def test_beta_must_be_positive(objective):
    with pytest.raises(ValueError, match="beta"):
        objective(beta=0.0)


def test_items_are_tokens_or_examples():
    batch = make_batch(ROWS, REFUSALS)
    tokens = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    refused = sum(label != -100 for row in REFUSALS for label in row["labels"][1:])
    assert NLL().num_items(batch) == GradAscent().num_items(batch) == KL().num_items(batch) == tokens
    assert NPO().num_items(batch) == SimNPO().num_items(batch) == DPO().num_items(batch) == 5
    assert WGA().num_items(batch) == SatImp().num_items(batch) == tokens
    assert IDK().num_items(batch) == JensUn().num_items(batch) == refused != tokens
    assert FLAT().num_items(batch) == 5
