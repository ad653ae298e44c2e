"""`estimate_memory` against torch's own count of one small training, by benchmarks/memory.py, within 15 %."""

import subprocess
import sys

import pytest
from support.device import DEVICE, ROOT, SEEN, needs_card
from support.processes import ENVIRONMENT


@needs_card("torch counts a GPU's memory; a CPU's is measured by benchmarks/memory.py, in minutes")
@pytest.mark.parametrize("case", ["float32, log-probs precomputed"])
def test_the_estimate_is_what_a_training_takes(case):
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--device", DEVICE.type]
    command += ["--cases", case, "--headlines"]
    done = subprocess.run(command, env=ENVIRONMENT | SEEN, capture_output=True, text=True, timeout=300, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(case)]
    ratio = float(line.removeprefix(case).split()[2])
    assert 0.85 <= ratio <= 1.15, done.stdout + done.stderr[-3000:]
