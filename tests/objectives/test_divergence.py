"""Closed forms against the plain formulas under autograd, in values, derivatives, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from blur_trainer.memory.working import Living
from blur_trainer.objectives import divergence, sliced

SHAPE = 3, 30, 3000  # several slices, the last one shorter


def plain_kl(z, ref, _):
    logp, ref_logp = F.log_softmax(z, -1), F.log_softmax(ref, -1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def plain_uniform(z, ref, _):
    return -math.log(z.shape[-1]) - F.log_softmax(z, -1).mean(-1)


def plain_js(z, ref, _):
    p, q = z.softmax(-1), ref.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def plain_undial(z, ref, y):
    goal = ref - 10.0 * F.one_hot(y, z.shape[-1])
    return -(goal.softmax(-1) * F.log_softmax(z, -1)).sum(-1)


def plain_ce_u(z, ref, y):
    """As `plain_undial`, `ref` fixed: at its use it is `z` itself, without a gradient."""
    p = ref.softmax(-1) * (1 - F.one_hot(y, z.shape[-1]))
    return -(p / p.sum(-1, keepdim=True) * F.log_softmax(z, -1)).sum(-1)


def plain_missing_entropy(z, ref, _):
    logp = F.log_softmax(z, -1)
    return (level(z) + (logp.exp() * logp).sum(-1)).clamp(min=0)


def plain_margin(z, ref, _):
    return (z.max(-1).values - z.mean(-1)) ** 2


def level(z):
    """Between the entropies of these logits, so that some are above and some below."""
    return math.log(z.shape[-1]) - 3.9 if z.shape[-1] > 100 else 1.0


#: name -> ours and the plain one, of logits, the reference's, targets
KINDS = {
    "kl": (lambda z, ref, _: divergence.kl_divergence(z, ref), plain_kl),
    "uniform": (lambda z, ref, _: divergence.uniform_divergence(z), plain_uniform),
    "js": (lambda z, ref, _: divergence.js_divergence(z, ref), plain_js),
    "undial": (lambda z, ref, y: divergence.soft_cross_entropy(z, ref, y, 10.0), plain_undial),
    "ce_u": (lambda z, ref, y: divergence.soft_cross_entropy(z, ref, y, math.inf), plain_ce_u),
    "missing entropy": (lambda z, ref, _: divergence.missing_entropy(z, level(z)), plain_missing_entropy),
    "margin": (lambda z, ref, _: divergence.squared_margin(z), plain_margin),
}


def both(kind, ref, targets):
    """Ours and the plain one, as functions of the logits; the plain one gets the reference in float64."""
    ours, plain = KINDS[kind]
    return lambda z: ours(z, ref, targets), lambda z: plain(z, ref.double(), targets)


def logits(shape=SHAPE, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (3 * torch.randn(shape)).to(dtype)


def labels(shape=SHAPE):
    torch.manual_seed(3)
    return torch.randint(shape[-1], shape[:-1])


def close(got, want, tolerance):
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_values_and_gradients(kind, dtype, tolerance):
    """bfloat16: the sums are float32, the gradient is rounded once, to the dtype of the logits.

    The gradient of JSD has logarithms of ratios: the plain formula in float32 is wrong by 3e-6 here.
    """
    z, ref = logits(dtype=dtype).requires_grad_(), logits(dtype=dtype, seed=1)
    exact = z.detach().double().requires_grad_()
    functions = both(kind, ref, labels())
    ours, plain = functions[0](z), functions[1](exact)
    assert ours.shape == SHAPE[:-1] and ours.dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)
    close(ours, plain, min(tolerance, 1e-6))
    weights = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    gradient = torch.autograd.grad((ours * weights).sum(), z)[0]
    assert gradient.dtype == dtype
    wanted = torch.autograd.grad((plain * weights.double()).sum(), exact)[0]
    close(gradient, wanted, tolerance * (3 if kind == "js" else 1))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    """`single_gradient_buffer` asks for it, under `no_grad`."""
    ours, plain = both(kind, logits(dtype=torch.float64, seed=1), labels())
    with torch.no_grad(), forward_ad.dual_level():
        z = forward_ad.make_dual(logits(dtype=torch.float64), logits(dtype=torch.float64, seed=2))
        close(*(forward_ad.unpack_dual(function(z)).tangent for function in (ours, plain)), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_has_a_gradient(kind):
    shape = 2, 2, 5
    z, ref = logits(shape, torch.float64).requires_grad_(), logits(shape, torch.float64, seed=1)
    ours = both(kind, ref, labels(shape))[0]
    assert torch.autograd.gradcheck(ours, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_slices_of_any_size(kind, size, monkeypatch):
    shape = 2, 9, 40
    ref, targets, at = logits(shape, seed=1), labels(shape), logits(shape)

    def run():
        z = at.clone().requires_grad_()
        values = both(kind, ref, targets)[0](z)
        return values, torch.autograd.grad(values.square().sum(), z)[0]

    whole = run()
    monkeypatch.setattr(sliced, "SLICES", math.ceil(18 / size))
    monkeypatch.setattr(sliced, "_LEAST", 1)
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_that_underflow(kind, scale):
    """Logits of +-1e4 in float32: against float64, and finite at a token that does not count."""
    z, ref = logits((2, 5, 50)) * scale / 3, logits((2, 5, 50), seed=1) * scale / 3
    z.requires_grad_()
    values = both(kind, ref, labels((2, 5, 50)))[0](z)
    exact = z.detach().double().requires_grad_()
    wide = both(kind, ref.double(), labels((2, 5, 50)))[0](exact)
    torch.testing.assert_close(values.double(), wide, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), at)[0] for each, at in ((values, z), (wide, exact))]
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_js_is_0_at_the_reference_and_bounded(dtype):
    z = logits(dtype=dtype).requires_grad_()
    values = divergence.js_divergence(z, z)
    assert values.abs().max() <= 1e-7 and torch.autograd.grad(values.sum(), z)[0].abs().max() <= 1e-7
    apart = torch.zeros(1, 1, 8, dtype=dtype)
    apart[..., 0] = 1e4
    far = divergence.js_divergence(apart, apart.roll(1, -1))
    assert far.item() == pytest.approx(math.log(2), rel=3e-6)


#: in float32 copies of the logits, beside both logits: at most for ours, at least for the plain formula
COPIES = {
    "kl": (1.25, 4),
    "uniform": (1.25, 2),
    "js": (1.3, 4),
    "undial": (1.25, 2),
    "ce_u": (1.25, 2),
    "missing entropy": (1.3, 2),
    "margin": (1.25, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory(kind):
    """The gradient, and slices. The plain formula shows that the measure sees copies."""
    shape = 4, 90, 3000  # as many slices as there may be
    z, ref, targets = logits(shape).requires_grad_(), logits(shape, seed=1), labels(shape)

    def highest(function):
        z.grad = None
        with Living({StorageWeakRef(tensor.untyped_storage()) for tensor in (z, ref, targets)}) as living:
            function(z, ref, targets).sum().backward()
        return living.highest / z.untyped_storage().nbytes()

    ours, plain = map(highest, KINDS[kind])
    copies, before = COPIES[kind]
    assert 1 <= ours <= copies and plain >= before, (ours, plain)
