"""An extension of Griffe: docstrings of this package as Markdown.

A reference is [`Name`], with no address. Here it gets one if the name is public, else it is shown as code. Sections
(`Args:`) become lists, and labeled lines (`Source: ...`) paragraphs: one entry may speak of several arguments, which
Griffe's own parser of such sections takes for a mistake.
"""

import re
import textwrap
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
LABEL = re.compile(r"^(Formula|Bounded|Use it|Source):(?= |\n)", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):\n((?: {4}.*(?:\n|\Z)|\n)+)", re.MULTILINE)
#: where an entry of a section begins
ARGUMENT = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?= \(|:)", re.MULTILINE)
ERROR = re.compile(r"^([A-Z]\w+(?:(?:, | or )[A-Z]\w+)*):(?= )", re.MULTILINE)


def section(match: re.Match[str]) -> str:
    name, body = match[1], textwrap.dedent(match[2]).strip()
    if name == "Example" and body.startswith(">>>"):
        body = f"```pycon\n{body}\n```"
    elif name in ("Args", "Attributes", "Raises"):
        entry = ERROR if name == "Raises" else ARGUMENT
        if entry.match(body):
            body = entry.sub(lambda found: f"* `{found[1]}`{':' if name == 'Raises' else ''}", body)
    return f"**{name}**\n\n{body}\n\n"


def linked(text: str, public: set[str]) -> str:
    """The text, its references with the addresses of the site."""

    def link(match: re.Match[str]) -> str:
        parts = match[1].split(".")
        name = next((part for part in parts if part in public), None)
        return f"`{parts[-1]}`" if name is None else f"[`{parts[-1]}`][blur_trainer.{name}]"

    return REFERENCE.sub(link, text)


def as_markdown(text: str, public: set[str]) -> str:
    return linked(LABEL.sub(r"\n**\1:**", SECTION.sub(section, text)), public)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {name for name, member in pkg.members.items() if member.is_alias and name[0] != "_"}
        self._rewrite(pkg, public)

    def _rewrite(self, owner: griffe.Object, public: set[str]) -> None:
        if owner.docstring is not None:
            owner.docstring.value = as_markdown(owner.docstring.value, public)
        for member in owner.members.values():
            if not member.is_alias:
                self._rewrite(member, public)
