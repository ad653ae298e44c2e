"""Refuses DeepSpeed versions and settings for which the backends of `gradients.deepspeed` were never tested."""

from importlib.metadata import version
from typing import Any

from packaging.version import Version

TESTED = (Version("0.19"), Version("0.20"))
#: settings that were never tested with two gradients -> the values that turn them off
_REFUSED: dict[str, tuple[Any, ...]] = {
    "zero_optimization.offload_optimizer.device": (None, "none", "cpu"),
    "zero_optimization.offload_param.device": (None, "none", "cpu"),
    "zero_optimization.offload_optimizer.super_offload": (None, False),
    "zero_optimization.zenflow": (None, False),
    "zero_optimization.zero_hpz_partition_size": (None, 1),
    "zero_optimization.zero_quantized_weights": (None, False),
    "zero_optimization.zero_quantized_gradients": (None, False),
    "zero_optimization.mics_shard_size": (None, -1, 0),
    "torch_autocast.enabled": (None, False),
    "compile.deepcompile": (None, False),
    "hybrid_engine.enabled": (None, False),
    "tensor_parallel.autotp_size": (None, 0, 1),
    "managed_gradient_accumulation": (None, True),
}


def check_deepspeed(config: dict[str, Any]) -> None:
    """Raises if the DeepSpeed version or configuration has no exact backend, or would save no model."""
    installed = Version(version("deepspeed"))
    if not TESTED[0] <= installed < TESTED[1]:
        raise NotImplementedError(
            f"deepspeed {installed} is not supported: its ZeRO optimizers are read through private attributes, tested "
            f"with {TESTED[0]} up to (not including) {TESTED[1]}. Install `deepspeed>={TESTED[0]},<{TESTED[1]}`."
        )
    for key, off in _REFUSED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in off:
            raise NotImplementedError(f"DeepSpeed's `{key}: {value}` is not supported: remove it from the config.")
    gather = "stage3_gather_16bit_weights_on_model_save"
    if _stage(config) == 3 and not config["zero_optimization"].get(gather):
        raise ValueError(
            f"ZeRO-3 without `zero_optimization.{gather}: true` saves no model, only its partitions: set it."
        )
    for kind in ("fp16", "bf16"):
        if _stage(config) == 0 and _is_on(config, kind):
            raise NotImplementedError(
                f"ZeRO 0 with {kind} is not supported (with fp16, DeepSpeed divides gradients by a loss scale that it "
                "never applied): use ZeRO 1 to 3, or DDP without DeepSpeed."
            )


def _stage(config: dict[str, Any]) -> int:
    return int((config.get("zero_optimization") or {}).get("stage") or 0)


def _is_on(config: dict[str, Any], section: str) -> bool:
    return (config.get(section) or {}).get("enabled") is True
