"""DeepSpeed ZeRO with one process on the device, also offloaded and pinned, against the literal training."""

import pytest
import torch
from support.device import CARD, needs, needs_card

pytestmark = needs("deepspeed", "deepspeed")
PINNED = needs_card("page-locked memory")
FP16 = [] if CARD or torch.ops.mkldnn._is_mkldnn_fp16_supported() else [pytest.mark.skip(reason="a CPU without fp16")]
CELLS = [
    *("zero0:sum", "zero1:sum", "zero1:bf16", "zero2:BLUR-NPO", "zero2:rmu", "zero2:accumulation", "zero2:offload"),
    *("zero3:BLUR-NPO", "zero3:rmu", "zero3:bf16", "zero3:lora", "zero2_offload:accumulation", "zero2_offload:bf16"),
    *("zero3_offload:BLUR-NPO", "zero3_offload_all:sum", "zero1_fp32_sums:bf16"),
    pytest.param("zero2:fp16", marks=FP16),
    *(pytest.param(f"zero2_offload_pinned:{name}", marks=PINNED) for name in ("BLUR-NPO", "accumulation", "bf16")),
]


@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_the_reference(found, cell):
    assert found[cell]["good"], found[cell]
    assert found[cell]["device"].startswith("cuda" if CARD else "cpu")
