"""The documentation as a site builds without a warning and shows all; the drawing of the house is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_imports import ARROWS

import blur_trainer

ROOT = Path(blur_trainer.__file__).parents[1]
#: modules that serve all floors, and what only starts the command
NOT_DRAWN = {"constants", "atomic_write", "file_names", "importing", "credentials", "choices", "checks", "__main__"}


def floors() -> list[list[str]]:
    """The rooms in the drawing: floors from above, rooms from the left."""
    text = (ROOT / "docs/img/house.svg").read_text("utf-8")
    rooms = re.findall(r'<text class="room" x="(\d+)" y="(\d+)">(\w+)<', text)
    return [
        [name for _, name in sorted((int(x), name) for x, at, name in rooms if at == y)]
        for y in sorted({y for _, y, _ in rooms}, key=int)
    ]


def test_the_drawing_of_the_house_agrees_with_the_arrows():
    """Every arrow leads down, or to the right on the same floor."""
    order = [name for floor in floors() for name in floor]
    assert len(floors()) == 6 and set(order) == set(ARROWS) - NOT_DRAWN
    for room in order:
        wrong = {other for other in ARROWS[room] - NOT_DRAWN if order.index(other) < order.index(room)}
        assert not wrong, f"{room} imports {wrong}, drawn above it"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with warnings as errors: links, anchors, references, pages that the navigation forgets."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def text(page: Path) -> str:
    return page.read_text("utf-8")


@pytest.mark.full
def test_every_public_name_has_its_text(site):
    pages = "\n".join(map(text, site.glob("reference/*.html")))
    missing = [name for name in blur_trainer.__all__ if f'id="blur_trainer.{name}"' not in pages]
    assert missing == ["__version__"]
    assert 'href="reference/choose-what-to-descend-on-the-forget-set.html#blur_trainer.NPO"' in text(site / "api.html")


@pytest.mark.full
def test_sections_references_and_formulas_of_docstrings_are_shown_as_such(site):
    page = text(site / "reference/choose-how-the-two-gradients-meet.html")
    assert "<strong>Args</strong>" in page and "<li>" in page
    everywhere = "\n".join(text(path) for path in site.rglob("*.html"))
    assert "<math" in everywhere and "arithmatex" not in everywhere
    assert not re.search(r"\[<code>\w+</code>\](?!\()", everywhere), "a reference that leads nowhere"


@pytest.mark.full
def test_the_site_fetches_nothing(site):
    """No script, style, font or picture of another host."""
    for page in site.rglob("*.html"):
        outside = re.findall(
            r'<(?:script|img|iframe)[^>]* src="?https?:[^ >]*|<link[^>]*href="?https?:[^ >]*', text(page)
        )
        assert outside == [], page
    assert "search/search_index.json" in {path.relative_to(site).as_posix() for path in site.rglob("*.json")}
