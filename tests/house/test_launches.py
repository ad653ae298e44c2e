"""benchmarks/launches.py runs, and each of its units counts something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"


@pytest.mark.full
def test_every_unit_is_counted(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--tiny", "--json", tmp_path / "counts.json"], check=True)
    found = json.loads((tmp_path / "counts.json").read_text())
    assert len(found) == 14
    for name, counts in found.items():
        assert sum(counts["operators"].values()) > 50 and sum(counts["waits"].values()) >= 1, name
        ours = sum(n for key, n in counts["waits"].items() if key.startswith("blur_trainer/"))
        # one for a step, and for each of the eight passes of `score_variants`
        assert ours <= (8 if name.startswith("score_variants") else 1), name
