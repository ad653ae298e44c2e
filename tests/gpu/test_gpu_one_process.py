"""One process on the device against the literal training: methods, memory options, precisions."""

import pytest

CELLS = [
    *("plain:BLUR-NPO", "plain:BLUR-NPO, live", "plain:rmu", "plain:rmu, lora", "plain:NPO, lora", "plain:offload"),
    *("plain:one buffer, NPO", "plain:fused head", "plain:tied", "plain:checkpointing", "plain:clipping"),
    *("plain:bf16", "plain:fp16", "finite:bfloat16 weights"),
]


@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_the_reference(found, cell):
    assert found[cell]["good"], found[cell]
