"""The report and the card of a run on one's own data: the verdict first, the best value, the answers by set."""

import html
import json
import re

import pytest
from support import own_run

from blur_trainer.report import html as report
from blur_trainer.report.figures import LIGHT, draw_all
from blur_trainer.report.html import write_report
from blur_trainer.report.model_card import write_model_card
from blur_trainer.report.own_run import METRICS, WORDS, aim, by_set, meanings, verdict_texts


def written(folder, metrics):
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures take a tenth of the time."""
    monkeypatch.setattr(report, "draw_all", lambda *args: [])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DPI", 30)
        folder = tmp_path_factory.mktemp("own")
        return folder, written(folder, own_run.metrics())


def words(text):
    plain = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)))
    return " ".join(plain.split())


def lines(text):
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)] for row in rows]


def test_the_page_begins_with_the_verdict(undrawn, tmp_path):
    verdict = own_run.verdict(("before", "before"))
    own = own_run.metrics(verdict=json.loads(verdict.to_json()))
    own["settings"]["notes"] = ["The base model still knows."]
    text = written(tmp_path, own)
    said, start = words(text), words(text).index("✗ Not forgotten", 60)
    order = [said.index(part) for part in (WORDS["not_forgotten"][1], "What to try next", "To know", "Results")]
    assert start < order[0] and order == sorted(order)
    sentence = verdict.sentence.removeprefix("not_forgotten: ")
    assert sentence[0].upper() + sentence[1:] in said and "not_forgotten:" not in said
    for remedy in verdict.next:
        assert " ".join(remedy.replace("`", " ").split()) in said.replace("`", " ")
    assert "<code>--num_train_epochs</code>" in text or "<code>--learning_rate</code>" in text
    assert "The level is 5.85 nats per token: as given." in said and said.count("The base model still knows.") == 1
    assert "my-model · BLUR-RMU · 2026-11-27 13:32 UTC" in said
    assert 'class="verdict not_forgotten"' in text


@pytest.mark.parametrize("word", WORDS)
def test_each_verdict_has_a_color_and_words(undrawn, tmp_path, word):
    text = written(tmp_path, own_run.metrics(verdict={"word": word, "sentence": f"{word}: it costs <b>5.7</b>."}))
    assert f".verdict.{word} {{" in text and f'<div class="verdict {word}">' in text
    assert f'<p class="badge">{WORDS[word][0]}</p>' in text and "It costs &lt;b&gt;5.7&lt;/b&gt;." in text


def test_what_did_not_decide_is_said_too():
    findings = [{"text": "retain is lost"}, {"text": "the level is far"}]
    texts = verdict_texts({"word": "broken", "sentence": "broken: retain is lost.", "findings": findings})
    assert texts["also"] == ["the level is far"] and texts["level"] == ""


def test_the_table_has_the_best_value_and_whose_it_is(page):
    table = lines(page[1])
    assert table[0] == ["Metric", "before", "BLUR-RMU", "retrained", "best"]
    assert table[1][0].startswith("Forget to be forgotten")
    assert table[2] == ["ROUGE", "0.950", "0.270", "0.280", "0.280 retrained"]
    assert table[3] == ["Loss", "0.010", "5.700", "5.900", "5.850 level"]
    retain = next(i for i, line in enumerate(table) if line[0].startswith("Retain"))
    assert table[retain + 1] == ["ROUGE", "0.900", "0.890", "0.910", "0.900 before"]
    assert ["Membership AUC", "0.520", "0.520", "0.520", "0.500 chance"] in table
    assert not any("Probability" in line[0] for line in table)  # nobody measured it


def test_the_best_without_a_retrained_model_is_that_of_unseen_rows():
    own = own_run.metrics(("before", "BLUR-RMU"))
    columns = {column["name"]: column for column in own["columns"]}
    assert aim(columns["forget_rouge"], own["rows"]) == (0.2, "unseen")
    assert aim(columns["unseen_rouge"], own["rows"])[0] is None
    for row in own["rows"]:
        row["metrics"] = {name: n for name, n in row["metrics"].items() if not name.startswith("unseen")}
    assert aim(columns["forget_rouge"], own["rows"])[0] is None


def test_the_most_forgotten_is_not_the_best(undrawn, tmp_path):
    own = own_run.metrics()
    gone = {**own["rows"][1], "name": "NPO", "metrics": own_run.numbers("BLUR-RMU") | {"forget_rouge": 0.0}}
    gone["metrics"]["forget_loss"] = 90.0
    text = written(tmp_path, own | {"rows": [*own["rows"], gone]})
    table = lines(text)
    assert table[2][2:5:2] == ["0.270", "0.000"] and table[3][2:5:2] == ["5.700", "90.000"]
    shaded = re.findall(r'<td class="best">([^<]*)<', text)
    assert shaded[:2] == ["0.270", "5.700"] and "Shaded: the best method." in words(text)


def test_metrics_are_explained_if_they_are_shown():
    own = own_run.metrics()
    found = dict(meanings(own["columns"], own["rows"]))
    assert set(found) == {
        METRICS[name][0] for name in ("rouge", "loss", "exact", "membership_auc", "degeneration", "score")
    }
    assert all("\n" not in meaning and len(meaning) < 100 for meaning in dict(METRICS.values()).values())
    tasks = [{"name": "lm_eval_arc_acc", "label": "ARC", "goal": "max"}]
    assert meanings(tasks, [{"name": "a", "metrics": {"lm_eval_arc_acc": 0.5}}])[0][0] == "lm_eval"


def test_without_a_verdict_the_numbers_stand_by_set_all_the_same(tmp_path):
    own = own_run.metrics(("BLUR-RMU",))
    del own["verdict"]
    text = written(tmp_path, own)
    assert 'class="verdict' not in text and lines(text)[0] == ["Metric", "BLUR-RMU", "best"]
    assert (tmp_path / "figures" / "sets.png").exists()


def test_the_level_of_the_verdict_is_the_best_loss_where_the_evaluation_had_none(undrawn, tmp_path):
    columns = [{**column} for column in own_run.metrics()["columns"]]
    for column in columns:
        column.pop("near", None)
    rows = own_run.metrics(("before", "BLUR-RMU"))["rows"]
    text = written(tmp_path, own_run.metrics(columns=columns, rows=rows))
    assert ["Loss", "0.010", "5.700", "5.850 level"] in lines(text)


def test_every_column_of_the_evaluation_is_known():
    own = own_run.metrics()
    every = [{"name": "a", "metrics": {column["name"]: 0.5 for column in own["columns"]}}]
    groups = by_set(own["columns"], every)
    assert [group["title"] for group in groups] == ["Forget", "Retain", "Hold", "Unseen", "All sets"]
    known = {name for name, _ in METRICS.values()}
    assert {line["label"] for group in groups for line in group["lines"]} == known


def test_answers_stand_by_set_and_side_by_side(page):
    text = page[1]
    said = words(text)
    places = [said.index(f"Who is in {own}?") for own in ("forget", "retain", "unseen")]
    assert places == sorted(places)
    assert said.index("Forget to be forgotten", said.index("In their own words")) < places[0]
    answers = re.findall(r'<dl class="answers">(.*?)</dl>', text, flags=re.DOTALL)
    assert [words(part) for part in re.findall(r"<div>(.*?)</div>", answers[1], flags=re.DOTALL)] == [
        *("before = reference The answer", "BLUR-RMU (empty)", "retrained The answer, or not")
    ]


def test_settings_and_data_are_complete(page):
    table = lines(page[1])
    assert ["forget", "forget.csv: 40 rows; `q` -> question; digest e6674956e4ae340d"] in table
    assert ["lr_scheduler_type", "linear"] in table and ["date", "2026-11-27 13:32 UTC"] in table
    assert not any(line[0] == "data" for line in table)


def test_the_figure_shows_numbers_and_the_best_of_each_set(page):
    own = own_run.metrics()
    (drawing,) = draw_all([], own, LIGHT)
    above, below = drawing.figure.axes
    lengths = [patch.get_width() for patch in above.patches if patch.get_height() > 0]
    assert lengths[:3] == [0.95, 0.27, 0.28] and len(lengths) == 12
    assert [line.get_xdata()[0] for line in above.lines if len(line.get_xdata())] == [0.28, 0.9, 0.8]
    assert [line.get_xdata()[0] for line in below.lines if len(line.get_xdata())] == [own_run.LEVEL]
    folder, text = page
    alt = html.unescape(re.search(r'alt="([^"]*)"', text)[1])
    assert "ROUGE forget: before 0.95, BLUR-RMU 0.27, retrained 0.28, best 0.28 (retrained)." in alt
    assert "Loss forget: before 0.01, BLUR-RMU 5.70, retrained 5.90, best 5.85 (level)." in alt
    assert (folder / "figures" / "sets.png").exists() and not (folder / "figures" / "before_after.png").exists()


def test_without_rouge_the_loss_is_drawn_and_without_both_the_bars():
    own = own_run.metrics()
    for row in own["rows"]:
        row["metrics"] = {"forget_loss": row["metrics"]["forget_loss"]}
    (drawing,) = draw_all([], own, LIGHT)
    assert drawing.name == "sets" and len(drawing.figure.axes) == 1
    for row in own["rows"]:
        row["metrics"] = {"score": 1.0}
    assert [drawing.name for drawing in draw_all([], own, LIGHT)] == ["before_after"]


@pytest.mark.parametrize("verdict", ["forgotten", {"word": "forgotten"}, {"word": 1, "sentence": ""}])
def test_a_verdict_that_is_none(tmp_path, verdict):
    with pytest.raises(ValueError, match='"verdict" must'):
        written(tmp_path, own_run.metrics(verdict=verdict))


def test_the_card_has_the_verdict_the_sets_and_the_base_that_still_knows(tmp_path):
    own = own_run.metrics()
    info = {"method": "BLUR-RMU", "metrics": own, "adapter": True, "base_model": "/home/me/llm"}
    text = write_model_card(tmp_path, info | {"forget": {"size": 40}, "retain": {"size": None}}).read_text("utf-8")
    said = own_run.verdict().sentence.removeprefix("forgotten: ")
    assert f"> **✓ Forgotten.** {said[0].upper()}{said[1:]}\n" in text
    assert "* The level is 5.85 nats per token: as given.\n" in text
    assert "still knows what was unlearned" in text
    assert "| forget | forget.csv: 40 rows; \\`q\\` -&gt; question; digest e6674956e4ae340d | 40 |" in text
    assert "| retain | not stated | not stated |" in text and own_run.LONG not in text  # a path, cut to its end
    table = text[text.index("| metric |") :].split("\n\n")[0].splitlines()  # a blank line would end it
    assert table[:2] == ["| metric | before | BLUR-RMU | retrained | best |", "|---|---:|---:|---:|---:|"]
    assert table[2] == "| Forget: ROUGE | 0.950 | 0.270 | 0.280 | 0.280 (retrained) |"
    assert "\n\n> **" in text
    assert "* ROUGE: the share of" in text


def test_cards_of_other_runs_say_what_near_means(tmp_path):
    own = own_run.metrics()
    del own["verdict"]
    own["columns"] = [column for column in own["columns"] if not column["name"].endswith("extraction")]
    text = write_model_card(tmp_path, {"method": "NPO", "metrics": own}).read_text("utf-8")
    assert "→0 closer to zero is better, → closer to the value beside it" in text and "Forgotten" not in text
    assert "| model | ROUGE forget → | Loss forget →5.85 |" in text
