"""Every series this server exports, named in one place; their values, and the HTTP port that shows them."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

TTFT = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
TPOT = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03),
    *(0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
DURATION = (0.001, 0.0025, 0.005, *(0.01 * 2**doubling for doubling in range(17)))
TOKENS = tuple(float(4**power) for power in range(10))
STEP = tuple(float(2**power) for power in range(14))


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One metric. The label `model`, if it is the first, is filled in by Metrics; `prefix` goes before the name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()
    prefix: str = "pressd_"


REQUESTS = Series("requests", "counter", "Calls by their end", ("model", "method", "code", "finish_reason"))
REJECTED = Series("requests_rejected", "counter", "Calls refused at the door", ("model", "reason"))
CANCELLED = Series("requests_cancelled", "counter", "Requests ended by their client", ("model", "phase"))
RUNNING = Series("requests_running", "gauge", "Requests being computed")
WAITING = Series("requests_waiting", "gauge", "Requests waiting in the engine")
SWAPPED = Series("requests_swapped", "gauge", "Of those, requests that ran and were put back for want of KV blocks")
PREEMPTIONS = Series("preemptions", "counter", "Times a running request was put back")
REQUEST_DURATION = Series(
    "request_duration_seconds", "histogram", "Arrival to end of a generation", ("model", "code"), DURATION
)
QUEUE_TIME = Series("request_queue_seconds", "histogram", "Arrival to the first computed token", buckets=DURATION)
PREFILL_TIME = Series("request_prefill_seconds", "histogram", "From there to the first new token", buckets=DURATION)
DECODE_TIME = Series("request_decode_seconds", "histogram", "First new token to the last", buckets=DURATION)
FIRST_TOKEN = Series(
    "time_to_first_token_seconds", "histogram", "Arrival to the first token handed to transport", buckets=TTFT
)
PER_TOKEN = Series(
    "time_per_output_token_seconds", "histogram", "Mean gap between the tokens of a sequence", buckets=TPOT
)
INTER_TOKEN = Series("inter_token_latency_seconds", "histogram", "Gap before each token but the first", buckets=TPOT)
WRITE_STALL = Series(
    "stream_write_stall_seconds", "histogram", "Time until transport took a message of a stream", buckets=DURATION
)
MESSAGES = Series("stream_messages", "counter", "Messages written to streams of a generation")
COALESCED = Series("stream_coalesced_tokens", "counter", "Tokens that came in the message of an earlier one")
PROMPT_TOKENS = Series("prompt_tokens", "counter", "Prompt tokens of requests that got a first token")
CACHED_TOKENS = Series(
    "cached_prompt_tokens", "counter", "Of those, tokens found in the prefix cache", ("model", "source")
)
GENERATED_TOKENS = Series("generated_tokens", "counter", "Tokens the engine made")
REQUEST_PROMPT = Series("request_prompt_tokens", "histogram", "Prompt tokens of a request", buckets=TOKENS)
REQUEST_GENERATED = Series("request_generated_tokens", "histogram", "Tokens sent for a request", buckets=TOKENS)
STEP_TIME = Series("engine_step_seconds", "histogram", "Time of a step", ("model", "kind"), TPOT)
STEP_TOKENS = Series("engine_step_tokens", "histogram", "Tokens computed in a step", buckets=STEP)
BATCH_SIZE = Series("engine_batch_size", "histogram", "Sequences computed in a step", buckets=STEP)
STEPS = Series("engine_steps", "counter", "Steps by the way they were launched", ("model", "graph"))
DISPATCHES = Series(
    "kernel_dispatch", "counter", "Layers that steps went through, once each, by what computes them", ("op", "impl")
)
COMPILES = Series("kernel_compiles_after_warmup", "counter", "Kernels compiled while requests waited for them")
KV_USAGE = Series("kv_cache_usage_ratio", "gauge", "Share of KV blocks in use")
KV_BLOCKS = Series("kv_cache_blocks", "gauge", "KV blocks by state", ("model", "dtype", "state"))
KV_BLOCK_TOKENS = Series("kv_cache_block_tokens", "gauge", "Tokens of a KV block", ("model", "dtype"))
KV_CAPACITY = Series("kv_cache_capacity_bytes", "gauge", "Memory of the KV pool", ("model", "dtype"))
KV_USED = Series("kv_cache_used_bytes", "gauge", "Memory of the KV blocks in use", ("model", "dtype"))
PREFIX_QUERIES = Series("prefix_cache_queries_tokens", "counter", "Prompt tokens looked up in the prefix cache")
PREFIX_HITS = Series("prefix_cache_hits_tokens", "counter", "Prompt tokens found in the prefix cache")
PREFIX_EVICTED = Series("prefix_cache_evicted_blocks", "counter", "Cached blocks that were taken for something else")
KV_GATHERS = Series("kv_gathers", "counter", "Times scattered KV blocks had to be copied")
WEIGHTS = Series("model_weights_bytes", "gauge", "Memory of the weights", ("model", "device", "format"))
DENSE = Series("model_weights_dense_equivalent_bytes", "gauge", "The same weights in the source's precision")
UNFUSED = Series("unfused_groups", "gauge", "Fused groups whose members could not become one matrix")
MEMORY = Series("memory_bytes", "gauge", "Memory that the engine set aside", ("device", "kind"))
LOAD_TIME = Series("model_load_seconds", "gauge", "Time of loading by stage", ("model", "stage"))
FIDELITY_KL = Series("fidelity_kl_mean", "gauge", "Mean KL divergence from the source, nats", ("model", "source"))
FIDELITY_TOP1 = Series("fidelity_top1_agreement", "gauge", "Same most likely token as the source", ("model", "source"))
NUMERIC_ERRORS = Series(
    "numeric_errors", "counter", "Sequences ended because their logits were not finite", ("model", "kind")
)
RESTARTS = Series("engine_restarts", "counter", "Times the engine died and came back")
WATCHDOG = Series("engine_step_watchdog_seconds", "gauge", "Age of the engine's last report while it has work")
BUILD = Series("build_info", "gauge", "The program", ("version",))
MODEL = Series(
    "model_info",
    "gauge",
    "The model",
    ("model", "format", "bits", "group_size", "sparsity", "rank", "artifact_sha", "kernel"),
)
CACHE_CONFIG = Series(
    "cache_config_info", "gauge", "The KV pool, on whatever device", ("model", "block_size", "num_gpu_blocks")
)
ENERGY = Series("energy_joules", "counter", "Energy that the machine took while the server ran", ("domain",))

# Names and labels of go-grpc-prometheus, so that its dashboards work.
_CALLED = ("grpc_type", "grpc_service", "grpc_method")
CALLS_STARTED = Series("grpc_server_started", "counter", "Calls begun", _CALLED, prefix="")
CALLS_HANDLED = Series("grpc_server_handled", "counter", "Calls ended", (*_CALLED, "grpc_code"), prefix="")
CALL_MESSAGES_IN = Series("grpc_server_msg_received", "counter", "Messages received in calls", _CALLED, prefix="")
CALL_MESSAGES_OUT = Series("grpc_server_msg_sent", "counter", "Messages sent in calls", _CALLED, prefix="")
CALL_TIME = Series("grpc_server_handling_seconds", "histogram", "Time of a call", _CALLED, DURATION, prefix="")

SERIES = tuple(value for value in list(globals().values()) if isinstance(value, Series))


@dataclass(slots=True)
class _Histogram:
    counts: list[int]  # one for each bucket, and one above the last
    total: float = 0.0


@dataclass(slots=True)
class _Values:
    numbers: dict[tuple[str, ...], float] = field(default_factory=dict)
    histograms: dict[tuple[str, ...], _Histogram] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What all requests and steps of a model share: where prefixes are cached, and its layers by (op, impl)."""

    cache_source: str
    layers: Mapping[tuple[str, str], int]


