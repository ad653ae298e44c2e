"""`GradientBackend` alone, over a stub of accelerate: what is held, multiplied, written and freed, against literals."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from support.fake_device import DEVICE, FakeDevice
from torch import nn

from blur_trainer.gradients.backend import GradientBackend, inner_products
from blur_trainer.gradients.engines import check_engine, choose_backend
from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Sum

LOSSES = {"forget": lambda model, x: (model(x) ** 3).sum(), "retain": lambda model, x: model(x).sin().sum()}
X = torch.linspace(-1, 1, 12).view(4, 3)


class Engine:
    """The part of `Accelerator` that the backend talks to; notes each `no_sync`."""

    distributed_type = DistributedType.NO
    num_processes = 1
    parallelism_config = None
    gradient_state = SimpleNamespace(plugin_kwargs={})

    def __init__(self, scaler=None):
        self.scaler, self.silent, self.calls = scaler, 0, []

    def backward(self, loss):
        self.calls.append("no_sync" if self.silent else "sync")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @contextmanager
    def no_sync(self, model):
        self.silent += 1
        yield
        self.silent -= 1


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)).to(dtype)


def one_pass(backend, role, loss, micro_batches=1):
    for index in range(micro_batches):
        with backend.accumulate(last=index == micro_batches - 1):
            backend.backward(loss() / micro_batches)
    backend.take(role)


def both_passes(backend, x=X):
    for role, loss in LOSSES.items():
        one_pass(backend, role, lambda loss=loss: loss(backend.model, x))


def literal(model, role, x=X):
    """The gradient as autograd gives it, one vector in float64; zeros where a parameter plays no part."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(LOSSES[role](model, x), parameters, allow_unused=True)
    return torch.cat(
        [(p * 0 if g is None else g).detach().flatten().double() for p, g in zip(parameters, grads, strict=True)]
    )


