"""Unlearning by a task vector: subtracts from the weights what fine-tuning on the forget set added to them."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from blur_trainer.atomic_write import atomic_write_folder
from blur_trainer.models.checkpoint_tensors import BESIDE, CheckpointTensors, check_adapter, is_adapter, local_folder

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others also change the weights below the adapter
Vector = Callable[[str, Tensor], Tensor | None]  # (name, float32 tensor of the target) -> difference, or None


def task_vector(
    target: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    **hub: Any,
) -> str:
    """
    `theta = theta_target - scale * (theta_finetuned - theta_target)`, from checkpoint to checkpoint.

    `finetuned` is the target, trained further on the forget set by plain next-token loss. Source: Ilharco et al.,
    2212.04089, section 3 (negation); a baseline of MUSE, 2407.06460. There the scale is chosen on held-out data; 1 is
    the default of MUSE's code.

    Works tensor by tensor in float32 and stores each in the target's dtype and shards. At most one shard of the target
    is in memory. `output_dir` appears only when it is complete.

    Differs from MUSE's code, which loads both models whole and computes the difference in bfloat16, whose rounding is
    of the size of small updates.

    Args:
        target (`str`):
            Folder or hub id of a model in safetensors.
        finetuned (`str`):
            Folder or hub id of the fine-tuned model, or of a LoRA trained on the target. For a LoRA the vector is its
            `(alpha/r) B A`.
        output_dir (`str`):
            A folder that does not exist yet. It gets the new weights, and configuration and tokenizer of the target.
        scale (`float`, defaults to `1.0`):
            How much of the vector is subtracted. A negative scale adds it.
        hub:
            For `huggingface_hub.snapshot_download`: `token`, `cache_dir`, `local_files_only`.

    Returns:
        `str`: `output_dir`.

    Raises:
        `FileNotFoundError`, `FileExistsError`, `ValueError`: before writing, if files are missing or no safetensors,
        if `output_dir` exists, or if names, shapes or vocabularies differ. While writing, if the vector is zero or a
        weight leaves the range of its dtype.
    """
    output = Path(output_dir)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale}: give a finite number other than 0, e.g. 1.0; above 0 forgets.")
    if output.exists():
        raise FileExistsError(f"output_dir {str(output)!r} exists: pass a folder that does not.")
    source, other = local_folder(os.fspath(target), **hub), local_folder(os.fspath(finetuned), **hub)
    if is_adapter(source):
        raise ValueError(f"target {str(source)!r} is an adapter: merge it into its model first, and pass that folder.")
    tensors = CheckpointTensors(source)
    vector = _adapter_vector(tensors, other) if is_adapter(other) else _whole_vector(tensors, CheckpointTensors(other))
    atomic_write_folder(output, lambda folder: _write(tensors, vector, scale, folder))
    return str(output)


def _whole_vector(target: CheckpointTensors, finetuned: CheckpointTensors) -> Vector:
    ours, theirs = target.shapes(), finetuned.shapes()
    places = f"{str(target.folder)!r} and {str(finetuned.folder)!r}"
    for name in sorted(ours.keys() ^ theirs.keys()):
        has = "target" if name in ours else "finetuned"
        raise ValueError(
            f"{places} are not one architecture: {len(ours.keys() ^ theirs.keys())} tensors are in one of them only, "
            f"e.g. {name!r} in {has}. (A head tied to the embedding is saved by some versions: save both anew.)"
        )
    for name, shape in ours.items():
        if shape != theirs[name]:
            raise ValueError(
                f"{name!r} is {shape} in target and {theirs[name]} in finetuned ({places}): another size, or another "
                "vocabulary."
            )
    words = target.vocabulary(), finetuned.vocabulary()
    if None not in words and words[0] != words[1]:
        raise ValueError(f"{places} have tokenizers with different vocabularies: the same row is not the same token.")

    def difference(name: str, weight: Tensor) -> Tensor | None:
        return finetuned.get(name).to(torch.float32) - weight

    return difference


def more_than_lora(config: PeftConfig) -> list[str]:
    """The settings that make an adapter more than `W + scaling B A` on unchanged weights `W`."""
    extra = [x for x in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, x, None)]
    if isinstance(config, LoraConfig):
        extra += [] if config.bias == "none" else ["bias"]
        extra += [] if config.init_lora_weights in PLAIN_STARTS else [f"init_lora_weights={config.init_lora_weights}"]
    return extra


def _adapter_vector(target: CheckpointTensors, folder: Path) -> Vector:
    """The vector of a LoRA by PEFT's own arithmetic, which handles rank patterns, transposed layers and embeddings."""
    check_adapter(folder)
    config = PeftConfig.from_pretrained(str(folder))
    extra = more_than_lora(config)
    if not isinstance(config, LoraConfig) or extra:
        raise ValueError(
            f"The adapter in {str(folder)!r} ({type(config).__name__}, {', '.join(extra)}) is more than a LoRA: merge "
            "it into the target first (`merge_and_save`), and pass the merged folder as finetuned."
        )
    config.init_lora_weights = False
    try:
        layers, missing = _adapted_layers(target, config, folder)
    except (RuntimeError, ValueError) as error:  # PEFT's errors: wrong sizes, wrong names
        raise ValueError(f"The adapter in {str(folder)!r} is not of target {str(target.folder)!r}. {error}") from error
    missing += sorted(layers.keys() - target.files.keys())
    if missing:
        raise ValueError(f"The adapter in {str(folder)!r} is not of target {str(target.folder)!r}: see {missing[0]!r}.")

    def difference(name: str, weight: Tensor) -> Tensor | None:
        return layers[name].get_delta_weight("default").to(torch.float32) if name in layers else None

    return difference


