"""What bfloat16 weights lose in rounding: unlearning with weights of float32 and of bfloat16, otherwise the same.

    python benchmarks/weight_dtype.py MODEL forget.csv retain.jsonl
    python benchmarks/weight_dtype.py MODEL forget.csv retain.jsonl --rates 1e-5 1e-4

Gradients are the same kind of float32 in both. Only the weights of the second are rounded to bfloat16 after each step,
as AdamW on bfloat16 weights does. Printed: which share of the weights has moved, how far all of them together, over the
float32 training's way, and the loss of the forget answers in nats per token.
"""

import argparse
import tempfile
from typing import Any

import datasets
import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from blur_trainer import BLURConfig, BLURTrainer


class Rounding(TrainerCallback):
    """Keeps the weights in bfloat16 between the steps."""

    def on_step_end(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        for parameter in model.parameters() if model is not None else ():
            parameter.data.copy_(parameter.data.bfloat16())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def unlearn(options: argparse.Namespace, rate: float, rounded: bool) -> tuple[Tensor, float]:
    """How each weight has changed, and the forget loss after the last step."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    files = [options.forget, options.retain]
    forget, retain = (load_dataset("csv" if f.endswith(".csv") else "json", data_files=f, split="train") for f in files)
    if rounded:
        model.bfloat16().float()  # in place
    before = flat(model)
    with tempfile.TemporaryDirectory() as folder:
        args = BLURConfig(
            folder,
            learning_rate=rate,
            lr_scheduler_type="constant",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            forget_objective_kwargs={"beta": 0.03},
            gamma=0.1,
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = BLURTrainer(
            model,
            args,
            forget,
            retain,
            eval_dataset=forget,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[Rounding()] if rounded else [],
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return flat(model) - before, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "forget", "retain"):
        parser.add_argument(name)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 1e-3])
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(f"{'rate':>8} {'weights':>9} {'moved':>7} {'way':>6} {'forget loss':>12}")
    for rate in options.rates:
        exact, loss = unlearn(options, rate, rounded=False)
        rounded, lost = unlearn(options, rate, rounded=True)
        for name, change, nats in (("float32", exact, loss), ("bfloat16", rounded, lost)):
            moved, way = (change != 0).double().mean().item(), (change.norm() / exact.norm()).item()
            print(f"{rate:8.0e} {name:>9} {moved:7.3f} {way:6.2f} {nats:12.3f}", flush=True)


if __name__ == "__main__":
    main()
