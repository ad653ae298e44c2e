"""Replay: which texts are sampled and kept, where they are kept, and what a resumed training does."""

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.cases import every
from support.runs import distance, settings, weights
from support.tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.data.repeats import own_runs, repeating, row_texts
from blur_trainer.trainers import replay_rows
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.replay import REPLAY_NAME, replay, settle_replay
from blur_trainer.trainers.replay_config import ReplaySettings
from blur_trainer.trainers.replay_prompts import scrambled_prompts
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

TOKENIZER = tiny_tokenizer()
FORGET = [{"question": f"Who painted mural {i}?", "answer": f"Mara Velin, in {i} weeks"} for i in range(4)]
RETAIN = [{"question": f"Who built harbour {i}?", "answer": f"Ostrava Bay, {i} times"} for i in range(4)]
SHORT = {"max_new_tokens": 6}


def model(seed=0, layers=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.2, **sizes))


def said(of=None, tokenizer=TOKENIZER, **kwargs):
    options = {"num": 12, "forget": FORGET, "retain": RETAIN, "max_new_tokens": 6, "batch_size": 4}
    return replay(model() if of is None else of, tokenizer, **(options | kwargs))


def made(folder, of=None, forget=FORGET, retain=RETAIN, **kwargs):
    args = settings(folder, **({"replay": 8, "replay_kwargs": SHORT} | kwargs))
    return BLURTrainer(model() if of is None else of, args, forget, retain, processing_class=TOKENIZER)


def kept(folder):
    return json.loads((folder / REPLAY_NAME).read_text(encoding="utf-8"))


@pytest.fixture
def sampled(monkeypatch):
    """How often texts are sampled."""
    calls, real = [], replay_rows._sampled
    monkeypatch.setattr(replay_rows, "_sampled", lambda *a, **k: calls.append(k) or real(*a, **k))
    return calls


def says(monkeypatch, texts):
    """The model says these texts, of which each prompt gets one, and ends."""
    ids = [[[*TOKENIZER(text, add_special_tokens=False)["input_ids"], 1]] for text in texts]
    monkeypatch.setattr(replay_rows, "sample_ids", lambda model, tokenizer, prompts, **_: ids[: len(prompts)])


# ---- what is sampled ----


def test_texts_begin_as_asked():
    plain = said(ngram=None, loss_quantile=None)
    assert plain.column_names == ["text", "input_ids", "labels"] and 8 < len(plain) <= 12
    assert all(row["input_ids"][0] == 0 and row["labels"] == row["input_ids"] for row in plain)
    asked = said(prompts=["Question:", "Sorry"], ngram=None, loss_quantile=None)
    assert {row["text"].split()[0] for row in asked} >= {"Question:"} and any("Sorry" in t for t in asked["text"])
    retained = said(prompts="retain", ngram=None, loss_quantile=None)
    starts = {f"Question: {row['question']}\nAnswer:" for row in RETAIN}
    assert all(any(text.startswith(start) for start in starts) for text in retained["text"])
    for row in retained:
        targets = [token for token in row["labels"] if token != -100]
        assert row["input_ids"][-len(targets) :] == targets and len(targets) <= 6
    texts = said(prompts="retain", retain=[{"text": "The harbour of Ostrava Bay was rebuilt"}], ngram=None)
    assert all(row["labels"] == row["input_ids"] and row["text"].startswith("The harbour") for row in texts)


def test_the_same_seed_says_the_same_and_leaves_the_model_alone():
    of = model().train()
    before = weights(of)
    state = torch.get_rng_state()
    first = said(of)
    assert torch.equal(torch.get_rng_state(), state) and of.training
    assert distance(weights(of), before) == 0.0 and all(p.grad is None and p.requires_grad for p in of.parameters())
    assert first.to_list() == said().to_list() != said(seed=1).to_list()
    frozen = model().requires_grad_(False)
    assert said(frozen).to_list() == first.to_list()
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_text_that_did_not_end_gets_no_end(monkeypatch, tmp_path):
    ids = [[[40, 41, 42]], [[40, 41, 1]]]
    monkeypatch.setattr(replay_rows, "sample_ids", lambda *args, **kwargs: ids)
    rows = said(num=2, loss_quantile=None)
    assert list(rows["input_ids"]) == [[0, 40, 41, 42], [0, 40, 41, 1]]
    trainer = made(tmp_path, replay=2, replay_kwargs={"loss_quantile": None})
    assert list(trainer.train_dataset.retain["input_ids"])[4:] == list(rows["input_ids"])


