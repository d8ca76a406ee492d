"""The page of a model that is deep, has one layer or none, or lost nothing, too much, or no number."""

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_pages import SVG, altered, assert_no_nan, cells_of, deep, group_of, page_of, text_of, tree_of

from pressd.compress import compress
from pressd.compress.report import BlockCost
from pressd.compress.svg import width_of
from pressd.runtime.artifact.manifest import Manifest


@pytest.fixture(scope="module")
def manifest(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return compress(tiny_llama, "w3a16g32", tmp_path_factory.mktemp("odd") / "out")


@pytest.mark.parametrize(("layers", "shown"), [(1, True), (8, True), (80, False), (126, False)])
def test_every_depth_has_a_map(manifest: Manifest, layers: int, shown: bool) -> None:
    names = ("embed", *(f"layers.{n}" for n in range(layers)), "head")
    blocks = tuple(BlockCost(name=name, seconds=n) for n, name in enumerate(names))
    page = page_of(deep(manifest, layers), blocks=blocks)
    tree = tree_of(page)
    drawings = {(drawing.get("aria-labelledby") or "").split("-")[0]: drawing for drawing in tree.iter(f"{SVG}svg")}
    drawn = drawings["map"]
    titles = [title.text for title in drawn.iter(f"{SVG}title")][1:]
    assert len(titles) == 4 * layers + 2
    assert f"layers.{layers - 1}.down, w4a16g128: {(5 + (layers - 1) / 10):#.3g} %" in titles
    # Numbers stand in the fields where there is room, and in the table in any case.
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert (texts.count("5.00") == 4) == shown
    rows = {row[0]: row for row in cells_of(page)}
    assert rows[f"layer {layers - 1}"] == [f"layer {layers - 1}", *[f"{5 + (layers - 1) / 10:#.3g}"] * 4]
    for drawing in drawings.values():
        assert_inside(drawing)
    numbers = [text for text in drawn.iter(f"{SVG}text") if (text.text or "").isdigit()]
    every = 1 if layers < 40 else 5
    assert [text.text for text in numbers] == [str(number) for number in range(0, layers, every)]
    assert_marks_apart(drawings["blocks"], layers)
    for one, other in itertools.pairwise(numbers):
        assert float(other.get("x", "")) - float(one.get("x", "")) >= 22  # three digits of 11 pixels


def assert_marks_apart(drawing: ElementTree.Element, layers: int) -> None:
    """Marks below bars do not touch; ends are named, numbers round."""
    marks = [text for text in drawing.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    spans = sorted((float(text.get("x", "")), width_of(text.text or "", 11) / 2) for text in marks)
    assert all(x + half <= other - wide for (x, half), (other, wide) in itertools.pairwise(spans))
    assert {"embed", "head"} <= {text.text for text in marks}
    # The first and the last may have no room beside words.
    wanted = set(range(0, layers, 1 if layers < 40 else 10))
    found = {int(text.text or "") for text in marks if (text.text or "").isdigit()}
    assert found <= wanted
    assert wanted - found <= {min(wanted), max(wanted)}


def assert_inside(drawing: ElementTree.Element) -> None:
    """Rectangles lie in the frame, and have a size that is not negative."""
    width, height = (float(drawing.get(name, "")) for name in ("width", "height"))
    for rect in drawing.iter(f"{SVG}rect"):
        x, y, across, down = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert 0 <= across <= width - x + 0.05
        assert 0 <= down <= height - y + 0.05
    for text in drawing.iter(f"{SVG}text"):
        if text.get("text-anchor") == "middle" and text.get("transform") is None:
            half = width_of(text.text or "", float(text.get("font-size", ""))) / 2
            assert half <= float(text.get("x", "")) <= width - half


@pytest.mark.parametrize(
    "errors",
    [
        (0.0, 0.0),
        (float("nan"), 0.1),
        (float("inf"), float("nan")),
        (1e-9, 40.0),
        (0.1, 0.1),
        (5e-324, 1.0),
        (5e-324, 0.0),
        (1e308, 1.0),
    ],
)
def test_odd_errors(manifest: Manifest, errors: tuple[float, float]) -> None:
    plan = tuple(group_of(f"layers.{n}.o", error) for n, error in enumerate(errors))
    page = page_of(altered(manifest, plan=plan))
    assert_no_nan(page)
    assert ("not finite" in text_of(page)) == any(not error < 1e307 for error in errors)


@pytest.mark.parametrize("names", [(), ("embed",), ("layers.99999999999.o", "layers.7.o"), ("layers.٣.o", "layers..")])
def test_odd_plans(manifest: Manifest, names: tuple[str, ...]) -> None:
    page = page_of(altered(manifest, plan=tuple(group_of(name, 0.1) for name in names)), blocks=(), schemes={})
    tree_of(page)
    assert all(name in text_of(page) for name in names)
