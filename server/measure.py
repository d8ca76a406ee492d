"""What happens, turned into metrics: one function for each kind of event."""

import importlib.metadata

from pressd.runtime.report import EngineInfo, StepStats
from pressd.server import metrics as m
from pressd.server.generation import Generation
from pressd.server.model_card import ModelCard

REJECTIONS = {
    "QUEUE_FULL": "queue_full",
    "KV_CAPACITY": "kv_capacity",
    "PROMPT_TOO_LONG": "too_long",
    "DRAINING": "draining",
}

# Totals of the engine's reports, and the counters that follow them.
TOTALS = {
    "kv_gathers": m.KV_GATHERS,
    "preemptions": m.PREEMPTIONS,
    "prefix_queried_tokens": m.PREFIX_QUERIES,
    "prefix_hit_tokens": m.PREFIX_HITS,
    "evicted_blocks": m.PREFIX_EVICTED,
}


def begin(metrics: m.Metrics) -> None:
    """Show at zero what can only grow, so that rates exist from the first event on."""
    metrics.set(m.BUILD, importlib.metadata.version("pressd"), to=1)
    for series in (m.RESTARTS, m.PROMPT_TOKENS, m.GENERATED_TOKENS, *TOTALS.values()):
        metrics.add(series, by=0)
    metrics.add(m.NUMERIC_ERRORS, "nan_logits", by=0)
    for reason in REJECTIONS.values():
        metrics.add(m.REJECTED, reason, by=0)
    for phase in ("queued", "prefill", "decode"):
        metrics.add(m.CANCELLED, phase, by=0)


def model(metrics: m.Metrics, info: EngineInfo, card: ModelCard) -> None:
    """The model is loaded."""
    metrics.set(m.WEIGHTS, info.device, card.format, to=info.weights_bytes)
    metrics.set(m.DENSE, to=info.dense_bytes)
    metrics.set(m.KV_CAPACITY, info.kv_dtype, to=info.kv_bytes)
    metrics.set(m.KV_BLOCK_TOKENS, info.kv_dtype, to=info.block_size)
    for stage, seconds in info.load_seconds.items():
        metrics.set(m.LOAD_TIME, stage, to=seconds)
    for name, series in (("kl_mean", m.FIDELITY_KL), ("top1_agreement", m.FIDELITY_TOP1)):
        if name in card.quality:
            metrics.set(series, "artifact", to=card.quality[name])
    # Labels of what this build cannot press yet (sparsity, rank) stay empty.
    kernels = "+".join(sorted({choice.implementation for choice in info.kernels}))
    scheme = card.schemes[0] if len(card.schemes) == 1 else None
    bits, group_size = (str(scheme.bits), str(scheme.group_size or "")) if scheme else ("", "")
    metrics.forget(m.MODEL)
    metrics.set(m.MODEL, card.format, bits, group_size, "", "", info.artifact_id, kernels, to=1)


def gauges(metrics: m.Metrics, stats: StepStats, info: EngineInfo) -> None:
    """What the engine holds now."""
    metrics.set(m.RUNNING, to=stats.num_running)
    metrics.set(m.WAITING, to=stats.num_waiting)
    metrics.set(m.SWAPPED, to=stats.num_preempted)
    metrics.set(m.KV_USAGE, to=stats.kv_blocks_used / info.kv_blocks)
    metrics.set(m.KV_BLOCKS, info.kv_dtype, "used", to=stats.kv_blocks_used)
    metrics.set(m.KV_BLOCKS, info.kv_dtype, "cached", to=stats.kv_blocks_cached)
    free = info.kv_blocks - stats.kv_blocks_used - stats.kv_blocks_cached
    metrics.set(m.KV_BLOCKS, info.kv_dtype, "free", to=free)
    metrics.set(m.KV_USED, info.kv_dtype, to=info.kv_bytes * stats.kv_blocks_used // info.kv_blocks)


def step(metrics: m.Metrics, stats: StepStats, before: StepStats | None) -> None:
    """The engine made a step; `before` are the stats of the one before it, whose totals it continues."""
    for name, series in TOTALS.items():
        metrics.add(series, by=getattr(stats, name) - (getattr(before, name) if before else 0))
    metrics.add(m.NUMERIC_ERRORS, "nan_logits", by=stats.numeric_errors - (before.numeric_errors if before else 0))
    if stats.num_rows:
        kind = "decode" if not stats.num_prefill_tokens else "mixed" if stats.num_decode_tokens else "prefill"
        metrics.observe(m.STEP_TIME, stats.seconds, kind)
        metrics.observe(m.STEP_TOKENS, stats.num_prefill_tokens + stats.num_decode_tokens)
        metrics.observe(m.BATCH_SIZE, stats.num_rows)


def tokens(metrics: m.Metrics, generation: Generation, num_tokens: int, now: float) -> None:
    """The engine made tokens of a request, which does not know of them yet."""
    metrics.add(m.GENERATED_TOKENS, by=num_tokens)
    if generation.last_token_at:
        metrics.observe(m.INTER_TOKEN, (now - generation.last_token_at) / num_tokens, times=num_tokens)
    else:
        metrics.add(m.PROMPT_TOKENS, by=generation.num_prompt_tokens)


def closed(metrics: m.Metrics, generation: Generation) -> None:
    """A request is over, however it ended."""
    if generation.was_left:
        metrics.add(m.CANCELLED, generation.phase)
    metrics.observe(m.REQUEST_PROMPT, generation.num_prompt_tokens)
    metrics.observe(m.REQUEST_GENERATED, generation.num_sent)
    if generation.scheduled_at:
        metrics.observe(m.QUEUE_TIME, generation.scheduled_at - generation.arrival)
    if generation.first_token_at:
        metrics.observe(m.PREFILL_TIME, generation.first_token_at - generation.scheduled_at)
        metrics.observe(m.DECODE_TIME, generation.last_token_at - generation.first_token_at)
    if generation.first_sent_at:
        metrics.observe(m.FIRST_TOKEN, generation.first_sent_at - generation.arrival)
    if generation.num_computed > 1:
        gaps = generation.num_computed - 1
        metrics.observe(m.PER_TOKEN, (generation.last_token_at - generation.first_token_at) / gaps)


def call(metrics: m.Metrics, method: str, code: str, *, reason: str, finish_reason: str, seconds: float) -> None:
    """A call is over; `reason` is that of its Refusal, if it was refused."""
    metrics.add(m.REQUESTS, method, code, finish_reason)
    if reason in REJECTIONS:
        metrics.add(m.REJECTED, REJECTIONS[reason])
    if method in ("Generate", "GenerateStream"):
        metrics.observe(m.REQUEST_DURATION, seconds, code)
