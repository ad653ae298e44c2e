"""`blur-trainer tofu`: unlearn TOFU's fictitious authors by any method. As `examples/run_tofu.py`."""

from blur_trainer.cli.benchmark import Benchmark
from blur_trainer.scripts import run_tofu, tofu

main = Benchmark("tofu", tofu.TOFUArguments, tofu.METHODS, run_tofu.main)
