"""The table and the plot of tests/bench/peers.py."""

import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What ours should be at least, as a multiple of the best peer at the same point.
MARK, MARK_IN_BATCHES = 1.25, 1.5
MARKS = re.compile(r"(  <!-- peers: begin \(.*?\) -->\n).*?(  <!-- peers: end -->)", re.DOTALL)
BATCHED = ("decode 4 ", "decode 8 ", "decode 16 ", "first token 512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every figure of a run, by point and contender, and what is known of the contenders."""

    facts: dict[str, dict[str, Any]]
    figures: dict[str, dict[str, list[float]]]
    missing: list[str]
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rate(self, point: str, label: str) -> tuple[float, float, float] | None:
        """Return the median, least and largest rate in tokens per second, or None if it was not measured."""
        values = self.figures[point].get(label)
        if not values:
            return None
        if point.startswith("first token"):
            values = [int(point.split()[-1]) / seconds for seconds in values]
        return statistics.median(values), min(values), max(values)

    def best(self, point: str, *, ours: bool) -> tuple[str, float] | None:
        """Return who is fastest at a point, of us or of the peers, and its median."""
        found = [
            (rate[0], label)
            for label, facts in self.facts.items()
            if facts["is_ours"] == ours and (rate := self.rate(point, label)) is not None
        ]
        return (max(found)[1], max(found)[0]) if found else None


def title(point: str) -> str:
    words = point.split()
    if point.startswith("first token"):
        return f"prompt of {words[-1]}"
    return f"decode, batch {words[1]}, context {words[3]}"


def mark_of(point: str) -> float:
    return MARK_IN_BATCHES if point.startswith(BATCHED) else MARK


def markdown(report: Report) -> str:
    machine = report.machine
    lines = [
        "# pressd and its peers on a CPU",
        "",
        "A random Llama of 1.1 B parameters (16 layers of 2048, ffn 8192, 32/8 heads, vocabulary 32,000) on "
        f"{machine['threads']} cores of {machine['processor']} (family {machine['family']}), {machine['date']}, commit "
        f"{machine['commit']}. Medians of {machine['runs']} rounds in which the contenders take turns, tokens per "
        "second; `tests/bench/peers.py` makes the models, this page and the plot. Every contender draws the likeliest "
        "token itself; a prompt's rate is its length over the time to its first token.",
        "",
        *_verdict(report),
        "",
        "## Every figure",
        "",
        "Median (least to largest) of the rounds.",
        "",
        *_table(report),
        "",
        "## Size and start",
        "",
        *_facts(report),
        "",
        "![tokens per second by batch](cpu.svg)",
        "",
    ]
    if report.missing:
        lines += [f"Not measured, since it was not given: {', '.join(report.missing)}.", ""]
    return "\n".join(lines)


def _verdict(report: Report) -> list[str]:
    """Ours beside the best peer at each point."""
    lines = ["| point | ours | | best peer | | ratio | mark |", "|---|---|---|---|---|---|---|"]
    for point in report.figures:
        ours, peer = report.best(point, ours=True), report.best(point, ours=False)
        if ours is None or peer is None:
            continue
        ratio = ours[1] / peer[1]
        shown = f"**{ratio:.2f}**" if ratio >= mark_of(point) else f"{ratio:.2f}"
        who = ours[0].removeprefix("pressd ")
        cells = (title(point), who, f"{ours[1]:.1f}", peer[0], f"{peer[1]:.1f}", shown, str(mark_of(point)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def into_readme(text: str, report: Report) -> str:
    """Put the table of ours beside the best peer between the README's marks."""
    lines = [
        *_verdict(report),
        "",
        f"Measured on {report.machine['date']} on {report.machine['threads']} cores of {report.machine['processor']}.",
    ]
    table = "\n".join(f"  {line}" if line else "" for line in lines)
    return MARKS.sub(lambda marks: f"{marks[1]}{table}\n{marks[2]}", text)


def _table(report: Report) -> list[str]:
    labels = list(report.facts)
    lines = ["| point | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for point in report.figures:
        cells = []
        for label in labels:
            rate = report.rate(point, label)
            cells.append("" if rate is None else f"{rate[0]:.1f} ({rate[1]:.1f} to {rate[2]:.1f})")
        lines.append(f"| {title(point)} | " + " | ".join(cells) + " |")
    return lines


def _facts(report: Report) -> list[str]:
    lines = [
        "| contender | version | MB of weights | resident, loaded | resident, after the run | cold start, s |",
        "|---|---|---|---|---|---|",
    ]
    for label, facts in report.facts.items():
        memory = " | ".join(f"{facts[key] / 1e6:,.0f}" for key in ("bytes", "rss_bytes", "rss_after_bytes"))
        version = "" if facts["is_ours"] else facts["version"]
        lines.append(f"| {label} | {version} | {memory} | {facts['cold_start_s']:.1f} |")
    return lines


def plot(report: Report, target: Path) -> None:
    """Draw rates by batch, a panel for each context, and those of prompts."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pressd"
    from matplotlib import pyplot

    contexts = sorted({int(point.split()[3]) for point in report.figures if point.startswith("decode")})
    figure, panels = pyplot.subplots(1, len(contexts) + 1, figsize=(5 * len(contexts) + 4, 4.2), layout="constrained")
    for panel, context in zip(panels, contexts, strict=False):
        points = {int(p.split()[1]): p for p in report.figures if p.startswith("decode") and p.endswith(f" {context}")}
        for label, facts in report.facts.items():
            rates = {batch: rate[0] for batch, p in sorted(points.items()) if (rate := report.rate(p, label))}
            if rates:
                style = "-o" if facts["is_ours"] else "--s"
                panel.plot(list(rates), list(rates.values()), style, label=label, markersize=4)
        panel.set(xscale="log", xticks=sorted(points), xlabel="sequences", ylabel="tokens/s", ylim=0)
        panel.set_xticklabels([str(batch) for batch in sorted(points)])
        panel.set_title(f"decode at context {context}")
        panel.legend(fontsize=7)
    prompts = [point for point in report.figures if point.startswith("first token")]
    labels = [label for label in report.facts if any(report.rate(point, label) for point in prompts)]
    for number, point in enumerate(prompts):
        rates = [(report.rate(point, label) or (0.0,))[0] for label in labels]
        places = [place + 0.4 * number for place in range(len(labels))]
        panels[-1].barh(places, rates, height=0.38, label=title(point))
    panels[-1].set(yticks=range(len(labels)), xlabel="tokens/s", title="prompts")
    panels[-1].set_yticklabels(labels, fontsize=7)
    panels[-1].invert_yaxis()
    panels[-1].legend(fontsize=7)
    figure.savefig(target, metadata={"Date": None})
