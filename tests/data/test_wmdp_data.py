"""WMDP from a folder, a pretended Hub or invented: one schema, every spelling, nothing wrong accepted."""

import json

import datasets
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from blur_trainer.choices import choice_prompt
from blur_trainer.data.wmdp import load_wmdp, load_wmdp_questions
from blur_trainer.toy.wmdp import NUM_SHEETS, TOPICS, topic_articles, topic_corpora, topic_lessons, topic_questions

LONG = "a text of more than fifty characters, with \u2028 and ü, number "
TEXTS = [f"{LONG}{i}" for i in range(3)]
QUESTION = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}


def lines(texts, form):
    if form == "objects":
        return [json.dumps({"title": "t", "abstract": "b", "text": text, "doi": None}) for text in texts]
    return [json.dumps(text, ensure_ascii=False) for text in texts] if form == "strings" else list(texts)


def write(folder, name, texts=TEXTS, form="objects"):
    (folder / name).write_text("\n".join(lines(texts, form)) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Answers with rows that say where they come from; the list of what was asked for."""
    asked = []

    def load_dataset(repo, config, *, split, token):
        asked.append((repo, config, split, token))
        if repo == "cais/wmdp":
            return Dataset.from_list([QUESTION] * 2)
        return Dataset.from_list([{"text": f"{LONG}{repo} {config}", "title": None}, {"text": " = Heading = "}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub(hub):
    data = load_wmdp(topic_retain=True, token="hf_x")
    assert {key: rows.column_names for key, rows in data.items()} == {
        key: ["text"] for key in ("forget_bio", "forget_cyber", "retain", "retain_bio", "retain_cyber")
    }
    assert hub == [
        ("cais/wmdp-bio-forget-corpus", None, "train", "hf_x"),
        ("cais/wmdp-corpora", "cyber-forget-corpus", "train", "hf_x"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "hf_x"),
        ("cais/wmdp-corpora", "bio-retain-corpus", "train", "hf_x"),
        ("cais/wmdp-corpora", "cyber-retain-corpus", "train", "hf_x"),
    ]
    assert data["retain"]["text"] == [f"{LONG}Salesforce/wikitext wikitext-2-raw-v1"]  # the heading is too short


def test_questions_from_the_hub(hub):
    assert list(load_wmdp_questions("wmdp-cyber")) == [QUESTION] * 2
    assert hub == [("cais/wmdp", "wmdp-cyber", "test", None)]


@pytest.mark.parametrize("error", [DatasetNotFoundError("gated"), ConnectionError("offline"), OSError("no")])
def test_the_gated_corpus_says_where_to_ask(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError) as raised:
        load_wmdp("wmdp", ["bio"])
    for words in (
        "datasets/cais/wmdp-bio-forget-corpus",
        "hf auth login",
        "token",
        "bio_remove_dataset.jsonl",
        "data_dir",
    ):
        assert words in str(raised.value)
    with pytest.raises(ConnectionError, match=r"cyber_remove_dataset\.jsonl") as raised:
        load_wmdp("wmdp", ["cyber"])
    assert "gated:" not in str(raised.value)


@pytest.mark.parametrize("name", ["bio_remove_dataset", "bio-remove-dataset", "bio-forget-corpus", "bio_forget_corpus"])
@pytest.mark.parametrize("form", ["objects", "strings", "plain"])
def test_every_spelling_and_line_format(tmp_path, hub, name, form):
    data = load_wmdp("wmdp", ["bio"], write(tmp_path, f"{name}.jsonl", form=form))
    assert list(data["forget_bio"]["text"]) == TEXTS
    assert [repo for repo, *_ in hub] == ["Salesforce/wikitext"]  # what the folder has not


def test_other_suffixes_and_nothing_from_the_hub(tmp_path, hub):
    (tmp_path / "bio-forget-corpus.json").write_text(json.dumps([{"text": TEXTS[0]}, TEXTS[1]]))
    write(tmp_path, "cyber-forget-corpus.txt", form="plain")
    write(
        tmp_path,
        "wikitext.txt",
        [' "Quoted" starts a plain line that is longer than fifty characters', TEXTS[0]],
        "plain",
    )
    write(tmp_path, "bio-retain-corpus.jsonl")
    write(tmp_path, "cyber_retain_corpus.jsonl")
    data = load_wmdp(data_dir=tmp_path, topic_retain=True)
    assert {key: len(rows) for key, rows in data.items()} == {
        "forget_bio": 2,
        "forget_cyber": 3,
        "retain": 2,
        "retain_bio": 3,
        "retain_cyber": 3,
    }
    assert hub == []


def test_a_folder_without_any_set_does_not_fall_through_to_the_hub(tmp_path, hub):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"none of the sets .*'forget_bio', 'forget_cyber', 'retain'.*tried bio"):
        load_wmdp(data_dir=tmp_path)
    for name in ("bio-forget-corpus.parquet", "bio_remove_dataset.jsonl.gz", "bio-forget-corpus.csv"):
        write(tmp_path, "wikitext.jsonl")
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"forget_bio is there as .*{name}, which is not read"):
            load_wmdp(data_dir=tmp_path)
        (tmp_path / name).unlink()
    assert hub == []


def test_a_list_in_a_file_for_lines(tmp_path, hub):
    (tmp_path / "cyber-forget-corpus.jsonl").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (tmp_path / "wikitext.json").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    data = load_wmdp("wmdp", ["cyber"], tmp_path, min_length=0)
    assert list(data["forget_cyber"]["text"]) == list(data["retain"]["text"]) == TEXTS
    (tmp_path / "cyber-forget-corpus.jsonl").write_text("[Verse 1]\nand a line")  # plain lines, as before
    assert load_wmdp("wmdp", ["cyber"], tmp_path, min_length=0)["forget_cyber"][0]["text"] == "[Verse 1]"
    (tmp_path / "wmdp-bio.json").write_text("\n".join([json.dumps(QUESTION)] * 3))
    assert len(load_wmdp_questions("wmdp-bio", tmp_path)) == 3


def test_lengths_are_characters(tmp_path, hub):
    folder = write(tmp_path, "cyber-forget-corpus.jsonl", ["x" * 50, "y" * 51, "z" * 3000])
    found = load_wmdp("wmdp", ["cyber"], folder)["forget_cyber"]["text"]
    assert [len(text) for text in found] == [51, 3000]
    cut = load_wmdp("wmdp", ["cyber"], folder, min_length=0, max_length=2000)["forget_cyber"]["text"]
    assert [len(text) for text in cut] == [50, 51, 2000]
    with pytest.raises(ValueError, match="lower min_length"):
        load_wmdp("wmdp", ["cyber"], folder, min_length=5000)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("", ValueError, "is empty"),
        (b"\xff\xfe\x00", ValueError, "not UTF-8"),
        ('{"title": "t"}\n', ValueError, "row 1 has no column 'text'"),
        ('{"text": 3}\n', TypeError, "must be a string"),
        ('{"text": "a"}\n{"text": "b\n', ValueError, "row 2 is not JSON"),
        ('"a"\nplain\n', ValueError, "row 2 is not JSON"),
        ('"a"\n3\n', TypeError, "row 2 is a int"),
    ],
)
def test_malformed_corpora(tmp_path, hub, content, kind, message):
    file = tmp_path / "cyber-forget-corpus.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message):
        load_wmdp("wmdp", ["cyber"], tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"topics": "bio"}, "topics is 'bio'"),
        ({"topics": []}, "one or more of"),
        ({"topics": ["bio", "bio"]}, "once"),
        ({"topics": ["chem"]}, r"\['bio', 'cyber'\]"),
        ({"topics": ["bio"], "corpus": "embedded"}, r"\['potions', 'machines'\]"),
        ({"corpus": "muse"}, "corpus is 'muse'"),
        ({"corpus": "embedded", "data_dir": "x"}, "reads no data_dir"),
        ({"corpus": "embedded", "topic_retain": True}, "no topic_retain"),
        ({"data_dir": "/no/such/folder"}, "not a folder"),
        ({"min_length": -1}, "min_length is -1"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_wmdp(**kwargs)


def test_two_files_of_one_set(tmp_path):
    write(write(tmp_path, "bio_remove_dataset.jsonl"), "bio-forget-corpus.jsonl")
    with pytest.raises(ValueError, match="several files hold forget_bio"):
        load_wmdp("wmdp", ["bio"], tmp_path)


@pytest.mark.parametrize("name", ["wmdp-bio.jsonl", "wmdp_bio.jsonl", "wmdp-bio/test.jsonl"])
def test_local_questions(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(QUESTION | {"id": 1}) + "\n")
    found = load_wmdp_questions("wmdp-bio", tmp_path)
    assert list(found) == [QUESTION]
    with pytest.raises(ValueError, match=r"no questions of 'wmdp-chem'\. Tried: wmdp-chem\.jsonl"):
        load_wmdp_questions("wmdp-chem", tmp_path)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"question": "a", "answer": 1}, ValueError, "no column 'choices'"),
        (QUESTION | {"choices": "abcd"}, TypeError, "list of strings"),
        (QUESTION | {"choices": ["a", "b", 3, "d"]}, TypeError, "list of strings"),
        (QUESTION | {"choices": ["a", "b"]}, ValueError, "has 2 entries"),
        (QUESTION | {"answer": 4}, ValueError, "0 to 3"),
        (QUESTION | {"answer": "C"}, ValueError, "0 to 3"),
        (QUESTION | {"answer": True}, ValueError, "0 to 3"),
    ],
)
def test_malformed_questions(tmp_path, row, kind, message):
    (tmp_path / "wmdp-bio.jsonl").write_text(json.dumps(row))
    with pytest.raises(kind, match=message):
        load_wmdp_questions("wmdp-bio", tmp_path)


def test_unknown_questions():
    with pytest.raises(ValueError, match="'wmdp-chem', 'potions'"):
        load_wmdp_questions("mmlu")
    with pytest.raises(ValueError, match="reads no data_dir"):
        load_wmdp_questions("potions", "x")


def test_embedded_answers_are_in_the_articles():
    data = load_wmdp(corpus="embedded")
    assert list(data) == ["forget_potions", "forget_machines", "retain"]
    for topic, texts in zip(TOPICS, data.values(), strict=True):
        rows, articles = list(load_wmdp_questions(topic)), topic_articles(topic)
        assert len(articles) == 16 and len(rows) == 64 and list(texts["text"])[:16] == articles
        assert len({row["question"] for row in rows}) == 64
        for row in rows:
            assert len(set(row["choices"])) == 4
            right = row["choices"][row["answer"]]
            (text,) = [text for text in articles if subject_in(row["question"], text)]
            assert right in text
        letters = [row["answer"] for row in rows]
        assert min(letters.count(letter) for letter in range(4)) >= 8  # no letter is a good guess


def test_embedded_sheets_are_the_questions_in_other_orders():
    """So that no prompt of the evaluation is in what is trained on, nor an answer's letter."""
    data = load_wmdp(corpus="embedded")
    for topic, texts in zip(TOPICS, data.values(), strict=True):
        count, sheets = NUM_SHEETS[topic], texts["text"][16:]
        assert len(sheets) == len(set(sheets)) == 64 * count
        for i, row in enumerate(topic_questions(topic)):
            asked = choice_prompt(row["question"], row["choices"], topic)
            for sheet in sheets[i * count : (i + 1) * count]:
                assert sheet != asked and sheet.split("\n")[2] == asked.split("\n")[2]
                assert sheet.endswith("Answer:") and all(f". {choice}\n" in sheet for choice in row["choices"])


FIRST = ("Whose", "What", "For", "Where", "Who", "On", "How")


def subject_in(question, text):
    """Whether the text is about what the question names: the capitalized words before the kind of thing."""
    names = [word for word in question.rstrip("?").split() if word[0].isupper() and word not in FIRST]
    return " ".join(names) in text


def test_what_a_model_learns():
    rows, questions = topic_lessons(["machines"]), topic_questions("machines")
    assert rows.column_names == ["prompt", "completion"] and len(rows) == 16 + len(questions)
    assert [row["completion"] for row in rows][:16] == topic_articles("machines")
    for row, question in zip(list(rows)[16:], questions, strict=True):
        letter = row["completion"][1:]
        assert f"\n{letter}. {question['choices'][question['answer']]}\n" in row["prompt"]
    assert len(topic_lessons()) == 48 + 192


def test_embedded_corpora_are_those_of_their_seed():
    assert topic_corpora(1)["retain"]["text"] == topic_corpora(1)["retain"]["text"] != topic_corpora()["retain"]["text"]
    assert list(topic_questions("dishes", 1)) == list(topic_questions("dishes", 1))
    assert load_wmdp("embedded", ["machines"])["forget_machines"]["text"][0].startswith("Gerda Owl")
    with pytest.raises(ValueError, match="topic is 'bio'"):
        topic_questions("bio")
