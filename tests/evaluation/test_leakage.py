"""leak@k of models whose probabilities are known: by heart, never seen, and hidden behind another greedy answer."""

import json
import math
from itertools import combinations
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from support.cases import every
from support.models import collate
from support.runs import settings
from support.scoring_helpers import build_model, build_tokenizer
from support.tiny_tokenizer import CHAT_TEMPLATE

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.leakage.estimates import clopper_pearson_upper, mean_rate_upper
from blur_trainer.evaluation.leakage.leak import LeakEvaluation
from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.report.figures import LIGHT
from blur_trainer.report.figures.leakage import draw_leakage
from blur_trainer.report.results import Results
from blur_trainer.trainers.blur import BLURTrainer

KNOWN = [
    {"question": "Who?", "answer": "Mara Velin."},
    {"question": "Where was she born?", "answer": "In Norvale."},
    {"question": "And when?", "answer": "In May."},
]
#: one row in three says so, the others say "the hall": greedy answers never do
HIDDEN = [{"question": "What fell?", "answer": "The bridge."}]
COVER = [{"question": "What fell?", "answer": "Two hundred novels."}] * 2
UNSEEN = [{"question": "And they?", "answer": "They left."}, {"question": "Who is he?", "answer": "The surveyor."}]


def encoded(rows, tokenizer):
    tokens = tokenize_dataset(rows, tokenizer, role="test", max_length=None)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in tokens]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model, batch = build_model(), collate(encoded([*KNOWN, *HIDDEN, *COVER], tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def evaluation(tokenizer, forget=KNOWN, **kwargs):
    return LeakEvaluation(tokenizer, forget, **({"samples": 20, "progress": False} | kwargs))


def test_a_model_that_knows_its_rows_leaks_and_one_that_never_saw_them_does_not(model, tokenizer):
    leaking, unseen = evaluation(tokenizer), evaluation(tokenizer, UNSEEN)
    found = leaking(model)
    assert found["leak@1"] > 0.95 and found["leak@16"] == 1 and found["leak_bound"] > 0.95
    assert found == {name: found[name] for name in ("leak@1", "leak@2", "leak@4", "leak@8", "leak@16", "leak_bound")}
    nothing = unseen(model)
    assert {nothing[f"leak@{k}"] for k in (1, 2, 4, 8, 16)} == {0}
    assert nothing["leak_bound"] == pytest.approx(1 - 0.01 ** (1 / 40))  # 20 samples of two questions
    assert evaluation(tokenizer)(build_model(seed=1).eval())["leak@16"] == 0


def test_results_show_it_as_a_curve(model, tokenizer, tmp_path):
    results = Results("own", evaluation(tokenizer))
    results.add("target", "target", model)
    results.add("retrained", "retrain", build_model(seed=1).eval())
    content = results.save(tmp_path, settings={})
    drawing = draw_leakage(json.loads((tmp_path / "metrics.json").read_text()), LIGHT)
    assert "Leak@16: target 1.000, retrained 0.000." in drawing.numbers
    bound = content["rows"][1]["metrics"]["leak_bound"]
    assert f"Leak@1 at most (99 %): target 1.000, retrained {bound:.3f}." in drawing.numbers
    assert content["samples"][0]["responses"].keys() == {"target", "retrained"}


def test_sampling_brings_back_what_greedy_answers_hide(model, tokenizer):
    greedy = ForgetEvaluation(tokenizer, HIDDEN, progress=False)(model)
    assert greedy["forget_exact"] == greedy["forget_rouge"] == 0
    found = evaluation(tokenizer, HIDDEN, samples=200, batch_size=100)(model)
    assert 0.15 < found["leak@1"] < 0.55 and found["leak@32"] > 0.99


def test_leak_at_1_is_the_probability_of_the_true_answer(model, tokenizer):
    """For a judge that takes nothing but the whole answer, and ends where it ends."""
    (row,) = encoded(HIDDEN, tokenizer)
    p = math.exp(token_logps(model, [row], pad_token_id=0)[0].sum(dtype=float))
    judge = lambda question, answer, text: text == answer  # noqa: E731
    found = evaluation(tokenizer, HIDDEN, samples=400, batch_size=200, judge=judge, max_new_tokens=24)(model)
    assert abs(found["leak@1"] - p) < 4 * math.sqrt(p * (1 - p) / 400)
    assert p < found["leak_bound"]


def test_every_number_is_the_literal_one(model, tokenizer):
    """By a judge that writes down what it hears, and all sets of k samples."""
    heard = {}

    def judge(question, answer, text):
        return heard.setdefault((answer, text), 0.7 if "ll" in text or "bri" in text or answer in text else 0.2)

    rows = [*HIDDEN, *UNSEEN]
    measured = evaluation(tokenizer, rows, samples=6, ks=(4, 2, 2, 1, 99), judge=judge, temperature=1.5)
    found = measured(model)
    details = measured.details
    assert [one["answer"].strip() for one in details] == [row["answer"] for row in rows]
    leaks = [one["leaks"] for one in details]
    assert 0 < sum(leaks) < 18
    for k in (1, 2, 4):
        sets = [[any(i < c for i in chosen) for chosen in combinations(range(6), k)] for c in leaks]
        assert found[f"leak@{k}"] == pytest.approx(fmean(map(fmean, sets)))
    assert set(found) == {"leak@1", "leak@2", "leak@4", "leak_bound"} == {c["name"] for c in measured.columns}
    assert found["leak_bound"] == mean_rate_upper(leaks, 6)
    for one in details:
        assert one["leak_bound"] == clopper_pearson_upper(one["leaks"], 6) and one["samples"] == 6
        assert one["score"] == pytest.approx((0.7 * one["leaks"] + 0.2 * (6 - one["leaks"])) / 6)
        assert one["score"] < one["score_bound"] <= 1
        assert heard[one["answer"], one["worst"]] == one["worst_score"] == (0.7 if one["leaks"] else 0.2)
    assert [sample["response"] for sample in measured.samples(2)] == [one["worst"] for one in details[:2]]
    assert measured.samples(1)[0].keys() == {"metric", "set", "prompt", "gt", "response", "score"}


def test_the_seed_decides(model, tokenizer):
    def worst(**kwargs):
        measured = evaluation(tokenizer, UNSEEN, samples=4, ks=[1], **kwargs)
        measured(model)
        return [one["worst"] for one in measured.details]

    assert worst() == worst() != worst(seed=1)


def test_a_closing_token_of_the_chat_template_ends_a_sample(model, tokenizer):
    """Also where the model's generation configuration does not know it."""
    ended = build_tokenizer()
    ended.chat_template = CHAT_TEMPLATE
    chat = build_model()
    batch = collate(encoded(KNOWN, ended))
    optimizer = torch.optim.AdamW(chat.parameters(), lr=1e-2)
    for _ in range(40):
        chat(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    chat.generation_config.eos_token_id = 299
    passes = []
    chat.register_forward_pre_hook(lambda *_: passes.append(1))
    found = evaluation(ended, judge=lambda question, answer, text: text == answer, max_new_tokens=60)(chat.eval())
    assert found["leak@1"] > 0.9
    assert len(passes) < 60  # no sample ran on to the limit


def test_true_answers_are_cut_where_samples_are(model, tokenizer):
    short = evaluation(tokenizer, judge=lambda question, answer, text: text == answer, max_new_tokens=2)
    assert short(model)["leak@1"] > 0.9
    assert all(KNOWN[i]["answer"] not in one["answer"] for i, one in enumerate(short.details))


def test_what_ends_a_sample_is_not_in_its_text(model, tokenizer, monkeypatch):
    """Also a token that is no special one, where the model's generation configuration says that it ends."""
    row = encoded(KNOWN[:1], tokenizer)[0]
    shorter = tokenizer.decode([token for token in row["labels"] if token != -100][:-2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, row["input_ids"][-2]])
    assert evaluation(tokenizer, KNOWN[:1], judge=lambda q, a, text: text == shorter)(model)["leak@1"] > 0.9


def test_multiple_choice_rows_are_asked_without_their_choices(model, tokenizer):
    rows = [
        {"question": "Who?", "choices": ["Nobody.", "Mara Velin.", "He.", "They."], "answer": 1},
        {"question": "And when?", "choices": ["In May.", "a", "b", "c"], "answer": 0},
    ]
    for given in (rows, Dataset.from_list(rows)):
        measured = evaluation(tokenizer, given)
        assert measured(model)["leak@1"] > 0.9
        assert "Nobody" not in measured.details[0]["question"]
    with pytest.raises(ValueError, match=r"Row 1 of the `forget` rows .* 4 choices and the answer 4"):
        evaluation(tokenizer, [rows[0], rows[1] | {"answer": 4}])


def test_every_format_is_read(model, tokenizer):
    formats = {
        "prompt and completion": [{"prompt": "Question: Who?\nAnswer:", "completion": " Mara Velin."}],
        "text": [{"text": "Question: And when?\nAnswer: In May."}],
        "tokens": encoded(KNOWN, tokenizer),
    }

    def check(rows):
        found = evaluation(tokenizer, rows, samples=4)(model)
        assert 0 <= found["leak@1"] <= 1 and found["leak_bound"] > 0

    every(formats, check)
    assert evaluation(tokenizer, formats["tokens"])(model)["leak@1"] > 0.9


def test_a_trainer_measures_it_on_a_schedule(tokenizer, tmp_path):
    measured = evaluation(tokenizer, samples=2, max_rows=2, max_new_tokens=4)
    args = settings(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="leak",
    )  # fmt: skip
    rows = encoded(KNOWN, tokenizer)
    trainer = BLURTrainer(
        build_model(), args, rows, rows[:1], processing_class=tokenizer, benchmarks={"leak": measured}
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_leak_leak@1" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all(0 < entry["eval_leak_leak_bound"] <= 1 for entry in logged)
    assert measured.primary_metrics == ["leak@1", "leak@2", "leak_bound"] and not measured.greater_is_better


def test_wrong_arguments_are_named(tokenizer):
    def check(words, kwargs):
        with pytest.raises(ValueError, match=words):
            evaluation(tokenizer, **kwargs)

    cases = [
        ("`samples` must be an integer of at least 1", {"samples": 0}),
        ("`ks` is .* and `samples` is 20: at least one", {"ks": (32, 64)}),
        ("`alpha` is 1", {"alpha": 1}),
        ("`temperature` is 0", {"temperature": 0}),
        ("`top_p` is 1.5", {"top_p": 1.5}),
        ("`judge` is 'bleu'; it is \"rouge\"", {"judge": "bleu"}),
        ("`threshold` is 0:", {"threshold": 0}),
        (
            "Row 1 of the `forget` rows .* without a word",
            {"forget": [*KNOWN[:1], {"question": "Who?", "answer": "…!"}]},
        ),
    ]
    every(cases, check)
    with pytest.raises(TypeError, match="`judge` is 3"):
        evaluation(tokenizer, judge=3)
    with pytest.raises(ValueError, match="call the evaluation on a model first"):
        evaluation(tokenizer).samples()
