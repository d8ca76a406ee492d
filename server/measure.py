"""What happens, turned into metrics: one function for each kind of event."""

import importlib.metadata
from collections import Counter

from pressd.runtime.energy import EnergyMeter
from pressd.runtime.report import EngineInfo, KernelChoice, StepStats
from pressd.server import metrics as m
from pressd.server.generation import Generation
from pressd.server.model_card import ModelCard
from pressd.server.strand import Strand

# The methods that make a request for the engine.
GENERATING = ("Generate", "GenerateStream", "Score")

REJECTIONS = {
    "QUEUE_FULL": "queue_full",
    "KV_CAPACITY": "kv_capacity",
    "PROMPT_TOO_LONG": "too_long",
    "DRAINING": "draining",
    "QUEUE_TIMEOUT": "queue_timeout",
    "TOKEN": "auth",
    "NOT_ADMIN": "auth",
    "ADMIN_DISABLED": "auth",
}

# Totals of the engine's reports, and the counters that follow them.
TOTALS = {
    "kv_gathers": m.KV_GATHERS,
    "late_compiles": m.COMPILES,
    "preemptions": m.PREEMPTIONS,
    "prefix_queried_tokens": m.PREFIX_QUERIES,
    "prefix_hit_tokens": m.PREFIX_HITS,
    "evicted_blocks": m.PREFIX_EVICTED,
}

# What kernels are made with, by the first word of their names.
TOOLS = {"cpu": "torch", "triton": "triton", "cuda": "cuda"}


def begin(metrics: m.Metrics) -> None:
    """Show at zero what can only grow, so that rates exist from the first event on."""
    metrics.set(m.BUILD, importlib.metadata.version("pressd"), to=1)
    growing = (m.RESTARTS, m.PROMPT_TOKENS, m.GENERATED_TOKENS, m.MESSAGES, m.COALESCED)
    for series in (*growing, *TOTALS.values()):
        metrics.add(series, by=0)
    for series in m.SERIES:
        if series.kind == "histogram" and series.labels == ("model",):
            metrics.observe(series, 0.0, times=0)
    metrics.add(m.STEPS, "eager", by=0)
    metrics.add(m.NUMERIC_ERRORS, "nan_logits", by=0)
    for reason in REJECTIONS.values():
        metrics.add(m.REJECTED, reason, by=0)
    for phase in ("queued", "prefill", "decode"):
        metrics.add(m.CANCELLED, phase, by=0)


def model(metrics: m.Metrics, info: EngineInfo, card: ModelCard) -> None:
    """The model is loaded."""
    layers = Counter[tuple[str, str]]()
    for choice in info.kernels:
        layers[choice.op, implementation(choice)] += choice.layers
    metrics.loaded = m.Loaded(cache_source="gpu" if info.device.startswith("cuda") else "host", layers=layers)
    metrics.add(m.CACHED_TOKENS, metrics.loaded.cache_source, by=0)
    for labels in layers:
        metrics.add(m.DISPATCHES, *labels, by=0)
    metrics.set(m.MEMORY, info.device, "weights", to=info.weights_bytes)
    metrics.set(m.MEMORY, info.device, "kv", to=info.kv_bytes)
    if info.graphs_bytes:
        metrics.set(m.MEMORY, info.device, "graphs", to=info.graphs_bytes)
        metrics.add(m.STEPS, "hit", by=0)
    if info.activations_bytes:
        metrics.set(m.MEMORY, info.device, "activations_peak", to=info.activations_bytes)
    metrics.set(m.CACHE_CONFIG, str(info.block_size), str(info.kv_blocks), to=1)
    metrics.set(m.WEIGHTS, info.device, card.format, to=info.weights_bytes)
    metrics.set(m.DENSE, to=info.dense_bytes)
    metrics.set(m.UNFUSED, to=info.unfused_groups)
    metrics.set(m.KV_CAPACITY, info.kv_dtype, to=info.kv_bytes)
    metrics.set(m.KV_BLOCK_TOKENS, info.kv_dtype, to=info.block_size)
    for stage, seconds in info.load_seconds.items():
        metrics.set(m.LOAD_TIME, stage, to=seconds)
    for name, series in (("kl_mean", m.FIDELITY_KL), ("top1_agreement", m.FIDELITY_TOP1)):
        if name in card.quality:
            metrics.set(series, "artifact", to=card.quality[name])
    kernels = "+".join(sorted({choice.implementation for choice in info.kernels}))
    metrics.forget(m.MODEL)
    metrics.set(m.MODEL, card.format, *_scheme_labels(card), info.artifact_id, kernels, to=1)


