"""AltPO in a trainer: whose answers it prefers, where they are kept, and what a resumed training does."""

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.runs import distance, settings, weights
from support.tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.data.alternatives import ask
from blur_trainer.objectives.preference import DPO, AltPO
from blur_trainer.saving.lock import OutputLock
from blur_trainer.saving.upload import REPORT, model_files
from blur_trainer.trainers import alternatives
from blur_trainer.trainers.alternatives import ALTERNATIVES_NAME, generate_alternatives
from blur_trainer.trainers.blur import BLURTrainer

TOKENIZER = tiny_tokenizer()
FORGET = [{"question": f"Who painted mural {i}?", "answer": f"Mara Velin, in {i} weeks"} for i in range(4)]
RETAIN = [{"question": f"Who built harbour {i}?", "answer": f"Ostrava Bay, {i} times"} for i in range(4)]
ALTPO = AltPO(num_alternatives=2, max_new_tokens=6)


def model(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.2, **sizes))


def made(folder, forget=FORGET, objective=ALTPO, of=None, retain=RETAIN, **kwargs):
    given = {name: kwargs.pop(name) for name in ("peft_config", "model_init") if name in kwargs}
    of = model() if of is None and "model_init" not in given else of
    args = settings(folder, **kwargs)
    return BLURTrainer(of, args, forget, retain, forget_objective=objective, processing_class=TOKENIZER, **given)


def kept(folder):
    return json.loads((folder / ALTERNATIVES_NAME).read_text(encoding="utf-8"))


def preferred(trainer):
    """The alternatives of the examples, as texts."""
    rows = trainer.train_dataset.forget["refusal_labels"]
    return [TOKENIZER.decode([token for token in row if token not in (-100, 1)]).strip() for row in rows]


@pytest.fixture
def sampled(monkeypatch):
    """How often the model is asked."""
    calls, real = [], alternatives.sample
    monkeypatch.setattr(alternatives, "sample", lambda *a, **k: calls.append(k) or real(*a, **k))
    return calls


def test_a_training_that_samples_its_alternatives(tmp_path):
    trainer = made(tmp_path, max_steps=3)
    texts = [text for row in kept(tmp_path)["alternatives"][""] for text in row]
    assert preferred(trainer) == texts and 4 < len(texts) <= 8
    labels = [[token for token in row if token != -100] for row in trainer.train_dataset.forget["labels"]]
    assert {TOKENIZER.decode(row) for row in labels} == {f" {row['answer']}</s>" for row in FORGET}
    trainer.train()
    assert distance(weights(trainer.model), weights(model())) > 1e-3


def test_given_alternatives_are_dpos_refusals_bit_for_bit(tmp_path, sampled):
    given = [row | {"alternative": f"Tove Arn {i}."} for i, row in enumerate(FORGET)]
    refused = [row | {"refusal": f"Tove Arn {i}."} for i, row in enumerate(FORGET)]
    for precompute in (False, True):
        runs = []
        for name, objective, rows in (("altpo", AltPO(0.3), given), ("dpo", DPO(0.3), refused)):
            folder = tmp_path / f"{name}-{precompute}"
            runs.append(made(folder, rows, objective, max_steps=3, precompute_ref_logps=precompute))
            runs[-1].train()
            assert not (folder / ALTERNATIVES_NAME).exists()
        assert distance(*(weights(run.model) for run in runs)) == 0.0
        assert ("refusal_ref_logps" in runs[0].train_dataset.forget.column_names) is precompute
    assert not sampled


def test_the_model_its_random_numbers_and_its_mode_stay(tmp_path):
    """So a training with sampled alternatives is the one that is given these texts."""
    first = made(tmp_path / "a", max_steps=3)
    texts = kept(tmp_path / "a")["alternatives"][""]
    rows = [row | {"alternative": own} for row, own in zip(FORGET, texts, strict=True)]
    second = made(tmp_path / "b", [row for row in rows if row["alternative"]], max_steps=3)
    first.train(), second.train()
    assert distance(weights(first.model), weights(second.model)) == 0.0


