"""The notebook: valid, small and without outputs, in step with the page, and it runs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import blur_trainer

ROOT = Path(blur_trainer.__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "unlearn_your_data.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_it_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in codes(notebook))
    assert NOTEBOOK.stat().st_size < 20_000


def test_it_tells_the_pages_story(notebook):
    page = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    world = re.findall(r"```python runnable\n(.*?)\n```", page, re.DOTALL)[0]
    assert codes(notebook)[0].source == f"{world};", "the semicolon keeps the last value out of the output"
    told = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    pages = re.findall(r"\]\(\.\./(docs/[^)#]+)(?:#([^)]+))?\)", told)
    assert len(pages) == 3
    for name, part in pages:
        heads = [line.strip("# ").lower().replace(" ", "-") for line in (ROOT / name).read_text().splitlines()]
        assert not part or part in heads, f"{name} has no section {part}"


@pytest.mark.full
def test_it_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, table, verdict, numbers, figure, loaded = codes(notebook)
    assert "BLUR-RMU" in printed(table) and "forgotten" in printed(verdict) and "the level" in printed(numbers)
    assert "image/png" in figure.outputs[0].data
    assert "retain: " in printed(loaded)
