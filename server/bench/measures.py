"""What a load's times come to: rates and percentiles. No torch."""

import itertools
import math
from collections.abc import Sequence

from pressd.server.bench.load import Run, Sample

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` percent are below, linear between ranks (Hyndman and Fan 1996, definition 7)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(runs: Sequence[Run]) -> dict[str, object]:
    """Return the figures of runs one after the other, as `--json` prints them; None where nothing was measured.

    From when a request should have been sent: `ttft_ms` until its first token came, `e2e_ms` until it ended. `tpot_ms`
    is its mean time for a token after the first, `itl_ms` each time between two arrivals of tokens. Requests that
    failed are counted, and their times left out; of those cut off, what came before counts. `wire_bytes_per_token` are
    those of all messages of the answers, where there is a wire.
    """
    samples = [sample for run in runs for sample in run.samples]
    good = [sample for sample in samples if sample.error is None]
    tokens, seconds = sum(sample.num_tokens for sample in samples), sum(run.seconds for run in runs)
    found: dict[str, object] = {
        "requests": sum(sample.ended is not None for sample in samples),
        "errors": len(samples) - len(good),
        "output_tokens": tokens,
        "wall_s": seconds,
        "output_tokens_per_s": tokens / seconds if seconds else None,
        "ttft_ms": _spread([sample.times[0] - sample.intended for sample in good if sample.times]),
        "tpot_ms": _spread([_per_token(sample) for sample in good if sample.num_tokens > 1 and len(sample.times) > 1]),
        "itl_ms": _spread([b - a for sample in good for a, b in itertools.pairwise(sample.times)]),
        "e2e_ms": _spread([sample.ended - sample.intended for sample in good if sample.ended is not None]),
    }
    totals: dict[str, float] = {}
    for run in runs:
        for name, value in run.facts.items():
            totals[name] = totals.get(name, 0.0) + value
    if "host_seconds" in totals:
        found["host_ms_per_step"] = 1e3 * totals["host_seconds"] / totals["steps"] if totals["steps"] else None
    if "wire_bytes" in totals:
        found["wire_bytes_per_token"] = totals["wire_bytes"] / tokens if tokens else None
    return found


def _per_token(sample: Sample) -> float:
    return (sample.times[-1] - sample.times[0]) / (sample.num_tokens - 1)


def _spread(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{share}": 1e3 * percentile(seconds, share) if seconds else None for share in PERCENTILES}
