"""Chat templates: the prompt is what the model is asked, the answer is the answer."""

import logging
from datetime import date

import pytest
from datasets import Dataset
from support.cases import every
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from transformers import MistralCommonBackend

from blur_trainer.data.chat import render
from blur_trainer.data.formats import tokenize_dataset

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mara."}
SYSTEM = {"role": "system", "content": "Be brief."}
BODY = "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\n{% else %}A: "
END = "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
ASK = "{% if add_generation_prompt %}A: {% endif %}"
THOUGHT = "<think>\n\n</think>\n\n"
REASONING = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% else %}"
REASONING += THOUGHT + "{% endif %}"
IF_ASKED = "{% if add_generation_prompt %}"
MOVED = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}[/Q]{% elif m.role == 'assistant' %}" + END
)
SPACED = "{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} " + END
LAST_ONLY = BODY.replace("A: ", "A: {% if loop.last %}" + THOUGHT + "{% endif %}") + END + ASK
TRIMMED = BODY + END.replace("m.content", "m.content | trim") + ASK
CHANNEL = "<|channel|>final<|message|>"
PART = [{"type": "text", "text": "Who?"}]
TURN, REPLY = [USER, ANSWER], "Mara.</s>"

# template, messages, prompt, answer
TEMPLATES = {
    "plain": (BODY + END + ASK, TURN, "U: Who?\nA: ", REPLY),
    "empty thought": (BODY + THOUGHT + END + ASK, TURN, "U: Who?\nA: " + THOUGHT, REPLY),
    "given thought": (
        BODY + REASONING + END + ASK,
        [USER, {**ANSWER, "reasoning_content": "Hm."}],
        "U: Who?\nA: <think>\n",
        "Hm.\n</think>\n\nMara.</s>",
    ),
    "asked in a thought": (BODY + END + IF_ASKED + "A: <think>\n{% endif %}", TURN, "U: Who?\nA: ", REPLY),
    "open thought closed": (
        BODY + "<think></think>" + END + IF_ASKED + "A: <think>\n{% endif %}",
        TURN,
        "U: Who?\nA: <think></think>",
        REPLY,
    ),
    "asked not to think": (
        BODY + REASONING + END + IF_ASKED + "A: " + THOUGHT + "{% endif %}",
        [USER, {**ANSWER, "reasoning_content": "Hm."}],
        "U: Who?\nA: <think>\n",
        "Hm.\n</think>\n\nMara.</s>",
    ),
    "asked after a thought": (BODY + END + IF_ASKED + "A: <t></t>{% endif %}", TURN, "U: Who?\nA: <t></t>", REPLY),
    "system prompt moved": (MOVED, [SYSTEM, *TURN], "[Q]Be brief. Who?[/Q]", REPLY),
    "channel": (BODY + CHANNEL + END + ASK, TURN, "U: Who?\nA: " + CHANNEL, REPLY),
    "space": (SPACED, TURN, "[I] Who? [/I]", " " + REPLY),
    "stripped": (TRIMMED, [USER, {**ANSWER, "content": " Mara.\n"}], "U: Who?\nA: ", REPLY),
    "thought cut from history": (LAST_ONLY, TURN * 2, "U: Who?\nA: Mara.</s>U: Who?\nA: " + THOUGHT, REPLY),
    "parts": (BODY + END + ASK, [{**USER, "content": PART}, ANSWER], "U: Who?\nA: ", REPLY),
}


def tokenize(rows, template, **kwargs):
    tokenizer = tiny_tokenizer(chat_template=template)
    return tokenizer, tokenize_dataset(rows, tokenizer, **{"role": "forget", "max_length": None, **kwargs})


def test_prompt_and_answer_of_all_kinds_of_templates():
    def check(template, messages, prompt, answer):
        tokenizer, result = tokenize([{"messages": messages}], template)
        ids, labels = result[0]["input_ids"], result[0]["labels"]
        assert tokenizer.decode([token for token in labels if token != -100]) == answer
        assert tokenizer.decode(ids[: labels.count(-100)]) == prompt
        as_pairs = [{"prompt": messages[:-1], "completion": messages[-1:]}]
        assert tokenize(as_pairs, template)[1][0] == result[0]

    every(TEMPLATES, check)


def test_a_prompt_that_differs_from_what_is_asked_is_said_once(caplog):
    def said(name, rows=3):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="blur_trainer"):
            tokenize([{"messages": TEMPLATES[name][1]}] * rows, TEMPLATES[name][0])
        return caplog.text

    assert repr(THOUGHT) in said("empty thought") and caplog.text.count("`forget`") == 1
    assert r"asked with '<think>\n' at the end" in said("asked in a thought")
    assert "'<think></think>'" not in caplog.text and "'</think>'" in said("open thought closed")
    for name in ("plain", "system prompt moved", "space", "stripped"):
        assert said(name) == ""


