import pytest
import torch
from datasets import Dataset
from support.scoring_helpers import PASSAGES, QUESTIONS, TEXTS, build_model, build_tokenizer, muse_data

from blur_trainer.evaluation.muse import GROUPS, MUSEEvaluation
from blur_trainer.metrics.rouge_l import rouge_l_f1


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


def make_evaluation(tokenizer, data=None, **kwargs):
    settings = {"max_new_tokens_verbmem": 6, "max_new_tokens_knowmem": 5, "progress": False} | kwargs
    return MUSEEvaluation(muse_data() if data is None else data, tokenizer, **settings)


@torch.no_grad()
def literal_auc(model, tokenizer):
    """Pair by pair, from one log-softmax per text."""

    def score(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logps = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(-1, ids[0, 1:, None])[:, 0]
        lowest = sorted(logps.tolist())[: max(1, int(0.4 * len(logps)))]
        return -sum(lowest) / len(lowest)

    forget, holdout = ([score(text) for text in TEXTS[name]] for name in ("forget", "holdout"))
    return sum(h < f for f in forget for h in holdout) / (len(forget) * len(holdout))


@pytest.fixture(scope="module")
def full(model, tokenizer):
    evaluation = make_evaluation(tokenizer, auc_retrain=0.5)
    return evaluation, evaluation(model)


def test_a_flat_dict_of_floats(full):
    _, values = full
    expected = [f"{group}_{metric}" for group in GROUPS for metric in ("verbmem", "knowmem")]
    assert sorted(values) == sorted([*expected, "privleak", "privleak_auc"])
    assert all(type(value) is float for value in values.values())


def test_text_metrics_are_the_means_of_the_samples(full):
    evaluation, values = full
    samples = evaluation.samples(n=100)
    assert len(samples) == 2 * 3 + 3 + 2 + 1
    for key in values:
        if key.startswith("privleak"):
            continue
        scores = [sample["score"] for sample in samples if sample["metric"] == key]
        assert values[key] == pytest.approx(100 * sum(scores) / len(scores), abs=1e-9)
    for sample in samples:
        assert sample["score"] == rouge_l_f1(sample["response"], sample["gt"])


def test_samples_are_the_first_of_each_metric(full):
    evaluation, _ = full
    metrics = [sample["metric"] for sample in evaluation.samples(n=1)]
    assert metrics == [f"{group}_{metric}" for group in GROUPS for metric in ("verbmem", "knowmem")]
    assert set(evaluation.samples(1)[0]) == {"metric", "prompt", "gt", "response", "score"}


def test_prompts_are_those_of_the_protocol(full):
    evaluation, _ = full
    prompts = {sample["metric"]: sample["prompt"] for sample in evaluation.samples(n=1)}
    assert prompts["forget_verbmem"] == "The surveyor spoke of"
    shots = "Question: a?\nAnswer: b\n\nQuestion: retain?\nAnswer: retain\n\n"
    assert prompts["retain_knowmem"] == shots + "Question: When?\nAnswer: "


def test_the_truth_is_cut_to_the_length_of_the_response_bos_counted(full, tokenizer):
    evaluation, _ = full
    truths = [sample["gt"] for sample in evaluation.samples(2) if sample["metric"] == "forget_verbmem"]
    assert len(tokenizer(truths[0])["input_ids"]) == 6  # BOS and five tokens
    assert PASSAGES[0][1].startswith(truths[0]) and truths[0] != PASSAGES[0][1]
    assert truths[1] == PASSAGES[1][1]  # short enough


def test_privleak(full, model, tokenizer):
    _, values = full
    auc = literal_auc(model, tokenizer)
    assert 0 < auc < 1 and auc != 0.5  # 0.5 would not tell forget from holdout
    assert values["privleak_auc"] == pytest.approx(auc, abs=1e-12)
    assert values["privleak"] == pytest.approx((auc - 0.5) / 0.5 * 100, abs=1e-9)


def test_privleak_auc_alone_is_the_auc_retrain_of_others(full, model, tokenizer):
    _, values = full
    auc = make_evaluation(tokenizer).privleak_auc(model)
    assert auc == values["privleak_auc"]
    assert make_evaluation(tokenizer, auc_retrain=auc)(model)["privleak"] == 0.0


def test_without_auc_retrain_there_is_no_privleak(model, tokenizer, full):
    evaluation = make_evaluation(tokenizer)
    values = evaluation(model)
    assert "privleak" not in values
    assert values == {key: value for key, value in full[1].items() if key != "privleak"}
    assert "privleak" not in evaluation.primary_metrics
    assert all(column["name"] != "privleak" for column in evaluation.columns)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_nothing(full, model, tokenizer, batch_size):
    values = make_evaluation(tokenizer, auc_retrain=0.5, batch_size=batch_size)(model)
    assert values == pytest.approx(full[1], abs=1e-9)


def test_icl_false_asks_the_bare_question_and_needs_no_examples(model, tokenizer):
    data = muse_data(*(f"knowmem_{group}_qa_icl" for group in GROUPS))
    evaluation = make_evaluation(tokenizer, data, icl=False)
    evaluation(model)
    prompts = {sample["metric"]: sample["prompt"] for sample in evaluation.samples(1)}
    assert prompts["hold_knowmem"] == "Question: How many people came to the hall?\nAnswer: "


def test_absent_splits_are_left_out(model, tokenizer):
    data = muse_data("verbmem_retain", "verbmem_hold", "knowmem_hold_qa", "privleak_forget", "privleak_holdout")
    evaluation = make_evaluation(tokenizer, data)
    assert set(evaluation(model)) == {"forget_verbmem", "forget_knowmem", "retain_knowmem"}
    with pytest.raises(ValueError, match="PrivLeak needs the splits"):
        evaluation.privleak_auc(model)


def test_a_plain_dict_of_datasets_is_accepted(model, tokenizer):
    data = {"verbmem_forget": muse_data()["verbmem_forget"]}
    assert set(make_evaluation(tokenizer, data)(model)) == {"forget_verbmem"}


def test_columns_and_primary_metrics(full):
    evaluation, values = full
    assert evaluation.primary_metrics == ["forget_verbmem", "forget_knowmem", "retain_knowmem", "privleak"]
    columns = evaluation.columns
    assert columns[0] == {"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"}
    assert columns[-1] == {"name": "privleak", "label": "PrivLeak", "goal": "zero"}
    goals = {column["name"]: column["goal"] for column in columns}
    assert goals["forget_knowmem"] == "min" and goals["retain_verbmem"] == goals["hold_knowmem"] == "max"
    assert set(goals) == set(values) - {"privleak_auc"}


def test_a_memorized_answer_scores_100_cut_at_the_next_question(tokenizer, monkeypatch):
    from blur_trainer.evaluation import muse

    def answers(model, tokenizer, prompts, *, stop_strings, **kwargs):
        truth = {question: answer for rows in QUESTIONS.values() for question, answer in rows}
        asked = [prompt.rpartition("Question: ")[2].partition("\n")[0] for prompt in prompts]
        assert "Question:" in stop_strings
        return [truth[question] + "\n\nQuestion: and then?" for question in asked]

    monkeypatch.setattr(muse, "generate", answers)
    data = muse_data(*(f"verbmem_{group}" for group in GROUPS), "privleak_forget", "privleak_holdout")
    values = make_evaluation(tokenizer, data)(None)
    assert values["hold_knowmem"] == 100.0
    assert values["forget_knowmem"] == pytest.approx(200 / 3)  # one of three truths is empty: 0 by definition
    assert values["retain_knowmem"] == 100.0
    with pytest.warns(UserWarning, match="1 references have no word.*'original'"):
        assert make_evaluation(tokenizer, data, rouge_tokenizer="original")(None)["retain_knowmem"] == 50.0


def test_models_and_data_are_left_as_they_were(tokenizer):
    model = build_model().train()
    data = muse_data()
    before = {name: split[:] for name, split in data.items()}
    make_evaluation(tokenizer, data)(model)
    assert model.training and all(module.training for module in model.modules())
    assert {name: split[:] for name, split in data.items()} == before
    assert tokenizer.pad_token is None


def test_samples_follow_the_last_model(model, tokenizer):
    evaluation = make_evaluation(tokenizer, {"verbmem_forget": muse_data()["verbmem_forget"]})
    with pytest.raises(ValueError, match="There are no samples"):
        evaluation.samples()
    evaluation(model)
    first = evaluation.samples()
    evaluation(build_model(seed=1).eval())
    assert len(evaluation.samples()) == len(first)
    assert [s["response"] for s in evaluation.samples()] != [s["response"] for s in first]


def test_progress_bars_name_what_is_evaluated(model, tokenizer, capfd):
    make_evaluation(tokenizer)(model)
    assert capfd.readouterr().err == ""
    make_evaluation(tokenizer, progress=True)(model)
    bars = capfd.readouterr().err
    assert all(name in bars for name in ("VerbMem hold", "KnowMem forget", "PrivLeak forget", "PrivLeak holdout"))


def split_of(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        ({"raw_forget": split_of(text=["a"])}, {}, r"none of MUSE's splits, it has \['raw_forget'\]"),
        ({}, {}, "none of MUSE's splits"),
        (muse_data("knowmem_retain_qa_icl"), {}, "lacks the split `knowmem_retain_qa_icl`.*icl=False"),
        (muse_data("privleak_holdout"), {}, "lacks the split `privleak_holdout`"),
        (muse_data("privleak_forget"), {}, "lacks the split `privleak_forget`"),
        ({"verbmem_forget": split_of(prompt=["a"], truth=["b"])}, {}, r"`verbmem_forget` lacks the columns \['gt'\]"),
        ({"verbmem_forget": split_of(prompt=[], gt=[])}, {}, "`verbmem_forget` is empty"),
        (muse_data("privleak_forget", "privleak_holdout"), {"auc_retrain": 0.5}, "`auc_retrain` needs the splits"),
        (muse_data(), {"auc_retrain": 0.0}, "`auc_retrain` must be in"),
        (muse_data(), {"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        (muse_data(), {"max_new_tokens_verbmem": -1}, "`max_new_tokens_verbmem`"),
        (muse_data(), {"max_new_tokens_knowmem": 3.5}, "`max_new_tokens_knowmem`"),
    ],
)
def test_bad_input_is_refused_at_construction(tokenizer, data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_evaluation(tokenizer, data, **kwargs)


def test_a_diverged_model_is_an_error_not_a_number(tokenizer):
    model = build_model().eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        make_evaluation(tokenizer).privleak_auc(model)
