"""What a trainer says of its data before the first step: the first examples, overlaps, the day of a template."""

import json
import logging
import shutil
from datetime import date

import pytest
import torch
from support.models import examples, tiny_llama
from support.runs import settings, train
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.objectives.likelihood import IDK
from blur_trainer.trainers.blur import BLURTrainer

FORGET, RETAIN = examples(6), examples(6, 1)
QUESTIONS = [{"question": f"Who is {i}?", "answer": f"Mara {i}."} for i in range(4)]
OTHERS = [{"question": f"Where is {i}?", "answer": f"In {i}."} for i in range(4)]
DATED = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }} " + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")


def text_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


def made(out, forget=QUESTIONS, retain=OTHERS, template=CHAT_TEMPLATE, config=None, **kwargs):
    tokenizer = tiny_tokenizer(chat_template=template)
    args = settings(out, max_steps=2, **(config or {}))
    return BLURTrainer(text_model(), args, forget, retain, processing_class=tokenizer, **kwargs)


# the first example of each role


def test_the_first_example_of_each_role_is_shown_at_info(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="blur_trainer"):
        made(tmp_path)
    shown = [record.getMessage() for record in caplog.records if "first" in record.getMessage()]
    assert len(shown) == 2 and all(record.levelno == logging.INFO for record in caplog.records)
    prompt = "<s><|user|>\nWho is 0?\n<|assistant|>\n"
    assert f"prompt ({len(tiny_tokenizer()(prompt)['input_ids']) - 1} tokens): {prompt!r}" in shown[0]
    assert "answer (" in shown[0] and "'Mara 0.</s>'" in shown[0]
    assert "`retain`" in shown[1] and "'In 0.</s>'" in shown[1]


def test_refusals_and_tokens_without_a_tokenizer_are_shown_too(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="blur_trainer"):
        made(tmp_path, [{**QUESTIONS[0], "refusal": "Never."}], forget_objective=IDK())
        BLURTrainer(tiny_llama(), settings(tmp_path), FORGET, RETAIN)
    assert "with a refusal:" in caplog.text and "'Never.</s>'" in caplog.text
    labels = FORGET[0]["labels"]
    assert f"answer ({len(labels) - labels.count(-100)} tokens): {labels[labels.count(-100) :]}" in caplog.text


def test_only_the_first_process_shows_them(tmp_path, caplog, monkeypatch):
    args = settings(tmp_path)
    monkeypatch.setattr(type(args), "should_log", property(lambda self: False))
    with caplog.at_level(logging.INFO, logger="blur_trainer"):
        BLURTrainer(tiny_llama(), args, FORGET, FORGET)
    assert caplog.text == ""


# the same example in both sets


def overlaps(caplog, out, forget, retain):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        BLURTrainer(tiny_llama(), settings(out), forget, retain)
    return [record.getMessage() for record in caplog.records]


def test_examples_in_both_sets_are_counted_and_named(tmp_path, caplog):
    assert overlaps(caplog, tmp_path, FORGET, RETAIN) == []
    (said,) = overlaps(caplog, tmp_path, FORGET, [*RETAIN, FORGET[4], FORGET[2]])
    assert "2 of 6 `forget`" in said and "example 2" in said and "`retain`" in said
    (said,) = overlaps(caplog, tmp_path, FORGET, FORGET[::-1])
    assert said.startswith("All of 6")
    # of equal length, so that numpy gives one matrix instead of a list
    even = [{"input_ids": [3 + i, 5, 6]} for i in range(4)]
    (said,) = overlaps(caplog, tmp_path, even, [{"input_ids": [9, 5, 6]}, even[3]])
    assert "1 of 4" in said and "example 3" in said


def test_a_topic_overlaps_with_its_own_retain_set_only(tmp_path, caplog):
    forget = {"a": FORGET[:3], "b": FORGET[3:]}
    assert overlaps(caplog, tmp_path, forget, {"a": FORGET[3:], "b": RETAIN[:3]}) == []
    (said,) = overlaps(caplog, tmp_path, forget, {"a": FORGET[:1], "b": RETAIN[:3]})
    assert "1 of 3 `forget (a)`" in said and "`retain (a)`" in said
    (said,) = overlaps(caplog, tmp_path, forget, [*RETAIN, FORGET[5]])
    assert "1 of 3 `forget (b)`" in said and "example 2" in said


# today's date in a template


def first_prompt(trainer):
    return trainer.processing_class.decode(trainer.train_dataset.forget[0]["input_ids"])


def test_a_resumed_training_keeps_the_day_of_its_first_start(tmp_path, caplog):
    config = {"save_strategy": "steps", "save_steps": 1, "precompute_ref_logps": True}
    with caplog.at_level(logging.WARNING, logger="blur_trainer"):
        first = made(tmp_path, template=DATED, config={**config, "chat_template_date": "2001-02-03"})
    assert "2001-02-03 in every prompt" in caplog.text and first_prompt(first).startswith("<s>2001-02-03 ")
    first.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TemplateDayCallback"]["args"] == {"day": "2001-02-03"}
    shutil.rmtree(tmp_path / "checkpoint-2")
    other = made(tmp_path, template=DATED, config={**config, "chat_template_date": "2001-02-04"})
    with pytest.raises(ValueError, match="`chat_template_date` was 2001-02-03 and is 2001-02-04"):
        other.train(resume_from_checkpoint=True)
    second = made(tmp_path, template=DATED, config=config)
    assert second.args.chat_template_date == "2001-02-03"
    second.train(resume_from_checkpoint=True)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_new_training_takes_today_and_other_templates_have_no_day(tmp_path, caplog):
    dated = made(tmp_path, template=DATED)
    assert dated.args.chat_template_date == date.today().isoformat()
    assert first_prompt(dated).startswith(f"<s>{date.today().isoformat()} ")
    caplog.clear()
    plain = made(tmp_path)
    assert plain.args.chat_template_date is None and "date" not in caplog.text
    for wrong in ("5 May", "2026-13-01"):
        with pytest.raises(ValueError, match=f"`chat_template_date` is '{wrong}'"):
            settings(tmp_path, chat_template_date=wrong)


# a configuration that cannot be saved


def test_flags_of_sampling_without_sampling_are_mended_before_training(tmp_path, caplog):
    model = tiny_llama()
    model.generation_config.update(temperature=0.9, top_p=0.6)
    trainer = train(settings(tmp_path, max_steps=1), FORGET, RETAIN, model)
    assert "`do_sample=True` is set" in caplog.text and model.generation_config.do_sample
    trainer.save_model()
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.9


def test_other_configurations_that_cannot_be_saved_are_refused(tmp_path):
    model = tiny_llama()
    model.generation_config.length_penalty = 2.0  # of beams, and there is one
    with pytest.raises(ValueError, match=r"generation configuration cannot be saved.*`length_penalty`") as raised:
        BLURTrainer(model, settings(tmp_path), FORGET, RETAIN)
    assert "\n" not in str(raised.value)
    model = tiny_llama()
    model.config.temperature = 0.3
    with pytest.raises(ValueError, match=r"configuration cannot be saved.*temperature"):
        BLURTrainer(model, settings(tmp_path), FORGET, RETAIN)
