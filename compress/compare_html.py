"""A comparison as a page: the table, which no other beats, and size against divergence. No torch."""

from collections.abc import Iterator
from pathlib import Path

from pressd.compress.compare import COLUMNS, Comparison, cells
from pressd.compress.markup import Html, element
from pressd.compress.page import alert, data_table, page, paragraph, section
from pressd.compress.pareto_points import pareto_points
from pressd.compress.svg_scatter import Dot, scatter

_TITLE = "Artifacts side by side"


def comparison_page(comparison: Comparison) -> str:
    """Return the page as one document, the same for the same comparison."""
    return page(
        _TITLE,
        element("h1", _TITLE),
        *([paragraph(comparison.data, class_="lead")] if comparison.data else []),
        *([alert("Not comparable", comparison.notes)] if comparison.notes else []),
        section("Size and divergence", *_drawing(comparison)),
        section(
            "All artifacts",
            data_table(COLUMNS, _rows(comparison), left=(0, 1)),
            paragraph(
                "● on the front: no other is smaller and closer to the source. KL in nats per token.", class_="note"
            ),
        ),
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`."""
    path.write_text(comparison_page(comparison), encoding="utf-8")


def _drawing(comparison: Comparison) -> list[Html]:
    points = pareto_points(comparison)
    if not points:
        return [paragraph("Nothing that was measured can be drawn; run pressd eval on the artifacts.")]
    dots = [
        Dot(
            name=point.label,
            told=f"{point.name}: {point.mebibytes:.2f} MiB, KL {0 if point.exact else point.kl:.4g}",
            x=point.mebibytes,
            y=point.kl,
            joined=point.front,
            exact=point.exact,
        )
        for point in points
    ]
    front = ", ".join(dot.told for dot in dots if dot.joined)
    picture = scatter(
        "front",
        dots,
        labels=("weights, MiB", "mean KL from the source, nats per token"),
        title="Size and divergence of each artifact",
        told=f"on the front: {front}",
        size=(912.0, 520.0),
    )
    note = "Both axes are logarithmic. Filled and joined: the front, which no other artifact beats in both."
    if any(point.exact for point in points):
        note += " A triangle does not diverge at all; it has no place on the axis and stands at the bottom."
    return [picture, paragraph(note, class_="note")]


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    for row in comparison.rows:
        *others, front = cells(row)
        yield [*others, element("span", "●", class_="kept-word", aria_label="on the front") if front else ""]
