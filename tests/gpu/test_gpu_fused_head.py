"""The fused LM head (a Triton kernel on GPUs) gives the log-probabilities and gradients of the logits."""

import copy

import pytest
import torch
from support.device import DEVICE, off, on_device, on_host
from support.models import collate, examples, tiny_llama
from support.runs import train, weights

from blur_trainer.models.forward import answer_logps, choose_head, has_fused_head
from blur_trainer.objectives.preference import NPO

#: relative error against float64: value, gradient. An H100 gave 4.4e-08, 6.7e-07 and 7.5e-05, 6.6e-03 on wider models
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}


def answer(model, batch):
    """Log-probabilities, and the gradient of a sum that weighs the examples differently, in float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    logps = answer_logps(model, batch)
    (logps * torch.arange(1.0, len(logps) + 1, device=logps.device)).sum().backward()
    return logps.detach().double().cpu(), torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
def test_value_and_gradient_are_those_of_the_logits(dtype):
    batch = collate(examples(5, seed=3))
    there = {name: value.to(DEVICE) for name, value in batch.items()}
    for tie in (False, True):
        model = tiny_llama(tie=tie).to(dtype)
        exact = answer(copy.deepcopy(model).double(), batch)
        model.to(DEVICE)
        for fused in (False, True):
            choose_head(model, fused, DEVICE)
            assert has_fused_head(model) is fused
            for got, want, limit in zip(answer(model, there), exact, LIMITS[dtype], strict=True):
                assert (got - want).norm() <= limit * want.norm(), (fused, tie)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_with_it_is_that_without(tmp_path, checkpointing):
    ends = []
    for fused in (True, False):
        config = {"fused_lm_head": fused, "activation_checkpointing": checkpointing, "max_steps": 3}
        args = on_device(tmp_path / str(fused), learning_rate=1e-2, **config)
        trainer = train(args, examples(8, seed=5), examples(5, seed=6), forget_objective=NPO())
        assert has_fused_head(trainer.model) is fused
        ends.append(on_host(trainer.model))
    assert off(*ends, weights(tiny_llama())) <= 1e-3
