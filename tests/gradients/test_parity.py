"""Two processes on every engine (gloo, CPU) give the weights of the literal single-process training."""

import pytest
from support.parity import CELLS, DEFAULT_TOLERANCE, TOLERANCE, launch

# Every engine with what could differ between them; benchmarks/parity.py runs the whole table.
OFFLOADED = {"blur", "sum", "accumulation", "clipping", "tied", "lora", "bf16", "NPO, kept logps"}
CELLS = [cell for cell in CELLS if "offload" not in cell or cell.split(":")[1] in OFFLOADED]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return launch(CELLS, tmp_path_factory.mktemp("parity"))


@pytest.mark.distributed
@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_the_reference(errors, cell):
    assert errors[cell] <= TOLERANCE.get(cell.split(":")[1], DEFAULT_TOLERANCE)
