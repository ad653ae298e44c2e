"""Unlearn TOFU's fictitious authors by any method; measure forget quality and model utility.

accelerate launch examples/run_tofu.py                                 # embedded authors, tiny Llama: minutes
accelerate launch examples/run_tofu.py --method simnpo --split forget05 --level unseen
accelerate launch examples/run_tofu.py --method blur-npo               # BLUR as published: no end of its own
accelerate launch examples/run_tofu.py --data_dir DIR --max_rows 60    # local JSON/JSONL, tiny Llama
accelerate launch examples/run_tofu.py --method npo --template llama3 \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full
accelerate launch examples/run_tofu.py --recipe open-unlearning        # published settings: docs/recipes.md

`blur-trainer tofu` is the same from any folder; on several GPUs `accelerate launch -m blur_trainer tofu`. What it does,
from the data through the trainer to the report, is written down in seven steps in blur_trainer/scripts/run_tofu.py.
"""

from blur_trainer.scripts.run_tofu import main
from blur_trainer.scripts.running import run

if __name__ == "__main__":
    run(main)
