"""The embedded corpora: the same everywhere, complete in MUSE's schema, no fact shared across the groups."""

import hashlib
import json
from itertools import chain, combinations, pairwise

import pytest
from datasets import Dataset, DatasetDict

from blur_trainer.toy.fiction import Draw
from blur_trainer.toy.muse import GROUPS, QA_TEMPLATE, _authors, muse_corpora, training_texts

COLUMNS = {
    "raw": ["text"],
    "verbmem": ["prompt", "gt"],
    "knowmem": ["question", "answer"],
    "privleak": ["text"],
    "scal": ["text"],
    "sust": ["text"],
}


@pytest.fixture(scope="module")
def data():
    return muse_corpora()


def fingerprint(data: DatasetDict) -> str:
    rows = {key: data[key].to_list() for key in sorted(data)}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_corpus_is_the_one_that_was_measured(data):
    # Numbers in the documentation belong to these very words; change both together.
    assert data["raw_forget"][0]["text"].startswith("Rhea Stenick of Ashbay won the Juniper Cup on Thursday for Silver")
    assert data["knowmem_hold_qa"][5] == {"question": "Which animal does Freya Maregg keep?", "answer": "striped camel"}
    assert fingerprint(data) == "584bfeaba82f6742805aac5c97740e44c9502e6bf74e7cc3bd5a24ee73217784"


def test_seed_decides_everything(data):
    assert fingerprint(muse_corpora(0)) == fingerprint(data)
    other = muse_corpora(1)
    assert set(other) == set(data)
    assert not set(other["raw_forget"]["text"]) & set(data["raw_forget"]["text"])


