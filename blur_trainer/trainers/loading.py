"""Loads or saves whole weights while an engine shards the trained model."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config


@contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """Inside, `from_pretrained` loads all weights on every process.

    Otherwise ZeRO-3 partitions while loading, and FSDP's `cpu_ram_efficient_loading` fills only the first process's
    weights. That is right for the trained model, but not for a model that is only evaluated.

    ```python
    with unsharded_loading(args):
        retrained = AutoModelForCausalLM.from_pretrained(name)
    ```
    """
    plugin = args.deepspeed_plugin if is_deepspeed_zero3_enabled() else None
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()


@contextmanager
def whole_state(accelerator: Accelerator) -> Iterator[None]:
    """Inside, FSDP saves whole weights that `from_pretrained` reads, even if its checkpoints are sharded.

    Without it Trainer's `save_model` would write nothing in that case.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)
