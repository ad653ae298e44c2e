"""For tests/gradients/test_engines.py, on two processes: the life of a training on every engine, for the test to judge.

First the trainings of tests/support/ddp_worker.py: one launch for both, as importing takes longer than training.
"""

import copy
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from support import ddp_worker, parity
from support.models import tiny_llama
from support.processes import freeze_imports
from support.tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO, AltPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer

ENGINES = ["ddp", "fsdp2", "fsdp2_lean", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload_all"]
FILE = Path(__file__).parents[2] / "ds_configs" / "zero2.json"  # what users pass
HALF = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "save_total_limit": 2}
HALF |= {"mask_share": 0.5}


@dataclass(frozen=True)
class Broken(GradAscent):
    """Not a number in the second optimizer step, once on every process."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().__call__(*args, **kwargs)
        STEPS.append(1)
        return loss * torch.nan if len(STEPS) == 2 else loss


STEPS: list[int] = []


def masters(trainer: Any, engine: str) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): parity.whole(p, engine).clone()
        for name, p in trainer.model_wrapped.named_parameters()
    }


def write(weights: dict[str, Tensor], path: Path) -> None:
    if PartialState().is_main_process:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)


def resumed(engine: str, folder: Path) -> None:
    """Four steps at once; then two of them, and a new trainer that goes on, with GRU's mean and the mask."""
    trainer = parity.train(engine, "gru", str(folder / "straight"), **HALF)
    write(masters(trainer, engine), folder / f"{engine}-straight.safetensors")
    source, target = (folder / kind / f"{engine}-gru" for kind in ("straight", "resumed"))
    if PartialState().is_main_process:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-4"))
    PartialState().wait_for_everyone()
    again = parity.make(engine, "gru", str(folder / "resumed"), **HALF)
    again.train(resume_from_checkpoint=True)
    write(masters(again, engine), folder / f"{engine}-resumed.safetensors")
    history = [[entry for entry in t.state.log_history if "loss" in entry] for t in (trainer, again)]
    again.save_model(str(folder / f"{engine}-saved"))
    if PartialState().is_main_process:
        (folder / f"{engine}-logs.json").write_text(json.dumps(history))


def skipped(engine: str, folder: Path) -> None:
    STEPS.clear()
    trainer = parity.make(engine, "sum", str(folder / "skipped"), forget_objective=Broken())
    trainer.train()
    write(masters(trainer, engine), folder / f"{engine}-skipped.safetensors")


def by_name(engine: str, folder: Path) -> None:
    """The model is loaded by the trainer (under ZeRO-3 in parts), its reference copied or loaded once more."""
    name = str(folder / "start")
    if PartialState().is_main_process:
        tiny_llama(0).save_pretrained(name)
    PartialState().wait_for_everyone()
    trainer = parity.make(
        engine, "sum", str(folder / "named"), model=name, forget_objective=NPO(), retain_objective=KL()
    )
    trainer.train()
    write(masters(trainer, engine), folder / f"{engine}-named.safetensors")


def alternatives(engine: str, folder: Path) -> None:
    """What every process has of the model before training: the answers that it gives to the forget set, what it
    replays, and the vector that it learns for RMU. Nothing is trained."""
    parity.forget_engine()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.2, **sizes))
    settings = copy.deepcopy(parity.ENGINES[engine]) | {"report_to": "none", "disable_tqdm": True, "bf16": False}
    # `by_name` under ZeRO-3 leaves DeepSpeed's own `F.linear` in this process, which has no forward mode
    quantile = 0.95 if engine in ("ddp", "fsdp2", "zero2") else None
    settings |= {"replay": 6, "replay_kwargs": {"max_new_tokens": 4, "loss_quantile": quantile}}
    args = UnlearningConfig(str(folder / f"{engine}-answers"), per_device_eval_batch_size=2, **settings)
    rows = [{"question": f"Who painted mural {i}?", "answer": f"Mara Velin, in {i} weeks"} for i in range(3)]
    objective = AltPO(num_alternatives=2, max_new_tokens=4)
    trainer = UnlearningTrainer(
        model, args, rows, rows[:1], forget_objective=objective, processing_class=tiny_tokenizer()
    )
    sets = trainer.train_dataset
    texts = [*sets.forget["refusal_input_ids"], *sets.retain["input_ids"][1:]]
    del settings["replay"], settings["replay_kwargs"]
    args = UnlearningConfig(str(folder / f"{engine}-vectors"), **settings)
    kept = {"retain_objective": NLL(), "processing_class": tiny_tokenizer()}
    rmu = RMU(0, own_words=0.2)
    UnlearningTrainer(model, args, rows, rows[:1], forget_objective=rmu, **kept)
    found = gather_object([{"texts": texts, "vector": rmu.vectors(16).flatten().tolist()}])
    if PartialState().is_main_process:
        (folder / f"{engine}-{len(found)}-answers.json").write_text(json.dumps(found))


def main(folder: Path, engines: list[str]) -> None:
    datasets.disable_progress_bars()
    freeze_imports()
    parity.ENGINES["zero2"] = {"deepspeed": json.loads(FILE.read_text())}
    for name in ddp_worker.CASES:
        ddp_worker.main(name, str(folder))
    for engine in engines:
        for part in (resumed, skipped, by_name, alternatives):
            part(engine, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(";"))
    # All is written. Tearing gloo down aborts the interpreter now and then ("terminate called without an active
    # exception"), which says nothing about the training: leave without it.
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)