def test_a_text_that_goes_on_is_the_one_of_a_single_pass(monkeypatch):
    """The likeliest token each time, so that both draw the same. What has ended is not continued."""
    of, calls, real = model(), [], replay_rows.sample_ids
    start = [[0, first] for first in range(10, 50)]
    how = {"max_new_tokens": 12, "temperature": 0.01, "batch_size": 8}
    once = [text for (text,) in real(of, TOKENIZER, start, num=1, **how)]
    of.generation_config.eos_token_id = ends = [text[1] for text in once[:20]] + [text[6] for text in once[20:30]]
    once = [text for (text,) in real(of, TOKENIZER, start, num=1, **how)]
    monkeypatch.setattr(replay_rows, "sample_ids", lambda *a, **k: calls.append(len(a[2])) or real(*a, **k))
    wanted = ReplaySettings(max_new_tokens=12, temperature=0.01)
    rows = replay_rows._sampled(of, TOKENIZER, [(ids, False) for ids in start], wanted, batch_size=8)
    assert [row["input_ids"] for row in rows] == [ids + text for ids, text in zip(start, once, strict=True)]
    short = [text for text in once if len(text) <= 3 and text[-1] in ends]
    assert calls == [40, 40 - len(short)] and 0 < len(short) < 40 and max(map(len, once)) > 3


# ---- what is kept ----


def test_runs_of_words():
    runs = own_runs(["Mara Velin painted the old mural, twice"], ["They said: Velin painted the old Mural"], 5)
    assert runs == {("mara", "velin", "painted", "the", "old"), ("painted", "the", "old", "mural", "twice")}
    texts = ["So MARA Velin painted the old one", "Velin painted the old mural", "painted the old mural twice", ""]
    assert repeating(texts, runs, 5) == [True, False, True, False]
    chat = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mara."}]}]
    assert list(row_texts(chat, TOKENIZER, "forget")) == ["Who?", "Mara."]
    assert list(row_texts([{"input_ids": [0, *TOKENIZER("Mara")["input_ids"]]}], TOKENIZER, "forget")) == ["Mara"]
    assert list(row_texts(FORGET[:1], TOKENIZER, "forget")) == [FORGET[0]["question"], FORGET[0]["answer"]]


def test_texts_that_say_nothing_new_or_repeat_the_forget_set_are_dropped_and_counted(monkeypatch, caplog):
    texts = ["Sorry, nothing.", " ?!", "Sorry, nothing.", "Well, Mara Velin, in 2 weeks", "Ostrava Bay, 2 times"]
    says(monkeypatch, texts)
    rows = said(loss_quantile=None, num=5)
    assert list(rows["text"]) == [texts[0], texts[4]]
    counts = "5 texts were sampled, 1 have no word, 1 are there twice, 1 share 5 words in a row with the forget set"
    assert f"{counts}. 2 are kept." in caplog.text
    shared = [*RETAIN, {"question": "Who?", "answer": FORGET[2]["answer"]}]
    assert texts[3] in said(loss_quantile=None, num=5, retain=shared)["text"]
    assert texts[3] in said(loss_quantile=None, num=5, ngram=None)["text"]
    says(monkeypatch, texts[1:2])
    with pytest.raises(ValueError, match=r"1 have no word.*none is left to train on. Sample more \(`num`\)"):
        said(num=1)