def _adapted_layers(target: CheckpointTensors, config: LoraConfig, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Maps each adapted tensor of the target to its LoRA layer; also returns mismatches. Reads no weights."""
    with torch.device("meta"):
        config_of_target = AutoConfig.from_pretrained(target.folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config_of_target, trust_remote_code=False)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):  # on the CPU: PEFT puts the LoRA there
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    adapted = get_peft_model(model, config)
    weights = load_peft_weights(str(folder), device="cpu")
    read: Any = set_peft_model_state_dict(adapted, {k: w for k, w in weights.items() if "lora_" in k})
    for name in [name for name in weights if "lora_" not in name]:  # PEFT saves these along with a LoRA on either
        _check_same(target, name.removeprefix("base_model.model.").replace(".base_layer.", "."), weights[name])
    named = adapted.get_base_model().named_modules()
    layers = {f"{name}.weight": module for name, module in named if isinstance(module, LoraLayer)}
    return layers, [*read.unexpected_keys, *(name for name in read.missing_keys if "lora_" in name)]


def _check_same(target: CheckpointTensors, name: str, weight: Tensor) -> None:
    if name in target.files and not torch.equal(target.get(name).to(weight.dtype), weight):
        raise ValueError(f"{name!r}, which it brings along, is another one than the target's.")


def _write(target: CheckpointTensors, vector: Vector, scale: float, folder: Path) -> None:
    changed = False
    for shard in target.shards:
        with safe_open(target.folder / shard, framework="pt") as file:
            metadata, tensors = file.metadata() or {"format": "pt"}, {}
            for name in file.keys():  # noqa: SIM118  (no dict)
                tensors[name], moved = _subtracted(name, file.get_tensor(name), vector, scale)
                changed |= moved
        save_file(tensors, folder / shard, metadata=metadata)
    if not changed:
        raise ValueError(f"target {str(target.folder)!r} and finetuned have the same weights: there is no task vector.")
    beside = {path for pattern in BESIDE for path in target.folder.glob(pattern) if path.is_file()}
    index = target.folder / SAFE_WEIGHTS_INDEX_NAME
    for path in beside | ({index} if len(target.shards) > 1 or index.exists() else set()):
        shutil.copyfile(path, folder / path.name)


@torch.no_grad()
def _subtracted(name: str, weight: Tensor, vector: Vector, scale: float) -> tuple[Tensor, bool]:
    """Returns the new tensor in the old dtype, and whether the vector is nonzero there. Integers do not change."""
    if not weight.is_floating_point():
        return weight, False
    exact = weight.to(torch.float32)
    difference = vector(name, exact)
    if difference is None:
        return weight, False
    new = (exact - scale * difference).to(weight.dtype)
    if not new.isfinite().all():
        raise ValueError(f"{name!r} leaves the range of {weight.dtype}, or was not finite before: lower the scale.")
    return new, bool(difference.any())
