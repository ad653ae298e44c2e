"""The table at the end of a run: golden text, alignment, width, digits, and what it refuses."""

import doctest
import math

import pytest

from blur_trainer.report import tables
from blur_trainer.report.tables import (
    cells,
    column_of,
    decimals,
    format_number,
    format_table,
    goal_of,
    heading,
    role_of,
    shorten,
    spread_texts,
    wrap_heading,
)

COLUMNS = [
    {"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"},
    {"name": "retain_knowmem", "label": "KnowMem retain", "goal": "max"},
    {"name": "privleak", "label": "PrivLeak", "goal": "zero"},
    {"name": "privleak_auc", "label": "AUC"},
]
ROWS = [
    {"name": "target", "metrics": {"forget_verbmem": 100.0, "retain_knowmem": 99.96, "privleak": -99.8}},
    {"name": "BLUR-NPO", "metrics": {"forget_verbmem": 21.349, "retain_knowmem": math.nan, "privleak_auc": 0.4772}},
    {"name": "retrained", "metrics": {"forget_verbmem": 22, "retain_knowmem": 98, "privleak": -0.04}},
]
GOLDEN = """\
           VerbMem forget ↓  KnowMem retain ↑  PrivLeak →0    AUC
---------  ----------------  ----------------  -----------  -----
target                100.0             100.0        -99.8      —
BLUR-NPO               21.3               nan            —  0.477
retrained              22.0              98.0          0.0      —"""
GOLDEN_WRAPPED = """\
            VerbMem   KnowMem
           forget ↓  retain ↑  PrivLeak →0    AUC
---------  --------  --------  -----------  -----
target        100.0     100.0        -99.8      —
BLUR-NPO       21.3       nan            —  0.477
retrained      22.0      98.0          0.0      —"""


TOFU = [
    {"name": "model_utility", "label": "Model utility", "goal": "max"},
    {"name": "forget_quality", "label": "Forget quality", "goal": "max"},
    {"name": "privleak", "label": "PrivLeak", "goal": "zero"},
]
TOFU_ROWS = [
    {"name": "target", "metrics": {"model_utility": 0.63, "forget_quality": 1.3e-13, "privleak": -99.0}},
    {
        "name": "SimNPO",
        "metrics": {"model_utility": 0.6, "forget_quality": 1e-198, "privleak": 3.0},
        "spread": {"model_utility": 0.0312, "forget_quality": 2e-199, "privleak": 12.34},
        "runs": 3,
    },
    {
        "name": "ULD",
        "metrics": {"model_utility": 0.62, "forget_quality": 0.52},
        "spread": {"model_utility": 1e-17, "forget_quality": 0.25},
        "runs": 3,
    },
    {"name": "retrained", "metrics": {"model_utility": 0.61, "forget_quality": 1.0}},
]
GOLDEN_TOFU = """\
           Model utility ↑     Forget quality ↑   PrivLeak →0
---------  ---------------  -------------------  ------------
target       0.630           1.3e-13             -99.0
SimNPO       0.600 ± 0.031  1.0e-198 ± 2.0e-199    3.0 ± 12.3
ULD          0.620 ± 0.000     0.520    ± 0.250      —
retrained    0.610             1.000                 —"""


def test_golden_of_probabilities_and_spreads():
    """P-values stay readable beside 1.000, and the means stand below each other."""
    assert format_table(TOFU, TOFU_ROWS) == GOLDEN_TOFU


@pytest.mark.parametrize(
    "mean, spread, text",
    [
        (62.0, 3.14, "± 3.1"),
        (0.62, 0.0304, "± 0.030"),
        (4e-25, 3e-25, "± 3.0e-25"),
        (0.5, 0.0, "± 0.000"),
        (0.5, None, ""),
        (1e8, 2e7, "± 2.0e+07"),
        (0.5, math.nan, "± nan"),
        (-math.inf, math.inf, "± inf"),
    ],
)
def test_spread_has_the_digits_of_the_mean(mean, spread, text):
    row = {"name": "a", "metrics": {"m": mean}, "spread": {"m": spread}}
    assert spread_texts({"name": "m"}, [row]) == [text]


def test_a_spread_does_not_decide_the_digits_of_the_column():
    rows = [{"name": "a", "metrics": {"m": 0.5}, "spread": {"m": 40.0}}, {"name": "b", "metrics": {"m": 1.0}}]
    assert cells({"name": "m"}, rows) == ["0.500", "1.000"]
    assert spread_texts({"name": "m"}, rows) == ["± 40.000", ""]


@pytest.mark.parametrize(
    "column, role",
    [
        ({"name": "forget_quality", "goal": "max"}, "forget"),
        ({"name": "forget_knowmem", "goal": "min"}, "forget"),
        ({"name": "wmdp_bio", "goal": "min", "role": "forget"}, "forget"),
        ({"name": "forget_me_not", "goal": "max", "role": "retain"}, "retain"),
        ({"name": "model_utility", "goal": "max"}, "retain"),
        ({"name": "privleak", "goal": "zero"}, None),
    ],
)
def test_role(column, role):
    assert role_of(column) == role


