"""A comparison as a page: its rows, its front, and what cannot be drawn."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pressd.compress import compress
from pressd.compress.compare import Comparison, Row
from pressd.compress.compare_html import comparison_page
from pressd.runtime.artifact.manifest import Manifest, write_manifest
from pressd.server import cli

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert(1)</script>&"
DATA = {"name": "stdlib", "split": "heldout", "tokens": 32768, "seq_len": 512, "sha256": "0" * 64}


def row_of(name: str, size: int, kl: float | None, *, front: bool) -> Row:
    return Row(
        name=name,
        path=name,
        schemes=("w4a16", "w8a8"),
        bytes=size << 20,
        ratio=2.0,
        bpw=4.0,
        ppl=10.0,
        ppl_ratio=1.0,
        kl_mean=kl,
        top1_agreement=1.0,
        comparable=kl is not None,
        front=front,
    )


def page_of(*rows: Row, notes: tuple[str, ...] = ()) -> ElementTree.Element:
    comparison = Comparison(rows=rows, protocol=None, data="against SOURCE", notes=notes)
    page = comparison_page(comparison)
    assert comparison_page(comparison) == page
    return ElementTree.fromstring(page.partition("\n")[2])


ROWS = (
    row_of("small", 4, 0.5, front=True),
    row_of("middle", 6, 0.9, front=False),
    row_of("exact", 16, 0.0, front=True),
    row_of("unmeasured", 5, None, front=False),
)


def test_a_page_has_every_row_and_marks_the_front() -> None:
    tree = page_of(*ROWS, notes=("unmeasured: not measured",))
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows[1] == ["small", "w4a16, w8a8", "4.00", "2.00", "4.00", "10.000", "1.0000", "0.50000", "100.00%", "●"]
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        *(("small", "●"), ("middle", ""), ("exact", "●"), ("unmeasured", "")),
    ]
    (drawing,) = tree.iter(f"{SVG}svg")
    names = {text.text for text in drawing.iter(f"{SVG}text")}
    assert {"small", "middle", "exact (KL 0)"} <= names
    assert "unmeasured" not in names
    assert [mark.get("class") for mark in drawing.iter(f"{SVG}circle")] == ["dot on", "dot off"]
    told = [title.text for title in drawing.iter(f"{SVG}title")]
    assert told[1:] == ["small: 4.00 MiB, KL 0.5", "middle: 6.00 MiB, KL 0.9", "exact: 16.00 MiB, KL 0"]
    words = " ".join(tree.itertext())
    assert "A triangle does not diverge at all" in words
    assert "Not comparable" in words
    assert "unmeasured: not measured" in words
    assert "triangle" not in " ".join(page_of(*ROWS[:2]).itertext())


def test_nothing_measured_is_said() -> None:
    tree = page_of(ROWS[3])
    assert not list(tree.iter(f"{SVG}svg"))
    assert "Nothing that was measured can be drawn; run pressd eval" in " ".join(tree.itertext())


def test_names_are_text() -> None:
    rows = [replace(row, name=HOSTILE, path=HOSTILE, schemes=(HOSTILE,)) for row in ROWS]
    tree = page_of(*rows, notes=(HOSTILE,))
    assert not list(tree.iter("script"))
    assert " ".join(tree.itertext()).count(HOSTILE) >= 2 * len(rows)


def test_the_verb_writes_it(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: Manifest = compress(tiny_llama, "w8a8", tmp_path / "out")
    quality: dict[str, object] = {"source": made.source.path, "data": DATA, "ppl_source": 2.0, "kl_mean": 0.1}
    write_manifest(tmp_path / "out", made.model_copy(update={"quality": quality}))
    html = tmp_path / "a.html"
    assert cli.main(["compare", str(tmp_path / "out"), "--html", str(html)]) == 0
    assert capsys.readouterr().out.startswith("artifact")
    tree = ElementTree.fromstring(html.read_text(encoding="utf-8").partition("\n")[2])
    assert "perplexity 2.000) on 32768 tokens of stdlib (heldout)" in " ".join(tree.itertext())
    assert len(list(tree.iter(f"{SVG}circle"))) == 1
