"""Counting, and what Prometheus reads of it."""

import dataclasses
import shutil
import subprocess
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.kernels.catalogue import ATTENTION, LINEAR
from pressd.runtime.params import SamplingParams
from pressd.runtime.report import EngineInfo, KernelChoice, StepStats
from pressd.server import measure
from pressd.server import metrics as m
from pressd.server.call_metrics import CallMetrics
from pressd.server.model_card import ModelCard

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: m.Metrics) -> Samples:
    registry = CollectorRegistry()
    registry.register(metrics)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset({"model": "m", **labels}.items())]


def stats(**counts: float) -> StepStats:
    zeros = {field.name: 0 for field in dataclasses.fields(StepStats) if field.name != "graph"}
    return StepStats(**(zeros | counts))  # type: ignore[arg-type]


def choice(op: str, implementation: str, storage: str = "packed_int", layers: int = 1) -> KernelChoice:
    return KernelChoice(op=op, storage=storage, implementation=implementation, layers=layers)


def info(device: str = "cpu", kernels: tuple[KernelChoice, ...] = ()) -> EngineInfo:
    return EngineInfo(
        architecture="A",
        artifact_id="sha",
        device=device,
        dtype="float32",
        kv_dtype="float32",
        vocab_size=9,
        max_context=64,
        max_batch=4,
        eos_token_ids=(0,),
        block_size=16,
        kv_blocks=10,
        kv_tokens=160,
        kv_bytes=1000,
        weights_bytes=300,
        dense_bytes=900,
        kernels=kernels,
        unfused_groups=0,
        load_seconds={"read": 0.5},
    )


def card(*schemes: str) -> ModelCard:
    parsed = tuple(parse_scheme(scheme) for scheme in schemes)
    return ModelCard(sampling=SamplingParams(), max_new_tokens=9, manifest=None, schemes=parsed, not_applied=())


def loaded(*kernels: KernelChoice, device: str = "cpu") -> m.Metrics:
    metrics = m.Metrics("m")
    measure.begin(metrics)
    measure.model(metrics, info(device, kernels), card())
    return metrics


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
    assert value(samples, "pressd_stream_write_stall_seconds_count") == 0
    assert value(samples, "pressd_stream_write_stall_seconds_bucket", le="+Inf") == 0
    assert not any(name.startswith(("pressd_fidelity", "pressd_kv_cache")) for name, _ in samples)


@pytest.mark.parametrize(("prefill", "decode", "kind"), [(5, 0, "prefill"), (0, 3, "decode"), (5, 3, "mixed")])
def test_step_is_named_by_what_it_computed(prefill: int, decode: int, kind: str) -> None:
    metrics = loaded()
    step = stats(seconds=0.5, num_prefill_tokens=prefill, num_decode_tokens=decode, num_rows=4, kv_gathers=7)
    measure.step(metrics, step, stats(kv_gathers=5))
    samples = scrape(metrics)
    assert value(samples, "pressd_engine_step_seconds_sum", kind=kind) == 0.5
    assert value(samples, "pressd_engine_step_tokens_sum") == prefill + decode
    assert value(samples, "pressd_engine_batch_size_sum") == 4
    assert value(samples, "pressd_kv_gathers_total") == 2
    assert value(samples, "pressd_engine_steps_total", graph="eager") == 1


def test_totals_go_on_where_another_engine_begins_at_zero() -> None:
    metrics = loaded()
    totals = (*measure.TOTALS, "numeric_errors")
    for number, (now, before) in enumerate([(5, None), (7, 5), (3, None), (3, 3)]):
        stats_before = stats(**dict.fromkeys(totals, before)) if before is not None else None
        measure.step(metrics, stats(**dict.fromkeys(totals, now)), stats_before)
        expected = (5, 7, 10, 10)[number]
        samples = scrape(metrics)
        for series in measure.TOTALS.values():
            assert value(samples, f"pressd_{series.name}_total") == expected
        assert value(samples, "pressd_numeric_errors_total", kind="nan_logits") == expected


