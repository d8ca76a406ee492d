"""docs/benchmarks/quantise.md, and the table of docs/schemes.md, from the rows that tests/bench/quantise.py kept."""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
MARKS = re.compile(r"(<!-- numbers: begin \(.*?\) -->\n).*?(<!-- numbers: end -->)", re.DOTALL)
RTN, STATIC = "rtn", "-static"
HEADS = ("scheme", "passes", "MiB", "bpw", "perplexity", "ratio", "KL", "seeds", "s.e.", "of rtn's KL", "top-1")
COSTS = ("s", "CPU s", "peak MiB")
IN_SHORT = (0, 1, 2, 3, 4, 6, 9, 10, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Cells that differ in their seed alone: means over them, and how far their KL lies apart.

    `kl_stderr` is the mean of theirs, over rows of text: they are all measured on the same rows, so that it does not
    shrink with their number.
    """

    scheme: str
    passes: str
    seeds: int
    bytes: int
    bpw: float
    ppl: float
    ppl_ratio: float
    kl: float
    kl_range: tuple[float, float]
    kl_stderr: float
    top1: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def base(self) -> str:
        """The scheme whose rounding to nearest is what passes are held against."""
        return self.scheme.removesuffix(STATIC)


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Return a line for each scheme and way of pressing, in the order of their first rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["cell"]["scheme"], row["cell"]["passes"]), []).append(row)
    return [_line(scheme, passes, group) for (scheme, passes), group in found.items()]


def _line(scheme: str, passes: str, rows: list[Row]) -> Line:
    def mean(of: Callable[[Row], float]) -> float:
        return statistics.fmean(map(of, rows))

    divergences = [row["kl_mean"] for row in rows]
    return Line(
        scheme=scheme,
        passes=passes,
        seeds=len(rows),
        bytes=rows[0]["bytes"],
        bpw=rows[0]["bpw"],
        ppl=mean(lambda row: row["ppl"]),
        ppl_ratio=mean(lambda row: row["ppl_ratio"]),
        kl=statistics.fmean(divergences),
        kl_range=(min(divergences), max(divergences)),
        kl_stderr=mean(lambda row: row["stderr"]["kl_mean"]),
        top1=mean(lambda row: row["top1_agreement"]),
        seconds=mean(lambda row: row["seconds"]),
        cpu_seconds=mean(lambda row: row["cpu_seconds"]),
        peak_bytes=max(row["peak_rss_bytes"] for row in rows),
    )


def markdown(rows: Sequence[Row], beside: Sequence[Row], peers: Sequence[Row], missing: Sequence[str]) -> str:
    """Return the document; `beside` are our rows on the tokens of `peers`, results of other tools."""
    lines = [
        "# What schemes and passes cost",
        "",
        *_setting(rows),
        "",
        *_table(lines_of(rows)),
        "",
        "KL is the mean over seeds, *seeds* its least and largest, *s.e.* its standard error over rows of text (of one "
        "seed: all are measured on the same rows, so that it does not shrink with their number, and two lines differ "
        "by less than their errors suggest where they lose in the same places). *of rtn's KL* is over that of rounding "
        "to nearest in the same scheme, for `-static` with dynamic activations. Perplexity, top-1 and seconds are "
        "means; seconds are of pressing, text and statistics included; the peak is the largest of a process that did "
        f"nothing else, of which {_before(rows):,.0f} MiB were Python and PyTorch before it began.",
        "",
        "![size against KL](quantise.svg)",
        "",
    ]
    if any(row["fallbacks"] for row in rows):
        said = sorted({f"{row['cell']['scheme']}: {why}" for row in rows for why in row["fallbacks"]})
        lines += [f"Groups that were pressed otherwise than asked: {'; '.join(said)}.", ""]
    if peers and beside:
        lines += _beside_peers(beside, peers)
    if missing:
        lines += [f"Not measured: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def into_guide(text: str, rows: Sequence[Row]) -> str:
    """Put the table, without what it took to measure, between the marks of the guide."""
    dates = sorted({row["date"] for row in rows})
    said = (
        f"Measured on {dates[-1]} with {rows[0]['tokens']['evaluation']:,} held-out tokens; means over the seeds of "
        "the calibration text. [All figures](benchmarks/quantise.md): standard errors, seeds, memory, and other tools "
        "beside."
    )
    lines = [*_table(lines_of(rows), IN_SHORT), "", said, "", "![size against KL](benchmarks/quantise.svg)"]
    found, count = MARKS.subn(lambda marks: "\n".join([marks[1].rstrip(), *lines, marks[2]]), text)
    assert count == 1, "the guide has no marks for the table, or several"
    return found


def _setting(rows: Sequence[Row]) -> list[str]:
    """What it was measured on, where and when, and by which commits."""
    tokens = rows[0]["tokens"]

    def said(of: Callable[[Row], object]) -> str:
        return ", ".join(dict.fromkeys(str(of(row)) for row in rows))

    return [
        "The example model (`examples/pylm`, 7.3 M parameters) on "
        f"{said(lambda row: row['environment']['processor'])}, "
        f"PyTorch {said(lambda row: row['environment']['torch'])} (threads: {said(lambda row: row['torch_threads'])}), "
        f"{said(lambda row: row['date'])}, commit {said(lambda row: row['environment']['commit'])}:",
        "",
        "    python tests/bench/quantise.py",
        "",
        f"Calibrated on {tokens['calibration']:,} tokens that a seed draws, measured on {tokens['evaluation']:,} "
        "others, in rows of 512, of the standard library of Python "
        f"{said(lambda row: row['environment']['python'])}. What looks at no text is measured once.",
    ]


def _table(lines: Sequence[Line], columns: Sequence[int] | None = None) -> list[str]:
    rounded = {line.scheme: line.kl for line in lines if line.passes == RTN}
    cells = [_cells(line, rounded.get(line.base)) for line in lines]
    chosen = range(len(HEADS) + len(COSTS)) if columns is None else columns
    return _markdown([[row[column] for column in chosen] for row in ((*HEADS, *COSTS), *cells)], texts=2)


def _cells(line: Line, rounded: float | None) -> tuple[str, ...]:
    return (
        line.scheme,
        line.passes,
        f"{line.bytes / 2**20:.2f}",
        f"{line.bpw:.2f}",
        f"{line.ppl:.3f}",
        f"{line.ppl_ratio:.4f}",
        f"{line.kl:.5f}",
        _seeds(line),
        f"{line.kl_stderr:.5f}",
        f"{line.kl / rounded:.2f}" if rounded else "",
        f"{line.top1:.2%}",
        f"{line.seconds:.1f}",
        f"{line.cpu_seconds:.1f}",
        f"{line.peak_bytes / 2**20:,.0f}",
    )


def _seeds(line: Line) -> str:
    return f"{line.kl_range[0]:.5f} to {line.kl_range[1]:.5f}" if line.seeds > 1 else ""


def _beside_peers(beside: Sequence[Row], peers: Sequence[Row]) -> list[str]:
    """Ours and other tools' in the same scheme, calibrated and measured on the same tokens."""
    theirs = [_of_peer(result) for result in peers]
    head = ("scheme", "tool", "passes", "KL", "seeds", "s.e.", "of the best peer's", "top-1", "s", "CPU s")
    table = [head]
    for scheme in dict.fromkeys(row["cell"]["scheme"] for row in beside):
        rivals = [line for line in lines_of(theirs) if line.scheme == scheme]
        # Our own rounding is among the results, since it was measured with the others; it is nobody's peer.
        best = min((line.kl for line in rivals if not line.passes.startswith("pressd ")), default=None)
        ours = [row for row in beside if row["cell"]["scheme"] == scheme]
        named = [row | {"cell": row["cell"] | {"passes": f"pressd {row['cell']['passes']}"}} for row in ours]
        for line in sorted([*rivals, *lines_of(named)], key=lambda line: line.kl):
            tool, _, passes = line.passes.partition(" ")
            ratio = "" if best is None else f"{line.kl / best:.2f}"
            shown = f"**{ratio}**" if tool == "pressd" and best is not None and line.kl < best else ratio
            error, divergence = f"{line.kl_stderr:.5f}", f"{line.kl:.5f}"
            took = (f"{line.top1:.2%}", f"{line.seconds:.1f}", f"{line.cpu_seconds:.1f}")
            table.append((scheme, tool, passes, divergence, _seeds(line), error, shown, *took))
    versions = sorted({f"{r['tool']} {r['versions'][r['tool']]}" for r in peers if r["tool"] in r.get("versions", {})})
    by = f" ({', '.join(versions)})" if versions else ""
    return [
        "## Same weights, same tokens",
        "",
        f"Beside other tools{by}: the same checkpoint, 64 rows of 512 tokens of each seed to calibrate on, and the "
        "same 32,768 held-out tokens, kept with the tests. KL of all of them is computed by us. Their seconds are of "
        "their own calls, recorded once and not in the same hour as ours; CPU seconds depend less on what else ran.",
        "",
        *_markdown(table, texts=3),
        "",
    ]


def _of_peer(result: Row) -> Row:
    """A result of another tool as a row of ours; what it does not tell is NaN, and not shown."""
    unknown = float("nan")
    return {
        "cell": {"scheme": result["scheme"], "passes": f"{result['tool']} {result['method']}"},
        "bytes": 0,
        "bpw": unknown,
        "ppl": result.get("ppl", unknown),
        "ppl_ratio": unknown,
        "kl_mean": result["kl_mean"],
        "stderr": {"kl_mean": result.get("kl_stderr", unknown)},
        "top1_agreement": result.get("top1_agreement", unknown),
        "seconds": result["seconds"],
        "cpu_seconds": result.get("cpu_seconds", unknown),
        "peak_rss_bytes": 0,
    }


def _before(rows: Sequence[Row]) -> float:
    return statistics.median(row["rss_bytes_before"] for row in rows) / 2**20


def _markdown(table: Iterable[Sequence[str]], *, texts: int) -> list[str]:
    """The first row is the head, the first `texts` columns are words."""
    head, *body = table
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return [f"| {' | '.join('' if cell.startswith('nan') else cell for cell in row)} |" for row in (head, rule, *body)]
