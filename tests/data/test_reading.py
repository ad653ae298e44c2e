"""Files of one's own: what is recognized, what is said of it, and that nothing else is trained in silence."""

import gzip
import io
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from support.cases import every
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from blur_trainer.data.chat import with_chat_template
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.data.reading import read_rows

USER, ANSWER, SYSTEM = ({"role": r, "content": c} for r, c in [("user", "Q"), ("assistant", "A"), ("system", "S")])
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


def read(source, *, chat=True, role="forget", **kwargs):
    return read_rows(source, role=role, has_template=chat, **kwargs)


def rows(source, **kwargs):
    return list(read(source, **kwargs).dataset)


def refused(words, source, error=ValueError, **kwargs):
    with pytest.raises(error) as raised:
        read(source, **kwargs)
    assert "\n" not in str(raised.value)
    missing = [word for word in ([words] if isinstance(words, str) else words) if word not in str(raised.value)]
    assert not missing, f"{missing} not in {raised.value}"


# names of columns

QA, PLAIN = {"question": "Q", "answer": "A"}, {"prompt": "Q", "completion": " A"}
SQUAD = {"text": ["A", "B"], "answer_start": [1, 2]}
# the row given; the row with a chat template; the row without one
LAYOUTS = [
    ({"prompt": "Q", "response": "A"}, QA, PLAIN),
    ({"Prompt": "Q", " Response ": "A", "ID": 3}, QA, PLAIN),
    ({"prompt": "Q", "completion": "A"}, QA, {"prompt": "Q", "completion": "A"}),
    ({"prompt": "Q", "output": "A"}, QA, PLAIN),
    ({"input": "Q", "target": "A"}, QA, PLAIN),
    ({"source": "Q", "target": "A"}, QA, PLAIN),
    ({"user": "Q", "assistant": "A"}, QA, PLAIN),
    ({"question": "Q", "answer": "A", "source": "a book", "label": "1"}, QA, QA),
    ({"query": "Q", "answer": "A"}, QA, QA),
    ({"q": "Q", "a": "A"}, QA, QA),
    ({"query": "Q", "response": " A "}, QA, QA),
    ({"instruction": "Q", "input": "", "output": "A"}, QA, QA),
    ({"instruction": "Q", "input": "C", "output": "A"}, QA | {"question": "Q\n\nC"}, QA | {"question": "Q\n\nC"}),
    ({"instruction": "Q", "context": "C", "response": "A"}, QA | {"question": "Q\n\nC"}, QA | {"question": "Q\n\nC"}),
    ({"context": "C", "question": "Q", "answers": SQUAD}, QA | {"question": "C\n\nQ"}, QA | {"question": "C\n\nQ"}),
    ({"question": "Q", "answers": ["A", "B"]}, QA, QA),
    ({"question": "Q", "answer": {"value": "A", "aliases": ["B"]}}, QA, QA),
    ({"question": "Q", "answer": 42}, QA | {"answer": "42"}, QA | {"answer": "42"}),
    ({"system": "S", "prompt": "Q", "response": "A"}, {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, None),
    ({"system": "S", "prompt": "Q", "reply": "A"}, None, PLAIN | {"prompt": "S\n\nQ"}),
    ({"prompt": [USER], "response": "A"}, {"prompt": [USER], "completion": [ANSWER]}, None),
    ({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}, QA),
    ({"messages": [USER, ANSWER], "prompt": "Q", "prompt_id": "7"}, {"messages": [USER, ANSWER]}, QA),
    ({"conversations": [HUMAN, GPT]}, {"messages": [USER, ANSWER]}, QA),
    ({"conversations": [HUMAN, GPT], "system": "S"}, {"messages": [SYSTEM, USER, ANSWER]}, None),
    ({"conversation": json.dumps([HUMAN, GPT])}, {"messages": [USER, ANSWER]}, QA),
    ({"dialog": ["Q", "A"]}, {"messages": [USER, ANSWER]}, QA),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]}, None, QA),
    ({"text": "T", "label": 1}, {"text": "T"}, {"text": "T"}),
    ({"title": "t", "Body": "T"}, {"text": "T"}, {"text": "T"}),
    ({"input_ids": [1, 2], "text": "T"}, {"input_ids": [1, 2]}, {"input_ids": [1, 2]}),
    ({"prompt": "Question: Q\nAnswer:", "output": "A"}, *[PLAIN | {"prompt": "Question: Q\nAnswer:"}] * 2),
    ({"prompt": "<|user|>Q", "completion": "A"}, *[{"prompt": "<|user|>Q", "completion": "A"}] * 2),
    (
        {"prompt": "東京", "response": "都"},
        {"question": "東京", "answer": "都"},
        {"prompt": "東京", "completion": "都"},
    ),
    (QA | {"forget_level": "4.5", "refusal": "No."}, *[QA | {"forget_level": 4.5, "refusal": "No."}] * 2),
]


