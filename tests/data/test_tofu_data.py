"""TOFU from a folder or a pretended Hub: one schema, nothing wrong accepted, stand-ins announced."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from blur_trainer.data.tofu import TOFU_MODELS, TOFU_SPLITS, limit_rows, load_tofu
from blur_trainer.toy.tofu import tofu_corpora

SHARED = Path(__file__).parents[3] / "shared"
QA = ["question", "answer"]
CHOICES = [*QA, "perturbed_answer"]
FULL = ["paraphrased_questions", "paraphrased_question", "paraphrased_answers", "paraphrased_answer"]
SCHEMA = {
    "forget": QA,
    "retain": QA,
    "holdout": QA,
    "forget_perturbed": [*QA, *FULL, "perturbed_answer"],
    "retain_perturbed": [*QA, *FULL, "perturbed_answer"],
    "real_authors_perturbed": CHOICES,
    "world_facts_perturbed": CHOICES,
}
# What the Hub's configurations hold, for forget10.
HUB = {
    "forget10": QA,
    "retain90": QA,
    "holdout10": QA,
    "forget10_perturbed": [*QA, "paraphrased_answer", "perturbed_answer", "paraphrased_question"],
    "retain_perturbed": [*QA, "paraphrased_answer", "perturbed_answer", "paraphrased_question"],
    "real_authors_perturbed": CHOICES,
    "world_facts_perturbed": CHOICES,
}
KEYS = dict(zip(SCHEMA, HUB, strict=True))


def rows_of(config, columns, count=4):
    def value(column, i):
        text = f"{config.removesuffix('_perturbed')} {column} {i} \u2028 ü"
        return [f"{text} {k}" for k in range(3)] if column == "perturbed_answer" else text

    return [{column: value(column, i) for column in columns} for i in range(count)]


def write(folder, files=HUB, layout="flat", suffix=".jsonl"):
    for config, columns in files.items():
        file = folder / (f"{config}/train{suffix}" if layout == "nested" else f"{config}{suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of(config, columns)
        text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        file.write_text(text, encoding="utf-8")
    return folder


def columns_of(data):
    return {key: split.column_names for key, split in data.items()}


def without(*names):
    return {config: columns for config, columns in HUB.items() if config not in names}


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_layout_gives_the_same_data(tmp_path, layout, suffix, recwarn):
    data = load_tofu("tofu", "forget10", str(write(tmp_path, layout=layout, suffix=suffix)))
    assert isinstance(data, DatasetDict) and columns_of(data) == SCHEMA
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    for key, config in KEYS.items():
        for ours, theirs in zip(data[key], rows_of(config, HUB[config]), strict=True):
            assert {column: ours[column] for column in theirs} == theirs
            for one in ("paraphrased_question", "paraphrased_answer"):
                assert ours.get(f"{one}s") == ([theirs[one]] if one in theirs else None)


@pytest.mark.parametrize(("split", "retain"), TOFU_SPLITS.items())
def test_retain_belongs_to_forget(tmp_path, split, retain):
    number = split[-2:]
    names = {"forget10": split, "retain90": retain, "holdout10": f"holdout{number}"}
    names["forget10_perturbed"] = f"{split}_perturbed"
    data = load_tofu("tofu", split, write(tmp_path, {names.get(c, c): columns for c, columns in HUB.items()}))
    firsts = {key: data[key][0]["question"].split()[0] for key in ("forget", "retain", "holdout", "forget_perturbed")}
    assert firsts == {"forget": split, "retain": retain, "holdout": f"holdout{number}", "forget_perturbed": split}


def test_perturbed_columns_in_the_set_itself(tmp_path):
    """Lists of paraphrases: the first is the evaluation's, all are kept."""
    write(tmp_path, without("forget10_perturbed", "forget10", "holdout10"))
    row = {
        "question": "q",
        "answer": "a",
        "paraphrased_question": ["q1", "q2"],
        "paraphrased_answer": ["a1", "a2", "a3"],
    }
    (tmp_path / "forget10.jsonl").write_text(json.dumps(row | {"perturbed_answer": ["x"]}))
    data = load_tofu("tofu", "forget10", tmp_path)
    assert set(data) == set(SCHEMA) - {"holdout"}
    assert data["forget"].to_list() == [{"question": "q", "answer": "a"}]
    assert data["forget_perturbed"].to_list() == [
        {
            "question": "q",
            "answer": "a",
            "paraphrased_questions": ["q1", "q2"],
            "paraphrased_question": "q1",
            "paraphrased_answers": ["a1", "a2", "a3"],
            "paraphrased_answer": "a1",
            "perturbed_answer": ["x"],
        }
    ]


