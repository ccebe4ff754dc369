"""HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """HTML, as opposed to text, which is escaped before it becomes a part of it."""


def tag(name: str, *content: str, **attributes: object) -> Html:
    """An element.

    Args:
        content: elements, and texts, which are escaped.
        attributes: one that is None or False is left out, True has no value; ``_`` at the end of a name is dropped,
            others become ``-``.

    >>> tag("p", "a < b ", tag("b", "c"), class_="note", hidden=True)
    '<p class="note" hidden>a &lt; b <b>c</b></p>'
    """
    named = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    given = (
        f" {key}" if value is True else f' {key}="{escape(str(value))}"'
        for key, value in named
        if value is not None and value is not False
    )
    return Html(f"<{name}{''.join(given)}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Elements and texts, one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(header: Iterable[str], rows: Iterable[Iterable[str]], **attributes: object) -> Html:
    """A table; the first cell of a row is its heading."""
    top = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = (
        tag("tr", *(tag("td" if i else "th", cell, scope=None if i else "row") for i, cell in enumerate(row)))
        for row in rows
    )
    whole = tag("table", tag("thead", top), tag("tbody", *body), **attributes)
    return tag("div", whole, class_="scroll")


def fold(title: str, *content: str, **attributes: object) -> Html:
    """A part that opens when its title is clicked."""
    return tag("details", tag("summary", title), *content, **attributes)