def test_names_of_columns():
    def check(given, with_template, without):
        for chat, expected in ((True, with_template), (False, without)):
            if expected is not None:
                assert rows([given], chat=chat) == [expected], chat

    every(LAYOUTS, check)


def test_what_a_chat_model_reads_is_what_it_is_asked():
    """`question` and `answer` are the tokens of a user's and an assistant's message."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    pair, conversation = (
        read([row]).dataset for row in ({"prompt": "Q", "response": "A"}, {"messages": [USER, ANSWER]})
    )
    one, two = (list(tokenize_dataset(d, tokenizer, role="forget", max_length=64)) for d in (pair, conversation))
    assert one == two and tokenizer.decode(one[0]["input_ids"]).startswith("<s><|user|>\nQ\n<|assistant|>\nA")


AMBIGUOUS = [
    (["prompt", "response", "text"], ["prompt=prompt,completion=response", "text=text"]),
    (["instruction", "input", "output", "text"], ["question=instruction,context=input,completion=output", "text=text"]),
    (
        ["prompt", "input", "output"],
        ["prompt=prompt,context=input,completion=output", "prompt=input,completion=output"],
    ),
    (["prompt", "response", "answer"], ["prompt=prompt,completion=response", "prompt=prompt,completion=answer"]),
    (["prompt", "question", "answer"], ["prompt=prompt,completion=answer", "question=question,completion=answer"]),
    (["prompt", "chosen", "rejected"], ["prompt=prompt,completion=chosen", "prompt=prompt,completion=rejected"]),
    (["text", "label"], ["text=text", "prompt=text,completion=label"]),
    (["text", "answer"], ["text=text", "prompt=text,completion=answer"]),
    (["document", "summary"], ["text=document", "prompt=document,completion=summary"]),
    (["text", "content"], ["text=text", "text=content"]),
    (
        ["question", "context", "passage", "answer"],
        ["question=question,context=context", "question=question,context=passage"],
    ),
    (["user", "assistant", "prompt"], ["prompt=user,completion=assistant", "prompt=prompt,completion=assistant"]),
    (["frage", "antwort"], ["prompt=frage,completion=antwort", "text=frage"]),
    (["question", "best_answer", "topic"], ["prompt=question,completion=best_answer"]),
    (["inhalt"], ["text=inhalt"]),
    (["Where does Alice live?", "In Rome."], ["add a line with names above"]),
    (["question", "A", "B", "answer"], ["question=question,completion=ANSWER", "multiple choice"]),
    (["question", "choices", "answerKey"], ["prompt=QUESTION,completion=ANSWER", "multiple choice"]),
    (["question", "choices", "answer"], ["question=question,completion=ANSWER", "multiple choice"]),
    (["instruction", "output", "history"], ["question=instruction,completion=output", "before the question"]),
]


def test_two_readings_are_refused_and_the_options_are_proposed(tmp_path):
    def check(columns, proposed):
        for role in ("forget", "retain"):
            (tmp_path / "a.csv").write_text(",".join(columns) + "\n" + ",".join("words" for _ in columns))
            options = [
                f"--{role}_columns {text}" if text.startswith(("prompt", "question", "text")) else text
                for text in proposed
            ]
            refused(options, tmp_path / "a.csv", role=role)

    every(AMBIGUOUS, check)


def test_each_proposal_is_accepted(tmp_path):
    for columns, proposed in AMBIGUOUS[:8]:
        row = {column: f"{column} words" for column in columns}
        for option in proposed:
            chosen = dict(pair.split("=") for pair in option.split(","))
            made = rows([row], columns=option)
            assert made == rows([row], columns=chosen)
            answer = chosen.get("completion", chosen.get("text"))
            assert list(made[0].values())[-1] == row[answer]


def test_columns_that_the_user_names():
    table = [{"Frage": "Q", "antwort": "A", "bezug": "C", "alternative": "B"}]
    assert rows(table, columns="prompt=frage,completion=antwort") == [QA | {"alternative": "B"}]
    assert rows(table, columns="question=Frage, context=bezug, answer=antwort", chat=False)[0]["question"] == "C\n\nQ"
    assert rows(table, columns={"text": "bezug"}) == [{"text": "C"}]
    tokens = [{"tokens": [1, 2], "labels": [1, 2], "question": "Q", "answer": "A"}]
    assert rows(tokens, columns="input_ids=tokens") == [{"input_ids": [1, 2], "labels": [1, 2]}]
    named = [{"prompt": "Question: Q\nAnswer:", "output": "A"}]  # asked, although it is written in a template
    assert rows(named, columns="question=prompt,completion=output") == [QA | {"question": "Question: Q\nAnswer:"}]
    every(
        [
            ("names the part 'promt'", "promt=frage"),
            ("names the column 'nix', and `forget` dataset has ['Frage'", "prompt=nix,completion=antwort"),
            ("write PART=COLUMN", "frage"),
            ("and its `completion`", "prompt=frage"),
            ("A `context` goes with a question", "text=frage,context=bezug"),
        ],
        lambda words, columns: refused(words, table, columns=columns),
    )


# conversations


def test_each_answer_of_a_conversation_is_trained():
    two = {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}
    found = read([{"messages": [USER, ANSWER, *two, USER]}, {"messages": [USER, ANSWER]}])
    assert [len(row["messages"]) for row in found.dataset] == [2, 4, 2]
    assert "2 conversations -> 3 examples, one for each answer" in found.said
    assert "last messages without an answer left out: 1 row" in found.said
    one = read([{"messages": [USER, ANSWER, *two], "refusal": "No."}])
    assert len(one.dataset) == 1 and "the last answer of each conversation is trained" in one.said
    every(
        {
            "twice": ("'Text' and 'text '", {"Text": "a", "text ": "b", "id": 1, "ID": 2}, True),
            "all empty": (
                "1 row without an answer in `answer` (row 0): fill them.",
                {"question": "Q", "answer": ""},
                True,
            ),
            "no template": ("--chat_template FILE", {"messages": [USER, ANSWER, *two]}, False),
            "role": ("has the role 'alien': known are 'user'", {"messages": [{"from": "alien", "value": "x"}]}, True),
            "python": ("save the table as JSON lines", {"messages": "[{'role': 'user'}]"}, True),
            "parts": ("message 0 of `messages` in `forget` dataset, row 0 has 2 parts", {"messages": [PARTS]}, True),
            "no answer": ("1 row without an answer in `messages` (row 0)", {"messages": [USER]}, True),
            "written": ("prompt=prompt,completion=reply", {"prompt": "[INST] Q", "reply": "A", "system": "S"}, True),
            "list": ("`question` in `forget` dataset, row 0 is a list", {"question": ["Q"], "answer": "A"}, True),
        },
        lambda words, row, chat: refused(words, [row], chat=chat),
    )


# kinds of files


def test_the_same_rows_from_every_kind_of_file(tmp_path, monkeypatch):
    given = [{"question": "Why, then?", "answer": "007"}, {"question": 'Say "NA".', "answer": "NA"}]
    table = Dataset.from_list(given)
    (
        table.to_csv(tmp_path / "a.csv"),
        table.to_csv(tmp_path / "a.tsv", sep="\t"),
        table.to_parquet(tmp_path / "a.parquet"),
    )
    table.to_csv(tmp_path / "semicolons.csv", sep=";")
    table.to_pandas().to_csv(tmp_path / "numbered.csv")  # with a column of row numbers
    (tmp_path / "bom.csv").write_text((tmp_path / "a.csv").read_text().replace("\n", "\r\n"), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, given)))
    (tmp_path / "a.json").write_text(json.dumps(given, indent=1))
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": given}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": given, "test": given[:1]}))
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    table.save_to_disk(tmp_path / "disk")
    (tmp_path / "folder").mkdir(), (tmp_path / "folder" / "README.md").write_text("# Rows")
    (tmp_path / "folder" / "LICENSE").write_text("MIT"), (tmp_path / "folder" / "dataset_infos.json").write_text("{}")
    for i in range(2):
        Dataset.from_list(given[i : i + 1]).to_csv(tmp_path / "folder" / f"{i}.csv")
    digests = {read(given).digest, read(table).digest, read(DatasetDict({"train": table})).digest}
    for path in sorted(tmp_path.iterdir()):
        found = read(path, split="train" if "splits" in path.name else None)
        assert list(found.dataset) == given and found.said.startswith(f"{path}: 2 rows; "), path
        digests.add(found.digest)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.jsonl").read_bytes())))
    digests.add(read("-").digest)
    assert len(digests) == 1 and read(given[::-1]).digest not in digests
    assert "cells parted by semicolons" in read(tmp_path / "semicolons.csv").said
    (tmp_path / "a.csv").write_text("question,answer\nNew,file\n")  # nothing is cached
    assert rows(tmp_path / "a.csv") == [{"question": "New", "answer": "file"}]


def test_squad(tmp_path):
    questions = [{"question": "Q", "id": "1", "answers": [{"text": "A"}, {"text": "B"}]}]
    questions += [{"question": "R", "id": "2", "answers": [], "is_impossible": True}]
    squad = {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": "C", "qas": questions}]}]}
    (tmp_path / "a.json").write_text(json.dumps(squad))
    refused("1 row without an answer in `answers` (question 2): fill them, or", tmp_path / "a.json")
    found = read(tmp_path / "a.json", drop_empty=True)
    assert list(found.dataset) == [{"question": "C\n\nQ", "answer": "A"}]
    said = ["`context` + `question` -> question, `answers` -> answer", "left out: 1 row without an answer", "several"]
    assert all(words in found.said for words in said)


def test_texts_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    (tmp_path / "b.txt").write_text("Three.")
    assert rows(tmp_path / "a.txt") == [{"text": "One.\nTwo.\n"}]
    assert [row["text"] for row in rows(tmp_path)] == ["One.\nTwo.\n", "Three."]
    (tmp_path / "c.txt").write_text('{"text": "x"}\n{"text": "y"}\n')
    refused(["it holds JSON", "rename it to c.jsonl"], tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("question,answer\nQ,A\n")
    refused(["starts like a table", "c.csv"], tmp_path / "c.txt")

    def given(text, expected):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert rows("-") == expected

    given("Once\nupon", [{"text": "Once\nupon"}])
    given("query;id;answer\nQ;1;A", [QA])
    given('{"text": "x"}\n{"text": "y"}\n', [{"text": "x"}, {"text": "y"}])
    given(json.dumps({"data": [QA]}, indent=1), [QA])
    given('["x", "y"]', [{"text": "x"}, {"text": "y"}])


BROKEN = {
    "a.csv": (b"question,answer\nQ,A,B\n", ["line 2 has 3 cells and the first line has 2 names", "quotes around"]),
    "b.csv": (b'question,answer\n"Q,A\nR,B\n', ["the row that starts in line 2", "written twice"]),
    "c.csv": (b"answer,answer\nQ,A\n", ["'answer' twice"]),
    "d.csv": (b"question,answer\n", ["has no rows"]),
    "e.csv": (b"\n", ["is empty"]),
    "f.csv": ("question,answer\nWo?,K\u00f6ln\n".encode("latin-1"), ["iconv -f WINDOWS-1252 -t UTF-8", "f.csv"]),
    "g.csv": ("question,answer\nWo?,Da\n".encode("utf-16"), ["iconv -f UTF-16 -t UTF-8"]),
    "h.csv": (b"question,answer\nQ,A\nQ,\n\n\xc3\xa4,\n", ["2 rows without an answer in `answer` (line 3, line 5)"]),
    "i.jsonl": (b'{"text": "x"}\n\n{"text": \n', ["i.jsonl, line 3 is not JSON"]),
    "j.jsonl": (b'{"text": "x"}\n7\n', ["j.jsonl, line 2 is a int"]),
    "k.json": (b'{"question": {"0": "Q"}}', ['orient="records"']),
    "l.json": (b'{"question": ["Q"], "answer": ["A"]}', ['orient="records"']),
    "m.json": (b'{"train": [{"a": 1}], "test": [{"a": 2}]}', ["['train', 'test']", "`split`"]),
    "n.parquet": (b"no", ["is no Parquet file"]),
    "o.csv.gz": (b"no", ["is not a whole gzip file"]),
    "p.xlsx": (b"no", ["is a .xlsx, which is not read", "CSV in UTF-8"]),
    "r.csv": (b"\x89PNG\r\n\x00\x00\xff", ["is no text but a binary file", "UTF-8"]),
    "q.csv": (b"prompt,completion,forget_level\nQ,A,high\n", ["`forget_level` in", "line 2 is 'high'"]),
}


def test_what_cannot_be_read_is_said_with_its_place(tmp_path):
    def check(name, content, words):
        (tmp_path / name).write_bytes(content)
        refused(words, tmp_path / name)

    every({name: (name, *case) for name, case in BROKEN.items()}, check)


def test_a_name_that_is_empty_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("question,answer\nQ,A\n")
    monkeypatch.chdir(tmp_path)
    assert rows(".") == [QA]
    refused("The name of the `forget` data is empty", "")
    refused("The name of the `forget` data is empty", " ")


def test_a_file_has_no_splits(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nQ,A\n")
    refused("is one table without splits: leave `split` (`--forget_split`) out", path, split="train")
    refused("is a file, which has no configurations: leave `config`", path, config="small")


def test_folders(tmp_path):
    refused("is empty", tmp_path)
    (tmp_path / "sub").mkdir()
    refused(["no files", "['sub']"], tmp_path)
    (tmp_path / "train.csv").write_text("text\nx\n")
    (tmp_path / "test.csv").write_text("text\ny\n")
    refused(["splits ['test', 'train']", "--retain_split"], tmp_path, role="retain")
    assert rows(tmp_path, split="test") == [{"text": "y"}]
    (tmp_path / "test.csv").rename(tmp_path / "more.csv")
    assert len(rows(tmp_path)) == 2
    (tmp_path / "more.csv").write_text("body\ny\n")
    refused(["differ", "['body']"], tmp_path)
    (tmp_path / "b.jsonl").write_text("{}")
    refused("holds 2 .csv, 1 .jsonl", tmp_path)


def test_rows_in_memory():
    table = Dataset.from_list([{"text": f"t{i}", "picture": "/nowhere/1.png"} for i in range(5)])
    pictures = table.cast(Features({"text": Value("string"), "picture": Image()}))
    found = read(pictures.with_format("torch"), limit=2)
    assert list(found.dataset) == [{"text": "t0"}, {"text": "t1"}] and "2 rows; the first of 5" in found.said
    tokens = {"input_ids": [1, 2], "labels": [1, 2]}
    assert read([tokens]).digest == read([dict(reversed(tokens.items()))]).digest
    assert rows(table.to_iterable_dataset(), limit=2) == list(found.dataset)
    refused("`limit`", table.to_iterable_dataset(), TypeError)
    refused("splits ['a', 'b']", DatasetDict({"a": table, "b": table}))
    refused("a dict with the keys ['text']", {"text": ["x"]}, TypeError)
    refused("`limit` is 0", table, limit=0)
    refused("There is no file or folder 'nix.csv'", "nix.csv")


# the Hub


def test_a_dataset_on_the_hub(monkeypatch):
    configs, splits = ["forget01", "retain99"], ["train", "test"]
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda repo, token: configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config, token: splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or Dataset.from_list([QA]))
    refused(["configurations ['forget01', 'retain99']", "--forget_config forget01"], "a/b")
    refused(["splits ['train', 'test']", "--forget_split train"], "a/b", config="forget01")
    assert rows("a/b", config="forget01", split="train", token="t") == [QA]
    splits.pop()
    assert "config 'forget01', split 'train'" in read("a/b", config="forget01").said
    assert asked[0] == (*asked[1][:1], {"split": "train", "token": "t"}) and asked[0][0] == ("a/b", "forget01")

    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "get_dataset_config_names", fails)
    refused(["no file or folder 'a/b'", "offline"], "a/b", ConnectionError)


# what is said


def test_one_line_says_it_all():
    table = [{"Instruction": "Q", "input": "C", "output": 42, "id": i, "url": "u"} for i in range(3)]
    assert read(table, role="retain").said == (
        "`retain` dataset: 3 rows; `Instruction` + `input` -> question, `output` -> answer; asked through the chat "
        "template; numbers read as text: 3 cells; repeated: 2 examples; not read: `id`, `url`"
    )
    assert "`messages` -> question and answer; asked" in read([{"messages": [USER, ANSWER]}], chat=False).said
    said = read([{"prompt": "Q", "response": "A"}], chat=False).said
    assert "no chat template; a space put before each completion" in said
    assert "no space stands between" in read([{"prompt": "Q", "completion": "A"}], chat=False).said
    written = read([{"prompt": "Q\nAssistant:", "response": "A"}]).said
    assert "`--forget_columns question=prompt,completion=response` asks them through the model's" in written


def test_chat_templates(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    assert with_chat_template(tokenizer, "auto") is tokenizer
    assert with_chat_template(tokenizer, "never").chat_template is None and tokenizer.chat_template == CHAT_TEMPLATE
    (tmp_path / "a.jinja").write_text(CHAT_TEMPLATE)
    assert with_chat_template(tiny_tokenizer(), tmp_path / "a.jinja").chat_template == CHAT_TEMPLATE
    for content, words in {"{% for %}": "the chat template fails", "hello": "writes the answer 0 times"}.items():
        (tmp_path / "b.jinja").write_text(content)
        with pytest.raises(ValueError, match=rf"b\.jinja does not write .*{words}"):
            with_chat_template(tokenizer, tmp_path / "b.jinja")
    with pytest.raises(ValueError, match=r"'nver': give 'auto' .*, 'never', or a file"):
        with_chat_template(tokenizer, "nver")
