"""Comparisons: which measurements may stand beside each other, what the front is, and the picture."""

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.compress import compare as comparing
from pressd.compress import compress
from pressd.compress.compare import DENSE, Comparison, Row, compare, comparison_json, show_comparison
from pressd.compress.pareto_plot import draw, figure_of
from pressd.compress.recipe import KEEP
from pressd.runtime.artifact.manifest import Manifest, read_manifest, write_manifest
from pressd.runtime.artifact.schemes import CASTS

if TYPE_CHECKING:  # an extra: a machine that tests something else must be able to collect this file without it
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

DATA = {"name": "stdlib", "split": "heldout", "tokens": 32768, "seq_len": 512, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def manifests(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Of one model pressed in four ways."""
    found = {}
    for scheme in ("w8a8", "w4a16g32", "w2a16", "bf16"):
        found[scheme] = compress(tiny_llama, scheme, tmp_path_factory.mktemp("pressed") / "out")
    return found


class Shelf:
    """Directories that hold a manifest and nothing else: all that comparing reads."""

    def __init__(self, path: Path, manifests: dict[str, Manifest]) -> None:
        self._path = path
        self._manifests = manifests

    def put(self, folder: str, scheme: str, kl: float | None = None, source: str | None = None, **data: object) -> str:
        manifest = self._manifests[scheme]
        quality: dict[str, object] = {
            "source": source or manifest.source.path,
            "data": DATA | data,
            "ppl_source": 10.0,
            "ppl": 12.5,
            "ppl_ratio": 1.25,
            "kl_mean": kl,
            "top1_agreement": 0.75,
            "stderr": {},
        }
        (self._path / folder / "pressd").mkdir(parents=True)
        update: dict[str, Any] = {"quality": {} if kl is None else quality}
        write_manifest(self._path / folder, manifest.model_copy(update=update))
        return str(self._path / folder)


@pytest.fixture
def shelf(tmp_path: Path, manifests: dict[str, Manifest]) -> Shelf:
    return Shelf(tmp_path, manifests)


def test_a_row_says_what_its_manifest_says(shelf: Shelf, manifests: dict[str, Manifest]) -> None:
    found = compare([shelf.put("a", "w8a8", 0.01), shelf.put("b", "w4a16g32", 0.5), shelf.put("c", "bf16", 0.0)])
    totals = manifests["w8a8"].totals
    row = found.rows[0]
    assert (row.name, row.schemes, row.bytes, row.ratio, row.bpw) == (
        *("a", ("w8a8",), totals.bytes, totals.ratio, totals.bpw),
    )
    assert (row.ppl, row.ppl_ratio, row.kl_mean, row.top1_agreement) == (12.5, 1.25, 0.01, 0.75)
    assert [row.schemes for row in found.rows] == [("w8a8",), ("w4a16g32",), ("bf16",)]
    assert [row.front for row in found.rows] == [True, True, True]
    assert found.notes == ()
    shown = show_comparison(found)
    assert shown.splitlines()[1].split() == [
        *("a", "w8a8", f"{totals.bytes / 2**20:.2f}", f"{totals.ratio:.2f}", f"{totals.bpw:.2f}"),
        *("12.500", "1.2500", "0.01000", "75.00%", "*"),
    ]
    assert "perplexity 10.000) on 32768 tokens of stdlib (heldout) in rows of 512" in shown


def test_what_was_measured_otherwise_is_named_and_left_out(shelf: Shelf) -> None:
    paths = [
        shelf.put("short", "w2a16", 1e-9, tokens=512, seq_len=64),
        shelf.put("a", "w8a8", 0.01),
        shelf.put("other-text", "w2a16", 1e-9, name="mine.txt", sha256="1" * 64),
        shelf.put("b", "w4a16g32", 0.5),
        shelf.put("other-source", "w2a16", 1e-9, source="models/other"),
        shelf.put("unmeasured", "w2a16"),
    ]
    found = compare(paths)
    assert [row.name for row in found.rows if row.comparable] == ["a", "b"]
    assert [row.name for row in found.rows if row.front] == ["a", "b"]
    assert found.protocol is not None
    assert found.protocol.tokens == 32768
    otherwise = "left out of the front, for it was measured otherwise"
    assert found.notes == (
        f"short: {otherwise} (512 tokens instead of 32768; rows of 64 instead of 512); measure it as the others",
        f"other-text: {otherwise} (on other text, mine.txt); measure it as the others",
        f"other-source: {otherwise} (against models/other); measure it as the others",
        f"unmeasured: not measured; run `pressd eval {paths[-1]}`",
    )
    last = show_comparison(found).splitlines()[6].split()
    assert (last[0], len(last)) == ("unmeasured", 5)


def test_one_source_is_one_source_wherever_it_lies(tiny_llama: Path, shelf: Shelf, tmp_path: Path) -> None:
    here = shelf.put("here", "w8a8", 0.1)
    there = shelf.put("there", "w4a16g32", 0.2)
    manifest = read_manifest(Path(there))
    assert manifest is not None
    moved = manifest.source.model_copy(update={"path": "/elsewhere"})
    quality = manifest.quality | {"source": "/elsewhere"}
    write_manifest(Path(there), manifest.model_copy(update={"source": moved, "quality": quality}))
    assert [row.comparable for row in compare([here, there]).rows] == [True, True]


def test_between_equally_many_the_first_decides(shelf: Shelf) -> None:
    paths = [shelf.put("a", "w8a8", 0.1, tokens=65536), shelf.put("b", "w8a8", 0.1), shelf.put("c", "w8a8")]
    assert [row.comparable for row in compare(paths).rows] == [True, False, False]
    assert [row.comparable for row in compare(paths[1:]).rows] == [True, False]


def test_nothing_measured(shelf: Shelf) -> None:
    found = compare([shelf.put("a", "w8a8"), shelf.put("b", "w4a16g32")])
    assert found.protocol is None
    assert not any(row.front or row.comparable for row in found.rows)
    assert show_comparison(found).endswith(
        "\n\n" + "\n".join(found.notes)
    )  # the table, then what to do, and nothing about how it was measured
    with pytest.raises(ValueError, match="nothing that was measured can be drawn; run `pressd eval DIR` first"):
        draw(found, Path("unwritten.png"))


def test_names_tell_directories_apart(shelf: Shelf, tmp_path: Path) -> None:
    paths = [shelf.put(name, "w8a8", 0.1) for name in ("x/out", "y/out", "z/other")]
    assert [row.name for row in compare(paths).rows] == [paths[0], paths[1], "other"]


@pytest.mark.parametrize("missing", ["data", "source", "ppl_source"])
def test_a_measurement_that_is_not_whole_is_refused(tiny_llama: Path, missing: str, tmp_path: Path) -> None:
    manifest = compress(tiny_llama, "w8a8", tmp_path / "out")
    data = {"name": "x", "split": "heldout", "sha256": "0" * 64, "tokens": 8, "seq_len": 4}
    quality: dict[str, object] = {"source": manifest.source.path, "data": data, "ppl_source": 2.0, "kl_mean": 0.1}
    del quality[missing]
    write_manifest(tmp_path / "out", manifest.model_copy(update={"quality": quality}))
    with pytest.raises(ValueError, match="the measurement in its manifest is not whole; run `pressd eval"):
        compare([str(tmp_path / "out")])


def test_what_is_no_artifact_is_refused(tiny_llama: Path, shelf: Shelf) -> None:
    with pytest.raises(ValueError, match="is not an artifact of pressd"):
        compare([shelf.put("a", "w8a8", 0.1), str(tiny_llama)])


def test_dense_schemes_are_those_that_cast() -> None:
    assert set(DENSE) == {KEEP, *CASTS}


def row_of(name: str, size: int, kl: float | None, *, comparable: bool = True) -> Row:
    return Row(
        name=name,
        path=name,
        schemes=("w4a16",),
        bytes=size,
        ratio=1.0,
        bpw=4.0,
        ppl=10.0,
        ppl_ratio=1.0,
        kl_mean=kl,
        top1_agreement=1.0,
        comparable=comparable,
        front=False,
    )


def comparison_of(rows: list[Row]) -> Comparison:
    fronts = [comparing._is_on_front(row, rows) for row in rows]
    marked = [Row(**{**_fields(row), "front": front}) for row, front in zip(rows, fronts, strict=True)]
    return Comparison(rows=tuple(marked), protocol=None, data="against SOURCE", notes=())


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__slots__}


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4]), st.booleans()), max_size=12))
def test_the_front_is_what_a_sweep_by_size_finds(drawn: list[tuple[int, float, bool]]) -> None:
    rows = [row_of(str(index), size, kl, comparable=ok) for index, (size, kl, ok) in enumerate(drawn)]
    expected: set[tuple[int, float]] = set()
    best = float("inf")
    for size, kl, _ in sorted(entry for entry in drawn if entry[2]):
        if kl < best:
            best = kl
            expected.add((size, kl))
    for row, (size, kl, ok) in zip(comparison_of(rows).rows, drawn, strict=True):
        assert row.front == (ok and (size, kl) in expected)


def test_a_model_that_computes_nan_is_on_no_front(tmp_path: Path) -> None:
    found = comparison_of([row_of("nan", 1, float("nan")), row_of("a", 2, 0.5)])
    assert [row.front for row in found.rows] == [False, True]
    draw(found, tmp_path / "a.png")


CLUSTERS = {
    "spread": [(10, 0.4), (12, 0.1), (14, 0.03), (20, 0.001), (30, 1e-4), (33, 0.02), (50, 0.3), (60, 1e-5)],
    "close": [(1000 + 4 * index, 0.1 * 0.97**index) for index in range(8)],
    "one": [(10, 0.1)],
    "exact": [(10, 0.2), (12, 0.1), (28, 0.0), (29, 0.0)],
    "only exact": [(28, 0.0)],
}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_names_cover_neither_each_other_nor_a_point(cluster: str) -> None:
    rows = [row_of(f"w4a16g{index}-artifact", size << 16, kl) for index, (size, kl) in enumerate(CLUSTERS[cluster])]
    figure = figure_of(comparison_of(rows))
    labels, points = _labels(figure), _points(figure)
    assert len(labels) == len(points) == len(rows)
    boxes = [label.get_window_extent() for label in labels]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box, (x, y) in itertools.product(boxes, points):
        assert not box.contains(x, y)
    (axes,) = figure.axes
    assert all(axes.get_window_extent().contains(*corner) for box in boxes for corner in box.corners())


def test_names_that_would_cover_each_other_are_found() -> None:
    """The check above can fail: written where matplotlib puts them unasked, close names do overlap."""
    from matplotlib.figure import Figure

    points = CLUSTERS["close"]
    figure = Figure()
    axes = figure.add_subplot()
    for x, y in points:
        axes.annotate("w4a16g32-artifact", (x, y))
    axes.set_xlim(900, 1100)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in _labels(figure)]
    assert any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def _labels(figure: "Figure") -> "list[Annotation]":
    from matplotlib.text import Annotation

    (axes,) = figure.axes
    return [text for text in axes.texts if isinstance(text, Annotation)]


def _points(figure: "Figure") -> list[tuple[float, float]]:
    (axes,) = figure.axes
    found = [axes.transData.transform(offset) for dots in axes.collections for offset in dots.get_offsets()]
    return [(float(x), float(y)) for x, y in found]


def test_a_picture_is_the_same_every_time(shelf: Shelf, tmp_path: Path) -> None:
    found = compare([shelf.put("a", "w8a8", 0.01), shelf.put("b", "w4a16g32", 0.5), shelf.put("c", "bf16", 0.0)])
    for name in ("one.png", "two.png"):
        draw(found, tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two
    assert one.startswith(b"\x89PNG\r\n")
    assert b"Software" not in one
    labels = {label.get_text() for label in _labels(figure_of(found))}
    assert labels == {"a", "b", "c (KL 0)"}


def test_without_matplotlib_there_is_a_way_out(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare([shelf.put("a", "w8a8", 0.01)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # makes the import fail
    with pytest.raises(ValueError, match=r"--png needs matplotlib; run: pip install 'pressd\[plots\]'"):
        draw(found, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_object_has_all_of_it(shelf: Shelf) -> None:
    found = json.loads(comparison_json(compare([shelf.put("a", "w8a8", 0.01), shelf.put("b", "w2a16")])))
    assert found.keys() == {"rows", "protocol", "data", "notes"}
    assert found["rows"][0]["schemes"] == ["w8a8"]
    assert (found["rows"][0]["front"], found["rows"][1]["front"]) == (True, False)
    assert found["rows"][1]["kl_mean"] is None
    assert found["protocol"].keys() == {"source", "sha256", "tokens", "seq_len"}
