"""The model card: valid metadata, numbers as given, nothing of this machine, nobody else's card overwritten."""

import logging
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from support.cases import every

from blur_trainer.report.card_metadata import base_metadata, is_hub_id
from blur_trainer.report.model_card import MARKER, merged_card, without_paths, write_model_card

METRICS = {
    "benchmark": "MUSE (embedded corpora)",
    "columns": [
        {"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"},
        {"name": "retain_knowmem", "label": "KnowMem retain", "goal": "max"},
    ],
    "rows": [
        {"name": "target", "kind": "target", "metrics": {"forget_verbmem": 100.0, "retain_knowmem": 99.0}},
        {"name": "BLUR-NPO", "kind": "unlearned", "metrics": {"forget_verbmem": 21.349}},
        {"name": "broken", "kind": "unlearned", "metrics": {"forget_verbmem": math.nan, "retain_knowmem": 3}},
    ],
}
INFO = {
    "method": "BLUR-NPO",
    "base_model": "muse-bench/MUSE-News_target",
    "forget": {"name": "muse-bench/MUSE-News raw forget", "size": 889},
    "retain": {"name": "retain1", "size": 1777},
    "hyperparameters": {"gamma": 0.2, "learning_rate": 1e-5, "lower_level": "forget"},
    "metrics": METRICS,
    "versions": {"torch": "2.13.0"},
    "tags": ["muse", "unlearning"],
}


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_metadata(tmp_path):
    path = write_model_card(tmp_path, INFO)
    assert path == tmp_path / "README.md"
    number = {"name": "VerbMem forget", "type": "forget_verbmem", "value": 21.349}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "MUSE (embedded corpora)", "type": "muse-embedded-corpora"},
        "metrics": [number],
    }
    assert metadata_load(path) == {
        "base_model": "muse-bench/MUSE-News_target",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "blur_trainer", "blur-npo", "muse"],
        "model-index": [{"name": "BLUR-NPO", "results": [result]}],
    }


def test_metadata_that_is_given(tmp_path):
    given = {"license": "other", "license_name": "llama3", "license_link": "https://x.org/l", "language": ["en", "de"]}
    given |= {"datasets": "locuslab/TOFU", "dataset": "TOFU", "dataset_args": "forget10", "model_name": "mine"}
    path = write_model_card(tmp_path, INFO | given | {"adapter": True, "library": "peft", "tasks": "text-generation"})
    data = metadata_load(path)
    assert {key: data[key] for key in given if key in data} | {"datasets": "locuslab/TOFU"} == {
        key: given[key] for key in ("license", "license_name", "license_link", "language", "datasets")
    }
    assert data["datasets"] == ["locuslab/TOFU"]
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    (index,) = data["model-index"]
    assert index["name"] == "mine" and "# mine\n" in path.read_text("utf-8")
    assert index["results"][0]["dataset"] == {"name": "TOFU", "type": "locuslab/TOFU", "args": {"args": "forget10"}}
    assert ModelCardData(**data).to_dict() == data


def test_numbers_are_of_this_models_row_and_finite(tmp_path):
    def numbers(info):
        return [r.metric_value for r in ModelCard.load(write_model_card(tmp_path, INFO | info)).data.eval_results or []]

    assert numbers({"row": "broken"}) == [3]
    assert numbers({"row": "target"}) == numbers({"method": "NPO"}) == numbers({"metrics": None}) == []


