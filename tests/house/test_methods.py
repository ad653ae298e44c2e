"""The tables of objectives in docs/methods.md: as the docstrings and the attributes of the classes say."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import blur_trainer
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES

ROOT = Path(blur_trainer.__file__).parents[1]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_methods", ROOT / "docs" / "generate_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_generated_one(generator):
    text = generator.PAGE.read_text(encoding="utf-8")
    assert text == generator.page(text), "run `python docs/generate_methods.py`"


def test_every_name_has_a_full_row(generator):
    names = [*FORGET_OBJECTIVES, *RETAIN_OBJECTIVES]
    rows = re.findall(r"^\| `(\w+)` (\|.*)$", "\n".join(map(generator.table, generator.TABLES.values())), re.MULTILINE)
    assert [name for name, _ in rows] == names
    for name, cells in rows:
        assert cells.count("|") == len(generator.COLUMNS), f"{name}: a bar in a text ends the cell"
        assert all(text.strip() for text in cells.split("|")[1:-1]), name


@dataclass(frozen=True)
class Silent(Objective):
    """It says nothing of itself.

    Formula: $x$
    Bounded: no.
    Use it:
    """


@dataclass(frozen=True)
class Said(Objective):
    r"""An objective of this test.

    Formula: $\|a\| + |b| - p(y|x)
        \cdot 2$
    Bounded: above, by 1.
    Use it: never.
    Source: Nobody, arXiv 1234.56789.
    """

    strength: float = 0.5
    seed: int = 3
    name: str = "a"
    per: ClassVar[str] = "example"
    needs_reference: ClassVar[bool] = True
    needs_refusal: ClassVar[bool] = True


def test_an_objective_without_its_lines_is_an_error(generator):
    with pytest.raises(ValueError, match="Silent has no line 'Use it:"):
        generator.row("silent", Silent)


def test_a_row_is_made_of_docstring_and_attributes(generator):
    assert generator.row("said", Said) == (
        r"| `said` | $\Vert a\Vert + \vert b\vert - p(y\vert x) \cdot 2$ | examples | above, by 1 | "
        "reference log-probabilities, refusals | `strength=0.5` | never | "
        "Nobody, [1234.56789](https://arxiv.org/abs/1234.56789) |"
    )


def test_what_an_item_is_comes_from_num_items(generator):
    rows = {name: generator.row(name, kind) for name, kind in {**FORGET_OBJECTIVES, **RETAIN_OBJECTIVES}.items()}
    assert "| examples |" in rows["npo"] and "| tokens |" in rows["nll"]
    assert "| tokens of the refusal |" in rows["idk"] and "| tokens, prompts included |" in rows["rmu"]
