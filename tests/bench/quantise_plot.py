"""docs/benchmarks/quantise.svg: size against KL, a colour and a marker for each way of pressing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantise_report import Line, lines_of

# Told apart without colour as well.
MARKERS = "os^vDPX<>*hdp8"
# Sizes of 8-bit schemes lie within a hundredth of one another: their panel has a place for each instead.
MANY_BITS = 6.0


def plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw integers of few bits by their size, 8-bit schemes side by side; bars span the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pressd"
    from matplotlib import pyplot

    lines = lines_of(rows)
    few, many = ([line for line in lines if (line.bpw > MANY_BITS) is wide] for wide in (False, True))
    # One look for a way in both panels.
    ways = list(dict.fromkeys(line.passes for line in lines))
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.4), layout="constrained", width_ratios=(3, 2))
    names = list(dict.fromkeys(line.scheme for line in many))
    _draw(panels[0], few, ways, [line.bytes / 2**20 for line in few])
    _draw(panels[1], many, ways, [float(names.index(line.scheme)) for line in many])
    for scheme in dict.fromkeys(line.scheme for line in few):
        highest = max((line for line in few if line.scheme == scheme), key=lambda line: line.kl)
        place = (highest.bytes / 2**20, highest.kl)
        panels[0].annotate(scheme, place, (6, 4), textcoords="offset points", fontsize=8)
    panels[0].set(xlabel="MiB of weight files", ylabel="KL from the source, nats", title="4 bits and fewer")
    panels[0].margins(x=0.2, y=0.12)
    panels[1].set(title="8 bits", xticks=range(len(names)), xlim=(-0.5, max(len(names), 1) - 0.5))
    panels[1].set_xticklabels(names, fontsize=8)
    for panel in panels:
        panel.set_yscale("log")
        panel.grid(visible=True, which="both", axis="y", linewidth=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def _draw(panel: Any, lines: Sequence[Line], ways: Sequence[str], places: Sequence[float]) -> None:
    import matplotlib

    colours = matplotlib.colormaps["tab20"]
    for number, way in enumerate(ways):
        points = [(x, line) for x, line in zip(places, lines, strict=True) if line.passes == way and line.kl > 0]
        if not points:
            continue
        at = [line.kl for _, line in points]
        # The mean of equal numbers may differ from them in its last bit.
        below = [max(0.0, line.kl - line.kl_range[0]) for _, line in points]
        above = [max(0.0, line.kl_range[1] - line.kl) for _, line in points]
        # The second ten are the pale ones of the first.
        marker, colour = MARKERS[number % len(MARKERS)], colours(2 * (number % 10) + number // 10 % 2)
        panel.errorbar(
            [x for x, _ in points], at, (below, above), fmt=marker, color=colour, label=way, markersize=6, linewidth=1
        )
