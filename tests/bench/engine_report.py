"""docs/benchmarks/engine.md from the rows that tests/bench/engine.py measured."""

import itertools
import statistics
from typing import Any

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """Return the document: how it was measured, then for each model rates, the split of a step, memory."""
    setting, plans = rows[0]["environment"], {row["model"]: row["plan"] for row in rows}
    lengths = "; ".join(
        f"{model}: {plan['new_tokens']} new tokens, {plan['runs']} runs" for model, plan in plans.items()
    )
    lines = [
        "# The engine, driven directly",
        "",
        f"Measured on {rows[-1]['date']} on {setting['processor']}, {rows[0]['torch_threads']} threads, PyTorch "
        f"{setting['torch']}, transformers {setting['transformers']}, at commit {setting['commit']}:",
        "",
        "    python tests/bench/engine.py",
        "",
        f"Tokens per second, decoding after prompts of {rows[0]['plan']['prompt']} random tokens, and of a prompt of "
        f"{rows[0]['plan']['prefill']} until its first token: the median of all runs, [lowest to highest], and the "
        "median of each run's ratio to transformers' `generate` on the same prompts just before (a static batch, "
        "bfloat16, greedy). "
        f"{lengths}. Every row is a process of its own.",
    ]
    for model, group in itertools.groupby(rows, key=lambda row: row["model"]):
        own = list(group)
        lines += ["", f"## {model} ({own[0]['parameters'] / 1e6:,.1f} M parameters)", "", *_rates(own)]
        lines += [
            "",
            "A decode step in ms (medians): layers, and all else (scheduler, sampler, Python).",
            "",
            *_steps(own),
        ]
        lines += ["", *_memory(own)]
    return "\n".join(lines) + "\n"


def _rates(rows: list[Row]) -> list[str]:
    cases = list(rows[0]["tokens_per_s"]["ours"])
    peers = {case: [rate for row in rows for rate in row["tokens_per_s"]["peer"][case]] for case in cases}
    table = [
        ("", *(case if case == "prefill" else f"batch {case}" for case in cases), "kernels"),
        ("transformers bf16", *(_spread(peers[case]) for case in cases), ""),
    ]
    for row in rows:
        ours, peer = row["tokens_per_s"]["ours"], row["tokens_per_s"]["peer"]
        ratios = [statistics.median(a / b for a, b in zip(ours[case], peer[case], strict=True)) for case in cases]
        cells = [f"{_spread(ours[case])} **{ratio:.2f}x**" for case, ratio in zip(cases, ratios, strict=True)]
        table.append((row["scheme"], *cells, "; ".join(row["kernels"])))
    return _table(table)


def _steps(rows: list[Row]) -> list[str]:
    batches = list(rows[0]["steps"])
    table = [("", *(f"batch {batch}" for batch in batches))]
    for row in rows:
        splits = [row["steps"][batch] for batch in batches]
        cells = [
            f"{split['model_ms']:.2f} + {split['host_ms']:.2f} (p95 {split['host_p95_ms']:.2f})" for split in splits
        ]
        table.append((row["scheme"], *cells))
    return _table(table)


def _memory(rows: list[Row]) -> list[str]:
    head = ("MiB", "artifact", "weights in memory", "of artifact", "keys and values", "process grew by")
    table = [head]
    for row in rows:
        memory = row["memory"]
        share = memory["weights_bytes"] / memory["artifact_bytes"]
        sizes = [memory[name] / 2**20 for name in ("artifact_bytes", "weights_bytes", "kv_bytes", "rss_bytes")]
        cells = [f"{size:,.1f}" for size in sizes]
        table.append((row["scheme"], *cells[:2], f"{share:.3f}", *cells[2:]))
    return _table(table)


def _spread(values: list[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 1
    low, middle, high = (f"{pick(values):,.{digits}f}" for pick in (min, statistics.median, max))
    return f"{middle} [{low} to {high}]"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rule = ("---", *["---:"] * (len(rows[0]) - 1))
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
