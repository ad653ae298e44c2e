"""DDP and FSDP2 with one process on the device against the literal training, under torchrun."""

import pytest
from support.device import CARD, needs_card

CELLS = [
    *("ddp:blur", "ddp:NPO, kept logps", "ddp:rmu", "ddp:accumulation", "ddp:offload", "ddp:one buffer", "ddp:bf16"),
    *("fsdp2:blur", "fsdp2:NPO, kept logps", "fsdp2:rmu", "fsdp2:accumulation", "fsdp2:lora", "fsdp2:fused head"),
    *("fsdp2:offload", "fsdp2:bf16", "fsdp2_lean:sum"),
    *(pytest.param(f"{engine}:fp16", marks=needs_card("torch's loss scaler")) for engine in ("ddp", "fsdp2")),
]


@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_the_reference(found, cell):
    assert found[cell]["good"], found[cell]
    assert found[cell]["device"].startswith("cuda" if CARD else "cpu")
