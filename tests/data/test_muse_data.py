"""MUSE from a folder or a pretended Hub: one schema, nothing wrong accepted, small parts that hold together."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from blur_trainer.data.muse import AUC_RETRAIN, MUSE_MODELS, limit_documents, load_muse, muse_stages
from blur_trainer.data.subset import _in_turn, locate
from blur_trainer.toy.muse import muse_corpora, training_texts

SHARED = Path(__file__).parents[3] / "shared"
QA = ["question", "answer"]
REQUIRED = {
    "raw_forget": ["text"],
    "raw_retain": ["text"],
    "verbmem_forget": ["prompt", "gt"],
    "knowmem_forget_qa": QA,
    "knowmem_retain_qa": QA,
    "privleak_forget": ["text"],
    "privleak_retain": ["text"],
    "privleak_holdout": ["text"],
}
ICL = {"knowmem_forget_qa_icl": QA, "knowmem_retain_qa_icl": QA}
FOLDS = {f"{config}_forget_{k}": ["text"] for config in ("scal", "sust") for k in range(1, 5)}


def rows_of(key: str, columns: list[str], count: int = 3) -> list[dict[str, str]]:
    return [{column: f"{key} {column} {i} \u2028 ü" for column in columns} for i in range(count)]


def write(folder: Path, layout: str = "flat", suffix: str = ".jsonl", skip: tuple[str, ...] = ()) -> Path:
    """A folder as users have it: the names of the Hub's files, or flat ones."""
    for key, columns in (REQUIRED | ICL).items():
        if key in skip:
            continue
        name = key.replace("_", "/", 1) if layout == "nested" else key
        file = folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of(key, columns)
        text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        file.write_text(text, encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("as_string", [True, False])
def test_every_layout_gives_the_same_data(tmp_path, layout, suffix, as_string):
    folder = write(tmp_path, layout, suffix)
    data = load_muse("news", str(folder) if as_string else folder)
    assert isinstance(data, DatasetDict)
    assert {key: split.column_names for key, split in data.items()} == REQUIRED | ICL
    for key, columns in (REQUIRED | ICL).items():
        assert data[key].to_list() == rows_of(key, columns)


def test_the_owners_layout(tmp_path):
    """raw/forget.txt and raw/retain1.txt, one long text each, as in the owners' repository."""
    write(tmp_path, "nested", ".json", skip=("raw_forget", "raw_retain"))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "forget.txt").write_text("All articles.\n\nEnd to end.")
    (tmp_path / "raw" / "retain1.txt").write_text("Others.")
    data = load_muse("books", tmp_path)
    assert data["raw_forget"].to_list() == [{"text": "All articles.\n\nEnd to end."}]
    assert data["raw_retain"].to_list() == [{"text": "Others."}]


def test_optional_splits_and_other_columns(tmp_path):
    write(tmp_path, skip=tuple(ICL))
    (tmp_path / "scal_forget_2.jsonl").write_text('{"text": "fold", "id": 3}\n\n')
    (tmp_path / "knowmem_hold_qa.json").write_text('[{"question": "q", "answer": "a", "source": null}]')
    (tmp_path / "raw_hold.json").write_text('["a document as a plain string"]')
    (tmp_path / "notes.jsonl").write_text("not read")
    data = load_muse("news", tmp_path)
    assert set(data) == set(REQUIRED) | {"scal_forget_2", "knowmem_hold_qa", "raw_hold"}
    assert data["scal_forget_2"].to_list() == [{"text": "fold"}]
    assert data["knowmem_hold_qa"].to_list() == [{"question": "q", "answer": "a"}]
    assert data["raw_hold"].to_list() == [{"text": "a document as a plain string"}]


def test_documents_without_a_word_are_left_out(tmp_path):
    write(tmp_path)
    (tmp_path / "raw_forget.jsonl").write_text('{"text": "one"}\n{"text": " \\n"}\n{"text": "two"}')
    assert load_muse("news", tmp_path)["raw_forget"]["text"][:] == ["one", "two"]


def test_privleak_stands_in_for_raw_retain_and_says_so(tmp_path):
    write(tmp_path, skip=("raw_retain",))
    with pytest.warns(UserWarning, match=r"no raw retain documents \(raw_retain.jsonl.*the 3 texts of privleak_retain"):
        data = load_muse("news", tmp_path)
    assert data["raw_retain"].to_list() == data["privleak_retain"].to_list()