def written(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def gramian_of(forget, retain):
    pair = (forget, retain)
    return torch.tensor([[sum((a.double() * b.double()).tolist()) for b in pair] for a in pair]).double()


# ---- take, gramian, write, discard ----


@pytest.mark.parametrize("seed", range(3))
def test_gramian_is_that_of_the_literal_gradients(seed):
    model = network(seed)
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    gramian = backend.gramian()
    assert gramian.shape == (2, 2) and gramian.dtype == torch.float64 and gramian.device.type == "cpu"
    assert torch.equal(gramian, gramian.T)
    torch.testing.assert_close(
        gramian, gramian_of(literal(model, "forget"), literal(model, "retain")), rtol=1e-6, atol=1e-7
    )
    assert gramian[0, 1].abs() > 1e-3  # orthogonal gradients would hide a swapped index


@pytest.mark.parametrize(
    "weights", [[2.0, -3.0], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1e-8, 1e8]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_write_is_the_weighted_sum(weights, dtype):
    model = network()
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    backend.write(torch.tensor(weights, dtype=dtype))
    want = weights[0] * literal(model, "forget") + weights[1] * literal(model, "retain")
    torch.testing.assert_close(written(model), want, rtol=1e-5, atol=1e-6)
    assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("order", [("forget", "retain"), ("retain", "forget")])
def test_roles_are_told_by_name_not_by_order(order):
    model = network()
    backend = GradientBackend(Engine(), model)
    for role in order:
        one_pass(backend, role, lambda role=role: LOSSES[role](model, X))
    torch.testing.assert_close(
        backend.gramian().diagonal().sqrt(),
        torch.stack([literal(model, "forget").norm(), literal(model, "retain").norm()]),
    )
    backend.write(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(written(model), literal(model, "forget"))


@pytest.mark.parametrize("rule", [BLUR(gamma=0.3), BLUR(lower_level="retain", gamma=0.3), PCGrad(), MGDA(), Sum()])
def test_the_written_gradient_has_the_inner_products_of_the_rule(rule):
    """`<d, g_i> = sum_j w_j G_ji`: what every rule relies on. BLUR's lower level: `gamma ||g_l||^2`."""
    model = network()
    g = {role: literal(model, role) for role in LOSSES}
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    gramian = backend.gramian()
    weights = rule(gramian)
    backend.write(weights)
    d = written(model)
    for index, role in enumerate(LOSSES):
        assert torch.dot(d, g[role]).item() == pytest.approx((weights @ gramian[:, index]).item(), rel=1e-4, abs=1e-5)
    if isinstance(rule, BLUR):
        lower = g[rule.lower_level]
        assert torch.dot(d, lower).item() == pytest.approx(rule.gamma * lower.norm().item() ** 2, rel=1e-4)


def test_take_empties_the_gradient_so_that_passes_do_not_mix():
    model = network()
    backend = GradientBackend(Engine(), model)
    one_pass(backend, "forget", lambda: LOSSES["forget"](model, X))
    assert all(p.grad is None for p in model.parameters())
    one_pass(backend, "retain", lambda: LOSSES["retain"](model, X))
    assert all(p.grad is None for p in model.parameters())
    for index, role in enumerate(LOSSES):
        torch.testing.assert_close(backend.gramian()[index, index], literal(model, role).square().sum())


def test_a_pass_accumulates_its_micro_batches_and_only_the_last_reduces():
    model, engine = network(), Engine()
    backend = GradientBackend(engine, model)
    one_pass(backend, "forget", lambda: LOSSES["forget"](model, X), micro_batches=3)
    assert engine.calls == ["no_sync", "no_sync", "sync"]
    torch.testing.assert_close(backend.gramian()[0, 0], literal(model, "forget").square().sum())
    one_pass(backend, "retain", lambda: LOSSES["retain"](model, X), micro_batches=1)
    assert engine.calls[3:] == ["sync"]


def test_no_sync_ends_when_a_micro_batch_fails():
    engine = Engine()
    backend = GradientBackend(engine, network())
    with pytest.raises(ZeroDivisionError), backend.accumulate(last=True):
        raise ZeroDivisionError
    assert engine.silent == 0


def test_discard_leaves_nothing_to_step_on():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    backend.discard()
    assert backend.slots == {} and all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.state_dict()["state"] == {}
    both_passes(backend)  # the next window is a fresh one
    backend.write(torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(written(model), 2 * literal(model, "forget") + literal(model, "retain"))


def test_gramian_may_be_read_twice_and_changes_nothing():
    model = network()
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    assert torch.equal(backend.gramian(), backend.gramian())
    backend.write(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(written(model), literal(model, "forget") + literal(model, "retain"))


# ---- parameters that not both objectives touch ----


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor([1.0 + k, -2.0])) for k in range(3))
        self.unused = nn.Parameter(torch.ones(2))


def parts_backend(forget, retain):
    model = Parts()
    backend = GradientBackend(Engine(), model)
    for role, names in (("forget", forget), ("retain", retain)):
        one_pass(backend, role, lambda names=names: sum((getattr(model, name) ** 2).sum() for name in names))
    return model, backend


@pytest.mark.parametrize(
    ("forget", "retain"), [("ab", "bc"), ("ab", "c"), ("a", "b"), ("abc", "a"), ("a", "abc")], ids=lambda names: names
)
@pytest.mark.parametrize("weights", [[2.0, 1.0], [2.0, 3.0]])
def test_parameters_with_a_gradient_in_one_role_only(forget, retain, weights):
    """d/dp p^2 = 2p in each role that has it; a parameter in neither keeps `.grad = None`: no decay, no moments."""
    model, backend = parts_backend(forget, retain)
    with torch.no_grad():
        norms = {name: (2 * getattr(model, name)).square().sum().item() for name in "abc"}
    want = [sum(norms[n] for n in names) for names in (forget, set(forget) & set(retain), retain)]
    gramian = backend.gramian()
    assert [gramian[0, 0].item(), gramian[0, 1].item(), gramian[1, 1].item()] == pytest.approx(want)
    backend.write(torch.tensor(weights))
    for name in "abc":
        factor = weights[0] * (name in forget) + weights[1] * (name in retain)
        gradient = getattr(model, name).grad
        if name in forget + retain:
            torch.testing.assert_close(gradient, 2 * factor * getattr(model, name).detach())
        else:
            assert gradient is None
    assert model.unused.grad is None


def test_frozen_parameters_are_not_held():
    model = network()
    model[0].requires_grad_(False)
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    assert [len(slot) for slot in backend.slots.values()] == [1, 1]
    want = literal(model, "forget") + 2 * literal(model, "retain")
    backend.write(torch.tensor([1.0, 2.0]))
    assert model[0].weight.grad is None and model[0].bias.grad is None
    torch.testing.assert_close(model[2].weight.grad.flatten().double(), want)


@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize("weight", [1.0, -2.0])
def test_one_role_alone(role, weight):
    """No retain set, under `Sum(retain_weight=0)`: its row of the Gramian is 0."""
    model = network()
    backend = GradientBackend(Engine(), model)
    one_pass(backend, role, lambda: LOSSES[role](model, X))
    index = list(LOSSES).index(role)
    want = torch.zeros(2, 2).double()
    want[index, index] = literal(model, role).square().sum()
    torch.testing.assert_close(backend.gramian(), want)
    weights = torch.zeros(2)
    weights[index] = weight
    backend.write(weights)
    torch.testing.assert_close(written(model), weight * literal(model, role))
    assert backend.slots == {}


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_gradients_are_in_float32(dtype):
    """Norms beyond float16's 65504 and below bfloat16's 8 bits: dot in half precision gives inf, or 2 digits."""
    model = nn.Linear(700, 1, bias=False).to(dtype)
    backend = GradientBackend(Engine(), model)
    generator = torch.Generator().manual_seed(0)
    gradients = {role: torch.randn(1, 700, generator=generator).mul(40).to(dtype) for role in LOSSES}
    for role, gradient in gradients.items():
        one_pass(backend, role, lambda gradient=gradient: (model.weight * gradient).sum())
    forget, retain = (g.flatten().double() for g in gradients.values())
    gramian = backend.gramian()
    assert gramian.isfinite().all() and gramian[0, 0] > 65504
    torch.testing.assert_close(gramian, gramian_of(forget, retain), rtol=1e-5, atol=1.0)
    backend.write(torch.tensor([0.5, 1.0]))
    assert model.weight.grad.dtype == dtype  # what the optimizer expects
    torch.testing.assert_close(model.weight.grad.flatten().double(), 0.5 * forget + retain, rtol=1e-2, atol=0.1)


def test_float64_gradients_stay_float64():
    model = network(dtype=torch.float64)
    backend = GradientBackend(Engine(), model)
    both_passes(backend, X.double())
    forget, retain = (literal(model, role, X.double()) for role in LOSSES)
    torch.testing.assert_close(backend.gramian(), gramian_of(forget, retain), rtol=1e-6, atol=0)
    assert backend.gramian()[0, 0].item() == pytest.approx(torch.dot(forget, forget).item(), rel=1e-14)
    backend.write(torch.tensor([0.1, 1.0], dtype=torch.float64))
    torch.testing.assert_close(written(model), 0.1 * forget + retain, rtol=1e-14, atol=1e-15)


def test_mixed_precisions_in_one_model():
    """A bfloat16 model with float32 adapters, as QLoRA has them."""
    model = nn.ParameterList([torch.ones(3, dtype=torch.bfloat16), torch.ones(2), torch.ones(1, dtype=torch.float64)])
    backend = GradientBackend(Engine(), model)
    for role, scale in (("forget", 2.0), ("retain", -1.0)):
        one_pass(backend, role, lambda scale=scale: sum((scale * p).sum().double() for p in model))
    assert backend.gramian().tolist() == [[24.0, -12.0], [-12.0, 6.0]]
    backend.write(torch.tensor([0.5, 3.0]))
    assert [p.grad.dtype for p in model] == [torch.bfloat16, torch.float32, torch.float64]
    assert all(torch.equal(p.grad, torch.full_like(p, -2.0)) for p in model)


def test_many_small_tensors_are_not_lost_beside_a_large_one():
    """Sums over tensors in float64: float32 would round each 1 away from 2^30."""
    model = nn.ParameterList([torch.zeros(1) for _ in range(1001)])
    backend = GradientBackend(Engine(), model)
    one_pass(backend, "forget", lambda: 2.0**15 * model[0].sum() + sum(p.sum() for p in list(model)[1:]))
    assert backend.gramian()[0, 0].item() == 2.0**30 + 1000


def test_a_long_tensor_is_as_exact_as_a_short_one():
    """An embedding has 10^8 elements. Ones and a little: a running float32 sum would lose the little."""
    size = 2**21 + 3
    generator = torch.Generator().manual_seed(0)
    gradients = {role: 1 + 0.01 * torch.randn(size, generator=generator) for role in LOSSES}
    model = nn.ParameterList([torch.zeros(size)])
    backend = GradientBackend(Engine(), model)
    for role, gradient in gradients.items():
        one_pass(backend, role, lambda gradient=gradient: torch.dot(model[0], gradient))
    f, r = (gradient.double() for gradient in gradients.values())
    want = torch.stack([f @ f, f @ r, f @ r, r @ r]).view(2, 2)
    torch.testing.assert_close(backend.gramian(), want, rtol=2e-6, atol=0)


# ---- loss scale ----


def scaled_backend(init_scale, **kwargs):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=10**6, **kwargs)
    model = network()
    return model, scaler, GradientBackend(Engine(scaler), model)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_loss_scale_is_divided_out_of_the_gramian_and_left_in_the_gradient(scale):
    model, scaler, backend = scaled_backend(scale)
    assert backend.skips_overflow
    forget, retain = literal(model, "forget"), literal(model, "retain")
    both_passes(backend)
    torch.testing.assert_close(backend.gramian(), gramian_of(forget, retain), rtol=1e-5, atol=1e-6)
    backend.write(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(written(model), scale * (0.5 * forget + retain), rtol=1e-5, atol=1e-5 * scale)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))  # which unscales
    after = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    torch.testing.assert_close(after, before - 0.1 * (0.5 * forget + retain), rtol=1e-5, atol=1e-6)


def test_a_disabled_scaler_is_none():
    model, _, backend = scaled_backend(2.0**16, enabled=False)
    assert not backend.skips_overflow
    assert not GradientBackend(Engine(), model).skips_overflow
    both_passes(backend)
    torch.testing.assert_close(backend.gramian()[0, 0], literal(model, "forget").square().sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_reaches_the_scaler_which_skips_lowers_and_recovers(bad):
    model, scaler, backend = scaled_backend(2.0**8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    start = [p.detach().clone() for p in model.parameters()]
    one_pass(backend, "forget", lambda: LOSSES["forget"](model, X) * bad)
    one_pass(backend, "retain", lambda: LOSSES["retain"](model, X))
    assert not backend.gramian().isfinite().all()
    backend.write(Sum(0.0, 1.0)(backend.gramian()))  # a weight of 0 does not hide it
    scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    forget = literal(model, "forget")
    both_passes(backend)
    torch.testing.assert_close(backend.gramian()[0, 0], forget.square().sum())  # divided by the new scale
    backend.write(torch.tensor([0.5, 1.0]))
    scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert not any(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))


# ---- memory ----


def test_gradients_are_moved_not_copied():
    model = network()
    backend = GradientBackend(Engine(), model)
    loss = LOSSES["retain"](model, X)
    backend.backward(loss)
    given = [p.grad.data_ptr() for p in model.parameters()]
    backend.take("retain")
    assert [g.data_ptr() for g in backend.slots["retain"]] == given
    one_pass(backend, "forget", lambda: LOSSES["forget"](model, X))
    backend.write(torch.tensor([0.5, 2.0]))
    assert [p.grad.data_ptr() for p in model.parameters()] == given


@pytest.mark.parametrize("end", ["write", "discard"])
def test_the_slots_are_free_afterwards(end):
    """Held by nothing else either: the optimizer step has this memory."""
    model = network()
    backend = GradientBackend(Engine(), model)
    both_passes(backend)
    held = [weakref.ref(g) for g in backend.slots["forget"]]
    gc.disable()  # freed at once, not whenever the collector runs
    try:
        backend.write(torch.tensor([0.5, 1.0])) if end == "write" else backend.discard()
        assert backend.slots == {}
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


# ---- engines ----


def arguments(**kwargs):
    defaults = {
        "parallelism_config": None,
        "n_gpu": 1,
        "ddp_static_graph": None,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch",
    }
    return SimpleNamespace(**(defaults | kwargs))


@pytest.mark.parametrize("kind", list(DistributedType), ids=lambda kind: kind.value)
def test_every_engine_that_accelerate_knows_is_taken_or_refused_by_name(kind):
    engine = Engine()
    engine.distributed_type = kind
    if kind == DistributedType.FSDP:  # the second version has a backend: tests/gradients/test_parity.py
        engine.is_fsdp2 = False
        with pytest.raises(NotImplementedError, match="FSDP version 1"):
            choose_backend(engine, network(), arguments())
    elif kind == DistributedType.DEEPSPEED:
        engine.state = SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(deepspeed_config={"hybrid_engine": {"enabled": 1}})
        )
        with pytest.raises(NotImplementedError, match="hybrid_engine"):
            choose_backend(engine, network(), arguments())
    elif kind.value in ("NO", *(f"MULTI_{device}" for device in ("CPU", "GPU", "NPU", "XPU", "MLU", "HPU"))):
        assert isinstance(choose_backend(engine, network(), arguments()), GradientBackend)
    else:
        with pytest.raises(NotImplementedError, match=kind.value):
            choose_backend(engine, network(), arguments())


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"parallelism_config": object()}, "parallelism_config"),
        ({"n_gpu": 2}, "DataParallel"),
        ({"ddp_static_graph": True, "gradient_accumulation_steps": 2}, "ddp_static_graph"),
        ({"optim": "lomo"}, "lomo"),
        ({"optim": SimpleNamespace(value="adalomo")}, "adalomo"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_give_a_wrong_gradient(wrong, word):
    with pytest.raises(NotImplementedError, match=word) as raised:
        check_engine(Engine(), arguments(**wrong))
    assert "\n" not in str(raised.value)
    check_engine(Engine(), arguments())


def test_fsdp_with_cpu_offload_is_refused():
    from torch.distributed.fsdp import CPUOffloadPolicy

    engine = Engine()
    engine.distributed_type, engine.is_fsdp2 = DistributedType.FSDP, True
    engine.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=CPUOffloadPolicy(pin_memory=False)))
    with pytest.raises(NotImplementedError, match="zero3_offload"):
        check_engine(engine, arguments())


