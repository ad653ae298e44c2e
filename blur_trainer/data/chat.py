"""Prompt and answer of a conversation, as the tokenizer's chat template writes them."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import MistralCommonBackend  # type: ignore[attr-defined]  # loaded lazily
from trl.trainer.utils import remove_none_values

from blur_trainer.data.files import read_text
from blur_trainer.data.rows import with_texts

Messages = list[dict[str, Any]]

# Stands for the answer while the template is asked where it puts one: private characters, which no text has.
_MARK = "\ue0f0answer\ue0f1"
_DIRECTIVES = "aAbBcdDeFHIjmMpSTuUVwWxXyYzZ"  # of strftime
# "<think>", "[THINK]", "<|reasoning|>" at the end: what follows is a thought, not an answer.
_OPEN_THOUGHT = re.compile(r"[<\[]\|?(?:think|thinking|thought|reason|reasoning)\|?[>\]]\s*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Rendered:
    """
    A conversation as text.

    Args:
        prompt: everything before the answer.
        answer: the answer and what closes it.
        asked: what a model is asked with, `apply_chat_template(prompt, add_generation_prompt=True)`.
    """

    prompt: str
    answer: str
    asked: str


def has_chat_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def with_chat_template(tokenizer: Any, choice: str | Path = "auto") -> Any:
    """
    The tokenizer with the chat template that is chosen.

    Args:
        choice: `"auto"` (the tokenizer as it is), `"never"` (a copy without a template), or a file with a Jinja
            template (a copy with this one).

    Raises `ValueError` if there is no such file, or if its template does not write a question and its answer.
    """
    if choice == "auto":
        return tokenizer
    template = None
    if choice != "never":
        file = Path(choice).expanduser()
        if not file.is_file():
            raise ValueError(
                f"`chat_template` is {str(choice)!r}: give 'auto' (the template of the tokenizer), 'never', or a file "
                "with a Jinja template."
            )
        template = read_text(file)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    if template is not None:
        user, assistant = ({"role": role, "content": f"<{role}>"} for role in ("user", "assistant"))
        try:
            render(changed, [user], [assistant], {}, None)
        except ValueError as error:
            raise ValueError(
                f"The chat template in {choice} does not write a question and its answer: {error}."
            ) from error
    return changed


def check_tokenizer(tokenizer: Any, fmt: str, role: str) -> None:
    """Raises for a tokenizer of mistral-common, which has a chat format but no template to render."""
    if isinstance(tokenizer, MistralCommonBackend) and fmt in ("messages", "question-answer"):
        raise ValueError(
            f"The `{role}` dataset is in the `{fmt}` format and the tokenizer is a `MistralCommonBackend`, which has "
            "no chat template: pass the repository's `tokenizer.json` as `processing_class` "
            "(`PreTrainedTokenizerFast.from_pretrained(...)`, with a `chat_template`), or rows with `input_ids` and "
            "`labels`."
        )


def writes_the_day(tokenizer: Any) -> bool:
    """Whether the chat template writes today's date, so that tokens depend on the day."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def parse_day(text: str | None) -> date | None:
    """The day of `chat_template_date`."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"`chat_template_date` is {text!r}: it must be a day such as '2026-01-31'.") from error


@lru_cache(maxsize=2)
def _calendar(day: date) -> str:
    """
    Jinja code that goes before a template. In it, the clock `strftime_now` stands still on that day.

    A function cannot be passed, because transformers gives templates plain data only.
    """
    texts = {f"%{code}": day.strftime(f"%{code}") for code in _DIRECTIVES}
    texts |= {f"%-{code}": day.strftime(f"%{code}").lstrip("0") or "0" for code in "dHIjmMSy"}
    filters = "".join(f"|replace({json.dumps(code)}, {json.dumps(text)})" for code, text in texts.items())
    # The empty expression keeps a line break that the template begins with.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}"


def render(tokenizer: Any, prompt: Messages, answer: Messages, row: Mapping[str, Any], day: date | None) -> Rendered:
    """
    Renders a conversation and finds its answer.

    The answer begins where the template puts the first answer's content. What the template writes before it (a header,
    an empty thinking block) is prompt. If a template writes the finished conversation in another way than the
    question (it moves the system prompt, or drops it), the prompt is the one that the model is asked.

    Differs from TRL, where everything after the generation prompt is answer, the thinking block included.

    Args:
        row: may have `tools` (a list, or its JSON) and `chat_template_kwargs`, variables of the template.
        day: what the template gets as today. `None`: the present day.

    Raises:
        `ValueError`: the template fails, or does not write the answer exactly once.
    """
    # Arrow fills in the keys that other rows have; a template would take None as an answer.
    prompt, answer = with_texts(remove_none_values(prompt)), with_texts(remove_none_values(answer))
    variables = dict(remove_none_values(row.get("chat_template_kwargs") or {}))
    tools = row.get("tools") or None
    tools = json.loads(tools) if isinstance(tools, str) else tools
    variables["tools"] = remove_none_values(tools) if tools else None
    if day is not None:
        variables["chat_template"] = _calendar(day) + tokenizer.get_chat_template(tools=tools)

    def written(messages: Messages, **kwargs: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **variables)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error

    final = prompt[-1]["role"] == "assistant"
    asked = written(prompt, add_generation_prompt=not final, continue_final_message=final)
    whole = written(prompt + answer)
    if not isinstance(answer[0].get("content"), str):  # a call of a tool: its text is the template's
        if not whole.startswith(asked):
            raise ValueError("the chat template writes the prompt of a tool call in another way than the question")
        return Rendered(asked, whole[len(asked) :], asked)
    marked = written([*prompt, {"role": answer[0]["role"], "content": _MARK}])
    if marked.count(_MARK) != 1:
        raise ValueError(f"the chat template writes the answer {marked.count(_MARK)} times, and must write it once")
    _check_nothing_is_lost(prompt, answer[0], asked, whole)
    return _parted(asked, marked[: marked.index(_MARK)], whole)


def _parted(asked: str, header: str, whole: str) -> Rendered:
    """
    Args:
        asked: the prompt as the model is asked.
        header: the finished conversation up to an answer without a thought.
        whole: the finished conversation.
    """
    # A thought that the row gives is a part of its answer; it begins where the two renderings part.
    before = _common_start(header, whole)
    answered = whole[len(before) :]
    if before.startswith(asked):
        added = before[len(asked) :]  # a space alone is the answer's, which the model writes itself
        return Rendered(before, answered, asked) if added.strip() else Rendered(asked, added + answered, asked)
    thought = _OPEN_THOUGHT.search(asked)
    if header.startswith(asked) or (thought and header.startswith(asked[: thought.start()])):
        return Rendered(before, answered, asked)  # an answer inside of an open thought would be none
    return Rendered(asked, answered, asked)


def _check_nothing_is_lost(prompt: Messages, answer: dict[str, Any], asked: str, whole: str) -> None:
    """Raises if the template leaves out what the system or the user says, or a part of the answer."""
    given = [(message, "content", asked) for message in prompt if message["role"] in ("system", "user")]
    given += [(answer, key, whole) for key in ("content", "reasoning_content", "reasoning", "thinking")]
    for message, key, text in given:
        content = message.get(key)
        if not isinstance(content, str):
            continue
        squeezed = "".join(text.split())
        escaped = json.dumps(content, ensure_ascii=False)[1:-1]  # some templates write JSON
        if not any("".join(form.split()) in squeezed for form in (content, escaped)):
            raise ValueError(f"the chat template leaves out what `{message['role']}` says in `{key}`: {content[:80]!r}")


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def notice(rendered: Rendered) -> str | None:
    """What a user must know of a prompt that is not what the model is asked."""
    if rendered.prompt == rendered.asked:
        return None
    if rendered.prompt.startswith(rendered.asked):
        added = rendered.prompt[len(rendered.asked) :]
        return (
            f"the chat template writes {added!r} before an answer, which its generation prompt lacks. It counts as "
            "prompt. Ask the model in the same way (templates that think: `enable_thinking=False`)"
        )
    common = len(_common_start(rendered.asked, rendered.prompt))
    return (
        f"the model is asked with {rendered.asked[common:]!r} at the end, and the chat template writes "
        f"{rendered.prompt[common:]!r} there in a finished conversation, as it is trained"
    )
