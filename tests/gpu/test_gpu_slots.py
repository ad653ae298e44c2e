"""Where the two gradients are held: in two slots, one of them on the CPU, or in one buffer. The steps are the same."""

import pytest
import torch
from support.device import CARD, DEVICE, device_of, off, on_device, on_host
from support.models import examples, tiny_llama
from support.runs import train, training_logs, weights

from blur_trainer.gradients import backend
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO

FORGET, RETAIN = examples(12, seed=5), examples(7, seed=6)
START = weights(tiny_llama())


def run(folder, **config):
    args = on_device(folder, gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=1e-2, **config)
    return train(args, FORGET, RETAIN, rule=BLUR(gamma=0.5), forget_objective=NPO())


def same_update(one, two, share):
    assert off(on_host(one.model), on_host(two.model), START) <= share


@pytest.fixture(scope="module")
def two_slots(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"))


def test_an_offloaded_gradient_waits_in_the_cpus_memory_and_changes_nothing(tmp_path, two_slots, monkeypatch):
    seen = []
    take = GradientBackend.take

    def spy(backend, role):
        take(backend, role)
        seen.append((role, {(g.device.type, g.is_pinned()) for g in backend.slots[role]}))

    monkeypatch.setattr(GradientBackend, "take", spy)
    offloaded = run(tmp_path, offload_forget_gradient=True)
    assert seen == [("forget", {("cpu", CARD)}), ("retain", {(DEVICE.type, False)})] * 3
    assert device_of(offloaded.model) == DEVICE.type
    same_update(offloaded, two_slots, 1e-4)


def test_one_buffer_makes_the_steps_of_two(tmp_path, two_slots):
    one = run(tmp_path, single_gradient_buffer=True)
    same_update(one, two_slots, 1e-3)
    for got, want in zip(training_logs(one), training_logs(two_slots), strict=True):
        for key in ("loss", "grad/forget_norm", "grad/retain_norm", "grad/cosine", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-2, abs=1e-3), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2**12, 2**26])
def test_the_gramian_is_that_of_the_same_gradients_in_float64(dtype, chunk, monkeypatch):
    """A large tensor of many chunks or of one, small ones, and a gradient that only one role has."""
    monkeypatch.setattr(backend, "_CHUNK_ON_ACCELERATOR", chunk)
    generator = torch.Generator().manual_seed(0)
    sizes = [3 * 2**18 + 5, 7, 1, 1000]
    forget, retain = ([torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(2))
    forget[1] = None
    got = backend.inner_products(*([g if g is None else g.to(DEVICE) for g in role] for role in (forget, retain)))
    f, r = (
        torch.cat([torch.zeros(n) if g is None else g for g, n in zip(role, sizes, strict=True)]).double()
        for role in (forget, retain)
    )
    want = torch.stack([f @ f, f @ r, r @ r])
    assert got.dtype == torch.float64 and got.is_cpu
    assert (got - want).abs().max() <= 2e-5 * want[2]


def test_a_fixed_sum_through_all_three(tmp_path):
    """BLUR's direction hides some mistakes."""
    ways = {"two": {}, "cpu": {"offload_forget_gradient": True}, "one": {"single_gradient_buffer": True}}
    ends = {
        name: train(
            on_device(tmp_path / name, max_steps=3, learning_rate=1e-2, max_grad_norm=0.3, **more),
            FORGET,
            RETAIN,
            rule=Sum(1.0, 2.0),
            forget_objective=GradAscent(),
        )
        for name, more in ways.items()
    }
    same_update(ends["cpu"], ends["two"], 1e-4)
    same_update(ends["one"], ends["two"], 1e-3)
