"""A mask alone: the threshold against sorting, and what it does to gradients."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
import torch
from support import reference
from test_backend import Engine, both_passes, network

from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.mask import Mask, chosen, threshold
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.trainers.mask_scores import saliency
from blur_trainer.trainers.step import Step


def scores(kind: str) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(60, generator=generator).abs()
    return {
        "plain": drawn,
        "ties": (drawn * 3).round(),
        "mostly 0": drawn * (drawn > 1.5),
        "denormal": drawn * 1e-42,
        "far apart": (drawn * 80 - 90).exp(),
        "bfloat16": drawn.bfloat16().float(),
        "infinite": torch.where(drawn > 1, torch.inf, drawn),
        "zeros": torch.zeros(60),
    }[kind].tolist()


KINDS = ["plain", "ties", "mostly 0", "denormal", "far apart", "bfloat16", "infinite", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_is_that_of_sorting_whoever_holds_the_scores(kind):
    every = scores(kind)
    shares = [torch.tensor(every[:7]), None, torch.tensor(every[7:31]).view(6, 4), torch.tensor(every[31:])]
    for share in (0.01, 0.1, 0.3, 0.5, 0.9):
        want, count = reference.top_share(every, share), max(1, round(share * 60))
        limit = threshold(shares, count, lambda n: n)
        kept = torch.cat([~place.flatten() for place in chosen(shares, limit) if place is not None])
        assert kept.tolist() == want
        assert in_two_processes(shares[:2], shares[2:], count) == [limit, limit]


def in_two_processes(mine, other, count):
    """Each has its share, and both add up their counts."""
    together, counts = Barrier(2), [0, 0]

    def limit(process):
        def total(number):
            counts[process] = number
            together.wait()
            both = sum(counts)
            together.wait()
            return both

        return threshold([mine, other][process], count, total)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(limit, range(2)))


def test_gradients_are_0_where_nothing_may_change_even_if_they_are_not_finite():
    mask = Mask([torch.tensor([[True, False]]), None, torch.tensor([True]), torch.tensor([False])])
    given = [torch.tensor([[torch.nan, 2.0]]), torch.full((2,), torch.inf), None, torch.tensor([torch.nan])]
    got = list(mask.apply(given))
    assert got[0].tolist() == [[0.0, 2.0]] and got[1].tolist() == [0.0, 0.0] and got[2] is None
    assert got[3].isnan().all()  # a step that is to be skipped is skipped
    assert got[0] is given[0]  # in place


@pytest.mark.parametrize(
    "given",
    [[torch.ones(2)], [torch.ones(2), torch.ones(3), torch.ones(1)], [torch.ones(2), torch.ones(2)]],
)
def test_a_mask_of_other_parameters_is_refused(given):
    with pytest.raises(ValueError, match="mask in the checkpoint is of other parameters"):
        list(Mask([torch.tensor([True, False]), torch.ones(3) > 0]).apply(given))


def test_what_the_rule_and_the_optimizer_get_is_masked():
    frozen = [torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for p in network().parameters()]
    plain, masked = (GradientBackend(Engine(), network()) for _ in range(2))
    masked.mask = Mask([*frozen[:2], None])
    for backend in (plain, masked):
        both_passes(backend)
    keeps = [~frozen[0], ~frozen[1], torch.zeros_like(frozen[2])]
    flat = {r: torch.cat([(g * k).flatten() for g, k in zip(plain.slots[r], keeps, strict=True)]) for r in plain.slots}
    want = torch.tensor([[flat[a] @ flat[b] for b in flat] for a in flat], dtype=torch.float64)
    torch.testing.assert_close(masked.gramian(), want, rtol=1e-6, atol=1e-8)
    masked.write(torch.tensor([2.0, 0.5], dtype=torch.float64))
    combined = 2.0 * flat["forget"] + 0.5 * flat["retain"]
    got = [p.grad for p in masked.parameters]
    torch.testing.assert_close(torch.cat([got[0].flatten(), got[1].flatten()]), combined[: -keeps[2].numel()])
    assert got[2] is None  # so that the optimizer makes no state for it


def test_scores_under_a_loss_scale_that_is_too_high_at_first():
    """Gradients above 300 are inf, as some are in fp16; the scale begins at 2^16."""

    class Scaled(Engine):
        device = torch.device("cpu")

        def reduce(self, count, reduction):
            return count

    def loss(model, role, batch, count):
        x = {"forget": batch["labels"].double(), "retain": batch["labels"].double() / 2}[role]
        value = (model.weight * x).sum() / count
        value.register_hook(lambda g: torch.where(g.abs() > 300, torch.inf, g))
        return value

    model = torch.nn.Linear(3, 1, bias=False).double()
    engine = Scaled(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    backend = GradientBackend(engine, model)
    fields = dict.fromkeys(("number", "epoch", "window", "counts", "rule", "forget_pass", "log"))
    step = Step(**fields, loss=loss, backend=backend, accelerator=engine, autocast=nullcontext)
    window = [{"forget": {"labels": torch.tensor([[1, 2, 3]])}}, {"forget": {"labels": torch.tensor([[4, 5, 6]])}}]
    (scores,) = saliency(step, window, NLL())
    torch.testing.assert_close(scores / scores[0, 0], torch.tensor([[5.0, 7.0, 9.0]]).double() / 5)
    assert model.weight.grad is None and backend.slots == {}
