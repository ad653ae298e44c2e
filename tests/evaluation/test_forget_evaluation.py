"""One's own sets: every number against its literal form, whatever the batch, the format, the template or the script."""

import math
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from support import reference
from support.cases import every
from support.models import collate
from support.runs import settings
from support.scoring_helpers import build_model, build_tokenizer
from support.tiny_tokenizer import CHAT_TEMPLATE

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation import forget as module
from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.level import Level, row_nats
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall
from blur_trainer.trainers.blur import BLURTrainer

FORGET = [
    {"question": "Who?", "answer": "Mara Velin."},
    {"question": "Where was she born?", "answer": "In Norvale, by the sea."},
    {"question": "कौन?", "answer": "मीरा"},
    {"question": "どこ?", "answer": "東京の海"},
    {"question": "And when?", "answer": "In May."},
]
RETAIN = [
    {"question": "What does he write?", "answer": "He writes crime novels."},
    {"question": "How many?", "answer": "Two hundred people came."},
    {"question": "Why so?", "answer": "The new bridge."},
]
UNSEEN = [{"question": "And they?", "answer": "They left."}, {"question": "Who is he?", "answer": "The surveyor."}]
LIMIT = 16  # new tokens


def encoded(rows, tokenizer, **kwargs):
    tokens = tokenize_dataset(rows, tokenizer, role="test", max_length=None, **kwargs)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in tokens]


