"""TOFU's suite against slow literal numbers, against open-unlearning's and against TOFU's published log."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import ks_2samp
from support.scoring_helpers import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.tofu_templates import TOFUTemplate
from blur_trainer.evaluation.tofu.aggregates import aggregate_log
from blur_trainer.evaluation.tofu.attacks import gradient_norms, likelihood_attacks
from blur_trainer.evaluation.tofu.reference import RetainReference
from blur_trainer.evaluation.tofu.suite import TOFUEvaluation
from blur_trainer.metrics.rouge_l_recall import RougeLRecall
from blur_trainer.report.results import Results

SHARED = Path(__file__).parents[3] / "shared"
GOLDEN, LOGS = SHARED / "golden", SHARED / "data" / "tofu" / "logs" / "retain90_llama"
needs_logs = pytest.mark.skipif(not LOGS.exists(), reason="no TOFU logs in ../shared/data")
needs_original = pytest.mark.skipif(
    not (GOLDEN / "tofu_orig").exists(), reason="no golden numbers of locuslab/tofu in ../shared/golden"
)
needs_ou = pytest.mark.skipif(
    not (GOLDEN / "ou_tofu_metrics").exists(), reason="no golden numbers of open-unlearning in ../shared/golden"
)
GROUPS = ("forget", "retain", "real_authors", "world_facts")


def rows(count, tag, *, paraphrased=True, perturbed=2):
    """Questions of unequal length, with answers in unequal number of words."""
    found = []
    for index in range(count):
        row = {"question": f"Where was {tag} {'x' * index}?", "answer": f"In {tag} hall{' again' * (index % 3)}."}
        if paraphrased:
            row["paraphrased_answer"] = f"{tag.title()}{index} it was."
        if perturbed:
            row["perturbed_answer"] = [
                f"In {word}{' now' * index}." for word in ("May", "Norvale", "the novels")[:perturbed]
            ]
        found.append(row)
    return Dataset.from_list(found)


def tofu_data(*without):
    data = {
        "forget_perturbed": rows(4, "forget"),
        "retain_perturbed": rows(3, "retain"),
        "real_authors_perturbed": rows(2, "author", paraphrased=False, perturbed=3),
        "world_facts_perturbed": rows(2, "fact", paraphrased=False, perturbed=3),
        "holdout": rows(3, "other", paraphrased=False, perturbed=0),
        "full": Dataset.from_list([{"question": "never", "answer": "read"}]),
    }
    return {name: split for name, split in data.items() if name not in without}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


@pytest.fixture(scope="module")
def retain_model():
    return build_model(seed=1).eval()


def make(tokenizer, data=None, **kwargs):
    settings = {"max_new_tokens": 5, "progress": False} | kwargs
    return TOFUEvaluation(tofu_data() if data is None else data, tokenizer, **settings)


@pytest.fixture(scope="module")
def full(tokenizer, model, retain_model):
    reference = make(tokenizer).reference(retain_model)
    evaluation = make(tokenizer, reference=reference, gradnorm=True, reference_model=retain_model)
    return evaluation, evaluation(model)


@torch.no_grad()
def nll(model, tokenizer, question, answer):
    """As training sees it, one answer at a time."""
    (row,) = tokenize_dataset(
        [{"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}],
        tokenizer,
        role="forget",
        max_length=200,
    )
    logps = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    scored = [t for t, label in enumerate(row["labels"]) if label != -100]
    return -sum(float(logps[t - 1, row["labels"][t]]) for t in scored) / len(scored)


def literal(model, tokenizer):
    """Probabilities and truth ratios, from the definitions."""
    values, ratios = {}, []
    for group in GROUPS:
        probabilities, truth = [], []
        for row in tofu_data()[f"{group}_perturbed"]:
            right = nll(model, tokenizer, row["question"], row["answer"])
            wrong = [nll(model, tokenizer, row["question"], text) for text in row["perturbed_answer"]]
            p = math.exp(-right)
            if group in ("real_authors", "world_facts"):
                probabilities.append(p / (p + sum(math.exp(-w) for w in wrong)))
                paraphrase = right
            else:
                probabilities.append(p)
                paraphrase = nll(model, tokenizer, row["question"], row["paraphrased_answer"])
            ratio = math.exp(-sum(wrong) / len(wrong)) / math.exp(-paraphrase)
            truth.append(min(ratio, 1 / ratio) if group == "forget" else max(0.0, 1 - ratio))
            ratios += [ratio] if group == "forget" else []
        values[f"{group}_probability"] = sum(probabilities) / len(probabilities)
        values[f"{group}_truth_ratio"] = sum(truth) / len(truth)
    return values, ratios


def test_a_flat_dict_of_floats_in_the_order_of_the_keys(full):
    evaluation, values = full
    assert list(values) == evaluation.metric_keys
    expected = {f"{group}_{metric}" for group in GROUPS for metric in ("probability", "rouge", "truth_ratio")}
    expected |= {"model_utility", "forget_quality", "forget_quality_log10", "privleak"}
    expected |= {"forget_exact_memorization", "forget_extraction_strength"}
    expected |= {f"mia_{name}" for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "reference")}
    assert set(values) == expected
    assert all(type(value) is float for value in values.values())


def test_probabilities_truth_ratios_and_what_is_made_of_them(full, model, retain_model, tokenizer):
    _, values = full
    truth, ratios = literal(model, tokenizer)
    for key, value in truth.items():
        assert values[key] == pytest.approx(value, rel=1e-4), key
    nine = [values[f"{g}_{m}"] for g in GROUPS[1:] for m in ("probability", "rouge", "truth_ratio")]
    utility = 0.0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert values["model_utility"] == pytest.approx(utility, abs=1e-12)
    p = ks_2samp(ratios, literal(retain_model, tokenizer)[1]).pvalue
    assert values["forget_quality"] == pytest.approx(p, abs=1e-12)
    assert values["forget_quality_log10"] == pytest.approx(math.log10(p), abs=1e-12)


def test_a_reference_is_the_models_own_numbers(full, model, retain_model, tokenizer):
    evaluation, _ = full
    reference = evaluation.retain_reference
    assert reference.truth_ratios == pytest.approx(literal(retain_model, tokenizer)[1], rel=1e-4)
    values = make(tokenizer, reference=reference)(retain_model)
    assert values["forget_quality"] == 1.0 and values["privleak"] == pytest.approx(0.0, abs=1e-9)
    assert reference.min_k_auc == values["mia_min_k"]


def test_privleak_is_the_relative_change_of_the_auc(full):
    evaluation, values = full
    reference = 1 - evaluation.retain_reference.min_k_auc
    assert values["privleak"] == pytest.approx(100 * (1 - values["mia_min_k"] - reference) / reference, abs=1e-9)


def test_the_loss_attack_pair_by_pair(full, model, retain_model, tokenizer):
    _, values = full

    def losses(scored, name):
        return [nll(scored, tokenizer, row["question"], row["answer"]) for row in tofu_data()[name]]

    def auc(forget, holdout):
        return np.mean([f < h for f in forget for h in holdout])

    sides = [(losses(model, name), losses(retain_model, name)) for name in ("forget_perturbed", "holdout")]
    assert values["mia_loss"] == pytest.approx(auc(sides[0][0], sides[1][0]), abs=1e-12)
    differences = [np.subtract(ours, theirs) for ours, theirs in sides]
    assert values["mia_reference"] == pytest.approx(auc(*differences), abs=1e-12)


@pytest.mark.parametrize("protocol", ["tofu", "open-unlearning"])
def test_gradient_norms_are_those_of_backward(protocol):
    model = build_model().eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)  # training's own
    examples = [
        {"input_ids": [0, 5, 9, 7], "labels": [-100, -100, 9, 7]},
        {"input_ids": [0, 3, 4], "labels": [-100, 3, 4]},
    ]
    found = gradient_norms(model, examples, protocol=protocol)
    assert bool((model.model.norm.weight.grad == 1).all()) and model.lm_head.weight.grad is None
    for example, value in zip(examples, found, strict=True):
        labels = list(example["labels"])
        if protocol == "open-unlearning":
            labels[-1] = -100
        model.zero_grad()
        model(input_ids=torch.tensor([example["input_ids"]]), labels=torch.tensor([labels])).loss.backward()
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        truth = math.sqrt(sum(n**2 for n in norms)) if protocol == "tofu" else sum(norms) / len(norms)
        assert value == pytest.approx(truth, rel=1e-5)


def test_rouge_is_the_mean_of_the_samples(full):
    evaluation, values = full
    samples = evaluation.samples(100)
    assert len(samples) == 4 + 3 + 2 + 2
    rouge = RougeLRecall(keep_in_memory=True)
    for group in GROUPS:
        mine = [sample for sample in samples if sample["metric"] == f"{group}_rouge"]
        texts = {"predictions": [s["response"] for s in mine], "references": [s["gt"] for s in mine]}
        assert values[f"{group}_rouge"] == pytest.approx(rouge.compute(**texts)["rouge_l_recall"], abs=1e-12)
        assert values[f"{group}_rouge"] == pytest.approx(sum(s["score"] for s in mine) / len(mine), abs=1e-12)
    assert samples[0]["prompt"] == "Question: Where was forget ?\nAnswer:"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(full, model, tokenizer, batch_size):
    values = make(tokenizer, reference=full[0].retain_reference, batch_size=batch_size)(model)
    assert values == pytest.approx({key: full[1][key] for key in values}, rel=1e-4)


def test_a_template_has_a_name_or_is_ones_own(tokenizer, model):
    data = {"forget_perturbed": tofu_data()["forget_perturbed"]}
    plain = make(tokenizer, data)
    phi, own = (make(tokenizer, data, template=t) for t in ("phi", TOFUTemplate("Question: ", "\nAnswer:", answer=" ")))
    assert own(model) == plain(model)
    for one, other in zip(phi._splits["forget"].variants, plain._splits["forget"].variants, strict=True):
        # one text, whoever the blank belongs to
        assert [row["input_ids"] for row in one] == [row["input_ids"] for row in other]
    assert phi._splits["forget"].prompts[0] == "Question: Where was forget ?\nAnswer: "


@pytest.mark.parametrize(("protocol", "count"), [("tofu", 300), ("open-unlearning", 305)])
def test_protocols_say_how_many_questions_and_tokens(tokenizer, protocol, count):
    data = {"forget_perturbed": Dataset.from_dict({"question": ["q"] * 305, "answer": ["a " * 600] * 305})}
    split = make(tokenizer, data, protocol=protocol)._splits["forget"]
    assert len(split.prompts) == count
    assert len(split.variants[0][0]["input_ids"]) == {"tofu": 200, "open-unlearning": 512}[protocol]


@pytest.mark.parametrize(
    ("without", "absent"),
    [
        (["holdout"], {"mia_loss", "mia_min_k"}),
        (["world_facts_perturbed"], {"model_utility", "world_facts_rouge"}),
        (["forget_perturbed", "holdout"], {"forget_rouge", "forget_exact_memorization", "mia_loss"}),
    ],
)
def test_what_is_absent_is_left_out(tokenizer, model, without, absent):
    keys = set(make(tokenizer).metric_keys)
    evaluation = make(tokenizer, tofu_data(*without))
    assert set(evaluation.metric_keys) < keys and not absent & set(evaluation.metric_keys)
    assert set(evaluation(model)) == set(evaluation.metric_keys)


def test_questions_without_perturbed_answers_have_no_truth_ratio(tokenizer, model):
    data = {"forget_perturbed": rows(2, "forget", perturbed=0), "real_authors_perturbed": rows(2, "a", perturbed=0)}
    values = make(tokenizer, data)(model)
    assert {"forget_probability", "forget_rouge", "real_authors_rouge"} <= set(values)
    assert not {"forget_truth_ratio", "real_authors_probability", "real_authors_truth_ratio"} & set(values)


def test_columns_fit_a_table_of_results(full, model):
    evaluation, values = full
    columns = {column["name"]: column for column in evaluation.columns}
    assert set(columns) == {key for key in values if not key.startswith("mia_") and "log10" not in key}
    assert columns["forget_probability"] == {"name": "forget_probability", "label": "Prob. forget", "goal": "min"}
    assert columns["forget_truth_ratio"]["goal"] == columns["real_authors_rouge"]["goal"] == "max"
    assert columns["privleak"]["goal"] == "zero"
    assert evaluation.primary_metrics == list(columns)[:9]
    assert evaluation.primary_metrics[:2] == ["forget_quality", "model_utility"] and "privleak" in columns
    results = Results("TOFU", evaluation, plane={"x": "forget_quality", "y": "model_utility"})
    assert results.add("target", "target", model) == values


def test_a_retain_model_that_is_always_recognised_gives_no_privleak(tokenizer, model, monkeypatch, caplog):
    evaluation = make(tokenizer)
    monkeypatch.setattr(evaluation._membership, "min_k_auc", lambda forget, holdout: 1.0)
    reference = evaluation.reference(model)
    assert reference.min_k_auc is None and "no PrivLeak" in caplog.text
    keys = make(tokenizer, reference=reference).metric_keys
    assert "privleak" not in keys and "forget_quality" in keys


def test_a_reference_survives_its_file(tmp_path):
    reference = RetainReference((0.5, 2.0, math.inf), 0.25)
    reference.save(tmp_path / "a" / "reference.json")
    assert RetainReference.load(tmp_path / "a" / "reference.json") == reference
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["reference.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "`truth_ratios` is empty"),
        (((0.5, math.nan),), "must be 0 or more, got nan"),
        (((-1.0,),), "must be 0 or more"),
        (((0.5,), 1.0), r"`min_k_auc` must be in \[0, 1\)"),
    ],
)
def test_a_reference_of_no_use_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RetainReference(*arguments)


def test_logs_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{"a": 1}')
    for read in (RetainReference.load, RetainReference.from_tofu_log, RetainReference.from_open_unlearning_log):
        with pytest.raises(ValueError, match="has no `"):
            read(path)
    with pytest.raises(ValueError, match="The log has none of"):
        aggregate_log(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        RetainReference.load(path)


REFERENCE = RetainReference((0.5,) * 4)


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        ({}, {}, "none of TOFU's splits"),
        ({"forget_perturbed": Dataset.from_dict({"question": ["a"]})}, {}, r"lacks the columns \['answer'\]"),
        ({"forget_perturbed": Dataset.from_dict({"question": [], "answer": []})}, {}, "is empty"),
        (tofu_data("forget_perturbed"), {}, "`holdout` is compared with `forget_perturbed`"),
        (tofu_data("holdout"), {"gradnorm": True}, "`gradnorm` needs the split `holdout`"),
        (tofu_data(), {"reference": RetainReference((0.5,))}, "has 1 truth ratios, the forget split 4"),
        (tofu_data("forget_perturbed", "holdout"), {"reference": REFERENCE}, "`reference` needs the split"),
        (tofu_data(), {"protocol": "mine"}, "`protocol` must be one of"),
        (tofu_data(), {"template": "no question"}, "must be a `TOFUTemplate` or one of"),
        (tofu_data(), {"max_length": 4}, "has no answer token left within max_length=4"),
        (tofu_data(), {"batch_size": 0}, "`batch_size` must be an integer"),
        (
            {"forget_perturbed": Dataset.from_list([{"question": "a", "answer": "b", "perturbed_answer": []}])},
            {},
            "must be a list of at least one wrong answer",
        ),
    ],
)
def test_bad_input_is_refused_at_construction(tokenizer, data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, data, **kwargs)


def test_several_paraphrases_per_question_are_refused(tokenizer):
    data = {"forget_perturbed": Dataset.from_list([{"question": "a", "answer": "b", "paraphrased_answer": ["c", "d"]}])}
    with pytest.raises(TypeError, match="one paraphrased answer per question"):
        make(tokenizer, data)


def test_what_cannot_be_asked_of_a_suite_or_a_model(tokenizer, model):
    with pytest.raises(ValueError, match="There are no samples"):
        make(tokenizer).samples()
    with pytest.raises(ValueError, match="A reference needs the split"):
        make(tokenizer, tofu_data("forget_perturbed", "holdout")).reference(model)
    frozen = build_model().requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        gradient_norms(frozen, [{"input_ids": [0, 1], "labels": [-100, 1]}])
    diverged = build_model()
    torch.nn.init.constant_(diverged.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        make(tokenizer)(diverged)


# ---- the owners' numbers ----

NAMES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
OURS = {"exact_memorization": "forget_exact_memorization", "extraction_strength": "forget_extraction_strength"}


@pytest.fixture(scope="module")
def golden():
    def split(name):
        return Dataset.from_list([json.loads(line) for line in (GOLDEN / "toydata" / "TOFU" / name).open()])

    data = {
        "forget_perturbed": split("forget10_perturbed.jsonl"),
        **{f"{name}_perturbed": split(f"{name}_perturbed.jsonl") for name in ("retain", "real_authors", "world_facts")},
        "holdout": split("holdout10.jsonl"),
    }
    models = {name: AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / name) for name in ("target", "retain")}
    settings = {"template": TOFUTemplate("Question: ", "\nAnswer:\n"), "protocol": "open-unlearning"}
    settings |= {"max_new_tokens": 64, "progress": False, "batch_size": 5}
    return data, AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"), models, settings


@needs_ou
@pytest.mark.parametrize("name", ["target", "retain"])
def test_every_number_of_open_unlearning(golden, name):
    data, tokenizer, models, settings = golden
    folder = GOLDEN / "ou_tofu_metrics"
    log = {key: task["agg_value"] for key, task in json.loads((folder / f"{name}.EVAL.json").read_text()).items()}
    reference = RetainReference.from_open_unlearning_log(folder / "retain.EVAL.json")
    assert TOFUEvaluation(data, tokenizer, **settings).reference(models["retain"]).truth_ratios == pytest.approx(
        reference.truth_ratios, rel=1e-5
    )
    extras = {"reference": reference, "gradnorm": True, "reference_model": models["retain"]}
    values = TOFUEvaluation(data, tokenizer, **settings, **extras)(models[name])
    theirs = {OURS.get(key, key): value for key, value in log.items() if not key.startswith(tuple(NAMES.values()))}
    for ours, short in NAMES.items():
        theirs[f"{ours}_probability"] = log[f"{short}_Q_A_Prob{'_normalised' if short in ('ra', 'wf') else ''}"]
        theirs[f"{ours}_rouge"] = log[f"{short}_Q_A_ROUGE"]
        theirs[f"{ours}_truth_ratio"] = log["forget_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"]
    theirs["forget_quality"] = log["forget_quality"]
    theirs["forget_quality_log10"] = math.log10(log["forget_quality"]) if name == "target" else 0.0
    if name == "retain":  # its own logs have no reference: no forget quality, and an assumed AUC of 0.5
        theirs |= {"forget_quality": 1.0, "privleak": 0.0}
    assert values == pytest.approx(theirs, abs=1e-6)


@needs_ou
def test_attack_scores_of_open_unlearning_text_by_text(golden):
    from blur_trainer.evaluation.answer_scoring import score_variants

    data, tokenizer, models, settings = golden
    log = json.loads((GOLDEN / "ou_tofu_metrics" / "target.EVAL.json").read_text())
    splits = TOFUEvaluation(data, tokenizer, **settings)._splits
    for side in ("forget", "holdout"):
        questions = splits[side]
        found = score_variants(models["target"], questions.variants, pad_token_id=0, details=True)
        scores = likelihood_attacks([row[0] for row in found], questions.answers, "open-unlearning")
        alone = [row[0] for row in questions.variants]
        scores["gradnorm"] = gradient_norms(models["target"], alone, protocol="open-unlearning")
        for attack, ours in scores.items():
            theirs = [entry["score"] for entry in log[f"mia_{attack}"][side]["value_by_index"].values()]
            assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-5), attack


@needs_logs
def test_the_published_aggregates_come_out_of_the_published_log(tmp_path):
    path = LOGS / "eval_log_aggregated.json"
    (theirs,) = csv.DictReader((LOGS / "aggregated_stat.csv").open())
    reference = RetainReference.from_tofu_log(path)
    assert len(reference.truth_ratios) == 300
    ours = aggregate_log(path, reference=reference, normalize_forget=True)
    titles = {"forget": "Forget", "retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World"}
    metrics = {"probability": "Probability", "rouge": "ROUGE", "truth_ratio": "Truth Ratio"}
    expected = {
        f"{g}_{m}": float(theirs[f"{title} {name}"]) for g, title in titles.items() for m, name in metrics.items()
    }
    expected |= {"model_utility": 0.6203436494291608, "forget_quality": 1.0, "forget_quality_log10": 0.0}
    assert ours == pytest.approx(expected, abs=1e-9)
    alone = json.loads(path.read_text())["eval_log_forget.json"]
    (tmp_path / "eval_log_forget.json").write_text(json.dumps(alone))
    assert RetainReference.from_tofu_log(tmp_path / "eval_log_forget.json") == reference
    with pytest.raises(ValueError, match="but the log lacks"):
        aggregate_log({"eval_log.json": alone}, reference=REFERENCE)


@needs_original
def test_the_originals_forget_quality_and_utility():
    original = json.loads((GOLDEN / "tofu_orig" / "tofu_orig.json").read_text())
    retain = aggregate_log(original["inputs"]["retain"])
    split = original["inputs"]["retain"]["eval_log_forget.json"]
    wrong = [np.mean(row) for row in split["average_perturb_loss"].values()]
    ratios = np.exp(np.subtract(list(split["avg_paraphrased_loss"].values()), wrong))
    ours = aggregate_log(original["inputs"]["unlearn"], reference=RetainReference(tuple(ratios)))
    theirs = original["aggregate_eval_stat"]
    assert ours["forget_quality"] == pytest.approx(theirs["forget_quality"]["Forget Quality"], abs=1e-12)
    assert ours["model_utility"] == pytest.approx(theirs["model_utility"]["Model Utility"], abs=1e-12)
    assert "forget_quality" not in retain