def test_no_warning_when_all_is_there(tmp_path, recwarn):
    load_muse("news", write(tmp_path))
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("key", [key for key in REQUIRED if key != "raw_retain"])
def test_missing_split_names_what_was_tried(tmp_path, key):
    write(tmp_path, skip=(key,))
    nested = key.replace("_", "/", 1)
    with pytest.raises(ValueError, match=rf"no file for \['{key}'\].*{key}\.jsonl, {key}\.json, .*{nested}\.jsonl"):
        load_muse("news", tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "knowmem_forget_qa.jsonl is empty"),
        (" \n\n", ValueError, "knowmem_forget_qa.jsonl is empty"),
        ('{"question": "q", "answer": "a"}\n{oops', ValueError, "knowmem_forget_qa.jsonl, line 2 is not JSON"),
        ('{"question": "q"}', ValueError, "row 1 has no column 'answer'; it has .*'question'"),
        (
            '{"question": "q", "answer": "a"}\n{"question": "q", "answer": 7}',
            TypeError,
            "row 2, column 'answer' is of type int",
        ),
        ('{"question": null, "answer": "a"}', TypeError, "row 1, column 'question' is of type NoneType"),
        ('["q", "a"]', TypeError, r"row 1 is a list; it must be an object with \['question', 'answer'\]"),
        ('"q"', TypeError, "row 1 is a str"),
    ],
)
def test_malformed_file(tmp_path, text, error, message):
    write(tmp_path)
    (tmp_path / "knowmem_forget_qa.jsonl").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_muse("news", tmp_path)
    assert "knowmem_forget_qa.jsonl" in str(caught.value)


def test_malformed_json_list(tmp_path):
    write(tmp_path, suffix=".json")
    (tmp_path / "raw_forget.json").write_text('{"text": ["columns, not rows"]}')
    with pytest.raises(ValueError, match=r"raw_forget\.json holds a dict; it must hold a list of objects"):
        load_muse("news", tmp_path)
    (tmp_path / "raw_forget.json").write_text("[]")
    with pytest.raises(ValueError, match=r"raw_forget\.json has no rows"):
        load_muse("news", tmp_path)


