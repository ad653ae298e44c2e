"""Compare methods over several seeds: runs of TOFU or WMDP, then mean and spread of each.

python examples/compare.py                                    # 4 methods, 3 seeds, tiny Llama: a quarter of an hour
python examples/compare.py --methods npo simnpo --seeds 0 1 --split forget05
python examples/compare.py --strengths 0.1 0.3 1 3            # at equal forgetting, and at equal utility
python examples/compare.py --benchmark wmdp --methods blur-rmu rmu
python examples/compare.py --resume_from_checkpoint true      # after an interrupt: what is not finished

Arguments that are not listed by --help go to the runs. `blur-trainer compare` is the same from any folder. What it does
is written down in blur_trainer/scripts/compare.py.
"""

from blur_trainer.scripts.compare import main
from blur_trainer.scripts.running import run

if __name__ == "__main__":
    run(main)
