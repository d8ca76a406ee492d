"""Puts artifacts side by side: size against fidelity, and which no other beats in both. Manifests only. No torch."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pressd.compress.inspect import read
from pressd.compress.measurement import finite
from pressd.compress.recipe import KEEP
from pressd.compress.tables import mebibytes, table
from pressd.runtime.artifact.manifest import Manifest

# Schemes that only say in which precision a weight is kept.
DENSE = (KEEP, "bf16", "fp16")
COLUMNS = ("artifact", "schemes", "MiB", "ratio", "bpw", "perplexity", "ppl ratio", "KL", "top-1", "front")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What two measurements must have in common to be comparable."""

    source: str
    sha256: str
    tokens: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One artifact. Metrics are None where nothing was measured.

    `comparable` says that it was measured as most of the others; `front` that none of those that were is smaller and
    closer to the source (or as good in one and better in the other).
    """

    name: str
    path: str
    schemes: tuple[str, ...]
    bytes: int
    ratio: float
    bpw: float | None
    ppl: float | None
    ppl_ratio: float | None
    kl_mean: float | None
    top1_agreement: float | None
    comparable: bool
    front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows in the order they were asked for, how they were measured, and what a reader must know besides."""

    rows: tuple[Row, ...]
    protocol: Protocol | None
    data: str
    notes: tuple[str, ...]


def compare(artifacts: Sequence[str]) -> Comparison:
    """Read the manifests of `artifacts`; raises ValueError for a directory that is not one of ours."""
    manifests = [read(path) for path in artifacts]
    for path, manifest in zip(artifacts, manifests, strict=True):
        _check_quality(path, manifest)
    names = _names(artifacts)
    protocols = [_protocol(manifest) for manifest in manifests]
    # The first of those that are most frequent: Counter keeps the order of arrival.
    common = max(counts, key=lambda one: counts[one]) if (counts := Counter(filter(None, protocols))) else None
    rows = [
        _row(name, path, manifest, comparable=protocol is not None and protocol == common)
        for name, path, manifest, protocol in zip(names, artifacts, manifests, protocols, strict=True)
    ]
    notes = [
        f"{row.name}: {_why_not(row, manifest, protocol, common)}"
        for row, manifest, protocol in zip(rows, manifests, protocols, strict=True)
        if not row.comparable
    ]
    data = next((_data(m) for m, p in zip(manifests, protocols, strict=True) if common and p == common), "")
    return Comparison(
        rows=tuple(dataclasses.replace(row, front=_is_on_front(row, rows)) for row in rows),
        protocol=common,
        data=data,
        notes=tuple(notes),
    )


def comparison_json(comparison: Comparison) -> str:
    """Return a comparison as one JSON object."""
    return json.dumps(dataclasses.asdict(comparison), indent=2, allow_nan=False)


def show_comparison(comparison: Comparison) -> str:
    """Return a comparison as a table, and its notes."""
    parts = [table([COLUMNS, *map(cells, comparison.rows)])]
    if comparison.data:
        parts.append(f"{comparison.data}\n* no other is smaller and closer to the source")
    parts += ["\n".join(comparison.notes)] if comparison.notes else []
    return "\n\n".join(parts)


def _names(artifacts: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart, else the path."""
    short = [Path(path).resolve().name for path in artifacts]
    counts = Counter(short)
    return [name if counts[name] == 1 else path for name, path in zip(short, artifacts, strict=True)]


def _check_quality(path: str, manifest: Manifest) -> None:
    """A manifest's measurement is a free object: what is read of it here must be there."""
    quality = manifest.quality
    data = quality.get("data")
    wanted = {"sha256": str, "tokens": int, "seq_len": int, "name": str, "split": str}
    whole = (
        isinstance(data, dict)
        and all(isinstance(data.get(key), kind) for key, kind in wanted.items())
        and isinstance(quality.get("source"), str)
        and isinstance(quality.get("ppl_source"), int | float)
    )
    if quality and not whole:
        raise ValueError(f"{path}: the measurement in its manifest is not whole; run `pressd eval {path}`")


def _protocol(manifest: Manifest) -> Protocol | None:
    if not manifest.quality:
        return None
    data, source = manifest.quality["data"], manifest.quality["source"]
    assert isinstance(data, dict)
    return Protocol(
        source=_source_identity(manifest) if source == manifest.source.path else str(source),
        sha256=str(data["sha256"]),
        tokens=int(data["tokens"]),
        seq_len=int(data["seq_len"]),
    )


def _source_identity(manifest: Manifest) -> str:
    """One word for one source, wherever it lies: what its files are."""
    lines = (f"{file.sha256}  {name}\n" for name, file in sorted(manifest.source.files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _row(name: str, path: str, manifest: Manifest, *, comparable: bool) -> Row:
    schemes = dict.fromkeys(group.scheme for group in manifest.plan)
    told = [scheme for scheme in schemes if scheme not in DENSE] or [s for s in schemes if s != KEEP] or [KEEP]
    # What is not finite has no place in a comparison, nor in JSON.
    metrics = {key: finite(manifest.quality.get(key)) for key in ("ppl", "ppl_ratio", "kl_mean", "top1_agreement")}
    return Row(
        name=name,
        path=path,
        schemes=tuple(told),
        bytes=manifest.totals.bytes,
        ratio=manifest.totals.ratio,
        bpw=manifest.totals.bpw,
        comparable=comparable,
        front=False,
        **metrics,
    )


def _is_on_front(row: Row, rows: Sequence[Row]) -> bool:
    if not row.comparable or row.kl_mean is None or math.isnan(row.kl_mean):
        return False
    return not any(
        other.comparable
        and other.kl_mean is not None
        and (other.bytes, other.kl_mean) != (row.bytes, row.kl_mean)
        and other.bytes <= row.bytes
        and other.kl_mean <= row.kl_mean
        for other in rows
    )


def _why_not(row: Row, manifest: Manifest, protocol: Protocol | None, common: Protocol | None) -> str:
    if protocol is None or common is None:
        return f"not measured; run `pressd eval {row.path}`"
    data = manifest.quality["data"]
    assert isinstance(data, dict)
    differing = {
        f"against {manifest.quality['source']}": protocol.source != common.source,
        f"on other text, {data['name']}": protocol.sha256 != common.sha256,
        f"{protocol.tokens} tokens instead of {common.tokens}": protocol.tokens != common.tokens,
        f"rows of {protocol.seq_len} instead of {common.seq_len}": protocol.seq_len != common.seq_len,
    }
    how = "; ".join(difference for difference, applies in differing.items() if applies)
    return f"left out of the front, for it was measured otherwise ({how}); measure it as the others"


def _data(manifest: Manifest) -> str:
    """How the measurements that are compared were made."""
    quality = manifest.quality
    data = quality["data"]
    assert isinstance(data, dict)
    return (
        f"against {quality['source']} ({mebibytes(manifest.totals.dense_bytes)} dense, perplexity "
        f"{quality['ppl_source']:.3f}) on {data['tokens']} tokens of {data['name']} ({data['split']}) in rows of "
        f"{data['seq_len']}"
    )


def cells(row: Row) -> Sequence[str]:
    """Return a row of a table below `COLUMNS`."""
    return (
        row.name,
        ", ".join(row.schemes),
        f"{row.bytes / 2**20:.2f}",
        f"{row.ratio:.2f}",
        _digits(row.bpw, ".2f"),
        _digits(row.ppl, ".3f"),
        _digits(row.ppl_ratio, ".4f"),
        _digits(row.kl_mean, ".5f"),
        _digits(row.top1_agreement, ".2%"),
        "*" if row.front else "",
    )


def _digits(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
