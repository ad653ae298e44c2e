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
#: a gradient that is kept, weights that are moved for a while, weights that do not move
NEW = {"gru", "sam", "mask"}
#: `.ci/run` trains the other cells too
EVERY_RUN = {
    "ddp": ALWAYS
    | {
        "tied",
        "one-sided",
        "one-sided, checkpointing",
        "NPO, kept logps",
        "one buffer",
        "constrained",
        "mask, one buffer",
    }
    | NEW,
    "fsdp2": ALWAYS | {"lora", "one-sided", "bf16", "NPO, lora, bf16"} | NEW,
    "fsdp2_lean": {"sum"},
    "zero0": {"accumulation"},
    "zero1": {"accumulation"},
    "zero2": ALWAYS | {"one-sided", "fp16"} | NEW,
    "zero3": ALWAYS | {"lora", "bf16", "NPO, lora", "rmu"} | NEW,
    "zero3_persistent": {"sam"},
    "zero1_offload": {"accumulation"},
    "zero2_offload": {"clipping", "bf16"},
    "zero3_offload": {"accumulation"},
    "zero3_offload_all": {"clipping"},
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