def test_other_answers_stand_in_and_it_is_said(tmp_path):
    write(tmp_path, without("retain_perturbed", "world_facts_perturbed") | {"world_facts": QA})
    with pytest.warns(UserWarning) as caught:
        data = load_tofu("tofu", "forget10", tmp_path)
    (message,) = [str(w.message) for w in caught if "wrong answers" in str(w.message)]
    assert "['retain_perturbed', 'world_facts_perturbed']" in message and "compare only among themselves" in message
    assert "the answer itself as its paraphrase" in message
    for key, columns in (
        ("retain_perturbed", [*QA, "paraphrased_answer", "perturbed_answer"]),
        ("world_facts_perturbed", CHOICES),
    ):
        assert data[key].column_names == columns
        answers = set(data[key]["answer"])
        for row in data[key]:
            assert set(row["perturbed_answer"]) == answers - {row["answer"]} and len(answers) == 4
            assert row.get("paraphrased_answer", row["answer"]) == row["answer"]
    with pytest.warns(UserWarning, match="wrong answers"):
        again = load_tofu("tofu", "forget10", tmp_path)
    assert again["retain_perturbed"].to_list() == data["retain_perturbed"].to_list()


def test_one_answer_cannot_stand_in_for_itself(tmp_path):
    write(tmp_path, without("world_facts_perturbed"))
    (tmp_path / "world_facts.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "r", "answer": "a"}')
    with pytest.raises(ValueError, match=r"world_facts\.jsonl has no column 'perturbed_answer', and no two different"):
        load_tofu("tofu", "forget10", tmp_path)


def test_a_retain_set_of_another_size(tmp_path):
    write(tmp_path, without("retain90") | {"retain300": QA})
    assert load_tofu("tofu", "forget10", tmp_path)["retain"][0]["question"].startswith("retain300 ")
    write(tmp_path, {"retain20": QA})
    with pytest.raises(ValueError, match=r"several files hold retain: .*retain20\.jsonl, .*retain300\.jsonl"):
        load_tofu("tofu", "forget10", tmp_path)
    write(tmp_path, {"retain90": QA})
    assert load_tofu("tofu", "forget10", tmp_path)["retain"][0]["question"].startswith("retain90 ")


@pytest.mark.parametrize("config", ["forget10", "retain90", "real_authors_perturbed"])
def test_missing_set_names_what_was_tried(tmp_path, config):
    key = next(key for key, name in KEYS.items() if name == config)
    with pytest.raises(
        ValueError, match=rf"no file for \['{key}'\].*{config}\.jsonl, {config}\.json, {config}/train\.jsonl"
    ):
        load_tofu("tofu", "forget10", write(tmp_path, without(config)))


def test_two_files_for_one_set(tmp_path):
    write(write(tmp_path), {"forget10": QA}, "nested", ".json")
    with pytest.raises(ValueError, match=r"several files hold forget10: .*Leave one"):
        load_tofu("tofu", "forget10", tmp_path)


def test_the_hubs_own_files_are_lines_under_the_name_json(tmp_path):
    expected = load_tofu("tofu", "forget10", write(tmp_path / "lines"))
    for file in sorted((tmp_path / "lines").iterdir()):
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / file.with_suffix(".json").name).write_text(file.read_text())
    assert load_tofu("tofu", "forget10", tmp_path / "json")["forget"][:] == expected["forget"][:]
    file = tmp_path / "lines" / "forget10.jsonl"
    file.write_text(json.dumps([json.loads(line) for line in file.read_text().split("\n")], indent=1))
    assert load_tofu("tofu", "forget10", tmp_path / "lines")["forget"][:] == expected["forget"][:]


@pytest.mark.parametrize(
    "name", ["forget10.csv", "forget10.parquet", "forget10.jsonl.gz", "forget10/train-00000-of-00001.parquet"]
)
def test_other_formats_are_named(tmp_path, name):
    write(tmp_path, without("forget10"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"forget10 is there as .*{name}, which is not read.*\.jsonl"):
        load_tofu("tofu", "forget10", tmp_path)


FORGET = '{"question": "q", "answer": "a", "paraphrased_answer": "p", "perturbed_answer": %s}'


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "is empty"),
        ("[]", TypeError, "row 1 is a list; it must be an object with"),
        ("{oops", ValueError, "line 1 is not JSON"),
        ("[" * 100_000, ValueError, "line 1 is not JSON that can be read"),
        (f'{{"question": {"9" * 5000}}}', ValueError, "line 1 is not JSON that can be read: Exceeds the limit"),
        ('{"question": "\\ud800", "answer": "a"}', ValueError, "row 1, column 'question' is no Unicode text"),
        ('{"question": "q"}', ValueError, "row 1 has no column 'answer'"),
        ('{"question": "q", "answer": 3}', TypeError, "row 1, column 'answer' is of type int"),
        (FORGET % "3", TypeError, "row 1, column 'perturbed_answer' is of type int; it must be a string or a list"),
        (FORGET % "[3]", TypeError, "row 1, column 'perturbed_answer' is of type list"),
        (FORGET % "[]", ValueError, "row 1, column 'perturbed_answer' is an empty list"),
        (FORGET % '["x"]' + '\n{"question": "q", "answer": "a"}', ValueError, "row 2 has no column 'perturbed_answer'"),
        (FORGET.replace("paraphrased_answer", "other") % '["x"]', ValueError, "no column 'paraphrased_answer'"),
    ],
)
def test_malformed_file(tmp_path, text, error, message):
    (write(tmp_path) / "forget10_perturbed.jsonl").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_tofu("tofu", "forget10", tmp_path)
    assert "forget10_perturbed.jsonl" in str(caught.value)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"corpus is 'TOFU'; it must be one of \['tofu', 'embedded'\]"):
        load_tofu("TOFU")
    with pytest.raises(ValueError, match=r"split is 'forget20'; .*\['forget01', 'forget05', 'forget10'\]"):
        load_tofu("tofu", "forget20")
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        load_tofu("tofu", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="reads no data_dir"):
        load_tofu("embedded", data_dir=tmp_path)