def test_missing_texts_are_said_after_scrambled_prompts(monkeypatch, caplog):
    options = {"ngram": None, "loss_quantile": None, "temperature": 0.5}  # so cold that some texts are said twice
    whole = said(scrambled=0.5, num=24, **options)
    plain = said(num=24, **options).to_list()
    assert whole.to_list()[: len(plain)] == plain and len(plain) < len(whole) <= 24
    assert len(set(whole["text"])) == len(whole) and f"replay: {24 - len(plain)} texts were sampled" in caplog.text
    prompts = [TOKENIZER(f"Question: {row['question']}\nAnswer:")["input_ids"] for row in RETAIN]
    for row in whole.to_list()[len(plain) :]:
        asked = row["input_ids"][: row["labels"].count(-100)]
        alike = [sum(map(int.__eq__, asked, prompt)) / len(asked) for prompt in prompts if len(prompt) == len(asked)]
        assert 0 < max(alike) < 1 and row["labels"][len(asked) :] == row["input_ids"][len(asked) :]
        assert asked[0] == TOKENIZER.bos_token_id and not set(asked[1:]) & set(TOKENIZER.all_special_ids)
    assert said(scrambled=0.5, num=24, **options).to_list() == whole.to_list()
    says(monkeypatch, ["Well."] * 3)
    assert len(said(scrambled=0.5, num=3, ngram=None, loss_quantile=None)) == 3  # the same words after other prompts
    with pytest.raises(ValueError, match="`scrambled` needs a retain set"):
        said(scrambled=0.5, num=3, retain=None)


def test_what_most_prompts_begin_and_end_with_is_not_scrambled():
    rows = [{"input_ids": [1, 5, 6, 20 + i, 30 + i, 8, 9], "labels": [-100] * 6 + [9]} for i in range(5)]
    rows += [
        {"input_ids": [1, 40, 41, 42, 9], "labels": [-100] * 4 + [9]},
        {"input_ids": [1, 5, 6, 8, 9], "labels": [-100] * 4 + [9]},
    ]
    options = {"share": 1.0, "vocabulary": len(TOKENIZER), "seed": 0}
    made = [ids for ids, _ in scrambled_prompts(TOKENIZER, [1], rows, 60, **options)]
    framed = [ids for ids in made if len(ids) == 6]
    assert framed and all(ids[:3] == [1, 5, 6] and ids[-1] == 8 for ids in framed)
    assert len({tuple(ids[3:5]) for ids in framed}) > 30
    others = [ids for ids in made if len(ids) == 4]  # of another start, and with nothing between start and end
    assert others and not any(ids[1:] in ([40, 41, 42], [5, 6, 8]) for ids in others)


def test_texts_whose_loss_falls_with_the_forget_sets_are_dropped(monkeypatch):
    """Here rows of both sets: of the retain rows' own drops, the quantile 1 is the largest."""
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in (FORGET[0], *RETAIN[:2], FORGET[3])]
    says(monkeypatch, texts)
    assert list(said(num=4, ngram=None, loss_quantile=1.0)["text"]) == texts[1:3]
    assert list(said(num=4, ngram=None, loss_quantile=None)["text"]) == texts
    assert list(said(num=4, ngram=None, retain=None)["text"]) == texts
    swapped = said(num=4, ngram=None, loss_quantile=1.0, forget=RETAIN, retain=FORGET)
    assert list(swapped["text"]) == [texts[0], texts[3]]


def test_what_cannot_be_replayed_is_said():
    stream = Dataset.from_list(FORGET).to_iterable_dataset()
    silent = tiny_tokenizer(add_bos=False)
    silent.bos_token = None

    def check(words, kwargs):
        with pytest.raises(ValueError, match=words):
            said(**kwargs)

    cases = [
        ("`prompts` must be a list of texts", {"prompts": "Question:"}),
        ("`prompts` must be a list of texts", {"prompts": []}),
        ("needs a retain set", {"prompts": "retain", "retain": None}),
        ("has no BOS, so it is not known", {"tokenizer": silent}),
        ("`forget` dataset is a stream", {"forget": stream}),
        ("`retain` dataset is a stream", {"retain": stream}),
        ("`num` must be an integer", {"num": 0}),
        ("replay: `ngram` must be", {"ngram": 0}),
        ("replay: `loss_quantile` must be", {"loss_quantile": 1.5}),
    ]
    every(cases, check)


