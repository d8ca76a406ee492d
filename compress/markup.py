"""Markup whose escaping cannot be forgotten: what is not `Html` already is text, and written as text. No torch.

Names, paths and notes come from files that anybody may have written, so they must not become elements, and must not
reorder what stands around them.
"""

import html
import re
from collections.abc import Iterable

# Elements that mostly hold nothing, and are then closed at once: so a page is well-formed XML as well.
_EMPTY = frozenset({"circle", "line", "meta", "path", "polyline", "rect"})
# What XML has no place for, halves of surrogate pairs, and marks that change the direction of the text around them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Return text as markup that shows it; what cannot be shown becomes U+FFFD. Markup is returned as it is."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Return one piece of markup after another."""
    return Html(escape(between).join(escape(part) for part in parts))


def element(name: str, /, *children: str, **attributes: str | float) -> Html:
    """Return an element; `class_` and `aria_label` are written `class` and `aria-label`, numbers to a tenth.

    `name` and the names of attributes are ours; children and values may be anybody's.
    """
    start = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else tenths(value))}"'
        for key, value in attributes.items()
    )
    if name in _EMPTY and not children:
        return Html(f"<{name}{start}/>")
    return Html(f"<{name}{start}>{join(children)}</{name}>")


def tenths(value: float) -> str:
    """A coordinate: a tenth of a pixel is less than anybody sees."""
    return f"{value:.1f}".removesuffix(".0")
