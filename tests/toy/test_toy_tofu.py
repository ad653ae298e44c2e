"""The embedded TOFU: the same everywhere, nested, wrong answers that are wrong and paraphrases nobody has seen."""

import hashlib
import json
import re

import pytest

from blur_trainer.toy.fiction import PAIRS, WORDS
from blur_trainer.toy.tofu import TRAINING_GROUPS, tofu_corpora, tofu_training_rows

SPLITS = {"forget01": 1, "forget05": 4, "forget10": 8}
OPENERS = {"The", "Before", "By", "One", "Readers", "They", "In"}
PARAPHRASED = ("forget_perturbed", "retain_perturbed")


@pytest.fixture(scope="module")
def corpora():
    return {split: tofu_corpora(split=split) for split in SPLITS}


@pytest.fixture(scope="module")
def data(corpora):
    return corpora["forget10"]


def rows(split):
    return [tuple(row.values()) for row in split.select_columns(["question", "answer"])]


def frame(sentence):
    """The sentence without its names: runs of capitalized words, a job, an animal."""
    words = "|".join([*WORDS["job"].split(), *(f"{a} {b}" for a in PAIRS["animal"][0].split() for b in BEASTS)])
    return re.sub(rf"\b({words})\b|[A-Z]\w+( [A-Z]\w+)*", "_", sentence)


BEASTS = PAIRS["animal"][1].split()


def fingerprint(data):
    return hashlib.sha256(json.dumps({key: data[key].to_list() for key in sorted(data)}).encode()).hexdigest()


def test_corpus_is_the_one_that_was_measured(data):
    # The numbers in the documentation belong to these very words; change both together.
    assert data["forget"][0] == {
        "question": "What is the birthplace of Kira Stenick?",
        "answer": "The birthplace of Kira Stenick is Brackford.",
    }
    assert fingerprint(data) == "23007ad4ef20a12753722d50fb196eee0e6eaacabf1e17e6e1ffccd46179e13e"


@pytest.mark.parametrize("split", SPLITS)
def test_sizes(corpora, split):
    n = SPLITS[split]
    sizes = {key: len(rows) for key, rows in corpora[split].items()}
    assert sizes == {
        "forget": 12 * n,
        "retain": 12 * (32 - n),
        "holdout": 12 * n,
        "forget_perturbed": 6 * n,
        "retain_perturbed": 48,
        "real_authors_perturbed": 24,
        "world_facts_perturbed": 24,
    }


def test_one_population_divided_three_ways(corpora):
    together = [set(rows(corpora[split]["forget"])) | set(rows(corpora[split]["retain"])) for split in SPLITS]
    assert together[0] == together[1] == together[2] and len(together[0]) == 32 * 12
    for small, large in (("forget01", "forget05"), ("forget05", "forget10")):
        for key in ("forget", "holdout", "forget_perturbed"):
            inner, outer = rows(corpora[small][key]), rows(corpora[large][key])
            assert outer[: len(inner)] == inner, key
    for split in SPLITS:
        data = corpora[split]
        assert not set(rows(data["forget"])) & set(rows(data["retain"]))
        assert set(rows(data["retain_perturbed"])) <= set(rows(data["retain"]))
        assert set(rows(data["forget_perturbed"])) <= set(rows(data["forget"]))
        for key in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
            assert data[key].to_list() == corpora["forget10"][key].to_list(), key


@pytest.mark.parametrize("seed", range(5))
def test_wrong_answers_are_wrong(seed):
    data = tofu_corpora(seed)
    for key in data:
        for row in data[key] if key.endswith("_perturbed") else ():
            wrong = row["perturbed_answer"]
            assert len(set(wrong)) == len(wrong) == 3, (key, row)
            assert not {row["answer"], row.get("paraphrased_answer")} & set(wrong), (key, row)


@pytest.mark.parametrize("key", PARAPHRASED)
def test_wrong_answers_have_the_paraphrase_s_form(data, key):
    for row in data[key]:
        assert {frame(wrong) for wrong in row["perturbed_answer"]} == {frame(row["paraphrased_answer"])}, row
        # About the same author; only the fact differs.
        name = re.search(r"[A-Z]\w+ [A-Z]\w+(?=\W| )", row["question"][1:])[0]
        assert all(name in wrong for wrong in row["perturbed_answer"]), row


@pytest.mark.parametrize("key", PARAPHRASED)
def test_paraphrases_are_another_wording_of_the_same_fact_and_nobody_has_read_them(data, key):
    trained = set(tofu_training_rows(data)["question"]) | set(tofu_training_rows(data)["answer"])
    for row in data[key]:
        assert row["paraphrased_question"] not in trained and row["paraphrased_answer"] not in trained
        assert frame(row["paraphrased_answer"]) != frame(row["answer"])
        assert not set(row["perturbed_answer"]) & trained
        assert [row["paraphrased_question"]] == row["paraphrased_questions"]
        assert [row["paraphrased_answer"]] == row["paraphrased_answers"]
        # All that the paraphrase names is named by the plain question and answer: it has no fact of its own.
        names = set(re.findall(r"[A-Z]\w+", row["paraphrased_answer"])) - OPENERS
        assert names and names <= set(re.findall(r"\w+", f"{row['question']} {row['answer']}"))


def test_frames_are_met_in_training(data):
    """The wording of each paraphrase is known from other authors: only the fact in it is at stake."""
    known = {frame(answer) for answer in data["retain"]["answer"]}
    for key in PARAPHRASED:
        assert {frame(answer) for answer in data[key]["paraphrased_answer"]} <= known


def test_outsiders_are_never_trained_on(data):
    trained = " ".join(text for row in rows(tofu_training_rows(data)) for text in row)
    names = {" ".join(re.findall(r"[A-Z]\w+ [A-Z]\w+", row["question"][1:])[-1:]) for row in data["holdout"]}
    assert len(names) == 8 and not [name for name in names if name in trained]


def test_seed_decides_everything(data):
    assert fingerprint(tofu_corpora(0)) == fingerprint(data)
    assert not set(rows(tofu_corpora(1)["forget"])) & set(rows(data["forget"]))


@pytest.mark.parametrize("split", ["forget", "forget1", "retain90", "", None])
def test_unknown_split(split):
    with pytest.raises(ValueError, match=r"must be one of \['forget01', 'forget05', 'forget10'\]"):
        tofu_corpora(split=split)


def test_training_rows(data):
    everything, without = tofu_training_rows(data), tofu_training_rows(data, TRAINING_GROUPS[1:])
    assert everything.column_names == ["question", "answer"] and len(everything) == 32 * 12 + 48
    assert rows(everything) == rows(data["forget"]) + rows(without)
    assert rows(tofu_training_rows(data, ["world_facts"])) == rows(data["world_facts_perturbed"])
    assert len(set(rows(everything))) == len(everything)


@pytest.mark.parametrize("groups", [[], "forget", ["holdout"], ["forget", "forget_perturbed"]])
def test_training_rows_refuses_other_groups(data, groups):
    with pytest.raises(ValueError, match=r"one or more of \['forget', 'retain', 'real_authors', 'world_facts'\]"):
        tofu_training_rows(data, groups)
