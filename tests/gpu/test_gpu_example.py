"""examples/run_muse.py with its own defaults on the device, from arguments to report, on models that know nothing.

The tiny models are made on the CPU whatever there is; the target is loaded to the device, measured and unlearned there.
"""

import importlib.util
import sys

import pytest
import torch
from support.device import DEVICE, ROOT, device_of
from support.example_runs import FILES, PRECOMPUTED, load, with_ignorant_models

import blur_trainer as bt
from blur_trainer.scripts import run_muse

BRIEF = ["--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--eval_strategy", "no", "--no_baseline"]


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("run_muse", ROOT / "examples" / "run_muse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_muse_runs_with_its_defaults(module, tmp_path, monkeypatch):
    seen = []

    class Spy(bt.BLURTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            seen.append((device_of(self.model), self.args.device.type, self.state.global_step > 1))
            return output

    monkeypatch.setattr(run_muse, "BLURTrainer", Spy)
    out = with_ignorant_models(tmp_path / "run", bt.load_muse("embedded"))
    arguments = ["--max_documents", "3", *BRIEF, "--disable_tqdm", "True", "--output_dir", str(out)]
    if DEVICE.type == "cpu":
        arguments += ["--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["run_muse.py", *arguments])
    torch.manual_seed(0)
    module.main()
    assert seen == [(DEVICE.type, DEVICE.type, True)]
    metrics = load(out)
    assert [row["name"] for row in metrics["rows"]] == ["target", "BLUR-Target", "retrain"]
    assert {path.name for path in out.iterdir() if path.is_file()} == (FILES - PRECOMPUTED) | {"replay.json"}
