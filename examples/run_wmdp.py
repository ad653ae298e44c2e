"""Unlearn hazardous knowledge, topic by topic, with BLUR-RMU or another method; judge it by multiple-choice questions.

deepspeed examples/run_wmdp.py                                  # invented topics, tiny Llama: minutes
python examples/run_wmdp.py --method npo --compare none
deepspeed examples/run_wmdp.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path HuggingFaceH4/zephyr-7b-beta           # WMDP as the paper has it (--recipe paper)

`blur-trainer wmdp` is the same from any folder, `deepspeed --module blur_trainer wmdp` on several GPUs. What it does,
from the data through the trainer to the report, is written down in seven steps in blur_trainer/scripts/run_wmdp.py.
"""

from blur_trainer.scripts.run_wmdp import main
from blur_trainer.scripts.running import run

if __name__ == "__main__":
    run(main)