def test_the_base_models_license_and_language(tmp_path):
    own, terse, strange, bare = (tmp_path / name for name in ("own", "terse", "strange", "bare"))
    for folder in (own, terse, strange, bare):
        folder.mkdir()
    (own / "README.md").write_text("---\nlicense: other\nlicense_name: l\nlanguage:\n- en\n- de\ntags: [x]\n---\n# x")
    (terse / "config.json").write_text('{"license": "mit"}')
    (strange / "README.md").write_text("---\nlicense: [1, 2]\nlicense_link: x\nlanguage: {a: b}\n---\n")
    (bare / "README.md").write_text("---\nlicense: [\n---\n")
    cases = [
        (own, {"license": "other", "license_name": "l", "language": ["en", "de"]}),
        (terse, {"license": "mit"}),
        (strange, {}),
        (bare, {}),
        (tmp_path / "absent" / "deeper" / "folder", {}),
        ("nobody/at-all", {}),  # offline: not in the cache
        (None, {}),
    ]

    def check(base, expected):
        assert base_metadata(base, online=base == "nobody/at-all") == expected

    every(cases, check)


def test_metadata_that_no_card_may_have_is_refused(tmp_path):
    cases = [
        ({"license": "mit\nbase_model: evil"}, "`license` of a model card must be text of one line"),
        ({"license": {"a": 1}}, "`license`"),
        ({"language": ["en", 3]}, "`language`"),
        ({"tags": ["a\n- b"]}, "`tags`"),
        ({"tasks": "a\nb"}, "`tasks`"),
        ({"datasets": "../x"}, "takes hub ids, got '../x'"),
        ({"datasets": "a: b"}, "takes hub ids"),
    ]

    def check(given, match):
        with pytest.raises(ValueError, match=match):
            write_model_card(tmp_path, INFO | given)

    every(cases, check)
    assert list(tmp_path.iterdir()) == []


def test_yaml_is_escaped(tmp_path):
    odd = 'BLUR: "x" #1 \n- evil: yes'
    rows = [{"name": odd, "kind": "unlearned", "metrics": {"forget_verbmem": 1.0}}]
    info = {"method": odd, "metrics": METRICS | {"rows": rows, "benchmark": odd}, "tags": ["yes", "a: b", "#c", "1e3"]}
    data = metadata_load(write_model_card(tmp_path, INFO | info))
    assert data["tags"][2:] == ["blur-x-1-evil-yes", "yes", "a: b", "#c", "1e3"]
    (index,) = data["model-index"]
    assert index["name"] == index["results"][0]["dataset"]["name"] == 'BLUR: "x" #1 - evil: yes'


def test_an_adapters_card_says_that_the_base_still_knows_until_it_is_merged(tmp_path):
    text = write_model_card(tmp_path, INFO | {"adapter": True, "library": "peft"}).read_text(encoding="utf-8")
    assert "The base model is as it was and **still knows what was unlearned**" in text
    merged = ModelCard(merged_card(text))
    assert "still knows" not in str(merged) and "<!--" not in str(merged).replace(MARKER, "")
    assert merged.data.library_name == "transformers" and "base_model_relation" not in merged.data.to_dict()
    assert merged.data.base_model == INFO["base_model"] and "| gamma | `0.2` |" in merged.content
    plain = write_model_card(tmp_path, INFO).read_text(encoding="utf-8")
    assert "still knows" not in plain and merged_card("# mine") == "# mine"


def test_an_unfinished_training_is_told(tmp_path):
    text = write_model_card(tmp_path, INFO | {"ending": "Interrupted at step 3 of 8"}).read_text(encoding="utf-8")
    assert "**Interrupted at step 3 of 8**: the training did not run to its end" in text


def test_a_kill_leaves_the_old_card_or_the_new_one(tmp_path, monkeypatch):
    write_model_card(tmp_path, INFO)
    before = (tmp_path / "README.md").read_bytes()

    def fail(path, text, **kwargs):
        path.write_bytes(text.encode()[:50])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", fail)
        write_model_card(tmp_path, INFO | {"method": "other"})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == before


