"""Writes the tables of objectives in docs/methods.md: `python docs/generate_methods.py`. A test compares.

Formula, bound, use and source are labeled lines in the docstring of the objective's class. Everything else is read from
its attributes, so that the page cannot say what the code does not do.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import torch

from blur_trainer.objectives.activations import ActivationObjective
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES

PAGE = Path(__file__).with_name("methods.md")
TABLES = {"forget": FORGET_OBJECTIVES, "retain": RETAIN_OBJECTIVES}
LABELS = ("Formula", "Bounded", "Use it", "Source")
COLUMNS = ("name", "loss of one item", "mean over", "bounded", "needs", "defaults", "use it", "source")
#: two examples with 3 answer tokens, refusals with 5, and 11 tokens that are attended to
PROBE = {
    "labels": torch.tensor([[-100, -100, 7, 7, -100, -100], [-100, 7, -100, -100, -100, -100]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
    "refusal": {"labels": torch.tensor([[-100, 7, 7, 7], [-100, -100, 7, 7]])},
}
ITEMS = {2: "examples", 3: "tokens", 5: "tokens of the refusal", 11: "tokens, prompts included"}


def labeled_lines(kind: type[Objective]) -> dict[str, str]:
    """The text after each label in the docstring. A text goes on in lines that are indented."""
    found = {}
    for label in LABELS:
        match = re.search(rf"^{label}:((?: .*)?(?:\n +\S.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE)
        if match is None or not match[1].strip():
            raise ValueError(
                f"{kind.__name__} has no line '{label}: ...' in its docstring; docs/methods.md needs {list(LABELS)}. "
                "CONTRIBUTING.md, 'Adding an objective', says how they look."
            )
        found[label] = " ".join(match[1].split())
    return found


def cell(text: str) -> str:
    """Markdown for one cell of a table: a bar would end the cell, and arXiv numbers become links."""
    for bar, name in ((r"\|", r"\Vert"), ("|", r"\vert")):
        text = re.sub(re.escape(bar) + r"(?=[a-zA-Z])", lambda _, name=name: f"{name} ", text).replace(bar, name)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def needs(objective: Objective) -> str:
    reference = "activations" if isinstance(objective, ActivationObjective) else "logits"
    found = []
    if objective.needs_reference_logits:
        found.append(f"reference {reference}")
    elif objective.needs_reference:
        found.append("reference log-probabilities")
    if objective.needs_refusal:
        found.append("alternatives" if objective.needs_alternatives else "refusals")
    if objective.needs_level:
        found.append("levels")
    return ", ".join(found) or "nothing"


def defaults(objective: Objective) -> str:
    """The numbers among the arguments, but for a seed."""
    values = {field.name: getattr(objective, field.name) for field in fields(objective) if field.init}
    numbers = {name: value for name, value in values.items() if type(value) in (int, float) and name != "seed"}
    return ", ".join(f"`{name}={value:g}`" for name, value in numbers.items()) or "none"


def row(name: str, kind: type[Objective]) -> str:
    said, objective = labeled_lines(kind), kind()
    said = {label: text.removesuffix(".") for label, text in said.items()}
    texts = [said["Formula"], ITEMS[int(objective.num_items(PROBE))], said["Bounded"], needs(objective)]
    texts += [defaults(objective), said["Use it"], said["Source"]]
    return f"| `{name}` | {' | '.join(map(cell, texts))} |"


def table(objectives: dict[str, type[Objective]]) -> str:
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(head + [row(name, kind) for name, kind in objectives.items()])


def page(old: str) -> str:
    """The page with new tables between its markers."""
    for name, objectives in TABLES.items():
        start = f"<!-- {name} objectives, generated from the docstrings -->\n\n"
        end = f"\n\n<!-- end of {name} objectives -->"
        before, rest = old.split(start)
        old = before + start + table(objectives) + end + rest.split(end)[1]
    return old


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
