"""One process on the device against the literal training: methods, memory options, precisions."""

import pytest
from support.cases import chosen
from support.device import cells

CELLS = [
    *("plain:BLUR-NPO", "plain:BLUR-NPO, live", "plain:rmu", "plain:rmu, lora", "plain:NPO, lora", "plain:offload"),
    *("plain:one buffer, NPO", "plain:fused head", "plain:tied", "plain:checkpointing", "plain:clipping"),
    *("plain:bf16", "plain:fp16", "finite:bfloat16 weights"),
]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    return cells(chosen(request, "cell"), tmp_path_factory.mktemp("cells") / "cells.json", launcher=False)


@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_the_reference(found, cell):
    assert found[cell]["good"], found[cell]