@pytest.mark.parametrize(
    "column, head",
    [
        ({"goal": "near", "near": 8.14}, "m →8.14"),
        ({"goal": "near", "near": 0.5}, "m →0.5"),
        ({"goal": "near"}, "m →"),
        ({"goal": "zero", "near": 3.0}, "m →0"),
        ({}, "m"),
    ],
)
def test_the_arrow_says_where_the_best_value_is(column, head):
    assert heading({"name": "m", **column}) == head
    assert wrap_heading(f"a long label of {head}", 6)[-1].endswith(head), "the arrow stays at the last word"


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role of column 'm' must be one of \['forget', 'retain'\], but got 'keep'"):
        role_of({"name": "m", "role": "keep"})


def test_a_logarithm_is_named_after_its_column():
    assert heading(column_of("forget_quality_log10", TOFU)) == "log10 Forget quality ↑"
    own = {"name": "forget_quality_log10", "label": "Mine", "goal": "max"}
    assert column_of("forget_quality_log10", [*TOFU, own]) == own
    assert column_of("unknown_log10", TOFU) == {"name": "unknown_log10"}


def test_golden():
    assert format_table(COLUMNS, ROWS) == GOLDEN


def test_headings_are_wrapped_only_when_the_table_is_too_wide():
    widest = max(len(line) for line in GOLDEN.splitlines())
    assert format_table(COLUMNS, ROWS, width=widest) == GOLDEN
    assert format_table(COLUMNS, ROWS, width=widest - 1) == GOLDEN_WRAPPED


def test_long_names_are_shortened_last_and_stay_distinct():
    rows = [{"name": f"BLUR-NPO with many options, seed {seed}", "metrics": ROWS[0]["metrics"]} for seed in (1, 2)]
    columns = [dict(COLUMNS[0], name=f"m{i}") for i in range(7)]
    lines = format_table(columns, rows).splitlines()
    assert max(len(line) for line in lines) == 100
    assert lines[-2].startswith("BLUR-NPO") and "…" in lines[-2] and "seed 1" in lines[-2]
    assert "seed 2" in lines[-1]


def test_the_shortest_name_wins_over_the_width():
    lines = format_table(COLUMNS, [{"name": "x" * 50, "metrics": {}}], width=10).splitlines()
    assert lines[-1].split()[0] == "xxxxxx…xxxxx"


def test_columns_are_aligned_right():
    lines = format_table(COLUMNS, ROWS).splitlines()
    ends = [i for i, char in enumerate(lines[1] + " ") if char == " " and lines[1][i - 1] == "-"]
    for line in lines[2:]:
        padded = line.ljust(len(lines[1]) + 1)
        assert all(padded[end - 1] != " " and padded[end] == " " for end in ends[1:])


def test_a_line_break_in_a_name_does_not_break_the_table():
    lines = format_table(COLUMNS, [{"name": "two\nlines", "metrics": {}}]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("two lines")


@pytest.mark.parametrize("columns, rows", [([], []), (COLUMNS, []), ([], ROWS)])
def test_empty(columns, rows):
    lines = format_table(columns, rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert all(column["label"] in lines[0] for column in columns)


@pytest.mark.parametrize("metrics", [None, {}, {"forget_verbmem": None}])
def test_missing_metrics_are_dashes(metrics):
    assert cells(COLUMNS[0], [{"name": "a", "metrics": metrics}]) == ["—"]


@pytest.mark.parametrize(
    "number, digits, text",
    [
        (None, 1, "—"),
        (12.345, 1, "12.3"),
        (-0.04, 1, "0.0"),
        (0.0, 3, "0.000"),
        (1e-13, 3, "1.0e-13"),
        (0.0005, 3, "0.001"),
        (1e-13, 1, "0.0"),
        (-99.96, 1, "-100.0"),
        (-1.5e300, 1, "-1.5e+300"),
        (9_999_999.0, 1, "9999999.0"),
        (math.inf, 1, "inf"),
        (-math.inf, 3, "-inf"),
        (math.nan, 1, "nan"),
    ],
)
def test_format_number(number, digits, text):
    assert format_number(number, digits) == text


@pytest.mark.parametrize(
    "numbers, expected",
    [([0.5, 1.0], 3), ([-1.0, None], 3), ([0.5, 1.01], 1), ([0.0, None], 1), ([], 1), ([math.nan, 0.2], 3)],
)
def test_decimals(numbers, expected):
    assert decimals(numbers) == expected


def test_heading():
    assert heading({"name": "auc"}) == "auc"
    assert heading({"name": "auc", "label": "AUC", "goal": "max"}) == "AUC ↑"
    assert heading({"name": "auc", "label": "Area\n under", "goal": "min"}) == "Area under ↓"


def test_an_unknown_goal_is_refused():
    words = r"'privleak' must be one of \['max', 'min', 'near', 'zero'\], but got 'lower'"
    with pytest.raises(ValueError, match=words):
        goal_of({"name": "privleak", "goal": "lower"})


@pytest.mark.parametrize("value", ["12", True, [1.0]])
def test_metrics_must_be_numbers(value):
    with pytest.raises(TypeError, match="must be a number or None"):
        format_table(COLUMNS[:1], [{"name": "a", "metrics": {"forget_verbmem": value}}])


def test_shorten():
    assert shorten("abc", 3) == "abc"
    assert shorten("abcdefgh", 5) == "ab…gh"
    assert shorten("a\n b", 9) == "a b"
    assert len(shorten("x" * 40, 12)) == 12


def test_doctests():
    result = doctest.testmod(tables)
    assert result.attempted and not result.failed