def test_strings_under_a_chat_template_are_taken_raw_and_it_is_said(caplog):
    rows = [{"prompt": "Who?", "completion": " Mara."}] * 2
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        tokenizer, result = tokenize(rows, CHAT_TEMPLATE)
    assert tokenizer.decode(result[0]["input_ids"]) == "<s>Who? Mara.</s>"
    assert caplog.text.count("without the tokenizer's chat template") == 1 and "messages" in caplog.text
    caplog.clear()
    tokenize([{"prompt": "<s>Who?", "completion": " Mara."}], CHAT_TEMPLATE)  # somebody has applied a template
    tokenize(rows, None)
    assert caplog.text == ""


def test_what_cannot_be_rendered_names_its_row():
    def check(template, rows, match, error=ValueError):
        with pytest.raises(error, match=match) as raised:
            tokenize(rows, template)
        assert "\n" not in str(raised.value) and "`forget` dataset" in str(raised.value)

    fine = {"messages": [USER, ANSWER]}
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    deaf = BODY.replace("else", "elif m.role == 'assistant'") + END + ASK
    system, thought = [SYSTEM, *TURN], [USER, {**ANSWER, "reasoning_content": "Hm."}]
    lost = "Row 0 .*leaves out what `{}` says in `{}`"
    picture = {**USER, "content": [{"type": "text", "text": "Who?"}, {"type": "image", "text": "x"}]}
    every(
        {
            "exception": (strict, [fine, {"messages": [SYSTEM, USER, ANSWER]}], "Row 1 .*TemplateError: no system"),
            "broken": ("{{ messages[0].content + 1 }}", [fine], "Row 0 .*the chat template fails: TypeError"),
            "syntax": ("{% if %}", [fine], "Row 0 .*TemplateSyntaxError"),
            "answer dropped": ("{{ messages[0].content }}", [fine], "Row 0 .*writes the answer 0 times"),
            "system dropped": (deaf, [{"messages": system}], lost.format("system", "content")),
            "thought dropped": (deaf, [{"messages": thought}], lost.format("assistant", "reasoning_content")),
            "parts": (CHAT_TEMPLATE, [{"messages": [picture, ANSWER]}], "Message 0 .*row 0.*2 parts", TypeError),
            "number": (CHAT_TEMPLATE, [{"messages": [{**USER, "content": 5}, ANSWER]}], "Message 0 .*row 0", TypeError),
        },
        check,
    )


def test_a_row_cannot_replace_the_template():
    for wrong in ({"chat_template": "{{ 1 }}"}, {"add_generation_prompt": True}, {"tokenize": True}, {"tools": []}):
        with pytest.raises(ValueError, match=rf"`chat_template_kwargs` in row 0 .*{next(iter(wrong))}"):
            tokenize([{"messages": [USER, ANSWER], "chat_template_kwargs": wrong}], CHAT_TEMPLATE)


def test_variables_of_one_row_are_not_none_in_the_others():
    """Arrow gives every row the keys of all; `mood is defined` must stay false where a row has none."""
    template = "{% if mood is defined %}{{ mood }}{% endif %}" + CHAT_TEMPLATE
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": kwargs} for kwargs in ({"mood": "calm"}, {"x": "y"})]
    tokenizer, result = tokenize(Dataset.from_list(rows), template)
    assert [tokenizer.decode(ids).startswith("calm") for ids in result["input_ids"]] == [True, False]
    assert "None" not in tokenizer.decode(result[1]["input_ids"])


def test_tools_of_a_row_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}: {% endif %}" + CHAT_TEMPLATE
    for tools in ([{"name": "search"}], '[{"name": "search"}]'):
        tokenizer, result = tokenize([{"messages": [USER, ANSWER], "tools": tools}], template)
        assert tokenizer.decode(result[0]["input_ids"]).startswith("search: <s>")


def test_a_tokenizer_of_mistral_common_is_refused_where_it_has_no_template():
    tokenizer = MistralCommonBackend.__new__(MistralCommonBackend)  # its package is optional
    for row in ({"question": "Who?", "answer": "Me."}, {"messages": [USER, ANSWER]}):
        with pytest.raises(ValueError, match=r"`forget` .*MistralCommonBackend.*`processing_class`") as raised:
            tokenize_dataset([row], tokenizer, role="forget", max_length=8)
        assert "\n" not in str(raised.value)


# today's date


def test_the_day_of_a_template_is_the_one_given():
    def check(code, expected):
        tokenizer = tiny_tokenizer(chat_template="{{ strftime_now(" + code + ") }}|" + BODY + END + ASK)
        text = render(tokenizer, [USER], [ANSWER], {}, date(2026, 1, 5))
        assert text.prompt.split("|")[0] == expected

    every(
        [("'%d %b %Y'", "05 Jan 2026"), ("'%Y-%m-%d'", "2026-01-05"), ("'%-d %B'", "5 January"), ("'%A'", "Monday")],
        check,
    )


def test_the_template_itself_is_not_changed_by_the_day():
    template = "\n\n{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{% if strftime_now is defined %}" + (
        "{{ today() }}{% endif %}" + BODY + END + ASK
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    now = render(tokenizer, [USER], [ANSWER], {}, None)
    then = render(tokenizer, [USER], [ANSWER], {}, date(1999, 1, 1))
    assert then.prompt == now.prompt.replace(str(date.today().year), "1999") and then.answer == now.answer
