"""The measured parts of an artifact's page: quality, where the error is, groups, and what it cost. No torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pressd.compress.markup import Html
from pressd.compress.measurement import finite, standard_error
from pressd.compress.page import beside, data_table, figure, folded, paragraph, section
from pressd.compress.svg_bars import lying_bars, standing_bars
from pressd.compress.svg_heat_map import LayerErrors, arrange, heat_map, legend, percent, shades_of
from pressd.compress.svg_scatter import Dot, scatter
from pressd.compress.tables import duration, size
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup

if TYPE_CHECKING:
    from pressd.compress.report import GroupError, Report

# Rows that a table may have and still stand open.
_OPEN_ROWS = 40
_NUM_WORST = 3
# No model predicts so badly but a broken one, and no axis needs to reach there.
_DRAWABLE = 1e100
# Keys of a measurement that are told in words.
_TOLD = frozenset({"data", "source", "stderr", "artifact"})
# Metrics in the order in which they explain each other; others follow by name.
_ORDER = ("ppl_source", "ppl", "ppl_ratio", "kl_mean", "kl_median", "kl_p99", "kl_max", "js_mean", "top1_agreement")


def remarks(group: PlannedGroup) -> Iterator[str]:
    """Yield what a reader must know about a group: that it fell back, and its notes, where the manifest has such."""
    if group.fallback is not None:
        yield f"fallback: {group.fallback}"
    yield from group.notes


def quality_section(manifest: Manifest) -> Html:
    """Size against quality, this artifact against its source, and every metric."""
    if not manifest.quality:
        return section("Size and quality", paragraph("Not measured yet; run pressd eval on the artifact."))
    metrics = data_table(("metric", "value", "standard error"), _metrics(manifest.quality))
    drawn = _against_source(manifest)
    note = paragraph("Perplexities that are no numbers, or beyond all measure, are not drawn.", class_="note")
    return section(
        "Size and quality",
        paragraph(_how_measured(manifest.quality)),
        beside(note if drawn is None else drawn, metrics),
        paragraph("Standard errors are over rows of text, logarithms natural.", class_="note"),
    )


def _against_source(manifest: Manifest) -> Html | None:
    totals = manifest.totals
    sides = [("source", totals.dense_bytes, "ppl_source"), ("this artifact", totals.bytes, "ppl")]
    dots = []
    for name, count, metric in sides:
        value = finite(manifest.quality.get(metric))
        if value is None or not 0 < value < _DRAWABLE or not count:
            return None
        told = f"{name}: {size(count)}, perplexity {value:.4g}"
        dots.append(Dot(name=name, told=told, x=count / 2**20, y=value, joined=True))
    return scatter(
        "quality",
        dots,
        labels=("weights, MiB", "perplexity, lower is better"),
        title="Size and perplexity of the source and of this artifact",
        told="; ".join(dot.told for dot in dots),
        size=(500.0, 330.0),
    )


def _how_measured(quality: Mapping[str, object]) -> str:
    """How a measurement was made, as far as it says so."""
    data = quality.get("data")
    said = {key: str(value) for key, value in data.items()} if isinstance(data, dict) else {}
    parts = (
        ("against ", str(quality.get("source", ""))),
        ("on ", f"{said['tokens']} tokens" if "tokens" in said else ""),
        ("of ", said.get("name", "")),
        ("", f"({said['split']})" if "split" in said else ""),
        ("in rows of ", said.get("seq_len", "")),
    )
    told = " ".join(f"{before}{what}" for before, what in parts if what)
    return f"Measured {told}." if told else "Measured; the manifest does not say how."


def _metrics(quality: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    for name, value in _flat({key: value for key, value in quality.items() if key not in _TOLD}):
        number, error = finite(value), standard_error(quality, name)
        shown = _plain(value) if number is None else f"{value:,}" if isinstance(value, int) else f"{number:#.5g}"
        yield name, shown, "" if error is None else f"{error:.2g}"


def _flat(values: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    order = {name: index for index, name in enumerate(_ORDER)}
    for key in sorted(values, key=lambda key: (order.get(key, len(order)), key)):
        value = values[key]
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _plain(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "not finite"
    return value if isinstance(value, str) else json.dumps(value)


def error_section(manifest: Manifest, worst: "Sequence[GroupError]") -> Html:
    """The sensitivity map, its scale, and its numbers as a table."""
    title = "Where the error is"
    about = paragraph(
        "How far each fused group is from its source: the Frobenius norm of the difference over that of the weights, "
        "in percent. A dash is a group that lost nothing."
    )
    if not manifest.plan:
        return section(title, paragraph("The plan has no groups."))
    errors = arrange(manifest.plan)
    shades = shades_of(errors)
    parts = [about, heat_map("map", errors, shades, title="Relative error by layer and kind of group")]
    if shades is not None:
        named = ", ".join(f"{one.name} ({percent(one.error)}\u00a0%)" for one in worst[:_NUM_WORST])
        scale = "Percent; equal steps of its logarithm" if shades.is_log else "Percent"
        parts += [
            legend("scale", shades, title="Scale of the map"),
            paragraph(f"{scale}. Most lost: {named}.", class_="note"),
        ]
    if errors.numbers:
        is_open = len(errors.numbers) <= _OPEN_ROWS // 2
        parts.append(folded("The numbers, in percent", _error_table(errors), is_open=is_open))
    return section(title, *parts)


def _error_table(errors: LayerErrors) -> Html:
    def cell(kind: str, number: int) -> str:
        group = errors.layers.get((kind, number))
        return "" if group is None else percent(group.error) if group.error else "–"

    rows = ((f"layer {number}", *(cell(kind, number) for kind in errors.kinds)) for number in errors.numbers)
    return data_table(("", *errors.kinds), rows)


def groups_section(manifest: Manifest) -> Html:
    """Every fused group as it is stored."""
    passes = {group.name: ", ".join(group.passes) for group in manifest.plan}
    notes = {group.name: "; ".join(remarks(group)) for group in manifest.plan}
    head = ["group", "scheme", "shape", "bits/weight", "bytes", "error, %"]
    head += ["passes"] if any(passes.values()) else []
    head += ["remarks"] if any(notes.values()) else []

    def row(group: PlannedGroup) -> list[str]:
        cells = [group.name, group.scheme, " × ".join(f"{length:,}" for length in group.shape), f"{group.bits:.3f}"]
        cells += [f"{group.bytes:,}", percent(group.error) if group.error else "–"]
        cells += [passes[group.name]] if "passes" in head else []
        return cells + ([notes[group.name]] if "remarks" in head else [])

    left = {0, 1, *(index for index, name in enumerate(head) if name in ("passes", "remarks"))}
    wide = {index for index, name in enumerate(head) if name == "remarks"}
    table = data_table(head, map(row, manifest.plan), left=left, wide=wide)
    num = len(manifest.plan)
    return section("Groups", folded(f"All {num} fused groups", table, is_open=num <= _OPEN_ROWS))


def cost_section(report: "Report") -> Html:
    """Seconds of each block, scheme and pass; memory, energy and the machine."""
    cost = report.cost
    drawn = []
    if cost.blocks:
        bars = [(block.name, _mark(block.name), block.seconds) for block in cost.blocks]
        drawn.append(figure("Seconds per block", standing_bars("blocks", bars, "s", title="Seconds per block")))
    for what, values in (("scheme", cost.schemes), ("pass", cost.passes)):
        if values:
            title = f"Seconds per {what}"
            longest_first = dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))
            drawn.append(figure(title, lying_bars(what, longest_first, "s", title=title)))
    energy = "" if cost.joules is None else f" It took {_energy(cost.joules)}."
    return section(
        "Cost",
        paragraph(
            f"Pressed in {duration(cost.wall_seconds)}, with {size(cost.peak_rss_bytes)} of memory at most, on "
            f"{report.machine.cpu} ({report.machine.cores} cores).{energy}"
        ),
        beside(*drawn),
    )


def _mark(block: str) -> str:
    return block.removeprefix("layers.")


def _energy(joules: float) -> str:
    told = f"{joules:.0f}\u00a0J" if joules < 10_000 else f"{joules / 1000:,.1f}\u00a0kJ"
    return f"{told} ({joules / 3600:,.3g}\u00a0Wh)"
