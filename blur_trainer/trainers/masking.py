"""The mask in a training: made before the first step, kept in checkpoints, described in a log and a small file."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blur_trainer.atomic_write import atomic_write
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.mask import Mask, chosen, threshold
from blur_trainer.gradients.retain_mean import Gradients
from blur_trainer.models.reference import partition_shape
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.mask_config import check_decay
from blur_trainer.trainers.mask_scores import check_readable, counts_by_name, fisher, read_batches, saliency
from blur_trainer.trainers.shares import read_share, write_share
from blur_trainer.trainers.step import Step

logger = get_logger(__name__)
NAME = "mask"  # of the files in a checkpoint
SUMMARY_NAME = "mask.json"


class MaskCallback(TrainerCallback):
    """
    Keeps the mask of a training.

    Args:
        args, collator: the trainer's.
        dataset: returns that of this training.
        objectives: returns the objectives by role.
    """

    def __init__(
        self,
        args: UnlearningConfig,
        collator: Callable[[list[Any]], Any],
        dataset: Callable[[], Any],
        objectives: Callable[[], Mapping[str, Objective]],
    ):
        self.args, self.collator, self.dataset, self.objectives = args, collator, dataset, objectives
        self.resumed_from: str | None = None
        self.mask: Mask | None = None
        self._described = False
        self._batch_size = args.train_batch_size
        if args.mask_share is not None:
            check_readable(dataset())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mask, self._described = None, False
        # that of this attempt: `auto_find_batch_size` may have made it smaller
        self._batch_size = state.train_batch_size or args.train_batch_size
        if self.args.mask_share is not None and self.resumed_from is not None:
            self.mask = _read(self.resumed_from)

    def before(self, step: Step, optimizer: Any) -> None:
        """Before each step; before the first one it makes the mask, if no checkpoint had it."""
        if self.args.mask_share is None or self._described:
            return
        check_decay(optimizer.param_groups)
        if self.mask is None:
            self.mask = self._make(step)
        step.backend.mask = self.mask

    def after(self, step: Step) -> None:
        """Behind each step; behind the first one it describes the mask. Then every engine knows its places."""
        if self.mask is not None and not self._described:
            self._describe(step, self.mask)
            self._described = True

    def parameters_changed(self) -> None:
        """Other parameters are trained from now on."""
        if self.mask is not None:
            raise ValueError(
                "Parameters were frozen or unfrozen during a training with `mask_share`, whose mask is of those that "
                "were trained before: freeze them before `train()`."
            )

    def save(self, checkpoint: str | Path, backend: GradientBackend | None, writes: bool) -> None:
        """On every process: under sharding each one writes its share. One bit per trained entry."""
        if self.mask is None or backend is None:
            return
        frozen = self.mask.frozen
        shapes = json.dumps([None if place is None else list(place.shape) for place in frozen])
        packed = [place if place is None else _packed(place) for place in frozen]
        write_share(checkpoint, NAME, packed, backend.sharded, writes, {"shapes": shapes})

    def _make(self, step: Step) -> Mask:
        args, backend = self.args, step.backend
        seed = args.seed if args.data_seed is None else args.data_seed
        window = read_batches(self.dataset(), self.collator, step, self._batch_size, args.mask_batches, seed)
        devices = [] if step.device.type == "cpu" else [step.device]
        with torch.random.fork_rng(devices, device_type=step.device.type):  # a resumed training makes none
            if args.mask_score == "fisher":
                scores = fisher(step, window)
            else:
                scores = saliency(step, window, self.objectives()["forget"])
        share: Any = args.mask_share
        limit = threshold(scores, max(1, round(share * _trained(backend))), lambda count: _sum(backend, count))
        frozen = _agreed(backend, scores, limit)
        if _sum(backend, sum(place is not None for place in frozen)) == 0:
            raise ValueError(
                "`mask_share` would leave nothing to train: the forget gradient is 0 before training. Choose another "
                "forget objective, or `mask_score='fisher'`."
            )
        return Mask(frozen)

    def _describe(self, step: Step, mask: Mask) -> None:
        kept = [place if place is None else ~place for place in mask.frozen]
        counts = counts_by_name(step, kept)
        sizes = {
            name: partition_shape(p).numel()
            for name, p in step.accelerator.unwrap_model(
                step.backend.model, keep_torch_compile=False
            ).named_parameters()
            if p.requires_grad
        }
        summary = summarize(counts, sizes) | {"score": self.args.mask_score, "mask_share": self.args.mask_share}
        logger.info(in_words(summary))
        if self.args.should_save:
            text = json.dumps(summary, indent=2) + "\n"
            atomic_write(Path(str(self.args.output_dir), SUMMARY_NAME), lambda file: file.write_text(text))


def summarize(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Number of entries that may change, and their share by layer and by kind of module."""
    shares: dict[str, dict[str, float]] = {}
    for which, position in (("by_layer", 0), ("by_module", 1)):
        kept: dict[str, int] = defaultdict(int)
        all_of: dict[str, int] = defaultdict(int)
        for name, size in sizes.items():
            label = _labels(name)[position]
            kept[label] += counts[name]
            all_of[label] += size
        shares[which] = {label: kept[label] / all_of[label] for label in all_of}
    return {"kept": sum(counts.values()), "of": sum(sizes.values()), **shares}


def in_words(summary: Mapping[str, Any]) -> str:
    """Three lines: how many, and the shares."""
    lines = [f"mask by {summary['score']}: {summary['kept']:,} of {summary['of']:,} trained weights may change"]
    for which, title in (("by_layer", "layers"), ("by_module", "modules")):
        shares = [f"{label} {share:.1%}" for label, share in summary[which].items()]
        lines.append(f"  {title}: {', '.join(shares)}")
    return "\n".join(lines)


def _labels(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.down_proj.weight` -> `("3", "down_proj")`; outside of the layers both are the module's."""
    parts = re.sub(r"\.(weight|bias)$", "", name).split(".")
    if len(parts) > 1 and parts[-2].startswith("lora_"):  # then comes the adapter's name
        parts = parts[:-1]
    kind = ".".join(parts[-2:]) if parts[-1].startswith("lora_") else parts[-1]
    return next((part for part in parts if part.isdigit()), kind), kind


def _trained(backend: GradientBackend) -> int:
    """The number of trained weights of the whole model, without an engine's padding."""
    return sum(partition_shape(parameter).numel() for parameter in backend.parameters)


def _sum(backend: GradientBackend, count: int) -> int:
    return int(backend.shared(torch.tensor([count], dtype=torch.float64))[0])


def _agreed(backend: GradientBackend, scores: Gradients, limit: float) -> Gradients:
    """What is frozen. Where each process has all gradients, process 0 decides: elsewhere the last bit may differ."""
    together = backend.accelerator.num_processes > 1 and not backend.sharded
    frozen = []
    for place in chosen(scores, limit):
        if place is not None and together:
            there = place.to(backend.accelerator.device)
            place = broadcast(there.to(torch.uint8)).bool().to(place.device)
        frozen.append(None if place is None or bool(place.all()) else place)
    return frozen


def _packed(frozen: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(frozen.cpu().numpy().reshape(-1)))


def _read(checkpoint: str) -> Mask:
    packed, metadata = read_share(checkpoint, NAME)
    frozen = []
    for bits, shape in zip(packed, json.loads(metadata["shapes"]), strict=True):
        if bits is not None:
            flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
            bits = torch.from_numpy(flat.astype(bool)).view(shape)
        frozen.append(bits)
    return Mask(frozen)
