"""Shows what an artifact says about itself: its manifest as a table. Checks nothing, reads no weights. No torch."""

from collections.abc import Sequence
from pathlib import Path

from pressd.compress.quality_text import show_more
from pressd.compress.report import Report
from pressd.compress.tables import mebibytes, table
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup, Totals, read_manifest

_COLUMNS = ("group", "scheme", "passes", "shape", "bits/weight", "bytes", "error")
# Metrics with more digits than anybody compares.
_DIGITS = 5


def read(artifact: str | Path) -> Manifest:
    """Return the manifest; raises ValueError if the directory is not an artifact of ours."""
    path = Path(artifact)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give an artifact that `pressd compress` wrote")
    manifest = read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path} is not an artifact of pressd (it has no manifest); press it first")
    return manifest


def show(manifest: Manifest, report: Report | None) -> str:
    """Return the manifest as text: a row per fused group, then totals, what it cost and, once measured, quality."""
    parts = [table([_COLUMNS, *(_row(group) for group in manifest.plan)])]
    notes = [f"{group.name}: {'; '.join(group.notes)}" for group in manifest.plan if group.notes]
    if notes:
        parts.append("\n".join(notes))
    parts.append(show_totals(manifest.totals))
    if manifest.calibration:
        parts[-1] += f"\n{_show_calibration(manifest.calibration)}"
    if report is not None:
        parts[-1] += f"\n{_show_cost(report)}"
    if manifest.quality:
        parts.append(show_quality(manifest.quality))
    else:
        parts.append("quality: not measured yet; run `pressd eval`")
    requires = ", ".join(f"{name} {bound}" for name, bound in sorted(manifest.requires.items()))
    parts.append(f"id {manifest.id}" + (f"\nother tools need {requires}" if requires else ""))
    return "\n\n".join(parts)


def show_totals(totals: Totals) -> str:
    """Return one line of sizes."""
    bpw = "" if totals.bpw is None else f", pressed linears {totals.bpw:.3f} bits per weight"
    sizes = f"{mebibytes(totals.bytes)} of weights (dense {mebibytes(totals.dense_bytes)}, ratio {totals.ratio:.2f})"
    return f"{totals.params:,} parameters, {sizes}{bpw}"


def show_passes(passes: Sequence[str]) -> str:
    """Return the passes of a group in one cell."""
    return " ".join(passes) or "-"


def show_quality(quality: dict[str, object]) -> str:
    """Return a measurement as a table of metric, value and standard error."""
    errors, data = quality["stderr"], quality["data"]
    assert isinstance(errors, dict)
    assert isinstance(data, dict)
    rows: list[Sequence[str]] = [("metric", "value", "standard error")]
    for name, value in quality.items():
        if isinstance(value, float):
            error = errors.get(name)
            rows.append((name, f"{value:.{_DIGITS}g}", "" if error is None else f"{error:.2g}"))
    read = f"{data['tokens']} tokens of {data['name']} ({data['split']}) in rows of {data['seq_len']}"
    shown = f"{table(rows)}\nagainst {quality['source']} on {read}; standard errors are over rows, logarithms natural"
    return "\n\n".join([shown, *show_more(quality)])


def _show_calibration(found: dict[str, object]) -> str:
    """Which text was looked at; a manifest may come from elsewhere, so every key may be missing."""
    tokens, data, seq_len, seed = (found.get(key, "?") for key in ("tokens", "data", "seq_len", "seed"))
    return f"calibrated on {tokens} tokens of {data} in rows of {seq_len}, seed {seed}"


def _show_cost(report: Report) -> str:
    cost, machine = report.cost, report.machine
    energy = "" if cost.joules is None else f", {cost.joules:.0f} J of the processors"
    return (
        f"pressed in {cost.wall_seconds:.1f} s{energy}, {mebibytes(cost.peak_rss_bytes)} of memory at most, on "
        f"{machine.cpu} ({machine.cores} cores) with torch {machine.torch}"
    )


def _row(group: PlannedGroup) -> Sequence[str]:
    shape = " x ".join(map(str, group.shape))
    note = f"{group.error:.2%}" if group.fallback is None else f"{group.error:.2%} (fallback: {group.fallback})"
    return group.name, group.scheme, show_passes(group.passes), shape, f"{group.bits:.3f}", f"{group.bytes:,}", note
