"""Short trainings that several tests share: the settings, and how weights are compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.models import tiny_llama
from support.processes import freeze_imports
from torch import Tensor, nn

from blur_trainer.trainers.blur import BLURConfig, BLURTrainer

Weights = Mapping[str, Tensor]

freeze_imports()


def settings(output_dir: Path | str, config: Any = BLURConfig, **kwargs: Any) -> Any:
    """Two epochs on the CPU, every step logged, nothing saved unless asked."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return config(output_dir=str(output_dir), **(defaults | kwargs))


def train(args: BLURConfig, forget: Any, retain: Any, model: nn.Module | None = None, **kwargs: Any) -> BLURTrainer:
    """A finished training of a fresh tiny model (or of `model`)."""
    trainer = BLURTrainer(tiny_llama() if model is None else model, args, forget, retain, **kwargs)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(a: Weights, b: Weights) -> float:
    """The largest difference of any weight; the names must agree."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def probe() -> Tensor:
    """Token ids `(2, 6)` to compare logits on."""
    return torch.tensor([[1, 5, 9, 13, 17, 21], [1, 4, 40, 41, 42, 2]])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    was_training = model.training
    answer = model.eval()(input_ids=probe(), use_cache=False).logits.clone()
    model.train(was_training)
    return answer


def training_logs(trainer: BLURTrainer) -> list[dict[str, float]]:
    """The log entries of optimizer steps (neither evaluation nor the final summary)."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