def zero(stage=2, **config):
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    return {"zero_optimization": {"stage": stage, **gather, **config.pop("zero_optimization", {})}, **config}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (zero(zero_optimization={"offload_optimizer": {"device": "nvme"}}), "offload_optimizer.device: nvme"),
        (zero(3, zero_optimization={"offload_param": {"device": "nvme"}}), "offload_param.device: nvme"),
        (zero(zero_optimization={"zenflow": {"topk_ratio": 0.1}}), "zenflow"),
        (zero(zero_optimization={"zero_quantized_gradients": True}), "zero_quantized_gradients"),
        (zero(3, zero_optimization={"zero_hpz_partition_size": 8}), "zero_hpz_partition_size: 8"),
        (zero(3, zero_optimization={"mics_shard_size": 4}), "mics_shard_size: 4"),
        (zero(torch_autocast={"enabled": True}), "torch_autocast.enabled"),
        (zero(compile={"deepcompile": True}), "deepcompile"),
        (zero(0, fp16={"enabled": True}), "ZeRO 0 with fp16"),
        (zero(0, bf16={"enabled": True}), "ZeRO 0 with bf16"),
        (zero(managed_gradient_accumulation=False), "managed_gradient_accumulation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deepspeed_settings_that_no_test_covers_are_refused_by_name(config, word):
    from blur_trainer.gradients.deepspeed_checks import check_deepspeed

    with pytest.raises(NotImplementedError, match=word) as raised:
        check_deepspeed(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_plain_deepspeed_settings_are_taken(stage):
    from blur_trainer.gradients.deepspeed_checks import check_deepspeed

    offload = {"offload_optimizer": {"device": "cpu"}} if stage else {}
    check_deepspeed(zero(stage, zero_optimization=offload, bf16={"enabled": bool(stage)}))


def test_zero_3_that_would_save_no_model_is_refused():
    from blur_trainer.gradients.deepspeed_checks import check_deepspeed

    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        check_deepspeed({"zero_optimization": {"stage": 3}})


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0"])
def test_a_deepspeed_version_that_no_test_ran_with_is_refused(version, monkeypatch):
    from blur_trainer.gradients import deepspeed_checks

    monkeypatch.setattr(deepspeed_checks, "version", lambda name: version)
    with pytest.raises(NotImplementedError, match=version):
        deepspeed_checks.check_deepspeed(zero())


def test_an_offloaded_forget_gradient_leaves_the_device_and_changes_nothing(monkeypatch):
    """Without a GPU, `to the host` is a copy here: what it is used for must be the same."""
    from blur_trainer.gradients import backend as module

    moved = []
    monkeypatch.setattr(module, "_to_host", lambda gradient: moved.append(gradient) or gradient.clone())
    plain, offloaded = (GradientBackend(Engine(), network(), offload_forget_gradient=o) for o in (False, True))
    for backend in (plain, offloaded):
        both_passes(backend)
        assert len(moved) == (3 if backend is offloaded else 0)  # of the forget pass alone
    assert torch.equal(plain.gramian(), offloaded.gramian())
    for backend in (plain, offloaded):
        backend.write(torch.tensor([0.3, 2.0]))
    for a, b in zip(plain.parameters, offloaded.parameters, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to offload from")
def test_on_a_gpu_the_slot_is_in_page_locked_memory():
    model = network().cuda()
    backend = GradientBackend(Engine(), model, offload_forget_gradient=True)
    both_passes(backend, X.cuda())
    assert all(g.is_cpu and g.is_pinned() for g in backend.slots["forget"])
    backend.gramian()
    backend.write(torch.tensor([0.3, 2.0]))
    assert all(p.grad.is_cuda for p in model.parameters())


# ---- on an accelerator ----


@pytest.mark.parametrize("slot", ["there", "on the host"])
def test_inner_products_of_an_accelerator_take_few_kernels_and_are_the_same(slot):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (4,), (0,), (2, 2), (5,)] * 4
    forget, retain = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    forget[3], retain[4], forget[1], retain[1] = None, None, forget[1].double(), retain[1].double()
    expected = inner_products(forget, retain)
    with FakeDevice() as device:
        there = [g if g is None or slot == "on the host" else g.to(DEVICE) for g in forget]
        found = inner_products(there, [g if g is None else g.to(DEVICE) for g in retain])
    assert found.is_cpu and found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert sum(device.waits.values()) == 1
    if slot == "there":
        assert sum(n for key, n in device.operators.items() if key.startswith("blur_trainer")) < 2 * len(
            shapes
        )  # a product each, and norms of all at once
