"""Tables that come after a run: in metrics.json, report and card, once, and what a card says stays."""

import json

import pytest
from support import own_run

from blur_trainer.report.later_tables import add_tables
from blur_trainer.report.metrics_file import check_files
from blur_trainer.report.model_card import write_model_card

TABLE = {
    "title": "Audit",
    "said": ["No recovery; of /home/me/model."],
    "heads": ["attack", "model"],
    "rows": [["a|b", "<1>"]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])
    (tmp_path / "metrics.json").write_text(json.dumps(own_run.metrics()))
    write_model_card(tmp_path, {"method": "BLUR-RMU", "metrics": own_run.metrics()})
    return tmp_path


def test_a_table_is_added_once_and_another_of_its_title_takes_its_place(folder):
    for cell in ("<1>", "<2>"):
        add_tables(folder, [{**TABLE, "rows": [["a|b", cell]]}])
    add_tables(folder, [{**TABLE, "title": "Requests"}])
    kept = json.loads((folder / "metrics.json").read_text())["tables"]
    assert [(table["title"], table["rows"][0][1]) for table in kept] == [("Audit", "<2>"), ("Requests", "<1>")]
    card, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    assert card.count("## Audit") == card.count("## Requests") == card.count("<!-- tables -->") == 1
    assert r"| a\|b | &lt;2&gt; |" in card and "of model." in card and "/home" not in card
    assert card.index("## Results") < card.index("## Audit") < card.index("## Limitations") < card.index("## Citation")
    assert "<td>&lt;2&gt;</td>" in page and "<h2>Requests</h2>" in page
    written = write_model_card(folder, {"method": "BLUR-RMU", "metrics": own_run.metrics(tables=[TABLE])}).read_text()
    assert "## Audit" in written and "## Requests" not in written


def test_a_card_of_somebody_else_keeps_what_it_says(folder):
    (folder / "README.md").write_text("Mine\n")
    (folder / "metrics.json").unlink()
    add_tables(folder, [TABLE])
    assert (folder / "README.md").read_text() == "Mine\n"
    for _ in range(2):
        add_tables(folder, [TABLE], any_card=True)
    card = (folder / "README.md").read_text()
    assert card.startswith("Mine\n\n<!-- tables -->\n## Audit\n") and card.count("## Audit") == 1
    (folder / "README.md").unlink()
    add_tables(folder, [TABLE], any_card=True)
    assert (folder / "README.md").read_text().startswith("<!-- tables -->\n## Audit\n")


@pytest.mark.parametrize("wrong", [{"title": "a"}, {"title": "a", "heads": ["b"], "rows": [["c", "d"]]}, {"heads": []}])
def test_a_table_of_another_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="tables"):
        check_files({}, {"tables": [wrong]})
