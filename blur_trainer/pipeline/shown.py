"""What report and model card say of a run: its model, its data with their digests, and all that decided it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from blur_trainer.evaluation.level import Level
from blur_trainer.pipeline.arguments import SETS
from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.pipeline.training import Trained
from blur_trainer.trainers.hidden_tokens import without_prompts

#: what the trainer's configuration decides and a default may have given
_OF_TRAINER = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_length", "replay", "stop_at_level", "seed"),
)


def shown_settings(prepared: Prepared, level: Level, trained: Trained) -> dict[str, Any]:
    """
    All settings, given, derived and by default, for `metrics.json`. Texts of the sets are not among them. Of a
    run that is redacted or goes to the Hub, digests and prompts of replay are not, either: `run.yaml` has them.

    Args:
        prepared: the options and the sets.
        level: where forgetting ends.
        trained: what the training left. Its trainer, if there is one, says the arguments of objectives and rule.
    """
    trainer = trained.trainer
    card = {} if trainer is None else trainer.card_info()
    options = {name: _plain(value) for name, value in prepared.options.items() if name not in (*SETS, "forgotten")}
    final: Any = prepared.args if trainer is None else trainer.args  # the level may have changed it
    args = {name: getattr(final, name) for name in _OF_TRAINER if hasattr(final, name)}
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "model_name_or_path": str(prepared.model_args.model_name_or_path),
        "method": prepared.method.label,
        "forget_level": f"{level.nats:.4g} nats per token ({level.source})",
        **{name: _plain(value) for name, value in args.items()},
        **{name: _plain(each) for name, each in {**prepared.settings, **options}.items() if name not in args},
        **(card.get("hyperparameters") or {}),
        "data": {role: f"{reading.said}; digest {reading.digest}" for role, reading in prepared.sets.items()},
    }
    if prepared.script.redact or final.push_to_hub:
        # a digest lets one test a guess of the data, and prompts may be the user's texts
        found["data"] = {role: reading.said for role, reading in prepared.sets.items()}
        found["replay_kwargs"] = without_prompts(final.replay_kwargs)
    if prepared.forgotten:
        found["forgotten"] = [reading.said for reading in prepared.forgotten]
    if trained.notes:
        found["notes"] = list(trained.notes)
    return found


def _plain(value: Any) -> Any:
    """As JSON can have it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