def test_content(tmp_path):
    text = write_model_card(tmp_path, INFO).read_text(encoding="utf-8")
    assert text.startswith("---\n") and MARKER in text
    rows = table_rows(text)
    for row in (
        ["forget", "muse-bench/MUSE-News raw forget", "889"],
        ["retain", "retain1", "1777"],
        ["gamma", "`0.2`"],
        [r"learning\_rate", "`1e-05`"],
        [r"lower\_level", "`forget`"],
        ["model", "VerbMem forget ↓", "KnowMem retain ↑"],
        ["target", "100.0", "99.0"],
        ["BLUR-NPO", "21.3", "—"],
        ["broken", "nan", "3.0"],
        ["torch", "2.13.0"],
    ):
        assert row in rows
    assert "arxiv.org/abs/2506.08164" in text and "title = {{BLUR}" in text
    for word in ("MUSE (embedded corpora)", "fine-tuning", "quantization", "metrics above only"):
        assert word in text


def test_attacks_are_shown_of_the_model_that_was_attacked(tmp_path):
    column = METRICS["columns"][0]["name"]
    rows = [{"name": "T", "kind": "target", "metrics": {column: 9.0}}]
    rows += [{"name": "BLUR-NPO", "kind": "unlearned", "metrics": {column: 1.0}}]
    found = {"attacks": [{"name": "4 bit", "metrics": {column: 7.0}}], "relearning": []}
    metrics = METRICS | {"rows": rows, "robustness": found}
    text = write_model_card(tmp_path / ".", INFO | {"method": "BLUR-NPO", "metrics": metrics}).read_text(
        encoding="utf-8"
    )
    assert "| 4 bit | 7.0 |" in text and text.index("| BLUR-NPO |") < text.index("| 4 bit |")
    text = write_model_card(tmp_path / ".", INFO | {"method": "NPO", "metrics": metrics}).read_text(encoding="utf-8")
    assert "4 bit" not in text


def test_tables_are_not_broken_by_blank_lines(tmp_path):
    lines = write_model_card(tmp_path, INFO).read_text(encoding="utf-8").splitlines()
    results = [i for i, line in enumerate(lines) if line.startswith(("| model |", "| target |", "| broken |"))]
    assert [i - results[0] for i in results] == [0, 2, 4]
    assert lines[results[0] + 1] == "|---|---:|---:|"


def test_the_least_that_can_be_said(tmp_path):
    text = write_model_card(tmp_path, {"method": "NPO + KL, weighted sum"}).read_text(encoding="utf-8")
    assert "do not assume that anything was forgotten" in text
    assert "not stated" in text and "## Versions" not in text
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data and "npo-kl-weighted-sum" in data["tags"]


def test_a_size_of_zero_is_shown(tmp_path):
    text = write_model_card(tmp_path, {"method": "NPO", "retain": {"size": 0}}).read_text(encoding="utf-8")
    assert ["retain", "not stated", "0"] in table_rows(text)


def test_a_local_base_model_is_not_metadata(tmp_path):
    (tmp_path / "secret_home" / "target").mkdir(parents=True)
    text = write_model_card(tmp_path, INFO | {"base_model": str(tmp_path / "secret_home" / "target")}).read_text(
        "utf-8"
    )
    assert "base_model" not in text.split("---")[1]
    assert "target (a model that is not on the Hub)" in text
    assert "secret_home" not in text


def test_an_existing_relative_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("out/model") and is_hub_id("gpt2") and is_hub_id("muse-bench/MUSE-News_target")
    Path("out/model").mkdir(parents=True)
    assert not is_hub_id("out/model")
    for name in ("./model", "../model", "/a/b", "a/b/c", "C:\\a", "a b"):
        assert not is_hub_id(name)


