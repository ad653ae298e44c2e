"""What a training is made of: settings, data, model and adapter as plain values, see `saving.run_record`.

The sets are digested whole (row by row in their order, some ten million tokens a second), the model by a sample of
each tensor: another model, or the same one in another precision, differs there; a model in which single numbers were
changed by hand may not.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from peft import PeftModel
from torch import Tensor, nn

from blur_trainer.constants import ROLES
from blur_trainer.data.topics import TopicDataset
from blur_trainer.models.reference import partition_shape
from blur_trainer.saving.run_record import SETS, UNKNOWN
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.health import local_shard

#: Order and number of the steps depend on these. Or the checkpoint's optimizer would silently keep its own value.
_FIXED = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
    *("dataloader_drop_last", "topics", "learning_rate", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "chat_template_date", "mask_share", "mask_score"),
)
#: These take effect from the checkpoint on.
_FREE = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("stop_at_level", "retain_bound"),
    *("bf16", "fp16", "neftune_noise_alpha", "repeat_topics", "precompute_ref_logps", "single_gradient_buffer"),
)
#: of an adapter's configuration: what says where it came from, not what it is
_NOT_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"}
_COMPUTED = {"ref_logps", "refusal_ref_logps"}  # columns that a training may add
_SAMPLE = 2**16  # numbers per tensor
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings_record(
    args: UnlearningConfig, dataset: Any, parts: Mapping[str, Any], processes: int, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The whole record of a training.

    Args:
        args, dataset: of the trainer.
        parts: objectives, rule, and what is trained, by name.
        processes: the number of processes of the launch.
        model: the model's part of the record.
    """
    fixed = {f"`{name}`": describe(getattr(args, name)) for name in _FIXED if hasattr(args, name)}
    fixed |= {f"`{name}`": describe(part) for name, part in parts.items()}
    fixed |= {name: _set(dataset, role) for name, role in zip(SETS, ROLES, strict=True)}
    fixed |= {"the number of processes": processes}
    free = {f"`{name}`": describe(getattr(args, name)) for name in _FREE}
    return {"fixed": fixed | model["fixed"], "free": free | model["free"]}


def model_record(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The model's part of the record: of its weights before training, and of its adapter."""
    config: Any = model.peft_config if isinstance(model, PeftModel) else {}
    named = list(model.named_parameters())
    fixed: dict[str, Any] = {
        "the starting model": _weights((name, p) for name, p in named if not any(_is_of(name, a) for a in config)),
        "the adapter": "none",
    }
    if not isinstance(model, PeftModel):
        return {"fixed": fixed, "free": {}}
    active = model.active_adapter
    settings = {name: value for name, value in config[active].to_dict().items() if name not in _NOT_ADAPTER}
    fixed |= {"the adapter": describe(config[active].peft_type)}
    fixed |= {f"the adapter's `{name}`": describe(value) for name, value in settings.items()}
    # free, as a new one is drawn from the random numbers of whoever made it, and then replaced by the checkpoint's
    before = _weights((name, p) for name, p in named if _is_of(name, active))
    return {"fixed": fixed, "free": {"the adapter before training": before}}


def describe(value: Any) -> Any:
    """A value as JSON that is equal for equal values, also in another process."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        compared = [f.name for f in dataclasses.fields(value) if f.compare and f.init]
        listed = ", ".join(f"{name}={describe(getattr(value, name))}" for name in compared)
        return f"{type(value).__name__}({listed})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(str(describe(item)) for item in value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(describe(item)) for item in value) + "]"
    return _ADDRESS.sub("", str(getattr(value, "value", value)))


def _is_of(name: str, adapter: str) -> bool:
    """Whether a parameter belongs to the adapter of that name."""
    return f".{adapter}." in f"{name}."


def _set(dataset: Any, role: str) -> str:
    """Number of examples and digest of one role's set. With topics: of each topic."""
    if isinstance(dataset, TopicDataset):
        by_topic = dataset.forget_by_topic if role == "forget" else dataset.retain_by_topic
        return "; ".join(f"{topic}: {_rows(rows)}" for topic, rows in by_topic.items())
    return _rows(getattr(dataset, role, None))


def _rows(rows: Any) -> str:
    if rows is None:
        return "none"
    if not isinstance(rows, datasets.Dataset):  # a stream is read once
        return UNKNOWN
    digest = xxhash.xxh3_64()
    columns = sorted(set(rows.column_names) - _COMPUTED)
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            _update(digest, table[name].combine_chunks())
    return f"{len(rows)} examples ({digest.hexdigest()})"


def _update(digest: Any, array: pa.Array) -> None:
    if pa.types.is_struct(array.type):
        for field in array.type:
            _update(digest, array.field(field.name))
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(np.asarray(array.value_lengths().fill_null(-1)).astype(np.int64).tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_integer(array.type) and not array.null_count:
        digest.update(np.asarray(array).astype(np.int64).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def _weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes, dtypes and a sample of the numbers, as far as this process has them."""
    digest = xxhash.xxh3_64()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(partition_shape(parameter))} {parameter.dtype}".encode())
        shard = local_shard(parameter)
        if shard.is_meta or hasattr(shard, "__tensor_flatten__"):  # quantized tensors have no plain numbers
            continue
        flat = shard.reshape(-1)
        step, columns = max(1, flat.numel() // _SAMPLE), (1, *partition_shape(parameter))[-1]
        while math.gcd(step, columns) > 1:  # so that it goes through all columns
            step += 1
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
