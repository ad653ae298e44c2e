"""The closed form of both divergences against the plain formulas under autograd, in values, derivatives, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from blur_trainer.memory.working import Living
from blur_trainer.objectives.divergence import kl_divergence, uniform_divergence

SHAPE = 3, 30, 3000  # several slices, the last one shorter
KINDS = ["kl", "uniform"]


def plain_kl(logits, ref_logits):
    logp, ref_logp = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def plain_uniform(logits):
    return -math.log(logits.shape[-1]) - F.log_softmax(logits, -1).mean(-1)


def both(kind, ref_logits):
    """Ours and the plain one, as functions of the logits."""
    if kind == "uniform":
        return uniform_divergence, plain_uniform
    return lambda z: kl_divergence(z, ref_logits), lambda z: plain_kl(z, ref_logits)


def logits(shape=SHAPE, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (3 * torch.randn(shape)).to(dtype)


def close(got, want, tolerance):
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_values_and_gradients(kind, dtype, tolerance):
    """bfloat16: the sums are float32, the gradient is rounded once, to the dtype of the logits."""
    z, ref = logits(dtype=dtype).requires_grad_(), logits(dtype=dtype, seed=1)
    exact = z.detach().double().requires_grad_()
    ours, plain = both(kind, ref)[0](z), both(kind, ref.double())[1](exact)
    assert ours.shape == SHAPE[:-1] and ours.dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)
    close(ours, plain, min(tolerance, 1e-6))
    weights = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    gradient = torch.autograd.grad((ours * weights).sum(), z)[0]
    assert gradient.dtype == dtype
    close(gradient, torch.autograd.grad((plain * weights.double()).sum(), exact)[0], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    """`single_gradient_buffer` asks for it, under `no_grad`."""
    ours, plain = both(kind, logits(dtype=torch.float64, seed=1))
    with torch.no_grad(), forward_ad.dual_level():
        z = forward_ad.make_dual(logits(dtype=torch.float64), logits(dtype=torch.float64, seed=2))
        close(*(forward_ad.unpack_dual(function(z)).tangent for function in (ours, plain)), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_has_a_gradient(kind):
    z, ref = logits((2, 2, 5), torch.float64).requires_grad_(), logits((2, 2, 5), torch.float64, seed=1)
    assert torch.autograd.gradcheck(both(kind, ref)[0], z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both(kind, ref)[0], z)


@pytest.mark.parametrize(("kind", "copies", "before"), [("kl", 1.25, 4), ("uniform", 1.25, 2)])
def test_memory(kind, copies, before):
    """In float32 copies of the logits, beside both logits: the gradient, and slices. The plain formula shows that the
    measure sees copies."""
    shape = 4, 90, 3000  # as many slices as there may be
    z, ref = logits(shape).requires_grad_(), logits(shape, seed=1)

    def highest(function):
        z.grad = None
        with Living({StorageWeakRef(tensor.untyped_storage()) for tensor in (z, ref)}) as living:
            function(z).sum().backward()
        return living.highest / z.untyped_storage().nbytes()

    ours, plain = map(highest, both(kind, ref))
    assert 1 <= ours <= copies and plain >= before
