"""A mixture of experts with `output_router_logits=True`: its load-balancing loss counts as in its own, only there."""

import pytest
import torch
from support.models import VOCAB, collate, examples, tiny_llama
from support.runs import settings, train, training_logs
from transformers import MixtralConfig, MixtralForCausalLM

from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.models.forward import answer_logps, choose_head, evaluating
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import SimNPO
from blur_trainer.objectives.router import check_router
from blur_trainer.trainers.blur import BLURTrainer

ROWS = examples(4, seed=2)


def mixtral(balance: bool = True) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=balance,
        router_aux_loss_coef=10.0,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("fused", [False, True])
def test_nll_is_the_models_own_loss(fused):
    model, batch = mixtral(), collate(ROWS)
    own = model(**batch)
    assert own.aux_loss > 1  # of which Trainer descends ten times this
    choose_head(model, fused, torch.device("cpu"))
    torch.testing.assert_close(NLL()(model, batch), own.loss)
    torch.testing.assert_close(IDK()(model, {**batch, "refusal": batch}), own.loss)
    without = NLL()(mixtral(balance=False), batch)
    torch.testing.assert_close(without, own.loss - 10 * own.aux_loss)
    # those that are no likelihood to descend are what they were
    for objective in (GradAscent(), SimNPO()):
        torch.testing.assert_close(objective(model, batch), objective(mixtral(balance=False), batch))


def test_over_micro_batches_it_is_a_mean_by_answer_tokens(tmp_path):
    """Not a sum, which would grow with the accumulation."""
    args = settings(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    (log,) = training_logs(train(args, ROWS[:3], ROWS[:3], model=mixtral(), forget_objective=NLL(), rule=None))
    rows = [collate([row]) for row in ROWS[:3]]
    counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    expected = sum(mixtral()(**row).loss.item() * n for row, n in zip(rows, counts, strict=True)) / sum(counts)
    assert log["loss/retain"] == pytest.approx(expected, rel=1e-5)
    assert log["loss/forget"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_and_references_leave_it_out():
    """Decoding with it fails in transformers, where the mask is longer than the new tokens."""
    model = mixtral()
    scored = token_logps(model, ROWS, pad_token_id=0)
    plain = token_logps(mixtral(balance=False), ROWS, pad_token_id=0)
    assert all((a == b).all() for a, b in zip(scored, plain, strict=True))
    with evaluating(model):
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert model(ids).aux_loss is None
    assert model.config.output_router_logits and model(ids).aux_loss is not None
    assert answer_logps(model, collate(ROWS)).requires_grad


def test_what_cannot_be_weighed_or_is_left_out(tmp_path, caplog):
    model = tiny_llama(output_router_logits=True)
    with pytest.raises(ValueError, match=r"LlamaConfig.*router_aux_loss_coef.*output_router_logits = False"):
        BLURTrainer(model, settings(tmp_path), ROWS, ROWS)
    check_router(mixtral(), {"forget": SimNPO(), "retain": NLL()})
    assert not caplog.text
    check_router(mixtral(), {"forget": SimNPO(), "retain": KL()})
    assert "left out of SimNPO" in caplog.text
