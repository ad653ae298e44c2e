"""Tests that want a GPU. Without one they are skipped.

    pytest -m gpu tests/gpu                        # on the first GPU
    BLUR_GPU_TESTS_ON=cpu pytest -m gpu tests/gpu  # a dry run: the same tests on the CPU, but for what only a card has

Each file says with `needs_card` what the dry run leaves out, and why. `EVERY_RUN` are short ones that run on the CPU in
every run of the suite, so that these files keep up with the package; tests/gpu/test_dry_run.py (`pytest -m full`) makes
the whole dry run.
"""

from pathlib import Path

import pytest
from support.device import CHOSEN

EVERY_RUN = {
    "test_gpu_slots.py::test_an_offloaded_gradient_waits_in_the_cpus_memory_and_changes_nothing",
    "test_gpu_fused_head.py::test_value_and_gradient_are_those_of_the_logits[float32]",
    "test_gpu_scoring.py::test_log_probabilities_and_texts_are_the_cpus",
    "test_gpu_loss_scale.py::test_an_overflow_in_the_middle_is_skipped_and_training_goes_on[blur]",
}


@pytest.hookimpl(tryfirst=True)  # the marker is there when `-m` chooses
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name != "test_dry_run.py":
            item.add_marker(pytest.mark.gpu)
            if not CHOSEN and f"{item.path.name}::{item.name}" not in EVERY_RUN:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or BLUR_GPU_TESTS_ON=cpu for a dry run"))


@pytest.fixture
def same_sums():
    """Kernels that give the same bits every time."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
