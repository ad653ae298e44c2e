"""The report: self-contained, escaped, the numbers of the JSON, and whatever a run may leave behind."""

import base64
import io
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import matplotlib.colors
import numpy as np
import pytest

from blur_trainer.report import figures
from blur_trainer.report import html as report
from blur_trainer.report import summary as reading
from blur_trainer.report.figures import DARK, LIGHT, draw_all, row_colors
from blur_trainer.report.figures.plane import trajectory
from blur_trainer.report.figures.style import plain
from blur_trainer.report.figures.training import series
from blur_trainer.report.html import write_report

COLUMNS = [
    {"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"},
    {"name": "retain_verbmem", "label": "VerbMem retain", "goal": "max"},
    {"name": "retain_knowmem", "label": "KnowMem retain", "goal": "max"},
    {"name": "privleak", "label": "PrivLeak", "goal": "zero"},
    {"name": "privleak_auc", "label": "AUC"},
]
NAMES = [column["name"] for column in COLUMNS]


def row(name, kind, *numbers, **more):
    return {"name": name, "kind": kind, "metrics": dict(zip(NAMES, numbers, strict=False))} | more


METRICS = {
    "benchmark": "MUSE (embedded corpora)",
    "columns": COLUMNS,
    "plane": {"x": "forget_verbmem", "y": "retain_knowmem"},
    "rows": [
        row("target", "target", 100.0, 100.0, 99.0, -99.8, 0.0012, seconds=35.06),
        row("BLUR-NPO", "unlearned", 21.349, 92.0, 97.218, 12.0, 0.512, seconds=12.3),
        row("GradDiff", "baseline", 0.4, 31.0, 24.1, 98.0),
        row("retrained", "retrain", 22.0, 100.0, 100.0, 0.0, 0.477),
    ],
    "stages": [{"name": f"fold {i}", "metrics": {"forget_verbmem": 20.0 + i, "extra": 0.1 * i}} for i in (1, 2, 3)],
    "robustness": {
        "relearning": [
            {"name": name, "kind": kind, "points": [{"steps": s, "metrics": {NAMES[0]: 20.0 + s}} for s in (0, 5)]}
            for name, kind in (("forget set", None), ("forget set again", "retrain"))
        ],
        "attacks": [{"name": "4 bit", "metrics": {NAMES[0]: 33.3}}],
    },
    "settings": {"gamma": 0.2, "kwargs": {"beta": 0.1}, "lora": None, "environment": {"torch": "2.13.0"}},
    "samples": [{"prompt": "Where?\nAnswer:", "reference": "Vell", "responses": {"target": "Vell", "BLUR-NPO": "a a"}}],
}


SMALL = {"log_history": [{"step": 1, "loss": 1.0}]}


def log_entry(step, **more):
    names = ("loss/forget", "loss/retain", "grad/forget_norm", "grad/retain_norm", "grad/weight_forget")
    values = {name: 1.0 / (step + i) for i, name in enumerate(names)}
    return {"step": step, "epoch": step / 4, "loss": 1.0, "grad/cosine": (-1) ** step * 0.3, **values, **more}


STATE = {
    "global_step": 8,
    "epoch": 2.0,
    "log_history": [
        *(log_entry(step) for step in range(1, 9)),
        {"step": 4, "eval_muse_forget_verbmem": 60.0, "eval_muse_retain_knowmem": 98.5},
    ],
}


class Page(HTMLParser):
    """Tags with attributes, text outside of style, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.table = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
            if "td" in self.open or "th" in self.open:
                self.table[-1][-1] += data

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write(folder, state=STATE, metrics=METRICS):
    for name, data in (("trainer_state.json", state), ("metrics.json", metrics)):
        if data is not None:
            (folder / name).write_text(json.dumps(data), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def png_size(data):
    """Width and height; raises where a chunk or the image data is damaged."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds, pixels = 8, [], b""
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        position += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and zlib.decompress(pixels)
    return struct.unpack(">II", data[16:24])


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """Twice as fast; `full` has the real size."""
    monkeypatch.setattr(report, "DPI", 48)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return folder, write(folder)


