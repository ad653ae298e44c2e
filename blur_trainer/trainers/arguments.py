"""What is not taken: arguments of other trainers, settings that mean something else here, another class's defaults."""

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

_REFUSED = {
    "compute_loss_func": "the objectives define the loss: pass a `forget_objective` or `retain_objective` of your own, "
    "or override `compute_loss`",
    "train_dataset": "pass `forget_dataset` and `retain_dataset`",
    "tokenizer": "pass it as `processing_class`",
    "formatting_func": "map the datasets to one of the formats before (docs/quickstart.md, Data formats)",
}
#: TRL's settings that mean the same here
_SHARED = ("max_length", "dataset_num_proc", "model_init_kwargs")
#: TRL's settings -> what to set here instead
_INSTEAD = {
    "beta": "`forget_objective_kwargs={{'beta': {value!r}}}`",
    "precompute_ref_log_probs": "`precompute_ref_logps={value!r}`",
}


def check_unknown(trainer: type, unknown: Mapping[str, Any]) -> None:
    """Raises `TypeError` for arguments that the trainer does not take, and says what to pass instead."""
    for name in unknown:
        if name in _REFUSED:
            raise TypeError(f"{trainer.__name__} takes no `{name}`: {_REFUSED[name]}.")
        makers = [vars(cls)["__init__"] for cls in trainer.__mro__ if "__init__" in vars(cls)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters} - {*_REFUSED, "self"}
        close = "".join(f" Did you mean `{match}`?" for match in difflib.get_close_matches(name, known, n=1))
        raise TypeError(f"{trainer.__name__} takes no `{name}`.{close}")


def check_settings(args: TrainingArguments) -> None:
    """Raises `ValueError` for settings of `TrainingArguments` that cannot work here."""
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy='batch_rebalance'` balances the lengths of single examples, and each batch here "
            "has two of them, a forget and a retain example: choose 'random', 'sequential' or 'group_by_length'."
        )


def check_defaults(wanted: type, args: Any, given: Collection[str] = ()) -> None:
    """
    Raises `TypeError` if `args`, a config of another class than `wanted`, would bring that class's defaults along.

    `BLURTrainer(model, UnlearningConfig(...))` would run a plain sum otherwise. `given`: settings that do not count,
    because the trainer got an object instead.
    """
    if isinstance(args, wanted):
        return
    defaults = {f.name: _default(f) for f in fields(type(args))}
    for f in fields(wanted):
        if f.name in given or f.name not in defaults or defaults[f.name] == _default(f):
            continue
        if getattr(args, f.name) == defaults[f.name]:
            raise TypeError(
                f"`args` is a `{type(args).__name__}`, which has `{f.name}={defaults[f.name]!r}` where "
                f"`{wanted.__name__}` has {_default(f)!r}: pass a `{wanted.__name__}`. (If the former is meant, it has "
                f"a trainer of its own, or `{wanted.__name__}({f.name}={defaults[f.name]!r})` says so.)"
            )


def shared_settings(args: TrainingArguments) -> dict[str, Any]:
    """
    The settings of a `TrainingArguments` of another library, such as TRL's configs, that mean the same here.

    Raises `ValueError` if a setting of that library's own is not at its default: nothing is dropped in silence.
    """
    base = {f.name for f in fields(TrainingArguments)}
    taken = {f.name: getattr(args, f.name) for f in fields(type(args)) if f.init and f.name in base | set(_SHARED)}
    default = type(args)(**{name: value for name, value in taken.items() if name in base})
    for f in fields(type(args)):
        value = getattr(args, f.name)
        if f.name in taken or f.name in base or value == getattr(default, f.name):
            continue
        instead = _INSTEAD.get(f.name, "").format(value=value)
        raise ValueError(
            f"`{type(args).__name__}` has `{f.name}={value!r}`, which is no setting of this training: pass an "
            "`UnlearningConfig` or a preset of it"
            + (f", with {instead}." if instead else ", or leave it at its default.")
        )
    return taken


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()
