"""What the model card says of a run: plain data, from what the trainer holds."""

from collections.abc import Mapping, Sized
from typing import Any

from blur_trainer.data.topics import TopicDataset
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers.config import UnlearningConfig

_SETTINGS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("weight", "top_logit_filter"),  # of ULD
)


def sets_info(dataset: Any) -> dict[str, dict[str, Any]]:
    """Size and topics of the forget and the retain set."""
    return {role: _set_info(dataset, role) for role in ("forget", "retain")}


def settings_info(
    args: UnlearningConfig, objectives: Mapping[str, Objective], rule: Any, trained: Any, num_processes: int
) -> dict[str, Any]:
    """The settings that say how a run was made."""
    return {
        **{f"{role}_objective": repr(objective) for role, objective in objectives.items()},
        "rule": repr(rule),
        "parameters": trained,
        **({"topics": args.topics} if args.topics else {}),
        **{name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)},
        **({"max_steps": args.max_steps} if args.max_steps > 0 else {}),
        "num_processes": num_processes,
        "max_grad_norm": args.max_grad_norm,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "seed": args.seed,
    }


def _set_info(dataset: Any, role: str) -> dict[str, Any]:
    if isinstance(dataset, TopicDataset):
        by_topic = dataset.forget_by_topic if role == "forget" else dataset.retain_by_topic
        different = {id(rows): rows for rows in by_topic.values() if rows is not None}
        name = ", ".join(by_topic) if len(different) == len(by_topic) else None  # one set may serve all topics
        return {"name": name, "size": sum(map(len, different.values()))}
    rows = getattr(dataset, role, None)
    return {"size": len(rows) if isinstance(rows, Sized) else None}