@pytest.mark.parametrize(
    "item, expected",
    [
        ("/home/me/data/news.json", "news.json"),
        ("/home/My Name/news.json", "news.json"),
        (r"C:\Users\me\news.json", "news.json"),
        ("~/data/news.json", "news.json"),
        ("file:///home/me/news.json", "news.json"),
        ("--data=/home/me/a.json,/home/me/b.json", "--data=a.json,b.json"),
        ("load('/home/me/a.json')", "load('a.json')"),
        ("https://arxiv.org/abs/2506.08164", "https://arxiv.org/abs/2506.08164"),
        ("muse-bench/MUSE-News", "muse-bench/MUSE-News"),
        ("1/2 and / or", "1/2 and / or"),
        (Path("/home/me/model"), "model"),
        ({"/home/k": ["/home/a", {"b": ("/home/c", 1, None)}]}, {"k": ["a", {"b": ["c", 1, None]}]}),
        (0.5, 0.5),
    ],
)
def test_without_paths(item, expected):
    assert without_paths(item) == expected


def test_no_path_of_this_machine_in_the_card(tmp_path):
    here = str(tmp_path / "private" / "x")
    rows = [{"name": here, "metrics": {}}]
    info = INFO | {
        "title": f"from {here}",
        "forget": {"name": here},
        "hyperparameters": {"output_dir": here, "nested": {"cache": [here]}},
        "metrics": METRICS | {"rows": rows, "benchmark": f"in {here}"},
        "versions": {"torch": f"2.13 ({here})"},
    }
    text = write_model_card(tmp_path, info).read_text(encoding="utf-8")
    assert "private" not in text and str(tmp_path) not in text


def test_markup_is_escaped(tmp_path):
    rows = [{"name": "<script>a|b</script>\n# head", "metrics": {}}]
    info = INFO | {"metrics": METRICS | {"rows": rows}, "hyperparameters": {"a|b": "x`y|z"}}
    text = write_model_card(tmp_path, info).read_text(encoding="utf-8")
    assert "<script>" not in text and "\n# head" not in text
    assert r"&lt;script&gt;a\|b&lt;/script&gt; \# head" in text
    assert r"| a\|b | `x'y\|z` |" in text


def test_names_sizes_and_about_are_escaped(tmp_path):
    odd = "a|b\n\n# <b>*x*</b> ~~y~~ $z$"
    shown = r"a\|b \# &lt;b&gt;\*x\*&lt;/b&gt; \~\~y\~\~ \$z\$"
    info = {"method": "NPO", "forget": {"name": odd, "size": odd}, "about": odd, "base_model": "a/b c"}
    text = write_model_card(tmp_path, info).read_text(encoding="utf-8")
    assert f"| forget | {shown} | {shown} |" in text and f"\n{shown}\n" in text
    assert "<b>" not in text and "\n# <" not in text
    cases = [
        ("Import `a_b` and call `x|y`.", r"Import `a_b` and call `x\|y`."),
        ("an odd ` one", r"an odd \` one"),
        ("- item", r"\- item"),
        ("---", r"\---"),
        ("1. item", r"1\. item"),
        ("12 items", "12 items"),
    ]

    def check(about, expected):
        text = write_model_card(tmp_path, {"method": "NPO", "about": about}).read_text(encoding="utf-8")
        assert f"\n\n{expected}\n" in text

    every(cases, check)


def test_our_own_card_is_renewed(tmp_path):
    write_model_card(tmp_path, INFO)
    text = write_model_card(tmp_path, INFO | {"method": "GradDiff"}).read_text(encoding="utf-8")
    assert "GradDiff" in text and "**BLUR-NPO**" not in text


@pytest.mark.parametrize("content", [b"# mine\n", b"", b"\xff\xfe not utf-8"])
def test_another_card_is_left_alone(tmp_path, caplog, content):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="blur_trainer.report.model_card"):
        assert write_model_card(tmp_path, INFO) == path
    assert path.read_bytes() == content
    assert "stays as it is" in caplog.text


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown keys \['metric'\]. Accepted are"):
        write_model_card(tmp_path, {"method": "NPO", "metric": {}})
    with pytest.raises(ValueError, match='must name its "method"'):
        write_model_card(tmp_path, {"base_model": "gpt2"})
    assert not (tmp_path / "README.md").exists()
