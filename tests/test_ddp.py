"""Two processes (gloo, CPU) give the weights and the log of one process with the same windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ddp_worker import CASES, main
from models import tiny_llama
from safetensors.torch import load_file

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(HERE / "ddp_worker.py"), str(folder), ",".join(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        main(name, str(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_weights_of_two_processes_equal_those_of_one(runs, name):
    one, two = (load_file(runs / f"{name}-{count}.safetensors") for count in (1, 2))
    start = dict(tiny_llama(0).named_parameters())
    moved = max((value - start[key]).abs().max() for key, value in one.items())
    assert moved > 1e-3, "nothing moved: the comparison would prove nothing"
    error = max((one[key] - two[key]).abs().max() for key in one)
    assert one.keys() == two.keys()
    assert error / moved < 2e-4


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_the_log_is_that_of_the_whole_batch(runs, name):
    one, two = (json.loads((runs / f"{name}-{count}.json").read_text()) for count in (1, 2))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in (
            "loss",
            "loss/forget",
            "loss/retain",
            "grad/forget_norm",
            "grad/retain_norm",
            "grad/cosine",
            "grad_norm",
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
