"""Counting, and what Prometheus reads of it."""

import dataclasses
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pressd.runtime.report import StepStats
from pressd.runtime.request import RequestOutput
from pressd.server import measure
from pressd.server import metrics as m
from pressd.server.generation import Generation

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: m.Metrics) -> Samples:
    registry = CollectorRegistry()
    registry.register(metrics)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset({"model": "m", **labels}.items())]


def stats(**counts: float) -> StepStats:
    zeros = {field.name: 0 for field in dataclasses.fields(StepStats)}
    return StepStats(**(zeros | counts))  # type: ignore[arg-type]


def test_names_follow_the_rules_of_prometheus() -> None:
    for series in m.SERIES:
        assert not series.name.endswith(("_total", "_ms", "_count", "_sum", "_bucket"))
        assert bool(series.buckets) == (series.kind == "histogram")
        assert list(series.buckets) == sorted(set(series.buckets))
    assert len({series.name for series in m.SERIES}) == len(m.SERIES)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.0011, 3.0, 1e6]), st.integers(1, 9))))
def test_histogram_counts_each_value_in_every_bucket_that_holds_it(values: list[tuple[float, int]]) -> None:
    metrics = m.Metrics("m")
    for number, times in values:
        metrics.observe(m.QUEUE_TIME, number, times=times)
    samples = scrape(metrics)
    if not values:
        assert samples == {}
        return
    for bound in m.DURATION:
        expected = sum(times for number, times in values if number <= bound)
        assert value(samples, "pressd_request_queue_seconds_bucket", le=str(bound)) == expected
    assert value(samples, "pressd_request_queue_seconds_count") == sum(times for _, times in values)
    assert value(samples, "pressd_request_queue_seconds_sum") == pytest.approx(sum(n * times for n, times in values))


def test_what_cannot_be_known_is_absent_and_what_can_only_grow_begins_at_zero() -> None:
    metrics = m.Metrics("m")
    measure.begin(metrics)
    samples = scrape(metrics)
    assert value(samples, "pressd_engine_restarts_total") == 0
    assert value(samples, "pressd_requests_rejected_total", reason="queue_full") == 0
    assert not any(name.startswith(("pressd_fidelity", "pressd_kv_cache")) for name, _ in samples)


@pytest.mark.parametrize(("prefill", "decode", "kind"), [(5, 0, "prefill"), (0, 3, "decode"), (5, 3, "mixed")])
def test_step_is_named_by_what_it_computed(prefill: int, decode: int, kind: str) -> None:
    metrics = m.Metrics("m")
    step = stats(seconds=0.5, num_prefill_tokens=prefill, num_decode_tokens=decode, num_rows=4, kv_gathers=7)
    measure.step(metrics, step, stats(kv_gathers=5))
    samples = scrape(metrics)
    assert value(samples, "pressd_engine_step_seconds_sum", kind=kind) == 0.5
    assert value(samples, "pressd_engine_step_tokens_sum") == prefill + decode
    assert value(samples, "pressd_engine_batch_size_sum") == 4
    assert value(samples, "pressd_kv_gathers_total") == 2


def test_idle_report_is_no_step() -> None:
    metrics = m.Metrics("m")
    measure.step(metrics, stats(), None)
    assert not any(name.startswith("pressd_engine_step") for name, _ in scrape(metrics))


def test_latencies_of_a_request_are_weighted_by_tokens() -> None:
    metrics = m.Metrics("m")
    generation = Generation(
        request_id="r",
        engine_id="0",
        prompt_field="prompt",
        num_prompt_tokens=6,
        seed=0,
        arrival=100.0,
        detokenizer=None,
    )
    # One token at 103, four more at 107: the mean gap is a second, and it is four gaps.
    for now, ids in ((103.0, (1,)), (107.0, (2, 3, 4, 5))):
        measure.tokens(metrics, generation, len(ids), now)
        generation.push(RequestOutput(request_id="0", token_ids=ids, scheduled_at=101.0, first_token_at=103.0), now)
    measure.closed(metrics, generation)
    samples = scrape(metrics)
    assert value(samples, "pressd_inter_token_latency_seconds_count") == 4
    assert value(samples, "pressd_inter_token_latency_seconds_sum") == 4.0
    assert value(samples, "pressd_time_per_output_token_seconds_sum") == 1.0
    assert value(samples, "pressd_request_queue_seconds_sum") == 1.0
    assert value(samples, "pressd_request_prefill_seconds_sum") == 2.0
    assert value(samples, "pressd_request_decode_seconds_sum") == 4.0
    assert value(samples, "pressd_prompt_tokens_total") == 6
    assert value(samples, "pressd_generated_tokens_total") == 5
    assert value(samples, "pressd_requests_cancelled_total", phase="decode") == 1  # nobody read it to its end


def test_port_serves_until_it_is_closed() -> None:
    metrics = m.Metrics("m")
    metrics.add(m.RESTARTS)
    with m.exposed(metrics, "127.0.0.1", 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        with pytest.raises(OSError, match="in use"), m.exposed(metrics, "127.0.0.1", port):
            pass
    assert 'pressd_engine_restarts_total{model="m"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    with m.exposed(metrics, "127.0.0.1", port):
        pass
