"""The parts of a page that is one file: no script, nothing fetched, read without either. No torch."""

from collections.abc import Collection, Iterable, Sequence

from pressd.compress.markup import Html, element, join
from pressd.compress.page_style import style_sheet

# Should anything of a file's ever pass for markup, a browser still runs and fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, *parts: str) -> str:
    """Return a whole document; `title` and parts that are not markup are escaped."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(style_sheet())),
    )
    body = element("body", element("main", join(parts, Html("\n"))))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, *parts: str) -> Html:
    """Return a part of the page with a heading."""
    return element("section", element("h2", title), *parts)


def paragraph(*parts: str, class_: str = "") -> Html:
    """Return a paragraph."""
    return element("p", *parts, class_=class_) if class_ else element("p", *parts)


def figure(title: str, *parts: str) -> Html:
    """Return drawings with a small heading."""
    return element("div", element("h3", title), *parts)


def beside(*parts: str) -> Html:
    """Return parts in a row, below each other where it is too narrow."""
    return element("div", *parts, class_="row")


def headline(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Return figures that are read first: what, its value, and a remark."""
    return element(
        "dl",
        *(
            element("div", element("dt", what), element("dd", value, element("small", remark)))
            for what, value, remark in entries
        ),
        class_="headline",
    )


def data_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,), wide: Collection[int] = ()
) -> Html:
    """Return a table whose rows are named by their first cell; `left` and `wide` are columns: aligned so, broken."""
    classes = ["l wide" if column in wide else "l" if column in left else "" for column in range(len(head))]

    def cell(name: str, column: int, content: str, **more: str) -> Html:
        return element(name, content, **more, **({"class_": classes[column]} if classes[column] else {}))

    first = element("tr", *(cell("th", column, title, scope="col") for column, title in enumerate(head)))
    body = (
        element(
            "tr",
            cell("th", 0, row[0], scope="row"),
            *(cell("td", column, content) for column, content in enumerate(row[1:], start=1)),
        )
        for row in rows
    )
    return element("div", element("table", element("thead", first), element("tbody", join(body, "\n"))), class_="table")


def folded(title: str, content: str, *, is_open: bool) -> Html:
    """Return content that the reader can fold away."""
    summary = element("summary", title)
    return element("details", summary, content, open="") if is_open else element("details", summary, content)


def alert(title: str, lines: Sequence[str]) -> Html:
    """Return what must not be overlooked."""
    items = element("ul", *(element("li", line) for line in lines))
    return element("div", element("h2", title), items, class_="alert", role="note")


def verbatim(text: str) -> Html:
    """Return text as it is, in letters of one width."""
    return element("pre", element("code", text))
