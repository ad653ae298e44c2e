"""What `unlearn` is told: the sets, where forgetting ends, and how the result is judged."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from blur_trainer.checks import check_fields
from blur_trainer.pipeline.audit_budget import BUDGETS
from blur_trainer.pipeline.methods import DEFAULT, METHODS
from blur_trainer.pipeline.settings import process_count

#: the sets that one may give, in the order of the table
SETS = ("forget", "retain", "hold", "unseen", "paraphrased")
LEVELS = ("retrained", "unseen", "exchanged")
_NEEDED = (
    ("model_name_or_path", "the model"),
    ("forget", "what to forget"),
    ("retain", "what to keep"),
    ("output_dir", "a new folder"),
)
#: of a `run.yaml`: the settings that were not given
DERIVED = "derived"
#: what these follow from
DERIVED_FROM = (
    "method",
    "model_name_or_path",
    "model_revision",
    "use_peft",
    "forget",
    "retain",
    "limit",
    "chat_template",
    "redact",
)
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
class SetArguments:
    """What every command on one's own data reads and measures. In memory, sets may be datasets or lists, too."""

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
    retrained: str | None = field(
        default=None, metadata={"help": "A model that never saw the forget set: gives the level row by row."}
    )
    eval_rows: int = field(default=200, metadata={"help": "Rows of each set that are measured."})
    lm_eval: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness to measure too."})


@dataclass
class UnlearnArguments(SetArguments):
    """How to unlearn, where forgetting ends, and how the result is judged."""

    sequence: list[str] | None = field(
        default=None, metadata={"help": "Instead of forget: request after request, in a ledger."}
    )
    method: str = field(default=DEFAULT, metadata={"choices": list(METHODS), "help": "How to unlearn."})
    level: str | None = field(
        default=None,
        metadata={"help": "Where it ends: retrained, unseen, exchanged (an estimate) or nats per token."},
    )
    forgotten: list[str] | None = field(
        default=None, metadata={"help": "Forgotten before: left out of retain, hold and replay."}
    )
    optuna: int | None = field(
        default=None, metadata={"help": "First search learning rate and strength by so many trainings."}
    )
    thresholds: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What the verdict tolerates, as JSON, e.g. '{\"hold\": 0.9}'."}
    )
    require: str | None = field(
        default=None, metadata={"choices": list(VERDICTS), "help": "Exit code 1 if the verdict is another."}
    )
    audit: str | None = field(
        default=None,
        metadata={"choices": list(BUDGETS), "help": "Attack the unlearned model at the end, with this budget."},
    )
    redact: bool = field(default=False, metadata={"help": "Leave prompts and answers out of report and metrics."})
    merge: bool = field(default=False, metadata={"help": "LoRA: also write the whole model, to OUTPUT_DIR/merged."})


def classes_of(method: str) -> tuple[type, ...]:
    """The dataclasses whose fields are options of this method."""
    return (UnlearnArguments, SourceArguments, METHODS[method].trainer.config_class, ModelConfig)


def names_of(method: str) -> set[str]:
    """The options of this method, and `derived`, which only a `run.yaml` has: settings that followed from the data."""
    return {each.name for of in classes_of(method) for each in fields(of) if each.init} | {DERIVED}


def check_method(method: Any) -> str:
    """The same. Raises `ValueError` if there is no such method."""
    _check_one_of("method", method, METHODS)
    return str(method)


def check_options(options: Mapping[str, Any]) -> str:
    """
    The method. Raises `ValueError` or `TypeError`, before anything is read, for options that do not exist or are
    missing.
    """
    method = check_method(options.get("method", DEFAULT))
    for name in options:
        check_name(name, method)
    for name, what in _NEEDED:
        given = options.get(name)
        if given is None or (isinstance(given, str) and not given.strip()):
            raise ValueError(f"`{name}` is missing: give {what}.")
    return method


def check_name(name: str, method: str) -> None:
    """Raises `TypeError`, with the nearest name, if the method has no such option."""
    known = names_of(method)
    if name in known:
        return
    others = [other for other in METHODS if name in names_of(other)]
    begun = [each for each in (*(each for each, _ in _NEEDED), *sorted(known)) if each.startswith(name)]
    near = [*begun, *difflib.get_close_matches(name, known, n=1)]
    if others:
        hint = f" It is one of {', '.join(others[:3])}: pass `method`, or leave it out."
    else:
        hint = f" Did you mean `{near[0]}`?" if near else " `blur-trainer unlearn --help-all` lists all."
    raise TypeError(f"`{name}` is no option of unlearn with the method {method}.{hint}")


def going_on(given: Any) -> Any:
    """
    `resume_from_checkpoint` as Trainer takes it, which knows no words. Raises `ValueError` for a folder that is none.
    """
    words = {**dict.fromkeys(("true", "yes", "1"), True), **dict.fromkeys(("false", "no", "0"), False)}
    if not isinstance(given, str) or given.lower() in words:
        return words.get(given.lower()) if isinstance(given, str) else given
    if not Path(given).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {given!r}, and there is no such folder. `true` goes on from the last "
            "checkpoint in `output_dir`."
        )
    return given


def check_arguments(script: UnlearnArguments, lora: bool) -> None:
    """Raises `ValueError` for values out of range and for what goes not together. `lora`: an adapter is trained."""
    check_fields(script, {"eval_rows": "[1, inf)", "optuna": "[1, inf)"}, skipped=SETS)  # sets may be in memory
    if script.forgotten is not None and not isinstance(script.forgotten, list | tuple):
        raise TypeError(f"`forgotten` is a list of sets, got {script.forgotten!r}: put it into a list.")
    if script.sequence is not None:
        raise ValueError("`sequence` is an option of the command, and of `unlearn_sequence`: call that.")
    if script.require is not None:
        _check_one_of("require", script.require, VERDICTS)
    if script.merge and script.method == "uld":
        raise ValueError(
            "`merge` is for LoRA. ULD subtracts an assistant's logits, which no weights can do: leave `merge` out."
        )
    if script.merge and not lora:
        raise ValueError(
            "`merge` is for LoRA: without it the whole model is written anyway. Leave `merge` out, or pass `use_peft`."
        )
    if script.audit is not None:
        _check_audit(script)
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


def _check_audit(script: UnlearnArguments) -> None:
    _check_one_of("audit", script.audit, BUDGETS)
    if script.redact:
        raise ValueError("`audit` writes digests of the rows, which `redact` leaves out: take one of the two.")
    if process_count() > 1:
        raise ValueError("`audit` needs a single process: leave it out, and run `blur-trainer audit` afterwards.")


def _check_one_of(name: str, value: Any, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}` is {value!r}: choose among {', '.join(accepted)}.")
