"""A hook of mkdocs: pages of the site that are not files of `docs/`, and links to what lies outside of it.

The files in `docs/` have links for who reads them in the repository. On the site the same links lead to pages.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from generate_api import TASKS
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: a file of the repository -> its page
PAGES = {
    "README.md": "index.md",
    "docs/index.md": "pages.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results.md": "results.md",
    "examples/unlearn_your_data.ipynb": "notebook.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def slug(task: str) -> str:
    return re.sub(r"[^a-z]+", "-", task.lower()).strip("-")


def reference(task: str) -> str:
    """The page of one task, for mkdocstrings to fill in."""
    return "\n\n".join([f"# {task}", "[All tasks](../api.md)", *(f"::: blur_trainer.{name}" for name in TASKS[task])])


def notebook(text: str) -> str:
    """A notebook as Markdown: its texts, and its code in fences."""
    cells = json.loads(text)["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{source}\n```" if code else source for source, code in sources)


def relinked(text: str, home: str) -> str:
    """The text of a file of the repository, its links as those of its page.

    `home` is the path of the file in the repository. A target that is no page is shown as a file of the site.
    """

    def target(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(home), match[1])).replace(os.sep, "/")
        return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}.txt")

    return LINK.sub(target, text)


def linked_files() -> set[str]:
    """What the pages link to that is no page: paths in the repository."""
    homes = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
    found = {link for home in homes for link in LINK.findall(relinked((ROOT / home).read_text("utf-8"), home))}
    paths = {link[len("files/") : -len(".txt")] for link in found if link.startswith("files/")}
    return {path for path in paths if (ROOT / path).is_file()}  # mkdocs complains of the others


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    version = re.search(r'"(.+)"', (ROOT / "blur_trainer/_version.py").read_text("utf-8").split("=")[1])[1]
    config.copyright = f"blur_trainer {version}"
    pages = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    pages += [{task: f"reference/{slug(task)}.md"} for task in TASKS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.remove(files.src_uris["index.md"])
    for path, page in PAGES.items():
        text = (ROOT / path).read_text("utf-8")
        text = notebook(text) if path.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=relinked(text, path)))
    for task in TASKS:
        files.append(File.generated(config, f"reference/{slug(task)}.md", content=reference(task)))
    for path in linked_files():
        files.append(File.generated(config, f"files/{path}.txt", content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.generated_by is None:
        markdown = relinked(markdown, f"docs/{page.file.src_uri}")
    # a word for the tests, which superfences takes for a mistake
    markdown = re.sub(r"^(\s*```\w+) runnable$", r"\1", markdown, flags=re.MULTILINE)
    if page.file.src_uri == "api.md":  # each name leads to its whole text
        markdown = re.sub(r"^\| (`(\w+).*?`) \|", r"| [\1][blur_trainer.\2] |", markdown, flags=re.MULTILINE)
    return markdown
