"""Trains two processes on each engine, in float32 and bf16, and writes what the slots hold beside `estimate_memory`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from support import parity
from support.processes import freeze_imports

from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.memory.estimate import estimate_memory

HELD: list[dict[str, int]] = []
GRAMIAN = GradientBackend.gramian


def gramian(self: GradientBackend) -> Any:
    """As it is; on the way it records the bytes of each slot."""
    HELD.append(
        {role: sum(g.numel() * g.element_size() for g in slot if g is not None) for role, slot in self.slots.items()}
    )
    return GRAMIAN(self)


def main(folder: Path, cells: list[str]) -> None:
    GradientBackend.gramian = gramian  # type: ignore[method-assign]
    datasets.disable_progress_bars()
    freeze_imports()
    found = {}
    for cell in cells:
        trainer = parity.make(*cell.split(":"), str(folder / cell.replace(":", "-")))
        estimate = estimate_memory(trainer.model, trainer.args, PartialState().num_processes, dtype="float32")
        HELD.clear()
        trainer.train()
        found[cell] = {"held": HELD[-1], "estimated": estimate.forget_slot}
    if PartialState().is_main_process:
        (folder / "slots.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(";"))
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # as in engine_worker.py
