"""Where tests/gpu runs: on the first GPU, or on the CPU, so that no line of it waits for a card to run at all."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import ENVIRONMENT
from support.runs import settings
from torch import Tensor, nn

if "CUDA_VISIBLE_DEVICES" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one process on several GPUs is `DataParallel`, which is refused
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: the same sums every time

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
ROOT = Path(__file__).parents[2]
#: `cuda`, `cpu` (the dry run), or empty: neither a GPU nor a dry run
CHOSEN = os.environ.get("BLUR_GPU_TESTS_ON", "cuda" if torch.cuda.is_available() else "")
if CHOSEN not in ("cuda", "cpu", ""):
    raise ValueError(f"BLUR_GPU_TESTS_ON={CHOSEN!r}; accepted: cuda, cpu.")
CARD = CHOSEN == "cuda"
DEVICE = torch.device(CHOSEN or "cpu")
#: what a GPU would choose otherwise
PLAIN = {"bf16": False, "activation_checkpointing": False}
#: short tests, which run on the CPU in every run of the suite where there is no GPU
EVERY_RUN = {
    ("test_gpu_slots.py", "test_an_offloaded_gradient_waits_in_the_cpus_memory_and_changes_nothing"),
    ("test_gpu_fused_head.py", "test_value_and_gradient_are_those_of_the_logits"),
    ("test_gpu_scoring.py", "test_log_probabilities_and_texts_are_the_cpus"),
    ("test_gpu_loss_scale.py", "test_an_overflow_in_the_middle_is_skipped_and_training_goes_on"),
    ("test_gpu_resuming.py", "test_the_checkpoint_keeps_the_devices_random_state"),
    ("test_gpu_training.py", "test_an_adapter_trains_as_on_the_cpu"),
}
#: of processes that a test starts
SEEN = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"] if CARD else ""}


def needs_card(why: str) -> pytest.MarkDecorator:
    """Left out of the dry run."""
    return pytest.mark.skipif(False, reason=why) if CARD else pytest.mark.skip(reason=f"needs a GPU: {why}")


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    """Looked for, not imported: it takes seconds."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}: pip install blur_trainer[{extra}]")


def on_device(output_dir: Path | str, *config: Any, **kwargs: Any) -> Any:
    """`support.runs.settings` on the device, in float32 unless asked: what a CPU gives is what is compared with."""
    return settings(output_dir, *config, **({"use_cpu": not CARD} | PLAIN | kwargs))


def on_cpu(output_dir: Path | str, *config: Any, **kwargs: Any) -> Any:
    """The same, on the CPU whatever is there. Train before making other settings: accelerate has one state."""
    return settings(output_dir, *config, **(PLAIN | kwargs))


def device_of(model: nn.Module) -> str:
    (kind,) = {parameter.device.type for parameter in model.parameters()}
    return kind


def on_host(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def off(got: Mapping[str, Tensor], want: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """`||got - want|| / ||want - start||`: by the norm, as Adam makes whole steps of what is rounding alone."""
    assert got.keys() == want.keys() == start.keys()
    distance, moved = (
        sum((a[name].double() - b[name].double()).square().sum().item() for name in a)
        for a, b in ((got, want), (want, start))
    )
    assert moved > 1e-4, "nothing moved: the comparison would prove nothing"
    return (distance / moved) ** 0.5


def cells(names: list[str], file: Path, *, launcher: bool) -> dict[str, dict[str, Any]]:
    """What benchmarks/gpu/cells.py says of each of these cells, in a process of its own; `launcher`: under torchrun."""
    command = [sys.executable, *(TORCHRUN if launcher else []), str(ROOT / "benchmarks" / "gpu" / "cells.py")]
    command += ["--cells", ";".join(names), "--device", DEVICE.type, "--json", str(file)]
    done = subprocess.run(command, env=ENVIRONMENT | SEEN, capture_output=True, text=True, timeout=600, check=False)
    if not file.exists():
        raise RuntimeError(f"no cell was trained:\n{done.stderr[-6000:]}")
    found = json.loads(file.read_text(encoding="utf-8"))
    if missing := [name for name in names if name not in found]:
        raise RuntimeError(f"{missing} were not trained:\n{done.stderr[-6000:]}")
    return found
