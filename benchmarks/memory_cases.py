"""The trainings of `memory.py`: a model, how it is stored and trained, settings."""

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from peft import LoraConfig
from shapes import SHAPES, llama
from stepping import PINNED
from transformers import LlamaConfig

from blur_trainer.memory.estimate import MemoryEstimate, estimate_memory
from blur_trainer.trainers.blur import BLURConfig

LENGTH = 2048  # of the large models
SLOT_ON_CPU, ONE_BUFFER = {"offload_forget_gradient": True}, {"single_gradient_buffer": True}
CHECKPOINTS = {"activation_checkpointing": True}


@dataclass(frozen=True)
class Case:
    """One training: a model, how it is stored and trained, and the settings."""

    config: LlamaConfig
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lora: bool = False
    batch_size: int = 2
    length: int = 256
    limit: float | None = None  # GB on one card

    def peft_config(self) -> LoraConfig | None:
        return LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0) if self.lora else None

    def arguments(self, device: str, folder: str = "unused") -> BLURConfig:
        return BLURConfig(
            output_dir=folder,
            max_length=self.length,
            per_device_train_batch_size=self.batch_size,
            max_steps=3,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(PINNED | self.settings),
        )

    @property
    def accumulation(self) -> int:
        return self.settings.get("gradient_accumulation_steps", 1)

    @property
    def optim(self) -> str:
        return self.settings.get("optim", "AdamW")

    def estimate(self, device: str) -> MemoryEstimate:
        # `use_cpu`: settings such as bf16 are checked against the machine, which need not be the one estimated for
        arguments = self.arguments("cpu")
        return estimate_memory(self.config, arguments, peft_config=self.peft_config(), dtype=self.dtype, device=device)


KNOWN, COPY = {"precompute_ref_logps": True}, {}
RMU: dict[str, Any] = {
    "forget_objective": "rmu",
    "forget_objective_kwargs": {"layer": 5},
    "retain_objective": "activation_match",
    "retain_objective_kwargs": {"layer": 5},
}
CHOSEN = {"train_layers": "3,4,5", "train_parameters": "mlp.down_proj"}
CASES = {
    "float32, reference copied": Case(llama(512, 6)),
    "float32, log-probs precomputed": Case(llama(512, 6), KNOWN),
    "float32, long, precomputed": Case(llama(384, 6), KNOWN, length=768),
    "float32, long, checkpointing": Case(llama(384, 6), KNOWN | CHECKPOINTS, length=768),
    "float32, fused head": Case(llama(384, 4), KNOWN | {"fused_lm_head": True}, length=512),
    "float32, KL": Case(llama(384, 4), {"retain_objective": "kl"}, length=512),
    "float32, accumulation 2": Case(llama(512, 4), KNOWN | {"gradient_accumulation_steps": 2}),
    "float32, Adafactor": Case(llama(512, 6), KNOWN | {"optim": "adafactor"}, length=64),
    "float32, 8-bit Adam": Case(llama(512, 6), KNOWN | {"optim": "adamw_8bit"}),
    "bfloat16, reference copied": Case(llama(768, 6), dtype="bfloat16"),
    "autocast to bfloat16": Case(llama(512, 6), KNOWN | {"bf16": True}, length=512),
    "LoRA, float32": Case(llama(768, 6), lora=True),
    "LoRA, bfloat16, checkpointing": Case(llama(1024, 6), CHECKPOINTS, dtype="bfloat16", lora=True, length=512),
    "float32, forget gradient on the CPU": Case(llama(512, 6), KNOWN | SLOT_ON_CPU),
    "float32, one gradient buffer": Case(llama(512, 6), KNOWN | ONE_BUFFER | {"optim": "sgd"}),
    "float32, NPO, two layers trained": Case(llama(512, 6), {"train_layers": "3,4"}, length=512),
    "float32, BLUR-RMU, chosen matrices": Case(llama(768, 8), RMU | CHOSEN, length=512),
    "bfloat16, BLUR-RMU, chosen matrices": Case(llama(1024, 8), RMU | CHOSEN, dtype="bfloat16", length=512),
    "float32, BLUR-RMU, one matrix": Case(
        llama(768, 8), RMU | {"train_layers": "5", "train_parameters": "mlp.down_proj"}, length=1024
    ),
    "float32, BLUR-RMU, checkpointing": Case(llama(768, 8), RMU | CHOSEN | CHECKPOINTS, length=768),
    "float32, RMU, all parameters below": Case(llama(512, 8), RMU | {"rule": "sum"}, length=256),
    "float32, RMU with NLL": Case(llama(512, 6), RMU | {"retain_objective": "nll", "retain_objective_kwargs": None}),
    "float32, RMU with NLL, chosen matrices": Case(
        llama(512, 6), RMU | CHOSEN | {"retain_objective": "nll", "retain_objective_kwargs": None}, length=512
    ),
    "autocast to bfloat16, BLUR-RMU": Case(llama(768, 8), RMU | CHOSEN | {"bf16": True}, length=512),
    "LoRA, float32, BLUR-RMU": Case(llama(768, 8), RMU | {"train_layers": "3,4,5"}, lora=True, length=512),
}
#: bitsandbytes' states have 1 byte; without it AdamW's have the two of the weights
ADAM = "adamw_8bit" if find_spec("bitsandbytes") else "adamw_torch_fused"
HEADLINES = {
    "BLUR-NPO with LoRA, 8B": Case(
        SHAPES["8B"], CHECKPOINTS, dtype="bfloat16", lora=True, batch_size=1, length=LENGTH, limit=40
    ),
    "BLUR-NPO, all parameters, 8B": Case(
        SHAPES["8B"],
        KNOWN | CHECKPOINTS | SLOT_ON_CPU | {"optim": ADAM},
        "bfloat16",
        batch_size=1,
        length=LENGTH,
        limit=80,
    ),
}


def supported(case: Case, device: str) -> bool:
    """Settings of this version; the forget gradient on the CPU saves nothing where all is on the CPU."""
    if device == "cpu" and SLOT_ON_CPU.items() <= case.settings.items():
        return False
    return set(case.settings) <= {f.name for f in fields(BLURConfig)}