class Metrics(Collector):
    """The values of all series. Written by the event loop, read by the HTTP thread; a read may see half a step.

    `loaded` is None until there is a model.
    """

    def __init__(self, model: str) -> None:
        self.loaded: Loaded | None = None
        self._model = model
        self._values = {series: _Values() for series in SERIES}

    def add(self, series: Series, *labels: str, by: float = 1) -> None:
        """Increase a counter; by 0 makes it appear."""
        numbers, key = self._values[series].numbers, self._key(series, labels)
        numbers[key] = numbers.get(key, 0) + by

    def set(self, series: Series, *labels: str, to: float) -> None:
        """Set a gauge."""
        self._values[series].numbers[self._key(series, labels)] = to

    def forget(self, series: Series) -> None:
        """Drop all values of a series."""
        self._values[series] = _Values()

    def observe(self, series: Series, value: float, *labels: str, times: int = 1) -> None:
        """Count a value in a histogram, several times at once if it stands for several tokens."""
        histograms, key = self._values[series].histograms, self._key(series, labels)
        if key not in histograms:
            histograms[key] = _Histogram([0] * (len(series.buckets) + 1))
        histogram = histograms[key]
        histogram.counts[bisect_left(series.buckets, value)] += times
        histogram.total += value * times

    def collect(self) -> Iterable[Metric]:
        """Yield every series that has a value."""
        for series, values in self._values.items():
            numbers, histograms = list(values.numbers.items()), list(values.histograms.items())
            if numbers or histograms:
                yield _family(series, numbers, histograms)

    def _key(self, series: Series, labels: tuple[str, ...]) -> tuple[str, ...]:
        key = (self._model, *labels) if series.labels[0] == "model" else labels
        assert len(key) == len(series.labels), series.name
        return key


def _family(
    series: Series, numbers: list[tuple[tuple[str, ...], float]], histograms: list[tuple[tuple[str, ...], _Histogram]]
) -> Metric:
    name = f"{series.prefix}{series.name}"
    if series.kind == "histogram":
        family = HistogramMetricFamily(name, series.help, labels=series.labels)
        for key, histogram in histograms:
            running, buckets = 0, []
            for bound, count in zip((*map(str, series.buckets), "+Inf"), list(histogram.counts), strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric(key, buckets, histogram.total)
        return family
    family_type = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    plain = family_type(name, series.help, labels=series.labels)
    for key, value in numbers:
        plain.add_metric(key, value)
    return plain


@contextmanager
def exposed(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Serve the metrics over HTTP for the length of a block; gives the port, raises OSError if it is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
