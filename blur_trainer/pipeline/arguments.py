"""What `unlearn` is told: the sets, where forgetting ends, and how the result is judged."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from blur_trainer.checks import check_fields
from blur_trainer.pipeline.methods import DEFAULT, METHODS

#: the sets that one may give, in the order of the table
SETS = ("forget", "retain", "hold", "unseen", "paraphrased")
LEVELS = ("retrained", "unseen", "exchanged")
VERDICTS = ("forgotten", "not_forgotten", "over_forgotten", "broken")


@dataclass
class SourceArguments:
    """How the sets are read."""

    forget_columns: str | None = field(
        default=None, metadata={"help": "Which column is what: prompt=question,completion=response."}
    )
    retain_columns: str | None = field(default=None, metadata={"help": "The same of retain."})
    hold_columns: str | None = field(default=None, metadata={"help": "The same of hold."})
    unseen_columns: str | None = field(default=None, metadata={"help": "The same of unseen."})
    paraphrased_columns: str | None = field(default=None, metadata={"help": "The same of paraphrased."})
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    retain_config: str | None = field(default=None, metadata={"help": "The same of retain."})
    hold_config: str | None = field(default=None, metadata={"help": "The same of hold."})
    unseen_config: str | None = field(default=None, metadata={"help": "The same of unseen."})
    paraphrased_config: str | None = field(default=None, metadata={"help": "The same of paraphrased."})
    forget_split: str | None = field(
        default=None, metadata={"help": "Split of a dataset on the Hub, or file of a folder."}
    )
    retain_split: str | None = field(default=None, metadata={"help": "The same of retain."})
    hold_split: str | None = field(default=None, metadata={"help": "The same of hold."})
    unseen_split: str | None = field(default=None, metadata={"help": "The same of unseen."})
    paraphrased_split: str | None = field(default=None, metadata={"help": "The same of paraphrased."})
    limit: int | None = field(default=None, metadata={"help": "Read the first rows of each set only."})
    chat_template: str = field(
        default="auto", metadata={"help": "auto (the tokenizer's), never, or a file with a Jinja template."}
    )


@dataclass
class UnlearnArguments:
    """What to forget, what to keep, and where forgetting ends. In memory, sets may be datasets or lists, too."""

    forget: str | None = field(
        default=None, metadata={"help": "What to forget: a file, a folder, - for stdin, or a dataset on the Hub."}
    )
    retain: str | None = field(default=None, metadata={"help": "What to keep."})
    hold: str | None = field(
        default=None, metadata={"help": "What the model knows and neither set mentions: only measured."}
    )
    unseen: str | None = field(
        default=None, metadata={"help": "Of the kind of forget, but no model saw it: gives the level."}
    )
    paraphrased: str | None = field(
        default=None, metadata={"help": "The questions of forget in other words: only measured."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where the model has none beside it."})
    method: str = field(default=DEFAULT, metadata={"choices": list(METHODS), "help": "How to unlearn."})
    retrained: str | None = field(
        default=None, metadata={"help": "A model that never saw the forget set: gives the level row by row."}
    )
    level: str | None = field(
        default=None,
        metadata={"help": "Where it ends: retrained, unseen, exchanged (an estimate) or nats per token."},
    )
    eval_rows: int = field(default=200, metadata={"help": "Rows of each set that are measured."})
    lm_eval: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness to measure too."})
    thresholds: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What the verdict tolerates, as JSON, e.g. '{\"hold\": 0.9}'."}
    )
    require: str | None = field(
        default=None, metadata={"choices": list(VERDICTS), "help": "Exit code 1 if the verdict is another."}
    )
    redact: bool = field(default=False, metadata={"help": "Leave prompts and answers out of report and metrics."})
    merge: bool = field(default=False, metadata={"help": "LoRA: also write the whole model, to OUTPUT_DIR/merged."})


def classes_of(method: str) -> tuple[type, ...]:
    """The dataclasses whose fields are options of this method."""
    return (UnlearnArguments, SourceArguments, METHODS[method].trainer.config_class, ModelConfig)


def check_options(options: Mapping[str, Any]) -> str:
    """
    The method. Raises `ValueError` or `TypeError`, before anything is read, for options that do not exist or are
    missing.
    """
    method = str(options.get("method", DEFAULT))
    _check_one_of("method", method, METHODS)
    known = {each.name for of in classes_of(method) for each in fields(of) if each.init}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " `--help-all` lists them."
            raise TypeError(f"`unlearn` has no option `{name}` (method {method}).{hint}")
    for name, what in (("model_name_or_path", "the model"), ("forget", "what to forget"), ("retain", "what to keep")):
        if options.get(name) is None:
            raise ValueError(f"`{name}` is missing: give {what}.")
    return method


def check_arguments(script: UnlearnArguments) -> None:
    """Raises `ValueError` for values out of range and for sets that the level needs and that are missing."""
    check_fields(script, {"eval_rows": "[1, inf)"}, skipped=SETS)  # sets may be in memory
    if script.require is not None:
        _check_one_of("require", script.require, VERDICTS)
    level = script.level
    for name in ("retrained", "unseen"):
        if level == name and getattr(script, name) is None:
            raise ValueError(f"`level` is {name!r}, but there is no `{name}`: give it, or another level.")
    if level is None or level in LEVELS:
        return
    try:
        nats = float(level)
    except (TypeError, ValueError):
        nats = float("nan")
    if not 0 < nats < float("inf"):
        raise ValueError(f"`level` is {level!r}: give {', '.join(LEVELS)}, or a number above 0, in nats per token.")


def _check_one_of(name: str, value: Any, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}` is {value!r}: choose among {', '.join(accepted)}.")
