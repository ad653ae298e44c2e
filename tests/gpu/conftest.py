"""Tests that want a GPU. Without one they are skipped.

    pytest -m gpu tests/gpu                        # on the first GPU
    BLUR_GPU_TESTS_ON=cpu pytest -m gpu tests/gpu  # a dry run: on the CPU, all but what only a card has

`needs_card` says what the dry run leaves out, and why. Those in `EVERY_RUN` run on the CPU in every run of the suite:
these files keep up with the package. tests/gpu/test_dry_run.py (`pytest -m full`) makes the whole dry run.
"""

from pathlib import Path

import pytest
import torch
from support.cases import chosen
from support.device import CHOSEN, EVERY_RUN, cells

#: they start processes and take longest: begun first
LAUNCHES = ("test_gpu_zero.py", "test_gpu_data_parallel.py", "test_gpu_one_process.py", "test_gpu_compiled.py")


@pytest.hookimpl(tryfirst=True)  # the marker is there when `-m` chooses
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name != "test_dry_run.py":
            item.add_marker(pytest.mark.gpu)
            if not CHOSEN and (item.path.name, item.originalname) not in EVERY_RUN:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or BLUR_GPU_TESTS_ON=cpu for a dry run"))
    if CHOSEN:
        items.sort(key=lambda item: here not in item.path.parents or item.path.name not in LAUNCHES)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What each cell that this run has chosen of the module gave. An engine's cells run under torchrun."""
    names = chosen(request, "cell")
    engine = any(name.split(":")[0] not in ("plain", "finite") for name in names)
    return cells(names, tmp_path_factory.mktemp("cells") / "cells.json", launcher=engine)


@pytest.fixture
def same_sums():
    """Kernels that give the same bits every time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