def test_not_utf8_and_bom(tmp_path):
    write(tmp_path)
    (tmp_path / "raw_forget.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"text": "é"}'.encode())
    assert load_muse("news", tmp_path)["raw_forget"]["text"][:] == ["é"]
    (tmp_path / "raw_forget.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"raw_forget\.jsonl is not UTF-8"):
        load_muse("news", tmp_path)


def test_two_files_for_one_split(tmp_path):
    write(tmp_path)
    write(tmp_path, "nested", ".json")
    with pytest.raises(
        ValueError, match=r"several files hold raw_forget: .*raw_forget\.jsonl, .*forget\.json\. Leave one"
    ):
        load_muse("news", tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        load_muse("news", tmp_path / "nowhere")


@pytest.mark.parametrize("corpus", ["News", "tofu", "", None, 3])
def test_unknown_corpus(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"must be one of \['news', 'books', 'embedded'\]"):
        load_muse(corpus, tmp_path)


# ---------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers what is asked and remembers it."""
    calls = []

    def load_dataset(repo, config, *, split, token):
        calls.append((repo, config, split, token))
        columns = (REQUIRED | ICL | FOLDS).get(f"{config}_{split}", ["text"])
        return Dataset.from_list([row | {"extra": "1"} for row in rows_of(f"{config}_{split}", columns)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


BOTH = {
    ("raw", "forget"),
    ("raw", "retain1"),
    ("verbmem", "forget"),
    ("knowmem", "forget_qa"),
    ("knowmem", "retain_qa"),
    ("knowmem", "forget_qa_icl"),
    ("knowmem", "retain_qa_icl"),
    ("privleak", "forget"),
    ("privleak", "retain"),
    ("privleak", "holdout"),
}
NEWS_ONLY = {(config, f"forget_{k}") for config in ("scal", "sust") for k in range(1, 5)}


@pytest.mark.parametrize(
    ("corpus", "repo", "asked", "keys"),
    [
        ("news", "muse-bench/MUSE-News", BOTH | NEWS_ONLY, REQUIRED | ICL | FOLDS),
        ("books", "muse-bench/MUSE-Books", BOTH, REQUIRED | ICL),
    ],
)
def test_hub_is_asked_for_what_it_has(hub, corpus, repo, asked, keys):
    data = load_muse(corpus, token="secret")
    assert {(config, split) for _, config, split, _ in hub} == asked and len(hub) == len(asked)
    assert {(name, token) for name, *_, token in hub} == {(repo, "secret")}
    assert {key: split.column_names for key, split in data.items()} == keys
    assert data["raw_retain"][0]["text"].startswith("raw_retain1 ")


def test_no_network_unless_asked_for(hub, tmp_path):
    load_muse("news", write(tmp_path))
    load_muse("embedded")
    assert hub == []


@pytest.mark.parametrize(
    "cause",
    [
        ConnectionError("Couldn't reach 'muse-bench/MUSE-News' on the Hub (OfflineModeIsEnabled)"),
        DatasetNotFoundError("Dataset 'muse-bench/MUSE-News' is a gated dataset on the Hub."),
        ValueError("BuilderConfig 'raw' not found."),
        TimeoutError("timed out"),
    ],
)
def test_hub_problems_say_what_to_do(monkeypatch, cause):
    def fail(*args, **kwargs):
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError) as caught:
        load_muse("news")
    message = str(caught.value)
    for part in ("'muse-bench/MUSE-News' (config 'raw', split 'forget')", str(cause), type(cause).__name__):
        assert part in message
    for part in ("--data_dir", "corpus='embedded'", "token", "hf auth login"):
        assert part in message
    assert caught.value.__cause__ is cause


def test_bugs_are_not_network_problems(monkeypatch):
    def fail(*args, **kwargs):
        raise AttributeError("bug")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(AttributeError, match="bug"):
        load_muse("news")


def test_hub_rows_are_checked_too(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Dataset.from_dict({"text": [1]}))
    with pytest.raises(TypeError, match=r"'muse-bench/MUSE-Books' \(config 'raw'.*row 1, column 'text' is of type int"):
        load_muse("books")


def test_embedded():
    assert load_muse("embedded")["raw_forget"].to_list() == muse_corpora()["raw_forget"].to_list()
    with pytest.raises(ValueError, match="reads no data_dir"):
        load_muse("embedded", ".")


def test_constants():
    assert set(MUSE_MODELS) == set(AUC_RETRAIN) == {"news", "books"}
    assert MUSE_MODELS["books"].target == "muse-bench/MUSE-Books_target"
    assert MUSE_MODELS["news"].retrain == "muse-bench/MUSE-News_retrain"
    assert MUSE_MODELS["news"].tokenizer == "meta-llama/Llama-2-7b-hf"
    assert AUC_RETRAIN == {"news": 0.4772, "books": 0.5393}


# ---------------------------------------------------------------------------------------------------- small parts


def windows(documents: list[str], length: int, step: int) -> list[str]:
    joined = "".join(documents)
    return [joined[i : i + length] for i in range(0, len(joined) - length, step)]


@pytest.fixture
def corpus():
    """12 documents; VerbMem windows over one or two of them, PrivLeak windows over two or three, as on the Hub."""
    documents = [f"<{i}> alpha{i} beta{i}\ngamma{i} delta{i}. " for i in range(12)]
    verbatim = windows(documents, 24, 31)
    return DatasetDict(
        raw_forget=Dataset.from_dict({"text": documents}),
        raw_retain=Dataset.from_dict({"text": [f"retain {i}" for i in range(30)]}),
        verbmem_forget=Dataset.from_dict(
            {"prompt": [w[:15] for w in verbatim], "gt": [w[15:].strip() for w in verbatim]}
        ),
        privleak_forget=Dataset.from_dict({"text": windows(documents, 50, 29)}),
        privleak_retain=Dataset.from_dict({"text": [f"retain {i}" for i in range(30)]}),
        privleak_holdout=Dataset.from_dict({"text": [f"other {i}" for i in range(20)]}),
        knowmem_forget_qa=Dataset.from_dict({"question": list("abcdef"), "answer": list("ABCDEF")}),
        scal_forget_1=Dataset.from_dict({"text": documents[:3]}),
    )


def test_locate_against_a_search_character_by_character(corpus):
    documents = corpus["raw_forget"]["text"][:]
    letters = [(c, i) for i, document in enumerate(documents) for c in document if not c.isspace()]
    texts = [*corpus["privleak_forget"]["text"], "alpha3   beta3", "nowhere", "", "delta11."]
    for text, span in zip(texts, locate(documents, texts), strict=True):
        wanted = [c for c in text if not c.isspace()]
        owners: list[int] = []
        for at in range(len(letters) - len(wanted) + 1):
            if wanted and [c for c, _ in letters[at : at + len(wanted)]] == wanted:
                owners = sorted({i for _, i in letters[at : at + len(wanted)]})
                break
        assert list(span) == owners, text


@pytest.mark.parametrize("n", [4, 6, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_part_holds_together(corpus, n, seed):
    small = limit_documents(corpus, n, seed)
    assert set(small) == set(corpus) - {"scal_forget_1"}
    documents = small["raw_forget"]["text"][:]
    assert len(documents) == n and documents == [d for d in corpus["raw_forget"]["text"] if d in documents]
    together = "".join("".join(documents).split())
    for key in ("verbmem_forget", "privleak_forget"):
        assert 1 <= len(small[key]) <= n
        for row in small[key]:
            assert "".join("".join(row.values()).split()) in together, key
    assert len(small["knowmem_forget_qa"]) == min(n, 6) and len(small["privleak_holdout"]) == n


def test_texts_that_need_few_documents_come_first_and_splits_take_turns():
    spans = {"verbmem": [range(0, 3), range(5, 6), range(0), range(7, 9)], "privleak": [range(1, 5), range(2, 4)]}
    for seed in range(5):
        order = list(_in_turn(spans, random.Random(seed)))
        assert order == [range(5, 6), range(2, 4), range(7, 9), range(1, 5), range(0, 3)]


def test_passages_come_before_random_documents(corpus):
    """A random choice of 4 of 12 documents would hold about one whole VerbMem window; chosen, it is the most of any."""
    total = sum(len(limit_documents(corpus, 4, seed)["verbmem_forget"]) for seed in range(5))
    assert total >= 5 * 2


def test_retain_texts_belong_to_the_retain_documents(corpus):
    small = limit_documents(corpus, 5)
    assert small["raw_retain"].to_list() == small["privleak_retain"].to_list()
    assert len(small["raw_retain"]) == 5


def test_part_depends_on_the_seed_alone(corpus):
    def rows(seed):
        return {key: split.to_list() for key, split in limit_documents(corpus, 5, seed).items()}

    assert rows(3) == rows(3)
    assert any(rows(3) != rows(seed) for seed in range(3))


def test_large_part_is_everything(corpus):
    small = limit_documents(corpus, 1000)
    for key in set(corpus) - {"scal_forget_1"}:
        assert small[key].to_list() == corpus[key].to_list(), key


def test_texts_cut_from_elsewhere_are_drawn(corpus):
    corpus["verbmem_forget"] = Dataset.from_dict({"prompt": list("ABCDEFGH"), "gt": ["~"] * 8})
    assert len(limit_documents(corpus, 3)["verbmem_forget"]) == 3


def test_too_few_documents_for_one_text(corpus):
    with pytest.raises(ValueError, match=r"n=1 documents hold no whole text of 'privleak_forget'; n=\d is enough"):
        limit_documents(corpus, 1)


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None])
def test_number_of_documents_is_checked(corpus, n):
    with pytest.raises(ValueError, match="whole number of documents, at least 1"):
        limit_documents(corpus, n)


def test_part_of_the_embedded_corpora():
    small = limit_documents(muse_corpora(), 4)
    assert not any(key.startswith(("scal_", "sust_")) for key in small)
    for group in ("forget", "retain", "hold"):
        passages = [f"{row['prompt']} {row['gt']}" for row in small[f"verbmem_{group}"]]
        assert passages == small[f"raw_{group}"]["text"][:] and len(passages) == 4
    assert small["privleak_forget"]["text"][:] == small["raw_forget"]["text"][:]
    assert len(training_texts(small)) == 3 * (4 + 4)


# ---------------------------------------------------------------------------------------------------- real text


@pytest.mark.skipif(not (SHARED / "data" / "muse_news").is_dir(), reason="real MUSE-News texts are not on this machine")
def test_real_news():
    with pytest.warns(UserWarning, match="the 100 texts of privleak_retain serve"):
        data = load_muse("news", SHARED / "data" / "muse_news")
    assert len(data["raw_forget"]) == 888  # 889 and an empty one
    spans = locate(data["raw_forget"]["text"], [row["prompt"] + row["gt"] for row in data["verbmem_forget"]])
    assert all(spans) and max(map(len, spans)) > 1
    small = limit_documents(data, 8)
    assert len(small["raw_forget"]) == 8 and len(small["verbmem_forget"]) >= 2 and len(small["privleak_forget"]) >= 1
    texts = training_texts(small)["text"][:]
    for row in small["verbmem_forget"]:
        assert any(" ".join(text.split()).startswith(" ".join(row["prompt"].split())) for text in texts)


@pytest.mark.skipif(not (SHARED / "golden" / "toydata").is_dir(), reason="the golden toy sets are not on this machine")
def test_owners_toy(tmp_path):
    source = SHARED / "golden" / "toydata"
    with pytest.raises(ValueError, match=r"no file for \['raw_forget'\].*raw/forget\.txt"):
        load_muse("news", source / "MUSE-News")
    shutil.copytree(source / "MUSE-News", tmp_path, dirs_exist_ok=True)
    shutil.copytree(source / "MUSE" / "raw", tmp_path / "raw")
    data = load_muse("news", tmp_path)
    assert set(data) == set(REQUIRED) | set(ICL)
    assert [len(data[key]) for key in ("raw_forget", "verbmem_forget", "knowmem_forget_qa", "privleak_holdout")] == [
        1,
        4,
        4,
        4,
    ]
    assert len(limit_documents(data, 1)["verbmem_forget"]) == 1


# ---------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("protocol", ["sust", "scal"])
def test_stages_are_the_folds_in_order(protocol):
    data = muse_corpora()
    stages = muse_stages(data, protocol)
    assert [name for name, _ in stages] == [f"{protocol} {k}" for k in range(1, 5)]
    assert [texts["text"][:] for _, texts in stages] == [data[f"{protocol}_forget_{k}"]["text"][:] for k in range(1, 5)]


def test_stages_of_either_protocol_come_to_the_whole_forget_set():
    """`sust` in parts that do not overlap, `scal` in parts that grow."""
    data = muse_corpora()
    whole = data["raw_forget"]["text"][:]
    parts = [texts["text"][:] for _, texts in muse_stages(data, "sust")]
    assert [text for part in parts for text in part] == whole and len(set(whole)) == len(whole)
    growing = [texts["text"][:] for _, texts in muse_stages(data, "scal")]
    assert growing == [whole[: len(texts)] for texts in growing] and growing[-1] == whole
    assert len({len(texts) for texts in growing}) == 4


@pytest.mark.parametrize("protocol", ["sust", "scal"])
def test_stages_from_a_folder(tmp_path, protocol):
    folder = write(tmp_path, "nested", skip=tuple(ICL))
    (folder / protocol).mkdir()
    for k in range(1, 5):
        (folder / protocol / f"forget_{k}.txt").write_text(f"fold {k}")
    assert [texts["text"][:] for _, texts in muse_stages(load_muse("news", folder), protocol)] == [
        [f"fold {k}"] for k in range(1, 5)
    ]


@pytest.mark.parametrize("wrong", ["sustainability", "scale", "", None, "SUST"])
def test_stages_of_an_unknown_protocol(wrong):
    with pytest.raises(ValueError, match=r"protocol is .*must be 'sust' or 'scal'") as raised:
        muse_stages(muse_corpora(), wrong)
    assert repr(wrong) in str(raised.value)


@pytest.mark.parametrize("missing", [[2], [1, 2, 3, 4]], ids=["one", "all"])
def test_stages_that_the_data_has_not(missing):
    """MUSE-Books has none; three of four would be another protocol."""
    names = [f"scal_forget_{k}" for k in missing]
    data = DatasetDict({key: rows for key, rows in muse_corpora().items() if key not in names})
    with pytest.raises(ValueError) as raised:
        muse_stages(data, "scal")
    assert str(names) in str(raised.value) and "News" in str(raised.value) and "\n" not in str(raised.value)
    assert len(muse_stages(data, "sust")) == 4


def test_stages_of_a_limited_corpus_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="limited in documents"):
        muse_stages(limit_documents(muse_corpora(), 3), "sust")