def test_nothing_is_loaded_from_outside(full):
    folder, page = full
    for tag, attrs in page.tags:
        for key in ("src", "srcset", "data", "poster", "action", "background"):
            assert str(attrs.get(key) or "data:").startswith("data:"), (tag, key)
        if attrs.get("href"):
            assert tag == "a" and attrs["href"] == "https://arxiv.org/abs/2506.08164"
        assert not any(key.startswith("on") for key in attrs)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    policy = next(attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy


def test_images_are_whole_and_the_files_are_the_light_ones(full):
    folder, page = full
    assert sorted(path.name for path in folder.iterdir()) == [
        *("figures", "metrics.json", "report.html", "trainer_state.json")
    ]
    # of a sweep; of one's own data; of leak@k; of tests/evaluation/test_inside_pretender.py
    others = {"front", "sets", "leakage", "inside"}
    assert {path.stem for path in (folder / "figures").iterdir()} == set(figures.NAMES) - others
    light = [base64.b64decode(attrs["src"].partition("base64,")[2], validate=True) for attrs in page.of("img")]
    dark = [base64.b64decode(attrs["srcset"].partition("base64,")[2], validate=True) for attrs in page.of("source")]
    assert {bytes(data) for data in light} == {path.read_bytes() for path in (folder / "figures").iterdir()}
    assert len(light) == len(dark) == 6 and not set(light) & set(dark)
    for image, night, attrs in zip(light, dark, page.of("img"), strict=True):
        # twice the CSS size
        assert png_size(image) == png_size(night) == (2 * int(attrs["width"]), 2 * int(attrs["height"]))
        assert attrs["alt"]


def test_the_table_shows_the_numbers_of_the_json(full):
    _, page = full
    table = {cells[0].split("\n")[0]: cells for cells in page.table}
    assert page.table[0] == [
        *("Model", "VerbMem forget ↓", "VerbMem retain ↑", "KnowMem retain ↑", "PrivLeak →0", "AUC", "Seconds")
    ]
    assert table["targettarget"][1:] == ["100.0", "100.0", "99.0", "-99.8", "0.001", "35.1"]
    assert table["BLUR-NPOunlearned"][1:] == ["21.3", "92.0", "97.2", "12.0", "0.512", "12.3"]
    assert table["GradDiffbaseline"][1:] == ["0.4", "31.0", "24.1", "98.0", "—", "—"]
    for pair in (["gamma", "0.2"], ["kwargs", '{"beta": 0.1}'], ["lora", "null"], ["torch", "2.13.0"]):
        assert pair in page.table
    assert not any(cells[0] == "environment" for cells in page.table)


def test_the_best_methods_are_highlighted(full):
    folder, _ = full
    best = re.findall(r'class="best">([^<]*)<', (folder / "report.html").read_text(encoding="utf-8"))
    # neither target nor retrained, and no column without a goal; of what is forgotten the nearest to the retrained 22.0
    assert best == ["21.3", "92.0", "97.2", "12.0"]


@pytest.mark.parametrize(
    "goal, numbers, expected",
    [
        ("min", [1.0, 2.0, 3.0, 0.0], [False, True, False, False]),
        ("max", [9.0, 2.0, 3.0, 9.0], [False, False, True, False]),
        ("zero", [0.0, -2.0, 3.0, 0.0], [False, True, False, False]),
        ("max", [9.0, 2.01, 2.04, 9.0], [False, True, True, False]),
        ("max", [9.0, math.nan, 3.0, 9.0], [False] * 4),
        ("max", [9.0, None, 3.0, 9.0], [False] * 4),
        (None, [1.0, 2.0, 3.0, 0.0], [False] * 4),
        ("near", [9.0, 2.0, 7.0, 5.5], [False, False, True, False]),
        ("near", [9.0, 2.0, 7.0, None], [False] * 4),
        ("near 3", [9.0, 2.0, 7.0, 7.0], [False, True, False, False]),
        ("forget", [9.0, 0.0, 5.0, 4.0], [False, False, True, False]),
        ("forget", [9.0, 0.0, 5.0, None], [False, True, False, False]),
    ],
)
def test_best(goal, numbers, expected):
    goal, _, near = (goal or "").partition(" ")
    goal, role = ("min", {"role": "forget"}) if goal == "forget" else (goal, {})
    column = {"name": "m", **({"goal": goal} if goal else {}), **({"near": float(near)} if near else {}), **role}
    kinds = ("target", "unlearned", "baseline", "retrain")
    rows = [{"name": kind, "kind": kind, "metrics": {"m": n}} for kind, n in zip(kinds, numbers, strict=True)]
    assert report._best(column, rows) == expected


def test_the_reading_is_made_of_the_numbers(full):
    _, page = full
    assert "VerbMem forget went from 100.0 to 21.3; the retrained model has 22.0." in page.words
    assert "VerbMem retain kept 92.0 % and KnowMem retain 98.2 % of the target's." in page.words
    assert "PrivLeak went from -99.8 to 12.0; the aim is 0." in page.words
    assert "Training took 8 steps (2.0 epochs)." in page.words
    assert "(cosine below 0) at 50 % of the logged steps" in page.words
    assert not any(attrs.get("class") == "warn" for attrs in page.of("div"))


def test_reading_of_several_unlearned_rows_without_references():
    rows = [row("a", "unlearned", 1.0, 50.0), row("b", "unlearned", 2.0), row("c", "baseline", 3.0)]
    assert reading.read_results(COLUMNS, rows) == [
        "a: VerbMem forget is 1.0. VerbMem retain is 50.0.",
        "b: VerbMem forget is 2.0.",
    ]


@pytest.mark.parametrize("before", [0.0, -1.0, math.nan, math.inf, None])
def test_no_share_of_nothing(before):
    rows = [row("t", "target", None, before), row("u", "unlearned", None, 5.0)]
    (text,) = reading.read_results(COLUMNS, rows)
    assert "%" not in text and text.endswith("5.0.")


def test_only_the_first_readings_are_spelled_out():
    rows = [row(f"run {i} " + "x" * 100, "unlearned", float(i)) for i in range(5)]
    texts = reading.read_results(COLUMNS, rows)
    assert len(texts) == 4 and texts[2].startswith("run 2") and "x" * 100 not in texts[2]
    assert texts[3] == "2 more unlearned models are in the table."


def test_samples_keep_their_lines(full):
    folder, page = full
    assert "<dd>Where?\nAnswer:</dd>" in (folder / "report.html").read_text(encoding="utf-8")
    assert "In their own words" in page.words and "a a" in page.words


def test_what_was_not_finite_is_said(tmp_path):
    state = {"log_history": [log_entry(1, **{"loss/forget": math.nan}), log_entry(2, **{"grad/skipped": 2.0})]}
    metrics = METRICS | {"rows": [row("u", "unlearned", math.nan, math.inf)]}
    page = write(tmp_path, state, metrics)
    assert "loss/forget was not finite in 1 of 2 log entries." in page.words
    assert "Steps skipped because a gradient was not finite: 2." in page.words
    assert "VerbMem forget of u is not finite." in page.words
    assert page.table[1][1:3] == ["nan", "inf"]


EVIL = ["<script>alert(1)</script>\"><img src='http://x.example/a'>{{ 7 * 7 }}", "$\\frac$_"]


@pytest.mark.parametrize("evil", EVIL)
def test_names_are_text(tmp_path, evil):
    metrics = {
        "benchmark": evil,
        "columns": [{"name": "m", "label": evil, "goal": "min"}],
        "rows": [{"name": evil, "kind": "unlearned", "metrics": {"m": 1}}, {"name": f"_{evil}", "kind": evil}],
        "plane": {"x": "m", "y": "m"},
        "stages": [{"name": evil, "metrics": {"m": 1, evil: 2}}],
        "settings": {evil: evil, "versions": {evil: evil}},
        "samples": [{"prompt": evil, "reference": evil, "responses": {evil: evil}}],
    }
    page = write(tmp_path, metrics=metrics)
    assert page.words.count(evil) >= 12 and "49" not in page.words
    assert not page.of("script") and all(attrs["src"].startswith("data:") for attrs in page.of("img"))


@pytest.mark.parametrize("state, metrics", [(STATE, None), (None, METRICS)])
def test_one_file_is_enough(tmp_path, state, metrics):
    page = write(tmp_path, state, metrics)
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    if metrics is None:
        assert drawn == {"losses", "gradients"} and "There is no metrics.json" in page.words
    else:
        assert (
            drawn == {"before_after", "plane", "stages", "relearning"}
            and "There is no trainer_state.json" in page.words
        )


def test_means_over_runs_have_no_course_of_training(tmp_path):
    rows = [row("a", "unlearned", 1.0, 1.0, 5.0, spread={"forget_verbmem": 0.1}, runs=3)]
    assert "There is no trainer_state.json" not in write(tmp_path, None, METRICS | {"rows": rows}).words


def test_eight_methods_have_eight_colours():
    rows = [{"name": str(i), "kind": "baseline"} for i in range(8)]
    for theme in (LIGHT, DARK):
        assert len({*row_colors(rows, theme), theme.target, theme.retrain, theme.forget, theme.retain}) == 12


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither trainer_state.json .* nor metrics.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metrics.json", '{"rows": [', "metrics.json cannot be read as JSON"),
        ("metrics.json", "[]", "must hold a JSON object, but it holds a list"),
        ("metrics.json", '{"rows": {}}', None),
        ("metrics.json", '{"rows": {"a": 1}}', '"rows" must be a list of JSON objects, each with a "name"'),
        ("metrics.json", '{"columns": [{"label": "x"}]}', '"columns" must be a list'),
        ("metrics.json", '{"columns": [{"name": "x", "goal": "up"}]}', "must be one of"),
        ("trainer_state.json", '{"log_history": [1]}', '"log_history" must be a list'),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    if message is None:
        assert write_report(tmp_path).exists()
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


LONG = "a very long name of a run, with all of its options spelled out " * 5
DEGENERATE = {
    "nothing": ({}, {}),
    "empty": ({"log_history": []}, {"columns": [], "rows": [], "stages": [], "samples": [], "settings": {}}),
    "rows without columns": ({}, {"rows": METRICS["rows"]}),
    "columns without rows": ({}, {"columns": COLUMNS, "plane": METRICS["plane"]}),
    "one point": (
        {"log_history": [log_entry(1)]},
        METRICS | {"rows": METRICS["rows"][:1], "stages": METRICS["stages"][:1]},
    ),
    "nothing finite": (
        {"log_history": [{k: math.nan if k != "step" else 1 for k in log_entry(1)}]},
        METRICS | {"rows": [row("u", "unlearned", *[math.nan] * 5), row("v", "unlearned", *[-math.inf] * 5)]},
    ),
    "gaps": (
        {"log_history": [log_entry(s, **{"loss/forget": math.inf, "grad/forget_norm": 0.0}) for s in range(1, 60)]},
        METRICS | {"rows": [row("a", "unlearned"), row("b", "target", None, 1.0), {"name": "c", "metrics": None}]},
    ),
    "other logs": ({"log_history": [{"step": 1, "loss": "1.0"}, {"loss": 2.0}, {"step": 3, "loss": None}]}, {}),
    "long names": (STATE, METRICS | {"rows": [row(f"{LONG} {i}", "unlearned", i, 90, i) for i in range(12)]}),
    "same place": (STATE, METRICS | {"rows": [row(kind * 2, kind, 1, 1, 1) for kind in ("target", "unlearned")] * 4}),
    "huge": ({}, METRICS | {"rows": [row("a", "target", 1e300, 1e-300, 5.0), row("b", "unlearned", -1e300, 1, 5.0)]}),
    "infinite spread": (
        {},
        METRICS | {"rows": [row("a", "unlearned", 1.0, 1.0, 5.0, spread={"forget_verbmem": math.inf}, runs=2)] * 2},
    ),
    "many columns": (
        {},
        METRICS | {"columns": [{**COLUMNS[i % 3], "name": f"m{i}"} for i in range(23)]},
    ),
    "other letters": ({}, METRICS | {"rows": [row("a\tb\nc\x00", "unlearned", 1.0, 1.0, 1.0)]}),
}


#: drawn as others are, and slow
FULL = {"long names", "same place", "one point"}
EVERY = [pytest.param(case, marks=pytest.mark.full) if case in FULL else case for case in DEGENERATE]


@pytest.mark.parametrize("case", EVERY)
def test_degenerate(tmp_path, case):
    state, metrics = DEGENERATE[case]
    page = write(tmp_path, state, metrics)
    for path in (tmp_path / "figures").iterdir():
        width, height = png_size(path.read_bytes())
        assert 300 < width < 500 and 100 < height < 500
    for item in metrics.get("rows", []):
        # a NUL byte is no character of HTML
        assert ("unlearned" if "\x00" in item["name"] else " ".join(item["name"].split())) in page.words


def test_the_previous_report_survives_a_failure(tmp_path, monkeypatch):
    write(tmp_path, SMALL, None)
    before = (tmp_path / "report.html").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_figures_of_an_earlier_run_are_removed_and_other_files_kept(tmp_path):
    write(tmp_path, None, METRICS)
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    (tmp_path / "metrics.json").unlink()
    write(tmp_path, SMALL, None)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"losses", "mine"}


