"""What drawings and pages are made of: markup that cannot be forgotten to be escaped, axes, names, contrast."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.compress import page_style
from pressd.compress.label_places import Box
from pressd.compress.log_axis import log_limits, log_ticks
from pressd.compress.markup import Html, element, escape, join
from pressd.compress.measurement import check_gates, finite
from pressd.compress.page import data_table
from pressd.compress.page_style import contrast, style_sheet
from pressd.compress.svg import shortened, ticks, width_of
from pressd.compress.svg_bars import lying_bars, standing_bars
from pressd.compress.svg_scatter import Dot, scatter
from pressd.compress.tables import duration, size

SVG = "{http://www.w3.org/2000/svg}"


@given(st.text())
def test_text_and_attributes_are_read_as_they_were_given(text: str) -> None:
    shown = re.sub(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", "\ufffd", text
    )
    found = ElementTree.fromstring(element("p", text, title=text))
    # An XML reader makes one line feed of every end of a line, and spaces of those in attributes.
    assert (found.text or "") == re.sub("\r\n?", "\n", shown)
    assert found.get("title") == re.sub("[\n\t]", " ", re.sub("\r\n?", "\n", shown))
    assert len(found) == 0


def test_markup_is_not_escaped_twice() -> None:
    inner = element("b", "a & b")
    assert inner == "<b>a &amp; b</b>"
    assert element("p", inner, "<", class_="x", aria_label="y") == (
        '<p class="x" aria-label="y"><b>a &amp; b</b>&lt;</p>'
    )
    assert escape(inner) is inner
    assert join(["<", inner], "&") == "&lt;&amp;<b>a &amp; b</b>"
    # Joined as text, markup is text again: what forgets about it is safe, not broken.
    assert escape("".join([inner])) == "&lt;b&gt;a &amp;amp; b&lt;/b&gt;"
    assert element("rect", x=1.04, y=2) == '<rect x="1" y="2"/>'
    assert element("td") == "<td></td>"
    assert isinstance(element("td"), Html)


@given(st.floats(1e-12, 1e12), st.floats(1, 1e9))
def test_logarithmic_ticks_lie_inside_and_are_enough_and_apart(low: float, factor: float) -> None:
    ends = log_limits([low, low * factor])
    found = log_ticks(*ends)
    assert all(ends[0] <= value <= ends[1] for value in found)
    assert found == sorted(set(found))
    assert len(found) >= 3
    # With less than three powers of ten a step of the next set holds at most seven numbers a decade, over less than
    # three; a step that is two or two and a half times as long would have had two at most.
    assert len(found) <= max(14, math.log10(ends[1] / ends[0]) + 1)
    # Three digits say each.
    assert all(float(f"{value:.3g}") == pytest.approx(value, rel=1e-12) for value in found)


@given(st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_from_zero_reach_the_top(top: float, most: int) -> None:
    found = ticks(top, most)
    assert found[0] == 0
    assert found[-1] >= top * (1 - 1e-12)
    assert len(found) <= most + 1
    steps = {f"{value / found[1]:.6f}" for value in found}
    assert len(steps) == len(found)
    assert f"{found[1]:.0e}"[0] in "125"


CLUSTERS = {
    "spread": [(10, 0.4), (12, 0.1), (14, 0.03), (20, 0.001), (30, 1e-4), (33, 0.02), (50, 0.3), (60, 1e-5)],
    "close": [(1000 + 4 * index, 0.1 * 0.97**index) for index in range(8)],
    "one": [(10, 0.1)],
    "same": [(10, 0.1)] * 4,
}


def drawn(cluster: str, name: str = "w4a16g{}-artifact") -> ElementTree.Element:
    dots = [
        Dot(name=name.format(index), told="told", x=x, y=y, joined=index % 3 != 2, exact=index == 3)
        for index, (x, y) in enumerate(CLUSTERS[cluster])
    ]
    return ElementTree.fromstring(scatter("s", dots, labels=("across", "up"), title="t", told="d"))


def names_of(tree: ElementTree.Element, begin: str = "w4a16g") -> list[Box]:
    boxes = []
    for text in tree.iter(f"{SVG}text"):
        if (text.text or "").startswith(begin):
            width, x, y = width_of(text.text or ""), float(text.get("x", "")), float(text.get("y", ""))
            left = x - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "")]
            boxes.append(Box(x0=left, y0=y - 9, x1=left + width, y1=y + 2))
    return boxes


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_names_cover_neither_each_other_nor_a_point_nor_the_edge(cluster: str) -> None:
    tree = drawn(cluster)
    names = names_of(tree)
    assert len(names) == len(CLUSTERS[cluster])
    for one, other in itertools.combinations(names, 2):
        assert one.shared(other) == 0
    points = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in tree.iter(f"{SVG}circle")]
    for box, (x, y) in itertools.product(names, points):
        assert not (box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1)
    frame = Box(x0=0, y0=0, x1=720, y1=430)
    assert all(box.shared(frame) == pytest.approx(box.area) for box in names)


def test_a_drawing_tells_points_apart_by_shape_as_well() -> None:
    tree = drawn("spread")
    classes = [dot.get("class") for dot in tree.iter(f"{SVG}circle")]
    assert (classes.count("dot on"), classes.count("dot off")) == (5, 2)
    assert len([path for path in tree.iter(f"{SVG}path") if path.get("class") == "dot on"]) == 1
    (line,) = tree.iter(f"{SVG}polyline")
    xs = [float(pair.split(",")[0]) for pair in (line.get("points") or "").split()]
    assert xs == sorted(xs)
    assert len(xs) == 6


def test_the_longest_name_is_cut() -> None:
    (name,) = names_of(drawn("one", "w4a16g" + "x" * 500))
    assert name.x1 - name.x0 <= 0.4 * 720
    assert shortened("short", 100) == "short"
    assert shortened("long" * 10, 60).endswith("…")
    assert width_of("漢字") > width_of("ab")


def test_bars_are_as_long_as_they_should_be() -> None:
    tree = ElementTree.fromstring(lying_bars("b", {"long": 4.0, "half": 2.0, "none": 0.0}, "s", title="t"))
    widths = [float(rect.get("width", "")) for rect in tree.iter(f"{SVG}rect")]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)  # tenths of a pixel
    assert widths[2] == 0
    ElementTree.fromstring(lying_bars("b", {"none": 0.0}, "s", title="t"))
    tree = ElementTree.fromstring(
        standing_bars("b", [("a", "a", 4.0), ("b", "b", 1.0), ("c", "c", 0.0)], "s", title="t")
    )
    heights = [float(rect.get("height", "")) for rect in tree.iter(f"{SVG}rect")]
    assert heights[1] == pytest.approx(heights[0] / 4, abs=0.1)
    assert heights[2] == 0
    ElementTree.fromstring(standing_bars("b", [("a", "a", 0.0)], "s", title="t"))


def test_everything_stands_out_from_what_is_behind_it() -> None:
    """WCAG 2.1 asks for 4.5 of text and 3 of drawings; black on white has 21 by its definition."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the standard's well-known near miss
    light, dark = page_style._COLOURS.split("@media")
    for text, palette in ((light, page_style._LIGHT), (dark, page_style._DARK)):
        colours = dict(re.findall(r"--([\w-]+):(#\w{6})", text))
        for paper, inks in {
            "paper": ("ink", "quiet", "miss", "mark"),
            "panel": ("ink",),
            "miss-paper": ("ink",),
        }.items():
            assert all(contrast(colours[paper], colours[ink]) >= 4.5 for ink in inks)
        lightness = [contrast(colour, colours["paper"]) for colour in palette]
        assert lightness == sorted(lightness)  # the more, the further from the paper
        shades = dict(re.findall(r"\.h(\d)\{fill:(#\w+)\}", page_style._shades(palette)))
        inks_of = dict(re.findall(r"\.t(\d)\{fill:(#\w+)\}", page_style._shades(palette)))
        assert len(shades) == page_style.NUM_SHADES
        assert all(contrast(shades[index], inks_of[index]) >= 4.5 for index in shades)
    assert style_sheet().count("{") == style_sheet().count("}")


def test_numbers_of_a_measurement() -> None:
    assert [finite(value) for value in (1, 2.5, True, "3", None, float("nan"), float("-inf"), 10**400)] == [
        *(1.0, 2.5),
        *([None] * 6),
    ]
    (gate,) = check_gates({"kl_mean": 1.0}, {"kl_mean": float("nan")})
    assert gate.kept is False
    (gate,) = check_gates({"kl_mean": 1.0}, {"ppl": 1.0})
    assert gate.kept is False  # measured, but not this


def test_a_table_names_its_rows_and_columns() -> None:
    tree = ElementTree.fromstring(data_table(("a", "b"), [("<x>", "1"), ("y", "2")]))
    assert [cell.get("scope") for cell in tree.iter("th")] == ["col", "col", "row", "row"]
    assert [cell.text for cell in tree.iter("td")] == ["1", "2"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.004, "0.00 s"),
        (9.994, "9.99 s"),
        (59.96, "60.0 s"),
        (120, "2 min 00 s"),
        (7199.6, "2 h 00 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_sizes() -> None:
    assert [size(count) for count in (0, 3 << 19, 1 << 30)] == ["0.00 MiB", "1.50 MiB", "1.00 GiB"]
