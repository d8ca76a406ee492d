"""A forecast as text: a row per fused group, alike layers in one row, then totals and estimates. No torch."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pressd.compress.inspect import show_passes, show_totals
from pressd.compress.tables import mebibytes, table

if TYPE_CHECKING:
    from pressd.compress.forecast import Forecast, GroupForecast

_COLUMNS = ("group", "scheme", "passes", "shape", "bits/weight", "bytes")


def forecast_json(forecast: "Forecast") -> str:
    """Return a forecast as one JSON object."""
    fields = {field.name: getattr(forecast, field.name) for field in dataclasses.fields(forecast)}
    fields |= {
        "groups": [dataclasses.asdict(group) for group in forecast.groups],
        "totals": forecast.totals.model_dump(),
        "memory": dataclasses.asdict(forecast.memory),
        "time": dataclasses.asdict(forecast.time),
        "calibration": None if forecast.calibration is None else dataclasses.asdict(forecast.calibration),
    }
    return json.dumps(fields, indent=2)


def show_forecast(forecast: "Forecast") -> str:
    """Return a forecast as text; its warnings are not in it."""
    runs = list(_runs(forecast.groups))
    rows = [_COLUMNS, *(_row(*run) for run in runs)]
    lines = [table(rows), ""]
    if any(first != last for first, last, _ in runs):
        lines.append("A row of several layers gives the shape of one and the bytes of all.")
    lines.append(show_totals(forecast.totals))
    if forecast.calibration is not None:
        text = forecast.calibration
        lines.append(f"calibration: {text.tokens:,} tokens of {text.data} in {text.rows:,} rows of {text.seq_len}")
    if forecast.untied_bytes:
        lines.append(f"the head is no longer the embedding: stored apart, it adds {mebibytes(forecast.untied_bytes)}")
    return "\n".join([*lines, *_estimates(forecast)])


def _estimates(forecast: "Forecast") -> Iterator[str]:
    memory, time = forecast.memory, forecast.time
    pressing = memory.working_bytes + memory.allocator_bytes + memory.library_bytes
    yield (
        f"memory: about {mebibytes(memory.process_bytes + pressing)} at most, of which pressing {mebibytes(pressing)}; "
        f"and up to {mebibytes(memory.mapped_bytes)} of the source mapped, which the system takes back when it must"
    )
    yield (
        f"time: about {_seconds(time.compute_seconds)} s of computing on this machine's CPU, measured now on samples; "
        f"and reading {mebibytes(time.read_bytes)}, writing {mebibytes(time.written_bytes)}"
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _runs(groups: "Sequence[GroupForecast]") -> Iterator[tuple[int | None, int | None, "list[GroupForecast]"]]:
    """Yield (first layer, last layer, groups): consecutive layers whose group of a kind is stored alike are one run."""
    open_runs: dict[str, list[GroupForecast]] = {}
    runs: list[list[GroupForecast]] = []
    for group in groups:
        kind = group.name.rpartition(".")[2]
        run = open_runs.get(kind)
        if run is None or _stored(run[-1]) != _stored(group):
            run = open_runs[kind] = []
            runs.append(run)
        run.append(group)
    yield from ((_layer(run[0]), _layer(run[-1]), run) for run in runs)


def _stored(group: "GroupForecast") -> tuple[object, ...]:
    return group.scheme, group.passes, group.shape


def _layer(group: "GroupForecast") -> int | None:
    parts = group.name.split(".")
    return int(parts[1]) if len(parts) > 1 else None


def _row(first: int | None, last: int | None, run: "list[GroupForecast]") -> Sequence[str]:
    group = run[0]
    name = group.name if first == last else f"layers.{first}-{last}.{group.name.rpartition('.')[2]}"
    shape = " x ".join(map(str, group.shape))
    stored = f"{sum(one.bytes for one in run):,}"
    return name, group.scheme, show_passes(group.passes), shape, f"{group.bits:.3f}", stored
