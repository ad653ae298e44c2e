"""One thread per test process, no network: set before anything imports torch or a hub client. The same every time."""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
gc.disable()  # until all is collected: what is imported stays, and looking for garbage in it is a quarter of the time


#: files of more than twenty seconds: begun first, so that none of them is left for one core at the end
SLOWEST = (
    *("examples/test_example_wmdp.py", "gradients/test_parity.py", "house/test_docs.py", "saving/test_faults.py"),
    *("examples/test_example_muse.py", "evaluation/test_distributed_evaluation.py", "saving/test_resume.py"),
    *("gradients/test_engines.py", "report/test_report.py", "examples/test_example_tofu.py"),
    *("trainers/test_callbacks.py", "uld/test_uld_engines.py"),
)


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    """Each training begins with a garbage collection: over what it has made, not over all that was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def garbage_of_earlier_files():
    """Is collected once. What is left, mostly libraries, is spared where a training begins: with a collection."""
    gc.collect()
    gc.freeze()
