"""Real trainers, driven one optimizer step at a time: what `step_cost.py`, `engines.py`, `uld_train.py` compare."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from shapes import VOCAB
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.integrations.deepspeed import deepspeed_init

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.grad_diff import GradDiffConfig, GradDiffTrainer
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

SIZES = {
    "2M": (96, 4),
    "15M": (320, 8),
    "27M": (384, 12),
    "60M": (640, 10),
    "350M": (1536, 12),
    "1B": (2048, 20),
}  # width, layers
STOCK, PASSES = "two stock steps", "two stock passes, one step"
GRAD_DIFF, BLUR_GA = "GradDiff (ascent + NLL, sum)", "BLUR (ascent + NLL)"
ONE_BUFFER = "BLUR (ascent + NLL), one buffer"
BLUR_NPO, BLUR_NPO_LIVE = "BLUR-NPO, log-probs precomputed", "BLUR-NPO, frozen reference copy"
NPO_NLL, ULD = "NPO + NLL, all parameters", "ULD, a quarter of the layers"
VARIANTS = (STOCK, PASSES, GRAD_DIFF, BLUR_GA, ONE_BUFFER, BLUR_NPO, BLUR_NPO_LIVE)
ROWS = 64
#: off unless a benchmark sets it, whatever the default of the device is: so that numbers stay comparable
PINNED = {"activation_checkpointing": False, "bf16": False}


def build_model(size: str, device: str = "cpu") -> LlamaForCausalLM:
    width, layers = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        tie_word_embeddings=False,
    )
    with torch.device(device):  # random weights of a large model take long on a CPU
        return LlamaForCausalLM(config)


def rows(length: int, seed: int, **columns: float) -> list[dict[str, Any]]:
    """Rows of one length, all of them answer: every variant multiplies the same matrices."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (ROWS, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, **columns} for row in ids]


def build_trainer(variant: str, size: str, options: argparse.Namespace, folder: str, **engine: Any) -> Trainer:
    """`engine`: arguments that choose FSDP or DeepSpeed."""
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": options.device == "cpu" and not engine,  # with it, accelerate overlooks DeepSpeed
        "dataloader_pin_memory": options.device == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        **PINNED,
        **engine,
    }
    model = build_model(size, "cpu" if engine else options.device)
    if variant in (STOCK, PASSES):
        arguments["gradient_accumulation_steps"] = 2 if variant == PASSES else 1
        both = Dataset.from_list(rows(options.length, seed=1) + rows(options.length, seed=2))
        return Trainer(
            model,
            UnlearningConfig(**arguments),  # for a plain Trainer: with it, accelerate counts CPU processes
            train_dataset=both,
            data_collator=UnlearningCollator(pad_token_id=0),
        )
    known = {"ref_logps": -9.0 * options.length} if variant == BLUR_NPO else {}
    datasets = {
        "forget_dataset": rows(options.length, seed=1, **known),
        "retain_dataset": rows(options.length, seed=2),
    }
    if variant == ULD:
        model.save_pretrained(f"{folder}/target")
        more = {"augment_forget": rows(options.length, seed=3), "augment_retain": rows(options.length, seed=4)}
        return ULDTrainer(f"{folder}/target", ULDConfig(**arguments), **datasets, **more)
    if variant == NPO_NLL:
        return UnlearningTrainer(model, UnlearningConfig(**arguments, forget_objective="npo"), **datasets)
    if variant == GRAD_DIFF:
        return GradDiffTrainer(model, GradDiffConfig(**arguments), **datasets)
    objective = "grad_ascent" if variant in (BLUR_GA, ONE_BUFFER) else "npo"
    arguments |= {"precompute_ref_logps": variant == BLUR_NPO, "single_gradient_buffer": variant == ONE_BUFFER}
    config = BLURConfig(**arguments, forget_objective=objective)
    return BLURTrainer(model, config, **datasets)


class Steps:
    """A trainer, stopped between two optimizer steps: `__call__` does the work of one forget and one retain batch."""

    def __init__(self, variant: str, size: str, options: argparse.Namespace, folder: str, **engine: Any):
        made = build_trainer(variant, size, options, folder, **engine)
        self._settle(made, options, accumulation=2 if variant == PASSES else 1, steps=2 if variant == STOCK else 1)

    @classmethod
    def of(cls, trainer: Trainer, options: argparse.Namespace) -> "Steps":
        """Of a trainer made elsewhere, which accumulates nothing."""
        steps = cls.__new__(cls)
        steps._settle(trainer, options, accumulation=1, steps=1)
        return steps

    def _settle(self, trainer: Trainer, options: argparse.Namespace, accumulation: int, steps: int) -> None:
        self.trainer = trainer
        if trainer.is_deepspeed_enabled:
            trainer.optimizer, trainer.lr_scheduler = deepspeed_init(trainer, num_training_steps=1_000_000)
        if trainer.args.activation_checkpointing:  # as `Trainer.train` does
            trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
        trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.micro_batches, self.optimizer_steps = accumulation, steps
        self.batches = self._endless()
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if options.device == "cuda" else lambda: None

    def _endless(self) -> Iterator[Any]:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def __call__(self) -> float:
        """Seconds."""
        self.synchronize()
        start = self.clock()
        for _ in range(self.optimizer_steps):
            self._optimizer_step()
        self.synchronize()
        return self.clock() - start

    def _optimizer_step(self) -> None:
        """The body of `Trainer`'s loop over update steps, without callbacks and logging."""
        trainer, model = self.trainer, self.model
        window, num_items = trainer.get_batch_samples(self.batches, self.micro_batches, trainer.args.device)
        for batch in window:
            loss = trainer.training_step(model, batch, num_items)
            torch.isnan(loss).item()  # Trainer's `logging_nan_inf_filter`
            trainer.floating_point_ops(batch)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
