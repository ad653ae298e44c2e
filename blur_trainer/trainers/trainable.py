"""Chooses the trained parameters by layer and by name, and freezes all others.

Frozen parameters need no gradient, no slot and no moments: backend and optimizer hold trainable parameters only.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from blur_trainer.models.layers import check_layer, find_layers
from blur_trainer.models.reference import REFERENCE_ADAPTER, partition_shape
from blur_trainer.objectives.base import Objective

logger = get_logger(__name__)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def parse_layers(value: Any) -> list[int] | None:
    """Turns `"5,6,7"` or a list into ascending numbers. Raises `ValueError` for anything else."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    try:
        numbers = sorted({int(str(part)) for part in parts})
    except ValueError as error:
        raise ValueError(f"`train_layers` must be layer numbers such as '5,6,7', got {value!r}.") from error
    if not numbers or numbers[0] < 0:
        raise ValueError(f"`train_layers` must be layer numbers from 0 such as '5,6,7', got {value!r}.")
    return numbers


def check_pattern(value: Any) -> None:
    try:
        re.compile("" if value is None else value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`train_parameters` must be a regular expression such as 'mlp.down_proj', got {value!r} ({error})."
        ) from error


def choose_trainable(
    model: nn.Module, train_layers: Any, pattern: str | None, objectives: Mapping[str, Objective]
) -> str:
    """
    Freezes the parameters that are not chosen, and describes the others.

    Args:
        model: the choice is among its trainable parameters (usually all; for a `PeftModel` those of its adapter).
        train_layers: choose only these decoder layers, see [`parse_layers`]. `None`: no restriction.
        pattern: choose only names in which this regular expression is found. `None`: no restriction.
        objectives: if all of them end at a layer, parameters above it get no gradient and are frozen.

    Returns:
        `str`: e.g. `"training 3 of 291 tensors, 176.2M of 7.2B parameters: model.layers.5.mlp.down_proj.weight, ..."`.

    Raises:
        `ValueError`: no such layer or parameter. The message lists the existing ones.
    """
    layers = parse_layers(train_layers)
    tops = {role: objective.top_layer for role, objective in objectives.items()}
    for role, top in tops.items():
        if top is not None:
            check_layer(model, top, f"`{role}_objective` {objectives[role]}")
    ends = [top for top in tops.values() if top is not None]
    highest = max(ends) if ends and len(ends) == len(tops) else None
    for layer in layers or []:
        check_layer(model, layer, f"`train_layers` {layers}")
        if highest is not None and layer > highest:
            raise ValueError(
                f"`train_layers` {layers}: the objectives end at layer {highest}, and layer {layer} would get no "
                f"gradient: choose layers up to {highest}."
            )
    candidates = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = _below(model, candidates, highest)
    if layers is not None:
        kept &= _ids(find_layers(model)[2][layer] for layer in layers)
    if pattern is not None:
        kept &= {id(p) for name, p in candidates if re.search(pattern, name)}
    if candidates and not kept:
        raise ValueError(
            f"Nothing would be trained: no trainable parameter fits `train_layers` {layers} and `train_parameters` "
            f"{pattern!r}. There are: {_kinds(name for name, _ in candidates)}."
        )
    for role, top in tops.items():
        if top is not None and candidates and not kept & _below(model, candidates, top):
            raise ValueError(
                f"`{role}_objective` {objectives[role]} would train nothing: what `train_layers` {layers} and "
                f"`train_parameters` {pattern!r} choose lies above layer {top}."
            )
    for _, parameter in candidates:
        parameter.requires_grad_(id(parameter) in kept)
    chosen = describe(model)
    if len(kept) < len(candidates):
        logger.info(chosen)
    return chosen


def check_trainable(model: nn.Module, masters: bool) -> None:
    """Raises if nothing is trainable, or in float16. `masters`: an engine (DeepSpeed) keeps float32 copies of that."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        raise ValueError(
            "No parameter of the model has `requires_grad=True`: nothing would be trained. "
            + (
                "Load its adapter with `PeftModel.from_pretrained(base, folder, is_trainable=True)` to go on training "
                "it; or merge it, `blur_trainer.merge_and_save(folder, 'merged')`, and pass 'merged'."
                if adapted
                else "Unfreeze parameters, or pass `peft_config`."
            )
        )
    half = [name for name, p in trainable if p.dtype == torch.float16]
    if half and not masters:
        raise ValueError(
            f"{len(half)} trained weights are float16 ({half[0]}), in which small updates vanish and Adam breaks down: "
            "load the model in bfloat16 or float32 (`dtype`). With float32 weights `fp16=True` is fine."
        )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raises `ValueError` if an optimizer that was passed does not hold every trainable parameter."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise ValueError(
            f"`optimizers`: the optimizer holds none of {len(left_out)} trainable parameters ({left_out[0]}): they "
            "would not be trained, but count in every gradient. Make it of the parameters that have "
            "`requires_grad=True` (with `peft_config`: of `get_peft_model(model, peft_config)`, passed as `model`), "
            "freeze the others, or choose it with `optim`."
        )


def _below(model: nn.Module, candidates: list[tuple[str, nn.Parameter]], highest: int | None) -> set[int]:
    """The names below layer `highest`: without the layers above, the final norm and an untied head."""
    ids = {id(parameter) for _, parameter in candidates}
    if highest is None:
        return ids
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    backbone, name, layers = find_layers(model)
    names = [child for child, _ in backbone.named_children()]  # in nearly all models in the order in which they run
    behind = [backbone.get_submodule(child) for child in names[names.index(name) + 1 :]]
    above = _ids([*list(layers)[highest + 1 :], *behind, *([] if head is None else [head])])
    return ids - (above - _ids([embedding]))


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _kinds(names: Iterable[str]) -> str:
    """Unique names with `*` for the layer's number."""
    return ", ".join(dict.fromkeys(_NUMBER.sub("*", name) for name in names))


def describe(model: nn.Module) -> str:
    """`"training 3 of 291 tensors, 176.2M of 7.2B parameters: ..."`."""
    # a copy that an earlier trainer left is none of this model's: a resumed training begins without it
    everything = [each for each in model.named_parameters() if f".{REFERENCE_ADAPTER}." not in each[0]]
    trained = [(name, p) for name, p in everything if p.requires_grad]
    sizes = [sum(partition_shape(p).numel() for _, p in some) for some in (trained, everything)]
    names = [name for name, _ in trained]
    listed = ", ".join(names) if len(names) <= 8 else _kinds(names)
    return (
        f"training {len(trained)} of {len(everything)} tensors, {_short(sizes[0])} of {_short(sizes[1])} parameters: "
        f"{listed}"
    )


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
