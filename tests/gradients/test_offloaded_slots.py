"""What a GPU would show and a CPU cannot: when DeepSpeed's partitions are read, how often, and where the slots are."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from blur_trainer.gradients import deepspeed as zero


def backend(kind, sizes=(3, 5), **optimizer):
    """A backend over a stub of an engine; parameters of these sizes."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    optimizer = SimpleNamespace(zero_grad=lambda: None, **optimizer)
    engine = SimpleNamespace(
        optimizer=optimizer,
        get_data_types=lambda: (torch.bfloat16, torch.bfloat16),
        parameters=model.parameters,
        modules=model.modules,
    )
    return kind(SimpleNamespace(device=torch.device("cpu")), engine)


def test_partitions_on_the_cpu_are_read_after_the_copies_have_come(monkeypatch):
    """DeepSpeed copies without waiting: what is in the partition before the device is done is not the gradient."""
    partition = nn.Parameter(torch.zeros(4))
    partition.grad = torch.zeros(4)
    arrive = SimpleNamespace(synchronize=lambda: partition.grad.fill_(7.0))
    monkeypatch.setattr(zero, "get_accelerator", lambda: arrive)
    offloaded = backend(zero.OffloadedPartitions, single_partition_of_fp32_groups=[partition])
    offloaded.take("forget")
    assert offloaded.slots["forget"][0].tolist() == [7.0] * 4
    assert partition.grad.tolist() == [0.0] * 4


class LocalGradients:
    """DeepSpeed's documented access to the local gradients of ZeRO 3: each read is a float32 copy on the device."""

    def __init__(self, parameters):
        self.held = {id(p): torch.full((p.numel(),), 1 / 3, dtype=torch.bfloat16) for p in parameters}
        self.copies, self.most_alive = [], 0
        for parameter in parameters:
            parameter.ds_tensor = torch.empty(parameter.numel())

    def get(self, parameter):
        copy = self.held[id(parameter)].float()
        self.copies.append(weakref.ref(copy))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.copies))
        return copy

    def set(self, parameter, value):
        assert value.numel() == parameter.ds_tensor.numel()
        self.held[id(parameter)].copy_(value)


@pytest.mark.parametrize(("on_cpu", "kept"), [(True, torch.float32), (False, torch.bfloat16)])
def test_zero_3_reads_one_gradient_at_a_time_and_keeps_it_as_deepspeed_does(monkeypatch, on_cpu, kept):
    stage3 = backend(zero.Stage3, offload_optimizer=on_cpu, sizes=(3, 5, 2))
    local = LocalGradients(stage3.parameters)
    monkeypatch.setattr(zero, "safe_get_local_grad", local.get)
    monkeypatch.setattr(zero, "safe_set_local_grad", local.set)
    stage3.take("forget")
    assert len(local.copies) == 3  # emptying reads nothing
    assert local.most_alive <= 2  # the one that is being moved, and the next
    slot = stage3.slots["forget"]
    assert [(g.dtype, g.numel(), g.device.type) for g in slot] == [(kept, n, "cpu") for n in (3, 5, 2)]
    assert all(g.float().eq(torch.tensor(1 / 3, dtype=torch.bfloat16)).all() for g in slot)  # exact
    assert all(not held.any() for held in local.held.values())
