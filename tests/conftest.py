"""One thread per test process, no network: set before anything imports torch or a hub client. The same every time."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def pytest_collection_finish():
    """Each training begins with a garbage collection: over what it has made, not over all that was imported."""
    gc.collect()
    gc.freeze()