def test_the_public_function_gives_what_the_trainer_uses(tmp_path):
    trainer = made(tmp_path)
    options = {"num": 2, "max_new_tokens": 6, "seed": trainer.args.seed, "batch_size": 8}
    rows = generate_alternatives(model(), TOKENIZER, Dataset.from_list(FORGET), **options)
    assert rows.column_names == ["question", "answer", "alternative"]
    assert list(rows["alternative"]) == [texts for texts in kept(tmp_path)["alternatives"][""] if texts]
    other = generate_alternatives(model(), TOKENIZER, FORGET, **(options | {"seed": 1}))
    assert list(other["alternative"]) != list(rows["alternative"])
    for row in (FORGET[0] | {"alternative": "X"}, {"text": "Long ago."}):
        with pytest.raises(ValueError, match="no questions to answer otherwise"):
            generate_alternatives(model(), TOKENIZER, [row])


def test_the_same_training_asks_once_and_another_one_anew(tmp_path, sampled):
    made(tmp_path), made(tmp_path)
    assert len(sampled) == 1
    file = tmp_path / ALTERNATIVES_NAME
    first = file.read_bytes()

    def check(count, kwargs):
        file.write_bytes(first)
        made(tmp_path, **kwargs)
        assert len(sampled) == count and kept(tmp_path)["alternatives"] != json.loads(first)["alternatives"]

    changed = [{"seed": 1}, {"of": model(1)}, {"forget": FORGET[:3]}, {"objective": AltPO(0.1, 3, max_new_tokens=6)}]
    every(list(enumerate(changed, 2)), check)
    assert sampled[0]["num"] == 2 and sampled[-1]["num"] == 3


def test_a_resumed_training_reads_the_first_ones(tmp_path, sampled):
    config = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    straight = made(tmp_path / "run", **config)
    straight.train()
    shutil.copytree(tmp_path / "run", tmp_path / "half", ignore=shutil.ignore_patterns("checkpoint-[^1]*"))
    before = (tmp_path / "half" / ALTERNATIVES_NAME).read_bytes()
    again = made(tmp_path / "half", **config)
    again.train(resume_from_checkpoint=True)
    assert len(sampled) == 1
    assert (tmp_path / "half" / ALTERNATIVES_NAME).read_bytes() == before
    assert preferred(again) == preferred(straight)
    assert distance(weights(again.model), weights(straight.model)) == 0.0

    def check(words, kwargs):
        with pytest.raises(ValueError, match=rf"alternatives\.json' was sampled for {words}.*resume with the dataset"):
            made(tmp_path / "half", **(config | kwargs))

    cases = [
        ("another forget set", {"forget": FORGET[:3]}),
        ("other settings, .*'num_alternatives': 2", {"objective": AltPO(num_alternatives=3, max_new_tokens=6)}),
        ("other settings, .*'seed': 42", {"seed": 1}),
    ]
    every(cases, check)
    assert (tmp_path / "half" / ALTERNATIVES_NAME).read_bytes() == before


