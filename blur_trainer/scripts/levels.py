"""Where forgetting ends, as a command line says it: `--level`."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import PartialState

from blur_trainer.evaluation.level import Level
from blur_trainer.scripts.methods import changed

WAYS = ("retrained", "unseen", "exchanged")
HELP = (
    "Where forgetting ends: retrained (a loss for each row, of the retrained model), unseen (the target's loss on rows "
    "that nobody saw), exchanged (an estimate), or nats per token."
)


def check_level(asked: str | None, args: Any) -> None:
    """Raises `ValueError` for what is neither a way nor a number, or if the trainer's arguments have a level too."""
    if asked is None:
        return
    if args.forget_level is not None:
        raise ValueError(f"--level {asked} and --forget_level {args.forget_level} both give a level: pass one of them.")
    if asked in WAYS:
        return
    try:
        Level(float(asked))
    except ValueError as error:
        raise ValueError(f"--level {asked!r}: choose among {', '.join(WAYS)}, or give nats per token.") from error


def measured(
    asked: str,
    forget: Any,
    retain: Any,
    unseen: Any,
    target: str,
    retrained: str | None,
    load: Callable[[str], Any],
    tokenizer: Any,
    **how: Any,
) -> Level:
    """
    The level, printed.

    Args:
        asked: one of the ways, or a number as text.
        forget, retain, unseen: the rows, in the template of the training. `unseen` is `None` where the data has none.
        target, retrained: names of the models; `None` without a retrained one.
        load: returns a loaded model.
        how: as of [`Level`].

    Raises:
        `ValueError`: there is no such model or there are no such rows.
    """
    if asked not in WAYS:
        return _said(Level(float(asked)))
    if asked == "retrained" and retrained is None:
        raise ValueError("--level retrained, but there is no retrained model: pass --level unseen, or a number.")
    if asked == "unseen" and unseen is None:
        raise ValueError(
            "--level unseen, but the data has no rows that nobody saw: pass --level retrained or a number."
        )
    if asked == "retrained":
        return _said(Level.of_retrained(load(str(retrained)), forget, tokenizer, **how))
    model = load(target)
    if asked == "unseen":
        return _said(Level.of_unseen(model, unseen, tokenizer, **how))
    return _said(Level.of_exchanged(model, forget, retain, tokenizer, **how))


def _said(level: Level) -> Level:
    spread = "" if level.spread is None else f", spread {level.spread:.2f}"
    what = {
        "retrained": "what the retrained model loses on each row to forget",
        "unseen": "what the target loses on rows that nobody saw",
        "exchanged": "an estimate, from rows whose words are exchanged",
        "given": "as given",
    }[level.source]
    PartialState().print(f"Forgetting ends at {level.nats:.2f} nats per token{spread}: {what}.", file=sys.stderr)
    return level


def needs_level(args: Any) -> bool:
    """Whether the method of these arguments has no end of its own and none was given."""
    own = args.forget_objective_kwargs or {}
    own = json.loads(own) if isinstance(own, str) else own
    return args.forget_objective == "target_loss" and args.forget_level is None and "level" not in own


def with_level(args: Any, sets: Mapping[str, Any], level: Level) -> tuple[Any, dict[str, Any]]:
    """The arguments and training sets of a method that ends at the level, row by row where that is known."""
    if level.per_example is None:
        return changed(args, forget_level=level.nats), dict(sets)
    forget = level.attached(sets["forget_dataset"])
    return changed(args, forget_level="column"), {**sets, "forget_dataset": forget}
