"""The parts of a measurement beyond its headline metrics, as text. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from pressd.compress.spending import show_spent
from pressd.compress.tables import table


def show_more(quality: Mapping[str, Any]) -> list[str]:
    """Return a paragraph for each further entry that the measurement has."""
    parts = {
        "robustness": _robustness,
        "divergence": _divergence,
        "tasks": _tasks,
        "footprint": _footprint,
        "cost": show_spent,
    }
    return [show(quality[name]) for name, show in parts.items() if name in quality]


def _robustness(found: Mapping[str, Any]) -> str:
    names = ("ppl_source", "ppl", "ratio_of_ratios", "kl_mean", "top1_agreement")
    rows: list[Sequence[str]] = [("perturbed by", "rate", *names)]
    for kind, entry in found.items():
        cells = (f"{entry[name]:.5g}{_error(entry['stderr'].get(name))}" for name in names)
        rows.append((kind, f"{entry['rate']:g}", *cells))
    return f"{table(rows)}\nratio_of_ratios: ppl / ppl_source here, over the same on clean text"


def _divergence(found: Mapping[str, Any]) -> str:
    return (
        f"greedy continuations of {found['prompts']} prompts of {found['prompt_tokens']} tokens first differ at token "
        f"{found['mean']:.1f}{_error(found['stderr']['mean'])} in the mean, {found['median']:g} in the median; "
        f"{found['never']} never do in {found['new_tokens']}"
    )


def _tasks(found: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = [("task", "metric", "source", "artifact", "flips")]
    for task, entry in found.items():
        flips = f"{entry['flips']} of {entry['documents']}" if "flips" in entry else ""
        for metric, scores in entry.items():
            if isinstance(scores, dict):
                cells = (f"{scores[who]:.4g}{_error(scores['stderr'][who])}" for who in ("source", "artifact"))
                rows.append((task, metric, *cells, flips))
    return table(rows)


def _footprint(found: Mapping[str, Any]) -> str:
    source, artifact = found["source"], found["artifact"]
    rows: list[Sequence[str]] = [("footprint", "source", "artifact")]
    rows += [(name, f"{source[name]:,}", f"{artifact[name]:,}") for name in artifact]
    return table(rows)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2g}"