def test_draws_need_only_random():
    """Slow literal reference: selection without replacement from the documented sequence of `random()`."""
    import random

    words = list("abcdefgh")
    reference, pool, picked = random.Random(7), list(words), []
    for i in range(5):
        j = i + int(reference.random() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
        picked.append(pool[i])
    assert Draw(7).some(words, 5) == picked
    assert len(set(picked)) == 5
    assert words == list("abcdefgh")


@pytest.mark.parametrize("count", [40, 160])
def test_own_facts_are_nobody_elses(count):
    authors = _authors(0, count)
    for fact in ("surname", "name", "town", "title", "prize", "editor", "animal", "article"):
        assert len({author[fact] for author in authors}) == count, fact


def test_schema_is_complete(data):
    folds = {f"{config}_forget_{k}" for config in ("scal", "sust") for k in range(1, 5)}
    groups = {
        f"{key}" for g in GROUPS for key in (f"raw_{g}", f"verbmem_{g}", f"knowmem_{g}_qa", f"knowmem_{g}_qa_icl")
    }
    assert set(data) == groups | folds | {"privleak_forget", "privleak_retain", "privleak_holdout"}
    for key, split in data.items():
        assert split.column_names == COLUMNS[key.split("_")[0]], key
        assert all(value.strip() == value and value for row in split for value in row.values()), key


@pytest.mark.parametrize(("num_authors", "forget"), [(16, 4), (32, 8), (64, 16)])
def test_sizes(num_authors, forget):
    data = muse_corpora(num_authors=num_authors)
    for group, count in (("forget", forget), ("retain", 2 * forget), ("hold", forget)):
        assert len(data[f"raw_{group}"]) == len(data[f"verbmem_{group}"]) == count
        assert len(data[f"knowmem_{group}_qa"]) == 6 * count
        assert len(data[f"knowmem_{group}_qa_icl"]) == 2
    assert len(data["privleak_forget"]) == len(data["privleak_holdout"]) == forget


@pytest.mark.parametrize("bad", [0, 12, 30, 132, -16, 32.0, "32", None])
def test_refuses_other_sizes(bad):
    with pytest.raises(ValueError, match="multiple of 4 from 16 to 128"):
        muse_corpora(num_authors=bad)


def test_articles_are_news_like(data):
    for group in (*GROUPS, "holdout"):
        for text in data["privleak_holdout" if group == "holdout" else f"raw_{group}"]["text"]:
            assert 60 <= len(text.split()) <= 90, text
            assert "{" not in text and text.endswith((".", '."'))


def test_a_passage_is_its_prompt_and_the_rest(data):
    for group in GROUPS:
        for text, row in zip(data[f"raw_{group}"]["text"], data[f"verbmem_{group}"], strict=True):
            assert f"{row['prompt']} {row['gt']}" == text
            assert 0.35 < len(row["prompt"].split()) / len(text.split()) < 0.45
    # The prompt has to tell whose article it is.
    prompts = [row["prompt"] for group in GROUPS for row in data[f"verbmem_{group}"]]
    assert not any(a.startswith(b) or b.startswith(a) for a, b in combinations(prompts, 2))


def test_answers_are_stated_in_the_article_or_nowhere(data):
    articles, rows = data["raw_forget"]["text"], data["knowmem_forget_qa"].to_list()
    for i, article in enumerate(articles):
        own = rows[6 * i : 6 * i + 6]
        assert own[0]["answer"] in article and own[2]["answer"] in article
        assert own[5]["answer"] not in article
        for row in own:
            surname = row["question"].rstrip("?").split(" ")
            assert any(
                word in article for word in surname if word[0].isupper() and word not in ("Where", "What", "Who")
            )


def test_groups_share_no_names(data):
    people = _authors(0, 40)
    bounds = {"forget": people[:8], "retain": people[8:24], "hold": people[24:32], "outside": people[32:]}
    texts = {
        group: " ".join([*data[f"raw_{group}"]["text"], *(v for r in data[f"knowmem_{group}_qa"] for v in r.values())])
        for group in GROUPS
    }
    texts["outside"] = " ".join(data["privleak_holdout"]["text"])
    for owner, authors in bounds.items():
        for group, text in texts.items():
            found = [
                author["surname"] for author in authors if author["surname"] in text.split() or author["town"] in text
            ]
            assert len(found) == (len(authors) if owner == group else 0), (owner, group, found)


def test_outsiders_are_never_trained_on(data):
    trained = "\n".join(training_texts(data)["text"])
    assert not any(text in trained for text in data["privleak_holdout"]["text"])
    for group in GROUPS:
        assert not any(row["question"] in trained for row in data[f"knowmem_{group}_qa_icl"])


def test_scal_is_nested_and_sust_is_disjoint(data):
    forget = list(data["raw_forget"]["text"])
    scal = [list(data[f"scal_forget_{k}"]["text"]) for k in range(1, 5)]
    sust = [list(data[f"sust_forget_{k}"]["text"]) for k in range(1, 5)]
    for small, large in pairwise(scal):
        assert len(small) < len(large) and large[: len(small)] == small
    assert scal[-1] == forget
    assert list(chain(*sust)) == forget and all(sust)
    assert not any(set(a) & set(b) for a, b in combinations(sust, 2))


def test_training_texts_are_documents_then_questions(data):
    texts = training_texts(data)
    assert texts.column_names == ["text"] and len(texts) == 32 + 192
    forget = list(training_texts(data, ["forget"])["text"])
    assert forget[:8] == list(data["raw_forget"]["text"])
    first = data["knowmem_forget_qa"][0]
    assert forget[8] == f"Question: {first['question']}\nAnswer: {first['answer']}"
    assert len(forget) == 8 + 48
    retrain = set(training_texts(data, ("retain", "hold"))["text"])
    assert retrain | set(forget) == set(texts["text"]) and not retrain & set(forget)


def test_template_is_the_knowmem_prompt_and_the_answer():
    prompt = "Question: Who?\nAnswer: "  # as muse_bench writes it
    assert QA_TEMPLATE.format(question="Who?", answer="Nobody") == prompt + "Nobody"


def loaded(**extra) -> DatasetDict:
    """Data as the Hub has it: windows over several articles, no hold group."""
    data = {
        "raw_forget": {"text": ["One  two three.", "Four {five} six."]},
        "raw_retain": {"text": ["Seven eight."]},
        "verbmem_forget": {"prompt": ["three. Four", "One"], "gt": ["{five} six.", "two"]},
        "knowmem_forget_qa": {"question": ["What is {five}?"], "answer": ["5"]},
    }
    return DatasetDict({key: Dataset.from_dict(columns) for key, columns in (data | extra).items()})


def test_training_texts_of_loaded_data():
    # The first window begins in the middle of a document and is a text of its own; the second is how one begins.
    assert list(training_texts(loaded(), ("forget",))["text"]) == [
        "One  two three.",
        "Four {five} six.",
        "three. Four {five} six.",
        "Question: What is {five}?\nAnswer: 5",
    ]
    assert list(training_texts(loaded(), ("retain", "hold"))["text"]) == ["Seven eight."]


@pytest.mark.parametrize("groups", [[], ["remember"], "forget", ["forget", "holdout"]])
def test_training_texts_refuses_other_groups(data, groups):
    with pytest.raises(ValueError, match=r"one or more of \['forget', 'retain', 'hold'\]"):
        training_texts(data, groups)


def test_training_texts_names_what_is_missing():
    data = loaded()
    del data["raw_retain"]
    with pytest.raises(ValueError, match=r"no split 'raw_retain'.*it has .*'raw_forget'"):
        training_texts(data, ("retain",))