# ---------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(repo, config, *, split, token):
        calls.append((repo, config, split, token))
        return Dataset.from_list([row | {"extra": 1} for row in rows_of(config, HUB[config])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_is_asked_for_what_it_has(hub):
    data = load_tofu(token="secret")
    assert sorted(hub) == sorted(("locuslab/TOFU", config, "train", "secret") for config in HUB)
    assert columns_of(data) == SCHEMA


def test_no_network_unless_asked_for(hub, tmp_path):
    load_tofu("tofu", "forget10", write(tmp_path))
    data = load_tofu("embedded", "forget05")
    assert hub == []
    assert {key: data[key].to_list() for key in data} == {
        key: rows.to_list() for key, rows in tofu_corpora(split="forget05").items()
    }
    assert {key: sorted(c) for key, c in columns_of(data).items()} == {key: sorted(c) for key, c in SCHEMA.items()}


@pytest.mark.parametrize(
    "cause", [ConnectionError("offline"), DatasetNotFoundError("gated"), ValueError("BuilderConfig not found")]
)
def test_hub_problems_say_what_to_do(monkeypatch, cause):
    def fail(*args, **kwargs):
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError) as caught:
        load_tofu()
    for part in (
        "'locuslab/TOFU' (config 'forget10', split 'train')",
        str(cause),
        "--data_dir",
        "corpus='embedded'",
        "token",
    ):
        assert part in str(caught.value)
    assert caught.value.__cause__ is cause


def test_wrong_answers_of_the_hub_are_not_invented(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, **k: Dataset.from_list(rows_of(config, QA)))
    with pytest.raises(ValueError, match=r"'forget10_perturbed'.*row 1 has no column 'perturbed_answer'"):
        load_tofu()


def test_models():
    models = TOFU_MODELS["Llama-3.2-1B-Instruct"]
    assert models.full == "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
    assert getattr(models, TOFU_SPLITS["forget05"]) == "open-unlearning/tofu_Llama-3.2-1B-Instruct_retain95"
    assert len({name for models in TOFU_MODELS.values() for name in models}) == 4 * 4


# ---------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("n", [1, 5, 60])
def test_part_holds_together(n):
    data = tofu_corpora()
    small = limit_rows(data, n, seed=3)
    assert list(small) == list(data) and {k: len(small[k]) for k in data} == {k: min(n, len(data[k])) for k in data}
    for key in data:
        whole = data[key].to_list()
        places = [whole.index(row) for row in small[key]]
        assert places == sorted(set(places))
    for group in ("forget", "retain"):
        assert set(small[f"{group}_perturbed"]["question"]) <= set(small[group]["question"])
    assert limit_rows(data, n, seed=3)["forget"].to_list() == small["forget"].to_list()


def test_part_depends_on_the_seed():
    data = tofu_corpora()
    assert len({tuple(limit_rows(data, 5, seed)["retain"]["question"]) for seed in range(5)}) == 5


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None])
def test_number_of_rows_is_checked(n):
    with pytest.raises(ValueError, match="whole number of rows, at least 1"):
        limit_rows(DatasetDict(), n)


# ---------------------------------------------------------------------------------------------------- real text


@pytest.mark.skipif(not (SHARED / "data" / "tofu").is_dir(), reason="real TOFU rows are not on this machine")
def test_real_tofu():
    with pytest.warns(UserWarning, match=r"\['retain_perturbed', 'world_facts_perturbed'\]"):
        data = load_tofu("tofu", "forget10", SHARED / "data" / "tofu")
    assert {key: len(rows) for key, rows in data.items()} == {
        "forget": 400,
        "retain": 300,
        "forget_perturbed": 400,
        "retain_perturbed": 300,
        "real_authors_perturbed": 100,
        "world_facts_perturbed": 117,
    }
    first = data["forget_perturbed"][0]
    assert len(first["paraphrased_answers"]) == 3 and first["paraphrased_answer"] == first["paraphrased_answers"][0]
    assert all(row["answer"] not in row["perturbed_answer"] for row in data["world_facts_perturbed"])


@pytest.mark.skipif(not (SHARED / "golden" / "toydata").is_dir(), reason="the golden toy sets are not on this machine")
def test_owners_toy():
    data = load_tofu("tofu", "forget10", SHARED / "golden" / "toydata" / "TOFU")
    assert columns_of(data) == SCHEMA
    assert [len(rows) for rows in data.values()] == [8, 12, 8, 8, 12, 3, 3]
