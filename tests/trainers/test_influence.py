"""The first-order change of losses along a sign step, against inner products of gradients."""

import torch
import torch.nn.functional as F
from support import reference
from support.models import examples, tiny_llama

from blur_trainer.trainers.influence import loss_drops


def test_drops_are_the_slopes_of_the_losses():
    model = tiny_llama(dropout=0.5).double().train()
    step_on, others = examples(3, seed=1), examples(4, seed=2)
    got = loss_drops(model, step_on, others, pad_token_id=0, batch_size=2)
    assert model.training and all(p.grad is None for p in model.parameters())
    plain = model.eval()
    reference.token_mean_nll(plain, step_on).backward()
    signs = [torch.sign(weight.grad) for weight in plain.parameters()]
    slopes = []
    for row in others:
        plain.zero_grad()
        reference.token_mean_nll(plain, [row]).backward()
        slopes.append(sum((s * w.grad).sum() for s, w in zip(signs, plain.parameters(), strict=True)))
    torch.testing.assert_close(got.double(), torch.stack(slopes), rtol=1e-4, atol=1e-4)
    assert min(map(abs, slopes)) > 1e-2


def test_only_trained_weights_take_part_unless_there_are_none():
    step_on, others = examples(3, seed=1), examples(4, seed=2)

    def drops(train):
        model = tiny_llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(train(name))
        flags = [p.requires_grad for p in model.parameters()]
        found = loss_drops(model, step_on, others, pad_token_id=0, batch_size=3)
        assert [p.requires_grad for p in model.parameters()] == flags
        return found

    every, none = drops(lambda name: True), drops(lambda name: False)
    assert torch.equal(every, none)
    upper, rest = drops(lambda name: ".layers.1." in name), drops(lambda name: ".layers.1." not in name)
    torch.testing.assert_close(upper + rest, every, rtol=1e-4, atol=1e-4)
    assert (upper - every).abs().min() > 1e-3


def test_the_linear_that_zero3_leaves_behind_does_not_matter(monkeypatch):
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    model, sets = tiny_llama(), (examples(3, seed=1), examples(4, seed=2))
    expected = loss_drops(model, *sets, pad_token_id=0, batch_size=2)
    init = partition_parameters.InsertPostInitMethodToModuleSubClasses
    monkeypatch.setattr(init, "linear_bk", F.linear, raising=False)
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    assert torch.equal(loss_drops(model, *sets, pad_token_id=0, batch_size=2), expected)
    assert F.linear is zero3_linear_wrap
