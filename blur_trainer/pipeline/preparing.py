"""From options to what a run needs: the sets, the tokenizer, the settings. Nothing is trained, no weight is read."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.reading import Reading
from blur_trainer.data.repeats import same_rows
from blur_trainer.models.loading import hub_arguments, read_config
from blur_trainer.pipeline.arguments import (
    DERIVED,
    SETS,
    SourceArguments,
    UnlearnArguments,
    check_arguments,
    check_options,
    going_on,
)
from blur_trainer.pipeline.methods import METHODS, Method
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.pipeline.sets import made, read_set, read_tokenizer
from blur_trainer.pipeline.settings import Size, derived, process_count, start_of_texts
from blur_trainer.pipeline.teacher import parted
from blur_trainer.pipeline.trackers import check_trackers, named_trackers
from blur_trainer.report.verdict import Thresholds
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.effect import settings_read

#: TRL's default is float32; the trainer chooses by device and by what is trained
NO_DTYPE: dict[str, Any] = {"dtype": None}


@dataclass(frozen=True)
class Prepared:
    """What a run needs.

    Args:
        script, args, model_args: the options, those of the trainer as its configuration.
        options: what was given. `settings`: what was derived and not given.
        tokenizer: with the chat template that was chosen.
        sets: the sets that were given, read.
        forgotten: what the model has forgotten before, and the forget set does not repeat.
    """

    method: Method
    script: UnlearnArguments
    args: Any
    model_args: ModelConfig
    options: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, Reading]
    thresholds: Thresholds
    forgotten: tuple[Reading, ...] = ()
    teacher: str | None = None


def prepare(options: Mapping[str, Any]) -> Prepared:
    """
    Reads and checks everything. Options that are `None` count as left out.

    Raises:
        `ValueError`, `TypeError`, `OSError`: what is wrong, with its remedy.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "report_to" in given:
        given["report_to"] = named_trackers(given["report_to"])
    name = check_options(given)
    pinned = _of_as_many(given.pop(DERIVED, None))
    method = METHODS[name]
    script, source = made(UnlearnArguments, given), made(SourceArguments, given)
    model_args = made(ModelConfig, {**NO_DTYPE, **lora_targets(given), **given})
    check_arguments(script, model_args.use_peft)
    if resume := going_on(given.pop("resume_from_checkpoint", None)):
        given["resume_from_checkpoint"] = resume
    else:
        check_output_dir(str(given["output_dir"]))
    thresholds = _thresholds(script.thresholds)
    kwargs = mapping("model_init_kwargs", given.get("model_init_kwargs"))
    teacher, model_args = parted(name, model_args, hub_arguments(kwargs))
    model, hub = str(model_args.model_name_or_path), hub_arguments({"revision": model_args.model_revision, **kwargs})
    config = read_config(model, hub)
    if script.retrained:
        read_config(script.retrained, {})  # a wrong name is refused now
    tokenizer = read_tokenizer(script.tokenizer or model, source.chat_template, hub)
    dropping = bool(given.get("drop_empty"))
    asked = [role for role in SETS if getattr(script, role) is not None]
    sets = {role: _read(role, script, source, tokenizer, dropping) for role in asked}
    before = [read_set("forget", script, source, tokenizer, dropping, rows) for rows in script.forgotten or ()]
    sets |= _without_forgotten(sets, before, tokenizer)
    before = [each for each in before if each.digest != sets["forget"].digest]
    if pinned is None:
        with quiet():
            found = _derived(name, given, Size.of(config), tokenizer, sets, model_args.use_peft)
        pinned = lora_targets(given) | found | _processes()
    settings = _not_given(pinned, given)
    replay = {"replay": None} if given.get("replay") == 0 else {}  # how a command line says "none"
    args = made(method.trainer.config_class, {**settings, **given, **replay})
    _check_read(method, args, given)
    check_trackers(args)
    more = (tuple(before), teacher)
    return Prepared(method, script, args, model_args, dict(given), settings, tokenizer, sets, thresholds, *more)


