"""All of tests/gpu on the CPU, so that none of it is code that never ran when a card can be had. No marker `gpu`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.device import EVERY_RUN
from support.processes import ENVIRONMENT

HERE = Path(__file__).parent
#: the words of `needs_card`: what only a card has
LEFT_OUT = (
    "bfloat16 is chosen",
    "Inductor's kernels",
    "page-locked",
    "paged memory",
    "8-bit weights",
    "torch's loss scaler",
    "torch counts",
)


def test_what_every_run_is_to_try_is_there():
    assert all(f"def {name}(" in (HERE / file).read_text(encoding="utf-8") for file, name in EVERY_RUN)


def run(chosen):
    """What pytest counts and why it skips, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", "-m", "gpu", str(HERE)]
    environment = ENVIRONMENT | {"BLUR_GPU_TESTS_ON": chosen}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.MULTILINE)
    return done, reasons


@pytest.mark.full
def test_the_dry_run_passes_and_leaves_out_what_only_a_card_has():
    done, reasons = run("cpu")
    assert done.returncode == 0, done.stdout[-6000:]
    odd = [r for r in reasons if not r.startswith(tuple(f"needs a GPU: {word}" for word in LEFT_OUT))]
    assert odd in ([], ["a CPU without fp16"])


@pytest.mark.full
def test_without_a_gpu_all_others_are_skipped():
    done, reasons = run("")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "needs a GPU, or BLUR_GPU_TESTS_ON=cpu for a dry run" in reasons
    passed = int(re.search(r"(\d+) passed", done.stdout)[1]) if "passed" in done.stdout else 0
    assert passed <= 2 * len(EVERY_RUN)
