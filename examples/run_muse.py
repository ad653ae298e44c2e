"""Unlearn a MUSE corpus to the level of a model that never saw it; measure what is forgotten, kept and damaged.

accelerate launch examples/run_muse.py                                    # embedded corpora, tiny Llama: minutes
accelerate launch examples/run_muse.py --recipe paper                     # BLUR-NPO as published, alone
accelerate launch examples/run_muse.py --sequence                         # four forget sets, one after another
accelerate launch examples/run_muse.py --data_dir DIR --max_documents 8   # local JSON/JSONL, tiny Llama
accelerate launch examples/run_muse.py --corpus news --model_name_or_path muse-bench/MUSE-News_target \
    --tokenizer meta-llama/Llama-2-7b-hf
accelerate launch examples/run_muse.py --corpus news --recipe paper       # published settings: docs/recipes.md

`blur-trainer muse` is the same from any folder; on several GPUs `accelerate launch -m blur_trainer muse`. What it does,
from the data through the trainer to the report, is written down in seven steps in blur_trainer/scripts/run_muse.py.
"""

from blur_trainer.scripts.run_muse import main
from blur_trainer.scripts.running import run

if __name__ == "__main__":
    run(main)