def test_layers_are_counted_once_a_step_by_what_computes_them() -> None:
    metrics = loaded(
        choice("linear", "cpu-nibbles", layers=4),
        choice("linear", "cpu-bytes", layers=2),
        choice("linear", "reference", layers=3),
        choice("linear", "reference", "dense", layers=1),
        choice("attention", "reference", "paged", layers=5),
    )
    for rows in (1, 8, 0):  # the last is no step
        measure.step(metrics, stats(num_rows=rows, num_decode_tokens=rows), None)
    found = {labels: number for (name, labels), number in scrape(metrics).items() if "kernel_dispatch" in name}
    assert found == {
        frozenset({"op": "linear", "impl": "torch"}.items()): 2 * (4 + 2 + 1),
        frozenset({"op": "linear", "impl": "fallback"}.items()): 2 * 3,
        frozenset({"op": "attention", "impl": "fallback"}.items()): 2 * 5,
    }


def test_every_kernel_has_a_word_of_the_agreed_list() -> None:
    choices = [choice("linear", kernel.name, kernel.storage) for kernel in LINEAR]
    choices += [choice("attention", kernel.name, "paged") for kernel in ATTENTION]
    words = {measure.implementation(one) for one in choices}
    assert words <= {"triton", "torch", "cuda", "fallback"}
    assert "fallback" in words
    assert [measure.implementation(choice("linear", name)) for name in ("triton-w4", "cuda-w8")] == ["triton", "cuda"]


@pytest.mark.parametrize(
    ("schemes", "labels"),
    [
        ((), ("dense", "", "", "", "")),
        (("w4a16g32",), ("w4a16g32", "4", "32", "", "")),
        (("sparse24:w8a16",), ("sparse24:w8a16", "8", "", "0.5", "")),
        (("lowrank8:bf16",), ("lowrank8:bf16", "16", "", "", "8")),
        (("w4a16", "w8a16"), ("mixed", "", "", "", "")),
    ],
)
def test_model_is_described(schemes: tuple[str, ...], labels: tuple[str, ...]) -> None:
    metrics = m.Metrics("m")
    measure.model(metrics, info(kernels=(choice("linear", "b"), choice("attention", "a"))), card(*schemes))
    samples = scrape(metrics)
    words = dict(zip(("format", "bits", "group_size", "sparsity", "rank"), labels, strict=True))
    assert value(samples, "pressd_model_info", **words, artifact_sha="sha", kernel="a+b") == 1
    assert value(samples, "pressd_cache_config_info", block_size="16", num_gpu_blocks="10") == 1
    memory = {labels: number for (name, labels), number in samples.items() if name == "pressd_memory_bytes"}
    assert memory == {
        frozenset({"device": "cpu", "kind": "weights"}.items()): 300,
        frozenset({"device": "cpu", "kind": "kv"}.items()): 1000,
    }


@pytest.mark.parametrize(("device", "source"), [("cpu", "host"), ("cuda:0", "gpu")])
def test_cache_is_named_by_where_it_is(device: str, source: str) -> None:
    samples = scrape(loaded(device=device))
    assert value(samples, "pressd_cached_prompt_tokens_total", source=source) == 0
    assert len([name for name, _ in samples if name == "pressd_cached_prompt_tokens_total"]) == 1


def test_messages_are_counted_and_tokens_that_share_one() -> None:
    metrics = m.Metrics("m")
    measure.begin(metrics)
    for num_tokens, seconds in ((0, 0.5), (1, 0.25), (4, 2.0), (0, 0.0)):
        measure.written(metrics, num_tokens=num_tokens, seconds=seconds)
    samples = scrape(metrics)
    assert value(samples, "pressd_stream_messages_total") == 4
    assert value(samples, "pressd_stream_coalesced_tokens_total") == 3
    assert value(samples, "pressd_stream_write_stall_seconds_count") == 4
    assert value(samples, "pressd_stream_write_stall_seconds_sum") == 2.75


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_prometheus_has_nothing_to_say_against_it() -> None:
    metrics = loaded(choice("linear", "cpu-nibbles"))
    CallMetrics(metrics)
    for series in m.SERIES:
        labels = ["x"] * (len(series.labels) - (series.labels[0] == "model"))
        if series.kind == "histogram":
            metrics.observe(series, 0.5, *labels)
        else:
            metrics.add(series, *labels)
    registry = CollectorRegistry()
    registry.register(metrics)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_idle_report_is_no_step() -> None:
    metrics = m.Metrics("m")
    measure.step(metrics, stats(), None)
    assert not any(name.startswith("pressd_engine_step") for name, _ in scrape(metrics))


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