def test_the_same_data_give_the_same_bytes(tmp_path):
    write(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_colors_follow_the_row_not_the_figure():
    rows = METRICS["rows"]
    assert row_colors(rows, LIGHT) == [LIGHT.target, LIGHT.methods[0], LIGHT.methods[1], LIGHT.retrain]
    assert len(set(row_colors([{"kind": "unlearned"}] * 5, DARK))) == 5
    for theme in (LIGHT, DARK):
        drawings = {drawing.name: drawing.figure for drawing in draw_all([], METRICS, theme)}
        markers = [line.get_color() for line in drawings["plane"].axes[0].lines]
        assert markers == row_colors(rows, theme)
        legend = drawings["before_after"].legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [item["name"] for item in rows]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_and_marks_stand_out_from_the_paper(theme):
    """WCAG: contrast of text at least 4.5, of marks at least 2 (they are also labelled and differ in shape)."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(color):
        high, low = sorted((luminance(color), luminance(theme.paper)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(color) for color in (theme.ink, theme.muted)) >= 4.5
    marks = (theme.forget, theme.retain, theme.target, theme.retrain, *theme.methods)
    assert min(contrast(color) for color in marks) >= 2


def test_labels_of_the_plane_do_not_cover_each_other():
    rows = [row(f"method {i}", "baseline", 50.0 + i, 0, 50.0) for i in range(4)]
    (drawing,) = [d for d in draw_all([], METRICS | {"rows": rows}, LIGHT) if d.name == "plane"]
    boxes = [text.get_window_extent() for text in drawing.figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 4
    assert all(boxes[i].count_overlaps(boxes[:i]) == 0 for i in range(4))


def test_bars_have_the_heights_of_the_json():
    (drawing,) = [d for d in draw_all([], METRICS, LIGHT) if d.name == "before_after"]
    drawn = [[patch.get_height() for patch in ax.patches if patch.get_width() > 0] for ax in drawing.figure.axes]
    columns = {name: [item["metrics"].get(name, 0.0) for item in METRICS["rows"]] for name in NAMES}
    assert drawn == [
        columns["forget_verbmem"] + columns["retain_verbmem"] + columns["retain_knowmem"],
        columns["privleak"],
        columns["privleak_auc"],
    ]


def test_the_trajectory_takes_the_metric_that_was_meant():
    history = [
        {"eval_muse_forget_knowmem": 3.0, "eval_muse_knowmem": 1.0, "eval_muse_retain_knowmem": 5.0},
        {"eval_forget_knowmem": 4.0, "eval_retain_knowmem": 6.0},
        {"eval_muse_forget_knowmem": math.nan, "eval_muse_retain_knowmem": 5.0},
        {"eval_muse_forget_knowmem": 3.0, "eval_loss": 1.0},
        {"muse_forget_knowmem": 3.0, "muse_retain_knowmem": 5.0},
    ]
    names = ["forget_knowmem", "retain_knowmem", "knowmem"]
    assert trajectory(history, names, "forget_knowmem", "retain_knowmem").tolist() == [[3.0, 5.0], [4.0, 6.0]]
    assert trajectory(history, names, "knowmem", "retain_knowmem").tolist() == [[1.0, 5.0]]
    assert trajectory([], names, "a", "b").shape == (0, 2)


def test_series():
    history = [{"step": 1, "a": 2}, {"step": 2, "a": math.inf}, {"a": 3}, {"step": 4, "a": "5"}, {"step": 5}]
    steps, logged = series(history, "a")
    assert steps.tolist() == [1, 2] and logged[0] == 2 and np.isnan(logged[1])


def test_plain():
    assert plain("$x$") == r"\$x\$"
    assert plain("_hidden").startswith(" _")
    assert plain("a\tb\x00c\n") == "a b c"
    assert len(plain(LONG, 20)) == 20


def test_no_global_state_of_matplotlib_changes(tmp_path):
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    write(tmp_path, SMALL, None)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    image = pyplot.imread(io.BytesIO((tmp_path / "figures" / "losses.png").read_bytes()))
    assert image.std() > 0.01  # something is drawn


# ---- benchmarks whose forget metrics should rise ----

TOFU_COLUMNS = [
    {"name": "forget_probability", "label": "Prob. forget", "goal": "min"},
    {"name": "model_utility", "label": "Model utility", "goal": "max"},
    {"name": "forget_quality", "label": "Forget quality", "goal": "max"},
]
TOFU_NAMES = ("forget_probability", "model_utility", "forget_quality", "forget_quality_log10")


def tofu_row(name, kind, *numbers, **more):
    return {"name": name, "kind": kind, "metrics": dict(zip(TOFU_NAMES, numbers, strict=True))} | more


SPREAD = {"forget_probability": 0.01, "model_utility": 0.02, "forget_quality": 0.3, "forget_quality_log10": 4.0}
TOFU = {
    "benchmark": "TOFU (forget10)",
    "columns": TOFU_COLUMNS,
    "plane": {"x": "model_utility", "y": "forget_quality_log10"},
    "rows": [
        tofu_row("target", "target", 0.98, 0.63, 1.3e-13, -12.9),
        tofu_row("retrain", "retrain", 0.15, 0.61, 1.0, 0.0),
        tofu_row("NPO", "baseline", 0.12, 0.54, 0.42, -0.38),
        tofu_row("SimNPO", "baseline", 0.2, 0.6, 0.0, -math.inf),
        tofu_row("ULD", "unlearned", 0.05, 0.62, 0.52, -3.0, spread=SPREAD, runs=3),
    ],
}


def plane_of(metrics, history=(), theme=LIGHT):
    (drawing,) = [drawing for drawing in draw_all(history, metrics, theme) if drawing.name == "plane"]
    return drawing


def test_the_reading_of_forget_quality_is_no_share_of_the_target():
    (text,) = reading.read_results(TOFU_COLUMNS, TOFU["rows"])
    assert text == (
        "Prob. forget went from 0.980 to 0.050 ± 0.010; the retrained model has 0.150. "
        "Forget quality went from 1.3e-13 to 0.520 ± 0.300; the retrained model has 1.000. "
        "Model utility kept 98.4 % of the target's."
    )


def test_of_many_metrics_those_of_the_plane_are_read():
    columns = [*TOFU_COLUMNS, *({"name": f"m{i}", "goal": "max"} for i in range(9))]
    (text,) = reading.read_results(columns, TOFU["rows"], list(TOFU["plane"].values()))
    assert "Forget quality went" in text and "Model utility kept" in text and "Prob." not in text
    (text,) = reading.read_results(columns, TOFU["rows"], ["of nothing"])
    assert "Prob. forget went" in text


def test_the_table_and_the_captions_of_several_seeds(tmp_path):
    page = write(tmp_path, None, TOFU)
    table = {cells[0]: cells[1:] for cells in page.table}
    assert table["ULDunlearned"] == ["0.050 ± 0.010", "0.620 ± 0.020", "0.520 ± 0.300"]
    assert table["targettarget"] == ["0.980", "0.630", "1.3e-13"]
    assert page.words.count("mean and standard deviation over 3 seeds") >= 3  # table, bars, plane
    assert "Points on the frame lie beyond it: a value is infinite." in page.words


def test_no_word_of_seeds_where_there_was_one(full):
    _, page = full
    assert "seeds" not in page.words and "±" not in page.words


@pytest.mark.parametrize(
    "x, y, ideal, title, better",
    [
        ("min", "max", True, "Forgetting against retaining", "The closer to the retrained model, the better"),
        ("min", "max", False, "Forgetting against retaining", "Better is further left and up"),
        ("max", "max", True, "Forgetting against retaining", "Better is further right and up"),
        ("max", "min", False, "Forgetting against retaining", "Better is further right and down"),
        ("max", None, False, "Forgetting against retaining", "Better is further right"),
        (None, None, False, "b against forget_a", "b against forget_a"),
        ("zero", "min", True, "b against forget_a", "The closer to the retrained model, the better"),
        ("near", "max", True, "Forgetting against retaining", "The closer to the retrained model, the better"),
        ("near", "max", False, "Forgetting against retaining", "Better is further up"),
    ],
)
def test_titles_of_the_plane(x, y, ideal, title, better):
    columns = [{"name": "forget_a", "goal": x}, {"name": "b", "goal": y}]
    if title.startswith("Forg") and y != "max":
        columns[1]["role"] = "retain"
    rows = [{"name": "r", "kind": "retrain" if ideal else "baseline", "metrics": {"forget_a": 1.0, "b": 2.0}}]
    drawing = plane_of({"columns": columns, "rows": rows, "plane": {"x": "forget_a", "y": "b"}})
    assert (drawing.title, drawing.figure.axes[0].get_title(loc="left")) == (title, better)
    assert "Arrows" not in drawing.caption and ("rings" in drawing.caption) == ideal


def test_a_metric_with_a_best_value_of_its_own_is_read_with_it():
    columns = [{"name": "forget_loss", "label": "Loss forget", "goal": "near", "near": 8.14}]
    rows = [{"name": n, "kind": n, "metrics": {"forget_loss": v}} for n, v in (("target", 0.0), ("unlearned", 7.0))]
    assert reading.read_results(columns, rows) == ["Loss forget went from 0.0 to 7.0; the aim is 8.14."]
    retrained = {"name": "retrain", "kind": "retrain", "metrics": {"forget_loss": 8.2}}
    assert reading.read_results(columns, [*rows, retrained]) == [
        "Loss forget went from 0.0 to 7.0; the retrained model has 8.2."
    ]


def test_the_plane_draws_spreads_inside_the_frame_and_the_infinite_on_it():
    drawing = plane_of(TOFU)
    ax = drawing.figure.axes[0]
    assert ax.get_xlabel() == "Model utility ↑" and ax.get_ylabel() == "log10 Forget quality ↑"
    bars = [collection.get_segments()[0] for collection in ax.collections]
    drawn = sorted(np.ptp(bar, axis=0).max() / 2 for bar in bars)
    assert np.allclose(drawn, [0.02, 4.0])
    color = row_colors(TOFU["rows"], LIGHT)[-1]
    assert {matplotlib.colors.to_hex(collection.get_color()[0]) for collection in ax.collections} == {color}
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    for x, y in np.concatenate(bars):
        assert x0 < x < x1 and y0 < y < y1
    markers = [line.get_xydata()[0] for line in ax.lines if line.get_marker() in "oDsv^" and line.get_markersize() == 8]
    assert [0.6, y0] in [point.tolist() for point in markers]
    assert "SimNPO (-inf)" in [text.get_text() for text in ax.texts]


def test_bars_of_one_color_have_hatches_and_no_numbers_that_lie_on_each_other():
    rows = [{"name": "target", "kind": "target", "metrics": {"score": 1.0}}]
    rows += [{"name": f"method {i}", "kind": "baseline", "metrics": {"score": i / 20}} for i in range(20)]
    columns = [{"name": "score", "label": "Score", "goal": "max"}]
    (drawing,) = [d for d in draw_all([], {"columns": columns, "rows": rows}, LIGHT) if d.name == "before_after"]
    bars = [patch for patch in drawing.figure.axes[0].patches if patch.get_width() > 0]
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in bars]
    assert len(looks) == len(set(looks)) == 21
    assert not drawing.figure.axes[0].texts


def test_bars_have_the_spread():
    (drawing,) = [drawing for drawing in draw_all([], TOFU, DARK) if drawing.name == "before_after"]
    lengths = [np.ptp(c.get_segments()[0][:, 1]) / 2 for ax in drawing.figure.axes for c in ax.collections]
    assert np.allclose(sorted(lengths), [0.01, 0.02, 0.3])


def test_labels_of_many_groups_of_bars_do_not_cover_each_other():
    names = [f"world facts {i}" for i in range(17)]
    columns = [{"name": name, "label": f"ROUGE {name}", "goal": "max"} for name in names]
    rows = [{"name": str(i), "metrics": dict.fromkeys(names, 0.5)} for i in range(5)]
    (drawing,) = draw_all([], {"columns": columns, "rows": rows}, LIGHT)
    drawing.figure.draw_without_rendering()
    labels = [label for ax in drawing.figure.axes for label in ax.get_xticklabels()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(drawing.figure.axes) == 2 and len(boxes) == 17
    assert all(boxes[i].count_overlaps(boxes[:i]) == 0 for i in range(17))
