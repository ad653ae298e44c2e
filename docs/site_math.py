"""A hook of mkdocs: formulas become MathML when the site is built, so that a page needs no script to show them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

#: what `pymdownx.arithmatex` makes of `$...$` and of `$$...$$`
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
#: a function before an argument without parenthesis: the converter leaves no space between them
FUNCTION = re.compile(r"(\\log|\\exp)(?=\s*(?:[a-zA-Z]|\\(?!left|big|Big|,)))")


def mathml(latex: str, display: str) -> str:
    """The formula as a `<math>` element.

    Raises:
        ValueError: there is a command that the converter does not know: it would be shown as it is written.
    """
    found = convert(FUNCTION.sub(r"\1\\,", latex), display=display)
    if unknown := re.findall(r"\\[a-zA-Z]+", found):
        raise ValueError(f"The formula ${latex}$ has {unknown}, which latex2mathml does not know. Write it otherwise.")
    return found


def on_page_content(content: str, **_: Any) -> str:
    def formula(match: re.Match[str]) -> str:
        return mathml(html.unescape(match[2]), "inline" if match[1] == "span" else "block")

    return FORMULA.sub(formula, content)
