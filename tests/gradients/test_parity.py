"""Two processes on every engine (gloo, CPU) give the weights of the literal single-process training.

Every run: on each engine, what it does in a way of its own. `pytest -m full`: the rest of the table, for whoever
changes a backend; benchmarks/parity.py prints it.
"""

import pytest
import torch
from support.cases import chosen
from support.parity import CELLS, DEFAULT_TOLERANCE, ENGINES, TOLERANCE, launch

#: reduces on the last micro-batch only; clips by the norm of all shards
ALWAYS = {"blur", "accumulation", "clipping"}
#: a parameter in two places, few trainable ones, without a gradient; `<g_r, g_r>`; half precision
SHAPES = {"tied", "lora", "one-sided", "mgda", "bf16"}
EVERY_RUN = {
    "ddp": ALWAYS | SHAPES | {"compiled", "NPO, kept logps", "rmu", "one buffer", "one-sided, checkpointing"},
    "fsdp2": ALWAYS | SHAPES | {"checkpointing", "fused head", "NPO, lora, bf16"},
    "fsdp2_lean": {"sum", "lora"},
    "zero0": {"blur", "accumulation"},
    "zero1": {"accumulation", "bf16"},
    "zero2": ALWAYS | {"tied", "lora", "one-sided", "bf16", "fp16"},
    "zero3": ALWAYS | SHAPES | {"frozen", "fp16", "fused head", "NPO, lora", "rmu"},
    "zero1_offload": {"accumulation"},
    "zero2_offload": {"accumulation", "clipping", "bf16"},
    "zero3_offload": {"accumulation", "bf16"},
    "zero3_offload_all": {"clipping", "NPO, kept logps"},
    "zero1_fp32_sums": {"bf16"},
    "zero2_fp32_sums": {"bf16"},
}


#: DeepSpeed asks the CPU whether it knows fp16, and not all do
FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()


def marked(cell):
    engine, feature = cell.split(":")
    marks = [] if feature in EVERY_RUN[engine] else [pytest.mark.full]
    if feature == "fp16" and not FP16:
        marks.append(pytest.mark.skip(reason="a CPU without fp16"))
    return pytest.param(cell, marks=marks)


def test_every_engine_is_in_every_run():
    assert EVERY_RUN.keys() == ENGINES.keys()
    assert {f"{engine}:{feature}" for engine, features in EVERY_RUN.items() for feature in features} <= set(CELLS)


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory):
    """Of the cells that this run has chosen, in one launch."""
    return launch(chosen(request, "cell"), tmp_path_factory.mktemp("parity"))


@pytest.mark.distributed
@pytest.mark.parametrize("cell", map(marked, CELLS))
def test_the_weights_are_those_of_the_reference(errors, cell):
    assert errors[cell] <= TOLERANCE.get(cell.split(":")[1], DEFAULT_TOLERANCE)
