"""Run on two processes by tests/uld/test_uld_engines.py: one ULD training per engine, saved."""

import copy
import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import LoraConfig
from support.models import examples, tiny_llama
from support.parity import ENGINES as SETTINGS
from support.processes import freeze_imports
from transformers import PrinterCallback

from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def make(model, folder, batch_size, **settings):
    args = ULDConfig(
        str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_assistant_layers=2,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    trainer = ULDTrainer(
        model,
        args,
        examples(8, seed=1),
        examples(11, seed=2),
        augment_forget=examples(4, seed=3),
        augment_retain=examples(5, seed=4),
        peft_config=LORA,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def refused(engine, target, folder):
    """What is said to a loaded model, which FSDP2 and DeepSpeed would take the weights from."""
    try:
        make(tiny_llama(0, layers=4), folder, 2, **copy.deepcopy(SETTINGS[engine]))
    except ValueError as error:
        return str(error)
    return ""


def main(folder, engines):
    datasets.disable_progress_bars()
    freeze_imports()
    said = {}
    for engine in engines:
        said[engine] = refused(engine, folder / "target", folder / "refused")
        trainer = make(str(folder / "target"), folder / engine, 2, **copy.deepcopy(SETTINGS[engine]))
        trainer.train()
        trainer.save_model()
        try:
            trainer.unlearned_model()(torch.tensor([[1, 5]]))
        except RuntimeError as error:
            said[engine] += str(error)
    if PartialState().is_main_process:
        (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts an exit now and then, after everything is written
