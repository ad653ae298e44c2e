"""Makes the trainer's reference model, shards it like the trained one, or precomputes its log-probabilities."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, fsdp2_prepare_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.models import prepare_deepspeed

from blur_trainer.atomic_write import atomic_write
from blur_trainer.data.pairing import PairedDataset
from blur_trainer.models.loading import load_lower, load_pretrained, read_config
from blur_trainer.models.reference import CurrentModel, FrozenModel, Reference, adapter_reference, is_partitioned
from blur_trainer.models.truncation import frozen_lower
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.distributions import Distillation
from blur_trainer.objectives.preference import reference_logps
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.cpu import engine_requested
from blur_trainer.trainers.precision import loading_arguments
from blur_trainer.trainers.setup import reads_logps_only

#: file in `output_dir` with the reference's log-probabilities; a resumed training cannot recompute them
LOGPS_NAME = "reference_logps.safetensors"


def make_reference(
    model: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    objectives: Mapping[str, Objective],
    args: UnlearningConfig,
    source: Any = None,
) -> Reference | None:
    """The reference that training needs in memory, or `None`: see the table of `blur_trainer.models.reference`.

    `source`: what the model was loaded from, if it was given by name.
    """
    readers, num_layers = readers_of(objectives, args)
    if ref_model is not None and not any(o.needs_reference for o in objectives.values()):
        raise ValueError(
            f"`ref_model` was passed, but no objective reads it ({', '.join(map(str, objectives.values()))}): leave it "
            "out."
        )
    if not readers:
        return None
    if ref_model is None and any(isinstance(o, Distillation) for o in objectives.values()):
        raise ValueError(
            "`distill` is towards a model that has forgotten: pass it as `ref_model`. Without one it would be towards "
            "the model before training, and forget nothing."
        )
    if ref_model is not None:
        return FrozenModel(ref_model)
    if isinstance(model, PeftModel):
        return adapter_reference(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "A quantized model is not copied as a reference: pass `peft_config` (then the reference is the model "
            "without its adapter) or `ref_model`."
        )
    if not is_partitioned(model):
        if num_layers is None:
            return FrozenModel.copy_of(model)
        # engines that shard or cast replace parameters, so frozen parameters can be shared only without them
        share = not any(engine_requested(args, engine) for engine in ("fsdp", "deepspeed"))
        return FrozenModel(frozen_lower(model, num_layers, share))
    if not isinstance(source, str):
        raise ValueError(
            "ZeRO-3 has partitioned the model while it was loaded, and such a model cannot be copied as a reference: "
            "give the model by name, or pass `ref_model`, or set `precompute_ref_logps=True`, or use `peft_config`."
        )
    kwargs = loading_arguments(args, frozen=False)  # the dtype of the trained model
    if num_layers is not None:
        return FrozenModel(load_lower(source, read_config(source, kwargs), num_layers, kwargs))
    return FrozenModel(load_pretrained(source, kwargs))


def readers_of(objectives: Mapping[str, Objective], args: UnlearningConfig) -> tuple[list[Objective], int | None]:
    """The objectives that need a reference in memory, and how many of its layers they need (`None`: all)."""
    precomputed = {"forget"} if args.precompute_ref_logps and reads_logps_only(objectives["forget"]) else set()
    readers = [o for role, o in objectives.items() if o.needs_reference and role not in precomputed]
    tops = [reader.top_layer for reader in readers if reader.top_layer is not None]
    return readers, max(tops) + 1 if tops and len(tops) == len(readers) else None


def shard_reference(accelerator: Accelerator, reference: FrozenModel) -> FrozenModel:
    """Moves a frozen model to the trainer's devices, in the trained model's precision, sharded if that one is."""
    model: Any = reference.model
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        reference.model = prepare_deepspeed(model, accelerator)
    elif accelerator.distributed_type == DistributedType.FSDP:
        reference.model = fsdp2_prepare_model(accelerator, model)
    else:
        # `Accelerator.prepare_model` would do both, but keep the model alive after its numbers are computed
        if getattr(model, "hf_device_map", None) is None:  # it was placed at loading; quantized models cannot move
            model.to(accelerator.device)
        # frozen weights are read once a pass: casts of them need no cache
        reference.precision = functools.partial(accelerator.autocast, AutocastKwargs(cache_enabled=False))
    return reference


class PrecomputeCallback(TrainerCallback):
    """Before the first step, adds `log p_ref` of every forget answer (and refusal) as a column of the forget set.

    Each process computes its part with the prepared model, so it needs no more memory than training. A resumed training
    reads the file of the first one.

    Args:
        accelerator, collator, dataset: the trainer's. Nothing is done where `dataset` is not paired.
        reference: the one that is in memory anyway, or `None`.
        ref_model: the model to ask where there is none; `None`: the trained model as it is before its first step.
        wrapped_model: returns the trained model as the engine has prepared it.
        keeps: keep `ref_model` for another training (`model_init`), which asks it again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collator: Callable[[list[Any]], Any],
        dataset: Any,
        reference: Reference | None,
        ref_model: PreTrainedModel | None,
        wrapped_model: Callable[[], torch.nn.Module],
        keeps: bool = False,
    ):
        self.accelerator, self.collator, self.dataset = accelerator, collator, dataset
        self.reference, self.wrapped_model = reference, wrapped_model
        self.ref_model: torch.nn.Module | None = ref_model
        self.keeps = keeps
        self.resumed_from: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        paired = self.dataset
        if not isinstance(paired, PairedDataset) or "ref_logps" in paired.forget.column_names:
            return
        digest = rows_digest(paired.forget)
        if self.resumed_from is None:
            show = state.is_world_process_zero and not args.disable_tqdm
            # the batch size of this attempt: `auto_find_batch_size` may have made it smaller
            batch_size = state.train_batch_size or args.train_batch_size
            columns = self._columns(paired.forget, args, batch_size, show)
            if args.should_save:
                _write_columns(Path(str(args.output_dir)) / LOGPS_NAME, columns, digest)
        else:
            columns = _read_columns(Path(self.resumed_from).parent / LOGPS_NAME, digest)
        for name, values in columns.items():
            paired.forget = paired.forget.add_column(name, values)
        if not self.keeps:
            self.ref_model = None

    def _asked(self) -> Reference:
        if self.reference is not None:  # the retain objective needs one in memory anyway
            return self.reference
        if self.ref_model is not None:  # kept until it has answered: out of memory, it is asked again
            reference = shard_reference(self.accelerator, FrozenModel(self.ref_model))
            self.ref_model = reference.model
            return reference
        return CurrentModel(self.wrapped_model())

    def _columns(
        self, forget: datasets.Dataset, args: TrainingArguments, batch_size: int, show: bool
    ) -> dict[str, list[float]]:
        accelerator, reference = self.accelerator, self._asked()
        loader = accelerator.prepare(
            DataLoader(
                forget,
                batch_size=batch_size,
                collate_fn=self.collator,
                num_workers=args.dataloader_num_workers,
            )
        )
        columns: dict[str, list[float]] = {}
        for batch in tqdm(loader, desc="Reference log-probabilities", disable=not show):
            parts = {"ref_logps": batch} | ({"refusal_ref_logps": batch["refusal"]} if "refusal" in batch else {})
            for name, part in parts.items():
                with torch.no_grad(), accelerator.autocast():
                    logps = reference_logps(part, reference)
                columns.setdefault(name, []).extend(accelerator.gather_for_metrics(logps).float().tolist())
        return columns


def rows_digest(rows: datasets.Dataset) -> str:
    """Digest of tokens and answers, so that numbers of other data are not reused."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(np.asarray(row[name], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _write_columns(path: Path, columns: Mapping[str, list[float]], digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
    atomic_write(path, lambda file: save_file(tensors, file, metadata={"forget": digest}))


def _read_columns(path: Path, digest: str) -> dict[str, list[float]]:
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} is missing: a resumed training with `precompute_ref_logps=True` reads there what the model "
            "said before its first step. Put it back, or give the forget set a column `ref_logps`."
        )
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("forget") != digest:
            raise ValueError(
                f"{str(path)!r} was computed for another forget set: resume with the dataset, tokenizer and "
                "`max_length` of the interrupted training."
            )
        return {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118  (no dict)
