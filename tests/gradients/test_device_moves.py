"""What a step moves between a GPU and the CPU, and how often the host waits for it, on a GPU that is faked."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from support.fake_accelerator import DEVICE, FakeAccelerator
from torch import nn

from blur_trainer.gradients import backend
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.trainers.health import HealthCallback

SIZES = (40, 30, 20, 10)


class Engine:
    """The part of `Accelerator` that the backend talks to, for one process."""

    distributed_type, num_processes, scaler, device = DistributedType.NO, 1, None, DEVICE
    gradient_state = SimpleNamespace(plugin_kwargs={})

    def backward(self, loss):
        loss.backward()


def over(sizes=SIZES, **kwargs):
    model = nn.ParameterList([torch.zeros(size, device=DEVICE) for size in sizes])
    return GradientBackend(Engine(), model, **kwargs)


def both_passes(held):
    for role in ("forget", "retain"):
        with held.accumulate(last=True):
            held.backward(sum(p.square().sum() for p in held.parameters))
        held.take(role)


def test_a_step_moves_no_gradient_and_waits_once():
    held = over()
    with FakeAccelerator() as fake:
        both_passes(held)
        assert fake.moves == []
        gramian = held.gramian()
        assert fake.waits == 1 and fake.moves == [("to host", 3 * len(SIZES))]  # all inner products at once
        held.write(torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert fake.waits == 1 and gramian.is_cpu and all(p.grad.device == DEVICE for p in held.parameters)


def test_an_offloaded_gradient_goes_to_page_locked_memory_and_comes_back_tensor_by_tensor():
    held = over(offload_forget_gradient=True)
    with FakeAccelerator() as fake:
        both_passes(held)
        assert fake.moves == [("to host", size) for size in SIZES] and fake.pinned == len(SIZES)
        assert [g.device.type for g in held.slots["forget"]] == ["cpu"] * 4
        assert [g.device for g in held.slots["retain"]] == [DEVICE] * 4
        fake.moves.clear()
        held.gramian()
        assert fake.moves == [*(("to device", size) for size in SIZES), ("to host", 3 * len(SIZES))]
        fake.moves.clear()
        held.write(torch.tensor([0.5, 2.0], dtype=torch.float64))
        assert fake.moves == [("to device", size) for size in SIZES]
    assert fake.most_on_device <= SIZES[0] + SIZES[1]  # the one that is added, and the next
    assert all(p.grad.device == DEVICE for p in held.parameters)


def test_the_gramian_takes_a_large_offloaded_tensor_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(backend, "_CHUNK_ON_ACCELERATOR", 16)
    held = over((100,), offload_forget_gradient=True)
    with FakeAccelerator() as fake:
        both_passes(held)
        fake.moves.clear()
        held.gramian()
    assert fake.moves[:-1] == [*[("to device", 16)] * 6, ("to device", 4)] and fake.moves[-1][0] == "to host"
    assert fake.most_on_device <= 2 * 16


def test_partitions_that_are_read_as_copies_are_offloaded_one_by_one(monkeypatch):
    """ZeRO 1 and 2 hand out clones: with `offload_forget_gradient` these are never on the device all at once."""
    zero = pytest.importorskip("blur_trainer.gradients.deepspeed", reason="needs DeepSpeed")
    partitions = [torch.ones(size, device=DEVICE) for size in SIZES]
    lists = {"bit16_groups": [partitions], "averaged_gradients": {0: partitions}, "all_grad_tensors": {0: None}}
    optimizer = SimpleNamespace(**lists, zero_grad=lambda: None)
    model = nn.ParameterList([torch.zeros(1, device=DEVICE)])
    engine = SimpleNamespace(optimizer=optimizer, parameters=model.parameters, modules=model.modules)
    held = zero.Partitions(Engine(), engine, offload_forget_gradient=True)
    alive, most = [], []
    to_host = backend._to_host

    def watched(gradient):
        alive.append(weakref.ref(gradient))
        most.append(sum(ref() is not None for ref in alive))
        return to_host(gradient)

    monkeypatch.setattr(backend, "_to_host", watched)
    with FakeAccelerator() as fake:
        held.take("forget")
    assert fake.moves == [("to host", size) for size in SIZES]
    assert len(most) == 4 and max(most) <= 2
    assert optimizer.averaged_gradients == {0: None}


def test_the_health_of_the_weights_waits_once_per_reading():
    model = nn.ParameterList([torch.zeros(size, device=DEVICE) for size in SIZES])
    health = HealthCallback()
    with FakeAccelerator() as fake:
        health.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None, model=model)
    assert fake.moves == [("to host", len(SIZES))] * 2