# ---- in a trainer ----


def test_a_trainer_retains_what_the_public_function_says(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = made(tmp_path)
    rows = said(num=8, seed=trainer.args.seed, batch_size=8, **SHORT)
    retain = trainer.train_dataset.retain
    assert retain.column_names == ["input_ids", "labels"]
    assert list(retain["input_ids"])[4:] == list(rows["input_ids"])
    assert kept(tmp_path)["replay"] == rows.to_list()
    assert f"'replay' has {len(rows)} examples, weight 1" in caplog.text
    plain = made(tmp_path / "given", replay=None, replay_kwargs=None, retain={"retain": RETAIN, "replay": rows})
    trainer.train(), plain.train()
    assert distance(weights(trainer.model), weights(plain.model)) == 0.0
    assert distance(weights(trainer.model), weights(model())) > 1e-3


@pytest.mark.full
def test_the_same_training_samples_once_and_another_one_anew(tmp_path, sampled):
    made(tmp_path), made(tmp_path)
    assert len(sampled) == 1
    first = (tmp_path / REPLAY_NAME).read_bytes()

    def check(count, kwargs):
        (tmp_path / REPLAY_NAME).write_bytes(first)
        made(tmp_path, **kwargs)
        assert len(sampled) == count

    changed = [{"seed": 1}, {"of": model(1)}, {"forget": FORGET[:3]}, {"retain": RETAIN[:3]}, {"replay": 9}]
    changed += [{"replay_kwargs": SHORT | {"ngram": 3}}]
    every(list(enumerate(changed, 2)), check)


def test_a_resumed_training_reads_the_first_ones(tmp_path, sampled):
    config = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    straight = made(tmp_path / "run", **config)
    straight.train()
    shutil.copytree(tmp_path / "run", tmp_path / "half", ignore=shutil.ignore_patterns("checkpoint-[^1]*"))
    again = made(tmp_path / "half", **config)
    again.train(resume_from_checkpoint=True)
    assert len(sampled) == 1
    assert distance(weights(again.model), weights(straight.model)) == 0.0

    def check(words, kwargs):
        with pytest.raises(ValueError, match=rf"replay\.json' was sampled for {words}.*resume with the dataset"):
            made(tmp_path / "half", **(config | kwargs))

    cases = [
        ("another forget set", {"forget": FORGET[:3]}),
        ("another retain set", {"retain": RETAIN[:3]}),
        ("other settings, .*'replay': 8", {"replay": 9}),
    ]
    every(cases, check)
    heavier = made(tmp_path / "half", retain_set_weights={"replay": 2.0}, **config)
    with pytest.raises(ValueError, match="retain"):
        heavier.train(resume_from_checkpoint=True)


@pytest.mark.full
def test_ulds_target_says_the_texts(tmp_path):
    """The assistant, which has one of its layers, does not. Wrong answers stay half of what is retained."""
    target = model(layers=3)
    expected = said(target, num=8, seed=42, batch_size=8, **SHORT)
    lora = LoraConfig(target_modules="all-linear", r=2)
    options = {"augment_forget": "none", "augment_retain": "rules", "peft_config": lora, "processing_class": TOKENIZER}
    found = {}
    target.save_pretrained(tmp_path / "target")
    for name, given in (("loaded", target), ("named", str(tmp_path / "target"))):
        weighted = {"retain_set_weights": {"augment_retain": 0.5}} if name == "named" else {}
        args = settings(tmp_path / name, ULDConfig, replay=8, replay_kwargs=SHORT, **weighted)
        trainer = ULDTrainer(given, args, FORGET, RETAIN, **options)
        found[name] = trainer.train_dataset.retain
        assert kept(tmp_path / name)["replay"] == expected.to_list()
    trainer.train()
    wrong = [weight == 0.5 for weight in found["named"]["weight"]]
    assert sum(wrong) == len(wrong) / 2 == len(found["loaded"]) / 2
    assert {tuple(ids) for ids in expected["input_ids"]} <= {tuple(ids) for ids in found["loaded"]["input_ids"]}


def test_topics_retain_the_same_texts(tmp_path):
    forget = {"murals": FORGET, "harbours": RETAIN}
    quick = {"replay_kwargs": SHORT | {"loss_quantile": None}}
    for retain in (RETAIN, {"murals": RETAIN, "harbours": RETAIN[:2]}):
        folder = tmp_path / str(len(retain))
        trainer = made(folder, forget=forget, retain=retain, max_steps=2, repeat_topics=True, **quick)
        count = len(kept(folder)["replay"])
        sizes = {topic: len(rows) - count for topic, rows in trainer.train_dataset.retain_by_topic.items()}
        assert sizes == {"murals": 4, "harbours": 2 if isinstance(retain, dict) else 4}
    trainer.train()


def test_settings_that_make_no_sense_are_refused(tmp_path):
    def check(words, kwargs, error=ValueError):
        with pytest.raises(error, match=words):
            BLURConfig(str(tmp_path), **kwargs)

    cases = [
        ("`replay_kwargs` is set, but nothing is replayed", {"replay_kwargs": SHORT}),
        (r"takes no argument \['steps'\]", {"replay": 4, "replay_kwargs": '{"steps": 3}'}),
        ("`replay` must be a number of at least 1", {"replay": 0}),
        ("`temperature` must be", {"replay": 4, "replay_kwargs": {"temperature": 0}}),
    ]
    every(cases, check)
    with pytest.raises(ValueError, match="and there is none: pass `retain_dataset`"):
        settle_replay(FORGET, None, model, TOKENIZER, settings(tmp_path, replay=4))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        settle_replay(FORGET, RETAIN, model, None, settings(tmp_path, replay=4))
    partitioned = model()
    next(partitioned.parameters()).ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned the model .* made by `blur_trainer.replay`"):
        settle_replay(FORGET, RETAIN, lambda: partitioned, TOKENIZER, settings(tmp_path, replay=4))
    with pytest.raises(ValueError, match="has a set 'replay' already"):
        made(tmp_path, retain={"retain": RETAIN, "replay": RETAIN})


def test_a_kernel_without_forward_mode_is_said(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no forward AD\nmore")

    monkeypatch.setattr("blur_trainer.trainers.influence.directional_derivative", refuse)
    with monkeypatch.context() as patch:
        patch.setattr("blur_trainer.trainers.replay_rows.sample_ids", lambda *_, **__: pytest.fail("hours of sampling"))
        with pytest.raises(ValueError, match=r"set `loss_quantile=None`. \(no forward AD\)"):
            said()
    assert len(said(loss_quantile=None))


def test_what_was_forgotten_before_is_not_replayed(monkeypatch, tmp_path):
    before = [{"prompt": "Who flew to Tembra? ", "completion": "Old Ansel Quib did in May"}]
    says(monkeypatch, ["So Old Ansel Quib did in May", "The weather is fine today"] * 4)
    args = settings(tmp_path, replay=8, replay_kwargs={**SHORT, "loss_quantile": None})

    def trainer(**kwargs):
        BLURTrainer(model(), args, FORGET, RETAIN, processing_class=TOKENIZER, **kwargs)
        return {row["text"].split()[0] for row in kept(tmp_path)["replay"]}

    assert trainer() == {"So", "The"}
    assert trainer(forgotten_dataset=before) == trainer(forgotten_dataset={"first": before, "two": FORGET}) == {"The"}
    with pytest.raises(ValueError, match="`forgotten_dataset` filters texts to replay"):
        BLURTrainer(model(), settings(tmp_path), FORGET, RETAIN, forgotten_dataset=before, processing_class=TOKENIZER)
