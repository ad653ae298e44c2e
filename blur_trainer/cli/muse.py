"""`blur-trainer muse`: unlearn a MUSE corpus. As `examples/run_muse.py`."""

from blur_trainer.cli.benchmark import Benchmark
from blur_trainer.scripts import muse, run_muse

main = Benchmark("muse", muse.MUSEArguments, {}, run_muse.main)
