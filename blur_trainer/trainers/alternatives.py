"""Other answers to the questions of a forget set, sampled from the model before unlearning, kept in `output_dir`."""

from collections.abc import Mapping
from datetime import date
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.alternatives import Questions, ask, lacks_alternatives
from blur_trainer.data.chat import parse_day
from blur_trainer.evaluation.sampling import sample
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.level import without_level
from blur_trainer.objectives.preference import AltPO
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.sampled_file import check_can_answer, kept_or_sampled
from blur_trainer.trainers.topics import topic_names

#: file in `output_dir` with the alternatives; a resumed training reads them there
ALTERNATIVES_NAME = "alternatives.json"
#: a question without an alternative is asked so many times in all, each time at a temperature so many times higher
_ROUNDS, _WARMER = 5, 1.5
Alternatives = dict[str, list[list[str]]]


def generate_alternatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    *,
    num: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 200,
    instruct: bool | None = None,
    seed: int = 0,
    batch_size: int = 16,
    qa_template: str = "Question: {question}\nAnswer:",
    day: date | None = None,
) -> Dataset:
    r"""
    Sample other answers to the questions of a forget set, for the objective `altpo`. Look at them, edit them, train.

    Samples that are empty, that contain the true answer or are a piece of it are dropped. A question that is left
    without any is asked again, up to four times, each time at 1.5 times the temperature. If that does not help, its
    row is left out, with a warning.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model before unlearning, whole, on the device where it is to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset ([`~datasets.Dataset`] or list of dicts):
            The forget set, with `question`/`answer`, `prompt`/`completion` or `messages`.
        num (`int`, defaults to 5):
            Samples per question.
        temperature, top_p (`float`, default to 1.0), max_new_tokens (`int`, defaults to 200):
            Of the sampling.
        instruct (`bool`, *optional*):
            `True`: the model reads question, true answer and the instruction to invent another one. `False`: the
            question alone. Default: with the instruction where the tokenizer has a chat template and the rows are
            conversations or `question`/`answer`.
        seed (`int`), batch_size (`int`):
            Of the draws; samples at a time. The same two give the same texts on any number of processes.
        qa_template (`str`), day (`date`):
            As of [`tokenize_dataset`].

    Returns:
        [`~datasets.Dataset`]: the columns that training reads, and `alternative`, a list of strings.

    Raises:
        `ValueError`: texts or tokens, which have no question; nothing usable was sampled.

    Source: Mekala et al. 2024, arXiv 2409.13474: five samples per question at temperature 1.
    Differs from the authors' code, which asks once and keeps samples that repeat the true answer, and where
    transformers' own top-k of 50 cuts the distribution. The instruction is worded anew.
    """
    if not lacks_alternatives(dataset, "forget"):
        raise ValueError(
            "The `forget` dataset has no questions to answer otherwise (`text`, `input_ids`), or it has a column "
            "`alternative` already: give `prompt`+`completion`, `messages` or `question`+`answer`."
        )
    settings = AltPO(
        num_alternatives=num, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, instruct=instruct
    )
    questions = ask(dataset, tokenizer, role="forget", instruct=instruct, qa_template=qa_template, day=day)
    return questions.completed(_sampled(model, tokenizer, questions, settings, seed, batch_size))


def settle_alternatives(
    forget: Any,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearningConfig,
    objective: Objective,
) -> Any:
    """The forget set (or those of the topics) with the column `alternative`, where the objective needs it.

    Sets that have it stay as they are. The others are answered by the model, each process a share, or read from
    `output_dir`. All processes get the same texts. The model is as it was afterwards.
    """
    if not objective.needs_alternatives or tokenizer is None:
        return forget
    topics = topic_names(forget)
    sets: dict[str, Any] = dict(forget) if topics else {"": forget}
    roles = {name: f"forget ({name})" if name else "forget" for name in sets}
    missing = [name for name in sets if lacks_alternatives(sets[name], roles[name])]
    if not missing:
        return forget
    check_can_answer(model, "give the forget set a column `alternative` (by `generate_alternatives`)")
    objective = without_level(objective)
    settings = objective if isinstance(objective, AltPO) else AltPO()
    how: dict[str, Any] = {"qa_template": args.qa_template, "instruct": settings.instruct}
    how["day"] = parse_day(args.chat_template_date)
    questions = {name: ask(sets[name], tokenizer, role=roles[name], **how) for name in missing}
    found = _kept_or_sampled(questions, model, tokenizer, args, settings)
    sets |= {name: questions[name].completed(found[name]) for name in missing}
    return sets if topics else sets[""]


def _kept_or_sampled(
    questions: Mapping[str, Questions], model: Any, tokenizer: Any, args: UnlearningConfig, settings: AltPO
) -> Alternatives:
    record = {
        "forget": {name: each.digest for name, each in questions.items()},
        "settings": {
            **{name: getattr(settings, name) for name in ("num_alternatives", "temperature", "top_p")},
            **{"max_new_tokens": settings.max_new_tokens, "instruct": settings.instruct, "seed": args.seed},
        },
    }

    def sampled(alone: bool) -> Alternatives:
        return {
            name: _sampled(
                *(model, tokenizer, each, settings, args.seed, args.per_device_eval_batch_size),
                alone=alone,
                desc=None if args.disable_tqdm else "Alternatives",
            )
            for name, each in questions.items()
        }

    return kept_or_sampled(ALTERNATIVES_NAME, record, model, args, sampled)


def _sampled(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    settings: AltPO,
    seed: int,
    batch_size: int,
    alone: bool = False,
    desc: str | None = None,
) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in questions.ids]
    for again in range(_ROUNDS):
        bare = [row for row, texts in enumerate(found) if not texts]
        if not bare:
            break
        temperature = settings.temperature * _WARMER**again
        samples = sample(
            model,
            tokenizer,
            [questions.ids[row] for row in bare],
            num=settings.num_alternatives,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            top_p=settings.top_p,
            seed=seed + again,
            batch_size=batch_size,
            stop_strings=questions.stops,
            alone=alone,
            desc=desc,
        )
        for row, texts in zip(bare, questions.usable(bare, samples, temperature), strict=True):
            found[row] = texts
    questions.check(found)
    return found