def implementation(choice: KernelChoice) -> str:
    """Say what a kernel is made with, or that it is a fallback: a reference where the weights are compressed.

    For dense weights the reference is the library's own product, to which nothing fell back. A name that begins with no
    tool's stands for itself.
    """
    if choice.implementation == "reference":
        return "torch" if choice.storage == "dense" else "fallback"
    return TOOLS.get(choice.implementation.partition("-")[0], choice.implementation)


def _scheme_labels(card: ModelCard) -> tuple[str, str, str, str]:
    """Bits, group size, sparsity and rank of the one scheme of all groups; what there is not stays empty."""
    if len(card.schemes) != 1:
        return ("", "", "", "")
    scheme = card.schemes[0]
    sparsity = "0.5" if scheme.sparse24 else ""
    return (str(scheme.bits), str(scheme.group_size or ""), sparsity, str(scheme.rank or ""))


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
        metrics.add(m.STEPS, stats.graph)
        assert metrics.loaded is not None  # nothing runs before
        for labels, num_layers in metrics.loaded.layers.items():
            metrics.add(m.DISPATCHES, *labels, by=num_layers)


def tokens(metrics: m.Metrics, generation: Generation, strand: Strand, num_tokens: int, now: float) -> None:
    """The engine made tokens of a sequence, which does not know of them yet."""
    metrics.add(m.GENERATED_TOKENS, by=num_tokens)
    if not (generation.is_open and strand.is_open):
        return  # they came too late to be anybody's
    if strand.last_token_at:
        metrics.observe(m.INTER_TOKEN, (now - strand.last_token_at) / num_tokens, times=num_tokens)
        return
    if num_tokens > 1:
        metrics.observe(m.INTER_TOKEN, 0.0, times=num_tokens - 1)
    if not generation.first_token_at:
        metrics.add(m.PROMPT_TOKENS, by=generation.num_prompt_tokens)


def written(metrics: m.Metrics, *, num_tokens: int, seconds: float) -> None:
    """Transport took a message of a stream, with so many tokens, after so long."""
    metrics.add(m.MESSAGES)
    metrics.observe(m.WRITE_STALL, seconds)
    if num_tokens > 1:
        metrics.add(m.COALESCED, by=num_tokens - 1)


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
        assert metrics.loaded is not None  # nothing runs before
        metrics.add(m.CACHED_TOKENS, metrics.loaded.cache_source, by=generation.num_cached_tokens)
    if generation.first_sent_at:
        metrics.observe(m.FIRST_TOKEN, generation.first_sent_at - generation.arrival)
    for strand in generation.strands:
        if strand.num_computed > 1:
            metrics.observe(m.PER_TOKEN, (strand.last_token_at - strand.first_token_at) / (strand.num_computed - 1))


def call(metrics: m.Metrics, method: str, code: str, *, reason: str, finish_reason: str, seconds: float) -> None:
    """A call is over; `reason` is that of its Refusal, if it was refused."""
    metrics.add(m.REQUESTS, method, code, finish_reason)
    if reason in REJECTIONS:
        metrics.add(m.REJECTED, REJECTIONS[reason])
    if method in GENERATING:
        metrics.observe(m.REQUEST_DURATION, seconds, code)


def energy(metrics: m.Metrics, meter: EnergyMeter) -> None:
    """Some time has passed since the meter was last read."""
    joules = meter.read()
    if joules is None:
        metrics.forget(m.ENERGY)
    else:
        metrics.add(m.ENERGY, "package", by=joules)
