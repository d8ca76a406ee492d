"""The tables of docs/benchmarks/door.md from what tests/bench/door.py measured."""

import statistics
from typing import Any

HEADS = (
    *("a step each", "streams", "messages/s", "tokens/s", "tokens a message", "bytes a message"),
    *("CPU s per 1,000 messages: door", "engine", "client", "cores busy: door"),
)


def markdown(found: dict[str, Any]) -> str:
    """Return how it was measured and the tables."""
    setting, plan = found["environment"], found["plan"]
    lines = [
        f"Measured on {found['date']} on {found['cores']} cores of {setting['processor']}, Python {setting['python']}, "
        f"at commit {setting['commit']}.",
        "",
        f"The door by itself, {plan['seconds']:g} s each:",
        "",
        *_alone(found["alone"]),
    ]
    if "against" in found:
        lines += ["", *_against(found["against"], plan)]
    return "\n".join(lines) + "\n"


def _alone(rows: list[dict[str, Any]]) -> list[str]:
    cells: list[tuple[str, ...]] = [HEADS]
    for row in rows:
        messages, spent = row["messages"], row["cpu_seconds"]
        cells.append(
            (
                f"{row['pace'] * 1e3:g} ms" if row["pace"] else "as it can",
                str(row["streams"]),
                f"{messages / row['seconds']:,.0f}",
                f"{row['tokens'] / row['seconds']:,.0f}",
                f"{row['tokens'] / messages:.2f}",
                f"{row['bytes'] / messages:.0f}",
                *(f"{1e3 * spent[name] / messages:.3f}" for name in ("door", "engine", "client")),
                f"{spent['door'] / row['seconds']:.2f}",
            )
        )
    return _table(cells)


def _against(row: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    rates = row["tokens_per_s"]
    ratios = [grpc / own for grpc, own in zip(rates["over gRPC"], rates["in process"], strict=True)]
    head = ("model", "weights", "tokens/s in process", "over gRPC", "ratio", "door's CPU s per 1,000 tokens")
    cells = (
        row["model"],
        f"{row['weights_bytes'] / 2**20:,.0f} MiB",
        _spread(rates["in process"]),
        _spread(rates["over gRPC"]),
        f"**{statistics.median(ratios):.3f}** [{min(ratios):.3f} to {max(ratios):.3f}]",
        f"{statistics.median(row['door_cpu_s_per_1000_tokens']):.3f}",
    )
    return [
        f"{plan['clients']} streams of token ids over gRPC against the same engine in process, in {plan['rounds']} "
        f"turns, {row['torch_threads']} threads of PyTorch; prompts of {plan['prompt']}, answers of "
        f"{plan['tokens'] // 2} to {plan['tokens']} tokens; median [lowest to highest], ratios within a turn:",
        "",
        *_table([head, cells]),
    ]


def _spread(values: list[float]) -> str:
    low, middle, high = (f"{pick(values):,.1f}" for pick in (min, statistics.median, max))
    return f"{middle} [{low} to {high}]"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rule = ("---", *["---:"] * (len(rows[0]) - 1))
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
