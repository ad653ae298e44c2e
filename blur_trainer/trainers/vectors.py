"""RMU's control vectors in checkpoints: written with each, read back on resume."""

from typing import TYPE_CHECKING, Any

from blur_trainer.models.forward import hidden_size
from blur_trainer.objectives.activations import RMU
from blur_trainer.objectives.control_vectors import load_vectors, save_vectors

if TYPE_CHECKING:
    from blur_trainer.trainers.unlearning import UnlearningTrainer


def keep_vectors(trainer: "UnlearningTrainer", folder: str) -> None:
    """They follow from the seed, but the seed of a resumed training may be another one, or torch's generator."""
    objective = trainer.objectives["forget"]
    if isinstance(objective, RMU) and trainer.args.should_save:
        save_vectors(folder, objective.topics, objective.vectors(_size(trainer)))


def restore_vectors(trainer: "UnlearningTrainer", checkpoint: str | None) -> None:
    """Those of the checkpoint, on every process. Raises where they are missing, or of other topics or sizes."""
    objective = trainer.objectives["forget"]
    if isinstance(objective, RMU) and checkpoint is not None:
        objective.restore(load_vectors(checkpoint, objective.topics, _size(trainer)))


def _size(trainer: "UnlearningTrainer") -> int:
    model: Any = trainer.model
    return hidden_size(model)
