"""Whole weights beside an engine that shards: to load a model that is only evaluated, to save one for others."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config


@contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """Inside, `from_pretrained` loads all weights on every process.

    Otherwise ZeRO-3 partitions while loading, and FSDP's `cpu_ram_efficient_loading` fills the weights of the first
    process only: right for the model that is trained (the trainer loads one given by name so), useless for one that is
    evaluated beside it.

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
    """Inside, FSDP saves a model that `from_pretrained` reads, also where its checkpoints are sharded.

    Trainer's `save_model` writes nothing then.
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
