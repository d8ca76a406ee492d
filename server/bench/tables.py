"""What `pressd bench` prints for people. No torch."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pressd.server.bench.load import Run, Sample
from pressd.server.bench.measures import LATENCIES, PERCENTILES

SILENCE = 2.0


def progress(label: str, clock: Callable[[], float] = time.monotonic) -> Callable[[Sequence[Sample], int], None]:
    """Return what tells on stderr how far a run is, every other second."""
    began = told = clock()

    def tell(samples: Sequence[Sample], count: int) -> None:
        nonlocal told
        now = clock()
        if now - told >= SILENCE:
            told = now
            done = sum(sample.ended is not None for sample in samples)
            tokens = sum(sample.num_tokens for sample in samples)
            sys.stderr.write(f"{label}: {done} of {count} requests, {tokens} tokens, {now - began:.0f} s\n")
            sys.stderr.flush()

    return tell


def one(found: Mapping[str, Any]) -> str:
    """The figures of one target: totals in a sentence, latencies in a table."""
    rate = _number(found["output_tokens_per_s"])
    host = f"; host {_number(found['host_ms_per_step'], 2)} ms a step" if "host_ms_per_step" in found else ""
    wire = ""
    if "wire_bytes_per_token" in found:
        wire = f"; {_number(found['wire_bytes_per_token'])} bytes on the wire a token"
    lines = [
        f"{found['requests']} requests ({found['errors']} failed), {found['output_tokens']:,} tokens in "
        f"{found['wall_s']:.2f} s: {rate} tokens/s{host}{wire}",
        *aligned(
            [("ms", *(f"p{share}" for share in PERCENTILES))]
            + [(name.removesuffix("_ms"), *map(_number, found[name].values())) for name in LATENCIES]
        ),
    ]
    return "".join(f"{line}\n" for line in lines)


def several(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures of several targets, one a line; `of first` is the median ratio of rates in the same round."""
    head = (
        "",
        "weights",
        "tokens/s",
        "lowest",
        "highest",
        "of first",
        "ttft p50",
        "p95",
        "itl p50",
        "p95",
        "host/step",
    )
    table: list[tuple[str, ...]] = [head]
    for row in rows:
        rates, base = row["rounds_tokens_per_s"], rows[0]["rounds_tokens_per_s"]
        ratios = [rate / other for rate, other in zip(rates, base, strict=False) if other]
        cells: list[str] = [
            row["artifact"],
            f"{row['weights_bytes'] / 2**20:.1f} MiB",
            *(_number(pick(rates)) if rates else "-" for pick in (statistics.median, min, max)),
            f"{statistics.median(ratios):.2f}" if ratios else "-",
            *(_number(row[name][share]) for name in ("ttft_ms", "itl_ms") for share in ("p50", "p95")),
            _number(row.get("host_ms_per_step"), 2),
        ]
        table.append(tuple(cells))
    return "".join(f"{line}\n" for line in aligned(table))


def rates(runs: Sequence[Run]) -> list[float]:
    """Tokens a second of each run."""
    return [sum(sample.num_tokens for sample in run.samples) / run.seconds for run in runs if run.seconds]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of one length as lines whose columns are flush, the first on the left, the others on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
