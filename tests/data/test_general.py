"""General text: from which files it is read, and what is said of others."""

import gzip
import json

import pytest
from datasets import Dataset
from support.cases import every

from blur_trainer.data.general import general_text

TEXTS = ["The harbour was rebuilt twice.", "  \n", "A mural, in spring.", "So be it."]
GOOD = [TEXTS[0], *TEXTS[2:]]


def test_every_kind_of_file(tmp_path):
    table = Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]})
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    table.to_csv(tmp_path / "a.csv"), table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.parquet"):
        found = general_text(tmp_path / name)
        assert found.column_names == ["text"] and list(found["text"]) == GOOD, name
    assert list(general_text(str(tmp_path / "a.txt"))["text"]) == ["\n\n".join(TEXTS)]


def test_some_texts_by_seed(tmp_path):
    Dataset.from_dict({"body": GOOD}).to_json(tmp_path / "b.jsonl")
    found = [list(general_text(tmp_path / "b.jsonl", num=2, column="body", seed=seed)["text"]) for seed in range(6)]
    assert all(len(set(texts)) == 2 and set(texts) <= set(GOOD) for texts in found)
    assert len(set(map(tuple, found))) > 1
    assert found[0] == list(general_text(tmp_path / "b.jsonl", num=2, column="body")["text"])


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}')
    (tmp_path / "a.xml").write_text("<a/>")

    def check(words, name, **kwargs):
        with pytest.raises(ValueError, match=words):
            general_text(tmp_path / name, **kwargs)

    every([("is a .xml, which is not read: give", "a.xml"), ("There is no file", "b.csv")], check)
    check("has blank texts only", "a.jsonl")
    check("no column 'body'", "a.jsonl", column="body")
    check("`num` is 3, and .* has 0 texts", "a.jsonl", num=3)
