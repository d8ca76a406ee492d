"""`pressd/report.html`: what a person reads first about an artifact, from its manifest and its report. No torch.

One file without scripts, that fetches nothing. The same manifest and report give the same bytes.
"""

import shlex
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from pressd.compress.markup import Html, element
from pressd.compress.measurement import Gate, check_gates, finite, standard_error
from pressd.compress.page import alert, beside, data_table, folded, headline, page, paragraph, section, verbatim
from pressd.compress.report_sections import cost_section, error_section, groups_section, quality_section, remarks
from pressd.compress.tables import duration, size
from pressd.runtime.artifact.manifest import FOLDER, Manifest, StoredFile

if TYPE_CHECKING:  # which imports this module to write both
    from pressd.compress.report import Report

UNMEASURED = "not measured; run pressd eval"
# Schemes or groups that one line names; the table has them all.
_NAMED = 6


def report_page(manifest: Manifest, report: "Report") -> str:
    """Return the page as one document."""
    name = PurePath(manifest.source.path).name or manifest.source.path
    schemes = _some(_schemes(manifest))
    gates = list(check_gates(manifest.gates, manifest.quality))
    warnings = list(_warnings(manifest, gates))
    return page(
        f"{name}: {schemes}",
        element("h1", f"{name}, pressed with {schemes}"),
        paragraph(f"{manifest.totals.params:,} parameters from {manifest.source.path}", class_="lead"),
        paragraph(f"artifact {manifest.id[:16]}, by {manifest.tool.name} {manifest.tool.version}", class_="lead"),
        headline(_headline(manifest, report)),
        *([alert("What to know first", warnings)] if warnings else []),
        quality_section(manifest),
        _gates_section(gates),
        error_section(manifest, report.worst),
        groups_section(manifest),
        cost_section(report),
        _reproduction(manifest, report),
        _readers(manifest),
    )


def _schemes(manifest: Manifest) -> list[str]:
    """Schemes of the recipe in order of appearance; what only says that nothing was done comes last."""
    schemes = dict.fromkeys(group.scheme for group in manifest.plan)
    lossy = dict.fromkeys(group.scheme for group in manifest.plan if group.error)
    return list(lossy) or list(schemes) or ["nothing"]


def _headline(manifest: Manifest, report: "Report") -> Iterator[tuple[str, str, str]]:
    totals, quality, cost = manifest.totals, manifest.quality, report.cost
    yield "weights", size(totals.bytes), f"of {size(totals.dense_bytes)} dense"
    yield "ratio", f"{totals.ratio:.2f}×", "dense bytes over these"
    bits = (
        ("–", "nothing was pressed") if totals.bpw is None else (f"{totals.bpw:.3f}", "in what was pressed, scales too")
    )
    yield "bits per weight", *bits
    perplexities = [finite(quality.get(key)) for key in ("ppl_source", "ppl")]
    change = " → ".join(f"{value:#.4g}" for value in perplexities if value is not None)
    yield _measured("perplexity ratio", manifest, "ppl_ratio", ".4f", change)
    yield _measured("KL from the source", manifest, "kl_mean", ".4f", "nats per token")
    yield _measured("top-1 agreement", manifest, "top1_agreement", ".2%", "same most likely token")
    yield "time to press", duration(cost.wall_seconds), f"on {report.machine.cores} cores"
    yield "memory at most", size(cost.peak_rss_bytes), "mapped files included"


def _measured(what: str, manifest: Manifest, metric: str, form: str, remark: str) -> tuple[str, str, str]:
    if metric not in manifest.quality:
        return what, "–", UNMEASURED
    value, error = finite(manifest.quality[metric]), standard_error(manifest.quality, metric)
    if value is None:
        return what, "–", "not finite"
    spread = "" if error is None else f"± {format(error, form)}"
    return what, format(value, form), "; ".join(filter(None, (spread, remark)))


def _warnings(manifest: Manifest, gates: list[Gate]) -> Iterator[Html]:
    for gate in gates:
        if gate.kept is False:
            measured = "not a finite number" if gate.value is None else f"{gate.value:.6g}"
            yield element("span", f"gate missed: {gate.metric} is {measured}, the recipe asks for {_bound(gate)}")
    groups: dict[str, list[str]] = {}
    for group in manifest.plan:
        for remark in remarks(group):
            groups.setdefault(remark, []).append(group.name)
    for remark, names in groups.items():
        yield element("span", f"{remark}: {_some(names)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _bound(gate: Gate) -> str:
    return f"{'at least' if gate.at_least else 'at most'} {gate.bound:.6g}"


def _gates_section(gates: list[Gate]) -> Html:
    if not gates:
        return section("Gates", paragraph("The recipe sets none."))

    def rows() -> Iterator[tuple[str, ...]]:
        for gate in gates:
            if gate.kept is None:
                result = element("span", "not measured")
            elif gate.kept:
                result = element("span", "✓ kept", class_="kept-word")
            else:
                result = element("span", "✗ missed", class_="missed")
            measured = "" if gate.kept is None else "not finite" if gate.value is None else f"{gate.value:.6g}"
            yield gate.metric, _bound(gate), measured, result

    return section("Gates", data_table(("metric", "the recipe asks for", "measured", "result"), rows(), left=(0, 3)))


def _reproduction(manifest: Manifest, report: "Report") -> Html:
    machine, tool = report.machine, manifest.tool
    told = ["pressd", "compress", manifest.source.path, "--recipe", f"{FOLDER}/recipe.toml", "-o", "OUT"]
    how = (
        [paragraph("The command is not recorded; inside the artifact, this does the same:"), verbatim(shlex.join(told))]
        if report.command is None
        else [verbatim(report.command)]
    )
    return section(
        "To reproduce it",
        *how,
        paragraph(f"The recipe, which lies in {FOLDER}/recipe.toml (sha256 {manifest.recipe.sha256[:16]}):"),
        verbatim(manifest.recipe.text),
        paragraph(
            f"Pressed by {tool.name} {tool.version} on {machine.cpu} ({machine.cores} cores), with torch "
            f"{machine.torch} and Python {machine.python}."
        ),
        beside(
            folded("Files of the source", _files(manifest.source.files), is_open=False),
            folded("Files of the artifact", _files(manifest.files), is_open=False),
        ),
        paragraph("id ", element("code", manifest.id), class_="note"),
    )


def _files(files: dict[str, StoredFile]) -> Html:
    rows = ((name, f"{file.bytes:,}", file.sha256[:16]) for name, file in sorted(files.items()))
    return data_table(("file", "bytes", "sha256, its beginning"), rows, left=(0, 2))


def _readers(manifest: Manifest) -> Html:
    requires = ", ".join(f"{name} {bound}" for name, bound in sorted(manifest.requires.items()))
    return section(
        "What loads it",
        data_table(("reader", "how"), sorted(manifest.loads_in.items()), left=(0, 1)),
        paragraph(
            "native: reads it as it is. layout-checked: its layout is what that reader documents, but it was not "
            "loaded there.",
            *([f" Other readers need {requires}."] if requires else []),
            class_="note",
        ),
    )