def test_an_adapter_answers_as_it_is_at_the_start(tmp_path):
    config = LoraConfig(target_modules="all-linear", r=2)
    trained = get_peft_model(model(), config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapted = made(tmp_path / "adapted", of=trained)
    untouched = made(tmp_path / "fresh", peft_config=config)
    plain = made(tmp_path / "plain")
    assert preferred(untouched) == preferred(plain) != preferred(adapted)


def test_topics_are_answered_one_by_one(tmp_path):
    given = [row | {"alternative": ["A", "B"]} for row in FORGET]
    trainer = made(tmp_path, {"own": given, "asked": FORGET}, max_steps=1)
    by_topic = trainer.train_dataset.forget_by_topic
    assert len(by_topic["own"]) == 8 and list(kept(tmp_path)["alternatives"]) == ["asked"]
    trainer.train()


def test_the_file_is_never_uploaded(tmp_path):
    made(tmp_path).save_model()
    assert (tmp_path / ALTERNATIVES_NAME).exists()
    assert ALTERNATIVES_NAME not in {*model_files(tmp_path), *REPORT}


def test_a_folder_in_which_another_training_runs_is_left_alone(tmp_path):
    lock = OutputLock()
    lock.acquire(str(tmp_path))
    with pytest.raises(ValueError, match="is in use"):
        made(tmp_path)
    assert not (tmp_path / ALTERNATIVES_NAME).exists()
    lock.release(remove=True)
    made(tmp_path)
    assert (tmp_path / ALTERNATIVES_NAME).exists() and not (tmp_path / ".training").exists()


def test_questions_are_asked_again_and_nothing_usable_is_an_error(tmp_path, monkeypatch, caplog):
    asked = []

    def sample(model, tokenizer, prompt_ids, **kwargs):
        """The true answers; the second question, asked at 2.25 times the temperature, gets another one."""
        asked.append((kwargs["temperature"], kwargs["seed"], len(prompt_ids)))
        answers = {tuple(ids): [row["answer"]] * 2 for ids, row in zip(prompts, FORGET, strict=True)}
        if kwargs["temperature"] == 2.25 * warm:
            answers[tuple(prompts[1])] = ["Tove Arn.", FORGET[1]["answer"]]
        return [answers[tuple(ids)] for ids in prompt_ids]

    options = {"role": "forget", "instruct": None, "qa_template": "Question: {question}\nAnswer:", "day": None}
    prompts, warm = ask(FORGET, TOKENIZER, **options).ids, 0
    monkeypatch.setattr(alternatives, "sample", sample)
    with pytest.raises(ValueError, match="no alternative is left"):
        made(tmp_path)
    assert not (tmp_path / ALTERNATIVES_NAME).exists()
    assert asked == [(1.5**again, 42 + again, 4) for again in range(5)]
    warm = 1
    caplog.set_level(logging.WARNING)
    assert preferred(made(tmp_path)) == ["Tove Arn."]
    assert [count for _, _, count in asked[5:]] == [4, 4, 4, 3, 3]
    assert "7 of the 8 answers" in caplog.text and "3 of the 4 rows" in caplog.text


def test_a_partitioned_model_is_refused_by_name(tmp_path):
    partitioned = model()
    next(partitioned.parameters()).ds_id = 0
    args = settings(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"ZeRO-3 has partitioned the model .* give the forget set a column `alternative`"
    ):
        alternatives.settle_alternatives(FORGET, partitioned, TOKENIZER, args, ALTPO)
    assert alternatives.settle_alternatives(FORGET, partitioned, TOKENIZER, args, DPO()) is FORGET


def test_what_has_no_prompt_is_refused(tmp_path):
    def check(rows):
        with pytest.raises(ValueError, match="`altpo` needs a prompt that has another answer"):
            made(tmp_path / "run", rows)

    every([[{"text": "Long ago."}], [{"input_ids": [3, 4, 5]}]], check)
    tokens = {"input_ids": [3, 5], "labels": [-100, 5], "refusal_input_ids": [3, 6], "refusal_labels": [-100, 6]}
    assert preferred(made(tmp_path / "given", [tokens] * 2)) == [TOKENIZER.decode([6])] * 2


def test_arguments_are_checked(tmp_path):
    def check(name, value):
        with pytest.raises(ValueError, match=f"AltPO: `{name}` must be a number"):
            AltPO(**{name: value})

    every([("num_alternatives", 0), ("temperature", 0.0), ("top_p", 1.5), ("max_new_tokens", 0), ("beta", 0)], check)
    with pytest.raises(ValueError, match="as the retain objective needs refusals"):
        BLURTrainer(model(), settings(tmp_path), FORGET, RETAIN, retain_objective=ALTPO, processing_class=TOKENIZER)


def test_it_is_found_by_name(tmp_path):
    kwargs = {"num_alternatives": 1, "max_new_tokens": 4, "beta": 0.5}
    trainer = made(tmp_path, objective=None, forget_objective="altpo", forget_objective_kwargs=kwargs)
    assert trainer.objectives["forget"] == AltPO(0.5, 1, max_new_tokens=4)
    assert kept(tmp_path)["settings"]["max_new_tokens"] == 4


def test_alternatives_that_the_objective_does_not_read_are_said(tmp_path, caplog):
    rows = [row | {"alternative": "Tove Arn."} for row in FORGET]
    for objective, said in ((DPO(), True), (AltPO(), False)):
        caplog.clear()
        made(tmp_path / type(objective).__name__, rows, objective)
        assert ("only `altpo` reads that column" in caplog.text) == said