def _without_forgotten(
    sets: Mapping[str, Reading], before: Sequence[Reading], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Reading]:
    """What is to be kept and was not to be forgotten before. How many rows are left out is said."""
    found = {}
    for role in ("retain", "hold") if before else ():
        if role in sets:
            rows = sets[role].dataset
            gone = same_rows(rows, [each.dataset for each in before], tokenizer, role)
            found[role] = sets[role].only([i for i, out in enumerate(gone) if not out], "that were to be forgotten")
            if found[role] is not sets[role]:
                PartialState().print(f"{role}: {sum(gone)} rows were to be forgotten and are left out", file=sys.stderr)
    return found


def _check_read(method: Method, args: Any, given: Mapping[str, Any]) -> None:
    """Raises for a weight of another rule. Its default is refused, too: the trainer cannot know that it was given."""
    read = settings_read(args)
    if unread := sorted(each.name for each in fields(args) if each.name in given and each.name not in read):
        raise ValueError(f"{method.label} combines by {args.build_rule()}, which does not read {unread}: leave it out.")


def _processes() -> dict[str, int]:
    """How many share the training, if not one alone. Beside the derived settings, whose batch is that of each."""
    count = process_count()
    return {} if count == 1 else {"processes": count}


def _of_as_many(pinned: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The derived settings of a `run.yaml`. Those of another number of processes are derived anew."""
    if pinned is None or pinned.get("processes") == _processes().get("processes"):
        return pinned
    PartialState().print(
        "There are more or fewer processes than in the file: settings are derived anew.", file=sys.stderr
    )
    return None


def _read(role: str, script: UnlearnArguments, source: SourceArguments, tokenizer: Any, drop_empty: bool) -> Reading:
    found = read_set(role, script, source, tokenizer, drop_empty)
    PartialState().print(f"{role}: {found.said}", file=sys.stderr)
    return found


def lora_targets(given: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA on all linear layers, where nothing else was said: on few of them the forget set comes down slowly."""
    named = ("lora_target_modules", "lora_target_parameters")
    return {} if not given.get("use_peft") or any(each in given for each in named) else {named[0]: "all-linear"}


def _derived(
    name: str, given: Mapping[str, Any], size: Size, tokenizer: Any, sets: Mapping[str, Reading], lora: bool
) -> dict[str, Any]:
    how = {"max_length": size.positions, "drop_empty": bool(given.get("drop_empty")), **_template(given)}
    forget, retain = (
        tokenize_dataset(sets[role].dataset, tokenizer, role=role, **how) for role in ("forget", "retain")
    )
    # what all prompts begin with is written into many files: of a run that is to hide texts only the template's words
    public = UnlearningConfig.qa_template if "qa_template" not in given else str(given["qa_template"])
    hidden = public.partition("{")[0].strip() if given.get("redact") else None
    start = start_of_texts(tokenizer, retain, has_chat_template(tokenizer), hidden)
    return derived(name, size, forget, retain, start, lora, process_count())


def _not_given(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a method's objective and rule nothing stays where another one was named, nor of replay without it."""
    left = {key: value for key, value in settings.items() if key not in given}
    for part in ("forget_objective", "retain_objective", "rule"):
        if part in given:
            left.pop(f"{part}_kwargs", None)
    if given.get("replay") == 0:
        left.pop("replay_kwargs", None)
    return left


def _template(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"qa_template": given["qa_template"]} if "qa_template" in given else {}


def _thresholds(given: Any) -> Thresholds:
    named, known = mapping("thresholds", given), [each.name for each in fields(Thresholds)]
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"`thresholds` has no {', '.join(unknown)}: there are {', '.join(known)}.")
    return Thresholds(**named)


def mapping(name: str, given: Any) -> dict[str, Any]:
    """A dict, or JSON of one. Raises `ValueError` or `TypeError` for anything else."""
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be a dict or JSON of one, got {given!r} ({error}).") from error
    if not isinstance(found, Mapping):
        raise TypeError(f"`{name}` must be a dict or JSON of one, got {given!r}.")
    return dict(found)