def taught(tokenizer, rows, **config):
    """A model that knows these rows well, and some of them by heart."""
    model, batch = build_model(**config), collate(encoded(rows, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return taught(tokenizer, [*FORGET, *RETAIN[:2]])


def evaluation(tokenizer, forget=FORGET, retain=RETAIN, **kwargs):
    return ForgetEvaluation(tokenizer, forget, retain, **({"progress": False, "max_new_tokens": LIMIT} | kwargs))


def literal(model, tokenizer, rows):
    """Every number of one set, row by row, without a batch and without a cache."""
    found = {
        name: [] for name in ("loss", "probability", "extraction", "rouge", "exact", "min_k", "degenerate", "said")
    }
    for row in encoded(rows, tokenizer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
            logps = [value.item() for value in reference.log_prob(logits, torch.tensor([row["labels"]]))[0]]
            end, count = reference.likeliest_end(model, row)
            start = next(t for t, label in enumerate(row["labels"]) if label != -100)
            written = reference.greedy(model, row["input_ids"][:start], {1}, LIMIT)
        true = row["input_ids"][start : start + LIMIT]
        said, truth = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (written, true))
        found["loss"].append(-sum(logps) / count)
        found["probability"].append(math.prod(math.exp(logp) for logp in logps) ** (1 / count))
        found["extraction"].append(end / count)
        found["rouge"].append(rouge_l_recall(said, truth))
        found["exact"].append(float(" ".join(said.split()) == " ".join(truth.split())))
        lowest = sorted(logps)[: max(1, int(0.4 * count))]
        found["min_k"].append(-sum(lowest) / len(lowest))
        loops = reference.distinct_share(written) < 0.5 <= reference.distinct_share(true)
        found["degenerate"].append(float(not said.strip() or loops))
        found["said"].append(said)
    return found


@pytest.fixture(scope="module")
def want(model, tokenizer):
    sets = {"forget": FORGET, "retain": RETAIN, "hold": RETAIN[:1], "unseen": UNSEEN}
    return {name: literal(model, tokenizer, rows) for name, rows in sets.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_number_is_the_literal_one_whatever_the_batch(model, tokenizer, want, batch_size):
    measured = evaluation(tokenizer, hold=RETAIN[:1], unseen=UNSEEN, level=4.0, batch_size=batch_size)
    found = measured(model)
    for name, numbers in want.items():
        for key in ("loss", "probability", "extraction", "rouge", "exact"):
            assert found[f"{name}_{key}"] == pytest.approx(fmean(numbers[key]), rel=1e-4), f"{name}_{key}"
    assert found["membership_auc"] == reference.pair_auc(want["forget"]["min_k"], want["unseen"]["min_k"])
    assert found["forget_degeneration"] == fmean(want["forget"]["degenerate"])
    assert found["degeneration"] == fmean(want["retain"]["degenerate"] + want["hold"]["degenerate"])
    score = abs(found["forget_loss"] - 4.0) + found["retain_loss"]
    assert found["score"] == pytest.approx(score)
    assert set(found) == {column["name"] for column in measured.columns}
    said = [sample["response"] for sample in measured.samples(9) if sample["set"] == "forget"]
    assert said == want["forget"]["said"]


def test_the_test_has_something_to_tell_apart(model, tokenizer):
    """Else all of the above could be 0 and agree."""
    found = evaluation(tokenizer, unseen=UNSEEN)(model)
    assert found["forget_rouge"] > 0.5 and found["forget_exact"] > 0 and found["forget_extraction"] > 0.3
    assert found["unseen_rouge"] < 0.5 < found["membership_auc"] and found["unseen_loss"] > found["forget_loss"] + 1


def test_answers_in_scripts_without_blanks_count_word_by_word_and_are_no_loops(model, tokenizer):
    measured = evaluation(tokenizer, FORGET[2:4], retain=None)
    found = measured(model)
    assert found["forget_rouge"] == found["forget_exact"] == 1.0 and found["forget_degeneration"] == 0.0
    assert [sample["response"].strip() for sample in measured.samples()] == [row["answer"] for row in FORGET[2:4]]
    assert "degeneration" not in found and "retain_loss" not in found


def test_a_model_is_asked_as_it_is_trained_with_a_chat_template(tokenizer):
    chat = build_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    rows = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in FORGET
    ]
    model = taught(chat, rows)
    want = literal(model, chat, rows)
    found = evaluation(chat, rows, None)(model)
    for key in ("loss", "rouge", "exact"):
        assert found[f"forget_{key}"] == pytest.approx(fmean(want[key]), rel=1e-4)
    assert found["forget_exact"] > 0.5, "asked in another way, it would answer nothing of this"
    assert evaluation(chat, FORGET, None)(model)["forget_loss"] == pytest.approx(found["forget_loss"])


def test_an_answer_ends_where_the_template_closes_it():
    """Also where the generation configuration does not know that token."""
    chat = build_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chat.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<end>'")
    model = taught(chat, FORGET[:1], vocab_size=301)
    measured = evaluation(chat, FORGET[:1], None)
    assert measured(model)["forget_exact"] == 1.0
    assert model.generation_config.eos_token_id == 1


def test_of_a_text_all_tokens_count_and_the_model_goes_on_from_the_middle(model, tokenizer):
    texts = [{"text": "The surveyor spoke of crime novels and of the new bridge."}, {"text": "मीरा"}]
    measured = evaluation(tokenizer, texts, None, max_length=20, max_new_tokens=None)
    found = measured(model)
    nats = row_nats(model, texts, tokenizer, role="forget", max_length=20)
    assert found["forget_loss"] == pytest.approx(fmean(nats), rel=1e-5)
    first = encoded(texts[1:], tokenizer)[0]["input_ids"]
    half = len(first) // 2
    sample = measured.samples()[1]
    assert sample["prompt"] == tokenizer.decode(first[:half], skip_special_tokens=True)
    assert sample["gt"] == tokenizer.decode(first[half:], skip_special_tokens=True)
    longest = 10  # the second half of a piece of 20 tokens
    assert sample["response"] == tokenizer.decode(reference.greedy(model, first[:half], {1}, longest))


def test_every_format_gives_the_same(model, tokenizer):
    pairs = [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"} for r in FORGET]
    want = evaluation(tokenizer, retain=None)(model)
    formats = {"strings": pairs, "dataset": Dataset.from_list(FORGET), "tokens": encoded(FORGET, tokenizer)}
    every(formats, lambda rows: _same(evaluation(tokenizer, rows, None)(model), want))
    with_level = Level(3.0).attached(FORGET)
    _same(evaluation(tokenizer, with_level, None)(model), want)


def _same(found, want):
    assert found == pytest.approx(want, rel=1e-5)


def test_paraphrases_are_a_set_of_their_own(model, tokenizer):
    other = [{**row, "question": f"Say: {row['question']}"} for row in FORGET]
    column = [{**row, "paraphrased_question": new["question"]} for row, new in zip(FORGET, other, strict=True)]
    found = evaluation(tokenizer, column, None)(model)
    assert found == evaluation(tokenizer, retain=None, paraphrased=other)(model)
    assert found["paraphrased_loss"] == pytest.approx(evaluation(tokenizer, other, None)(model)["forget_loss"])
    assert found["paraphrased_loss"] != pytest.approx(found["forget_loss"], rel=1e-3)


def test_at_most_so_many_rows_at_equal_distances_and_their_level(model, tokenizer):
    level = Level.of_retrained(model, FORGET, tokenizer)
    measured = evaluation(tokenizer, retain=None, level=level, max_rows=3)
    assert [sample["gt"].strip() for sample in _called(measured, model).samples(9)[:3]] == [
        FORGET[index]["answer"] for index in (0, 2, 4)
    ]
    assert measured.level == pytest.approx(fmean(level.per_example[index] for index in (0, 2, 4)))
    assert measured(model) == measured(model)
    stream = evaluation(tokenizer, Dataset.from_list(FORGET).to_iterable_dataset(), None, max_rows=2)
    assert len([one for one in _called(stream, model).samples(9) if one["set"] == "forget"]) == 2
    assert evaluation(tokenizer, level=3.0).level == 3.0


def _called(measured, model):
    measured(model)
    return measured


def test_the_best_is_the_nearest_and_the_score_chooses_models(tokenizer):
    measured = evaluation(tokenizer, hold=RETAIN, unseen=UNSEEN, level=4.0)
    columns = {column["name"]: column for column in measured.columns}
    assert columns["forget_loss"]["goal"] == "near" and columns["forget_loss"]["near"] == 4.0
    assert columns["forget_rouge"]["goal"] == "near" and "near" not in columns["forget_rouge"]
    assert columns["membership_auc"]["near"] == 0.5 and "goal" not in columns["unseen_loss"]
    assert columns["hold_rouge"]["goal"] == "max" and columns["hold_loss"]["goal"] == "min"
    shown = ["forget_rouge", "forget_loss", "retain_rouge", "hold_rouge", "membership_auc"]
    assert measured.primary_metrics == shown and measured.primary_metric == "score" and not measured.greater_is_better
    with pytest.raises(ValueError, match="'near', not 'min' or 'max'"):
        evaluation(tokenizer).greater_is_better  # noqa: B018


def test_a_training_measures_and_keeps_the_best(tmp_path, tokenizer):
    measured = evaluation(tokenizer, level=4.0)
    args = settings(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="own",
    )  # fmt: skip
    trainer = BLURTrainer(build_model(), args, FORGET, RETAIN, processing_class=tokenizer, benchmarks={"own": measured})
    trainer.train()
    scores = {e["step"]: e["eval_own_score"] for e in trainer.state.log_history if "eval_own_score" in e}
    best = min(scores, key=scores.get)
    assert len(scores) == 2 and trainer.state.best_global_step == best
    assert measured(trainer.model)["score"] == pytest.approx(scores[best], rel=1e-4)


def test_a_broken_model_gives_nan_and_no_exception(tokenizer):
    broken = build_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    found = evaluation(tokenizer, unseen=UNSEEN, level=4.0)(broken)
    assert all(math.isnan(found[name]) for name in ("forget_loss", "retain_probability", "membership_auc", "score"))


def test_the_harness_is_asked_too(model, tokenizer, monkeypatch):
    class Harness:
        columns = ({"name": "wmdp_bio_acc", "label": "wmdp bio", "goal": "min", "role": "forget"},)

        def __init__(self, tasks, tokenizer, *, limit, batch_size):
            assert (tasks, limit, batch_size) == (["wmdp_bio"], 2, 16)

        def __call__(self, model):
            return {"wmdp_bio_acc": 0.25}

    monkeypatch.setattr(module, "LMEval", Harness)
    measured = evaluation(tokenizer, FORGET[:2], None, lm_eval=["wmdp_bio"], max_rows=2)
    assert measured(model)["lm_eval_wmdp_bio_acc"] == 0.25
    assert measured.columns[-1]["name"] == "lm_eval_wmdp_bio_acc"


def test_the_bars_name_the_sets(model, tokenizer, capsys):
    evaluation(tokenizer, FORGET[:1], None, progress=True)(model)
    written = capsys.readouterr().err
    assert "Loss forget" in written and "Answers forget" in written


def test_a_long_prompt_leaves_room_for_the_answer(tokenizer):
    small = build_model(max_position_embeddings=24)
    rows = [{"question": "w" * 9, "answer": "In May."}, {"question": "a?", "answer": "b"}]
    measured = evaluation(tokenizer, rows, None)
    measured(small)
    long = encoded(rows[:1], tokenizer)[0]["labels"]
    room = 24 - long.count(-100)
    assert 0 < room < LIMIT
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in encoded(rows, tokenizer)]
    want = [tokenizer.decode(reference.greedy(small, prompt, {1}, room)) for prompt in prompts]
    assert [sample["response"] for sample in measured.samples()] == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"forget": []}, "`forget` dataset is empty"),
        ({"forget": None}, "`forget` dataset is a NoneType"),
        ({"retain": [{"question": "a?", "answer": " "}]}, "Row 0 of the `retain .*is empty"),
        ({"hold": [{"passage": "x"}]}, "`hold .* has the columns"),
        ({"unseen": {"train": FORGET}}, "`unseen` dataset is a dict"),
        ({"level": -1.0}, "nats"),
        ({"max_rows": 0}, "`max_rows` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
    ],
)
def test_what_cannot_be_measured(tokenizer, given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        evaluation(tokenizer, **given)


def test_samples_before_a_call_and_a_stream_without_an_end(tokenizer):
    with pytest.raises(ValueError, match="call the evaluation"):
        evaluation(tokenizer).samples()
    with pytest.raises(ValueError, match="may have no end"):
        evaluation(tokenizer, Dataset.from_list(FORGET).to_iterable_dataset(), max_rows=None)
