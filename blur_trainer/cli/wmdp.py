"""`blur-trainer wmdp`: unlearn hazardous knowledge, topic by topic. As `examples/run_wmdp.py`."""

from blur_trainer.cli.benchmark import Benchmark
from blur_trainer.scripts import run_wmdp, wmdp

main = Benchmark("wmdp", wmdp.WMDPArguments, wmdp.METHODS, run_wmdp.main)
