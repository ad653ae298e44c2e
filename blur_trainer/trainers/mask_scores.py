"""How much each trained weight matters to forgetting, before the first step: the scores that a mask is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset

from blur_trainer.data.topics import TopicDataset
from blur_trainer.gradients.retain_mean import Gradients
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.trainers.step import Step, objective_pass

Window = list[dict[str, Any]]
#: beside the mean square on the retain set: far below any that is not 0
EPSILON = 1e-30
_SLOT = "retain"  # stays on the device: the forget slot may be on the CPU


def saliency(step: Step, window: Window, objective: Objective) -> Gradients:
    """
    `|gradient|` of the forget objective's mean over the batches.

    Source: SalUn, Fan et al. 2024, arXiv 2310.12508, equation 3.
    Differs from its code, which steps the optimizer after each batch while it sums the gradients up, so that these are
    of other weights than the ones before unlearning.
    Differs from its code, which masks `.grad` only: weight decay then moves the other weights too. We refuse that.
    """
    gradients, _ = _gradient(step, window, "forget", objective, step.loss)
    return [g if g is None else g.abs_() for g in gradients]


def fisher(step: Step, window: Window) -> Gradients:
    """
    The mean over the batches of the squared gradient of the NLL, on the forget set divided by on the retain set.

    It is the likelihood's whatever the objectives are: the gradient of `kl` is 0 before training. A batch is that of
    all processes.
    Source: selective synaptic dampening, Foster et al. 2024, arXiv 2308.07707, which divides by the squares of the
    whole training set, and makes the chosen weights smaller instead of training them.
    """
    forget, retain = _squares(step, window, "forget"), _squares(step, window, "retain")
    return [
        f if f is None else f.div_(EPSILON if r is None else r.add_(EPSILON))
        for f, r in zip(forget, retain, strict=True)
    ]


def _squares(step: Step, window: Window, role: str) -> Gradients:
    def loss(model: Any, role: str, batch: Any, count: Tensor) -> Tensor:
        return NLL()(model, batch, None, count)

    total: Gradients = []
    for batch in window:
        gradients, scale = _gradient(step, [batch], role, NLL(), loss)
        total = total or [None] * len(gradients)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                square, before = gradient.float().square_().mul_(scale**-2 / len(window)), total[place]
                total[place] = square if before is None else before.add_(square)
                gradients[place] = None  # so that never all are there twice
    return total


def _gradient(
    step: Step, window: Window, role: str, objective: Objective, loss: Callable[..., Tensor]
) -> tuple[Gradients, float]:
    """This process's share of the gradient of one pass, and what it is scaled by. The engine's own is empty again."""
    backend = step.backend
    count = torch.stack([objective.num_items(batch[role]) for batch in window]).sum()
    part = replace(step, window=window, counts={role: step.accelerator.reduce(count, "sum")}, loss=loss)
    # before training a loss scaler's scale is the highest that it will ever try
    for weight in (1.0, 2.0**-8, 2.0**-16) if backend.skips_overflow else (1.0,):
        objective_pass(part, role, weight)
        backend.take(_SLOT)
        norm, gradients = backend.norm(_SLOT), backend.slots.pop(_SLOT)
        if isfinite(norm):
            return gradients, weight * backend._loss_scale()
    raise FloatingPointError(
        f"The {role} gradient before training is not finite, so `mask_share` has no scores: look at the loss of the "
        "first steps without it."
    )


def read_batches(
    dataset: Dataset, collate: Callable[[list[Any]], Any], step: Step, size: int, limit: int, seed: int
) -> Window:
    """
    This process's part of up to `limit` batches of all processes, drawn by `seed`, on its device.

    `size`: examples per process. The set is gone through at most once; a last batch may be smaller.
    """
    processes, process = step.accelerator.num_processes, step.accelerator.process_index
    total, block = len(dataset), size * processes  # type: ignore[arg-type]
    drawn = torch.Generator().manual_seed(seed)
    if isinstance(dataset, TopicDataset):  # in its order each batch has one topic
        batches = torch.arange(total).split(block)
        batches = tuple(batches[i] for i in torch.randperm(len(batches), generator=drawn).tolist())
    else:
        batches = torch.randperm(total, generator=drawn).split(block)
    read = []
    for batch in batches[:limit]:
        if len(batch) < processes:  # a process without an example would let the others wait
            batch = batch.repeat(processes)
        read.append(collate([dataset[i] for i in batch[process::processes].tolist()]))
    return [send_to_device(batch, step.device) for batch in read]


def check_readable(dataset: Any) -> None:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            "`mask_share` needs datasets of known length, not a stream, which is not gone over twice: load the "
            "datasets, or choose the weights by `train_layers` and `train_parameters`."
        )


def counts_by_name(step: Step, kept: Sequence[Tensor | None]) -> Mapping[str, int]:
    """Name of each trained parameter -> how many of its entries are true in `kept`, over all processes."""
    backend = step.backend
    model = step.accelerator.unwrap_model(backend.model, keep_torch_compile=False)
    index = {id(p): i for i, p in enumerate(model.parameters())}
    counts = torch.zeros(len(index), dtype=torch.float64)
    for owners, place in zip(backend.owners(), kept, strict=True):
        for parameter, part in owners if place is not None else ():
            counts[index[id(parameter)]] += int(place.reshape(-1)[part].sum())  # type: ignore[union-attr]
    whole = backend.shared(counts).tolist()
    return {name: int(whole[index[id(p)]]) for name, p in model.named_parameters() if p.requires_grad}
