"""What a server says about itself: Control, health, reflection, metrics."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pressd.client import CallError, Client
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.energy import EnergyMeter
from pressd.runtime.report import EngineInfo
from pressd.server.app import start_line
from pressd.server.control import compression_methods
from pressd.server.fields import HONOURED
from pressd.v1 import control_pb2, model_pb2

pytestmark = pytest.mark.system

# What exists in this build, by the names of the metrics' agreed list.
SERIES = {
    "build_info",
    "cache_config_info",
    "cached_prompt_tokens",
    "engine_batch_size",
    "engine_restarts",
    "engine_step_seconds",
    "engine_step_tokens",
    "engine_step_watchdog_seconds",
    "engine_steps",
    "generated_tokens",
    "inter_token_latency_seconds",
    "kernel_compiles_after_warmup",
    "kernel_dispatch",
    "kv_cache_block_tokens",
    "kv_cache_blocks",
    "kv_cache_capacity_bytes",
    "kv_cache_usage_ratio",
    "kv_cache_used_bytes",
    "kv_gathers",
    "memory_bytes",
    "model_info",
    "model_load_seconds",
    "model_weights_bytes",
    "model_weights_dense_equivalent_bytes",
    "unfused_groups",
    "numeric_errors",
    "preemptions",
    "prefix_cache_evicted_blocks",
    "prefix_cache_hits_tokens",
    "prefix_cache_queries_tokens",
    "prompt_tokens",
    "request_decode_seconds",
    "request_duration_seconds",
    "request_generated_tokens",
    "request_prefill_seconds",
    "request_prompt_tokens",
    "request_queue_seconds",
    "requests",
    "requests_cancelled",
    "requests_rejected",
    "requests_running",
    "requests_swapped",
    "requests_waiting",
    "stream_coalesced_tokens",
    "stream_messages",
    "stream_write_stall_seconds",
    "time_per_output_token_seconds",
    "time_to_first_token_seconds",
} | ({"energy_joules"} if EnergyMeter().read() is not None else set())


@pytest.fixture
def client(parrot: Any) -> Any:
    with parrot.client() as client:
        yield client


def test_model_tells_what_it_is_and_can_do(client: Client) -> None:
    (model,) = client.models()
    assert model == client.model("parrot") == client.model()
    assert (model.name, model.version, model.architecture) == ("parrot", "echo-1", "Echo")
    assert model.state == model_pb2.MODEL_STATE_READY
    assert (model.limits.max_context, model.limits.max_kv_tokens) == (4096, 4096 * 16)
    assert list(model.capabilities.request_fields) == sorted(HONOURED["GenerateStream"])
    assert model.capabilities.text
    assert model.capabilities.chat
    assert list(model.eos_token_ids) == [0]
    assert (model.memory.weights_bytes, model.memory.dense_bytes) == (3 << 20, 8 << 20)
    (kernel,) = model.compression.kernels
    assert (kernel.op, kernel.implementation, kernel.num_layers, list(kernel.refusals)) == ("linear", "echo", 2, ["x"])
    assert list(model.compression.methods) == []


def test_unknown_model_is_not_found(client: Client, refused: Callable[..., CallError]) -> None:
    refused(lambda: client.model("other"), "NOT_FOUND", "MODEL_NOT_FOUND")


def test_server_tells_what_it_is(client: Client) -> None:
    info = client.server_info()
    assert info.state == control_pb2.SERVER_STATE_READY
    assert (info.engine_restarts, info.max_queue_requests) == (0, 256)
    assert info.started_at.seconds > 0


def test_reflection_lists_the_services(parrot: Any) -> None:
    with grpc.insecure_channel(parrot.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest
        services, file = stub.ServerReflectionInfo(
            iter([ask(list_services=""), ask(file_containing_symbol="pressd.v1.GenerateRequest")]), timeout=60
        )
    names = {service.name for service in services.list_services_response.service}
    assert names >= {"pressd.v1.Inference", "pressd.v1.Control", "grpc.health.v1.Health"}
    assert file.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("service", ["", "pressd.v1.Inference", "pressd.v1.Inference/parrot"])
def test_health_has_a_name_for_each_question(client: Client, service: str) -> None:
    assert client.is_serving(service)


def test_health_can_be_watched(parrot: Any) -> None:
    with grpc.insecure_channel(parrot.target) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="pressd.v1.Inference"), timeout=60
        )
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()


def test_metrics_are_the_agreed_ones(
    client: Client, parrot: Any, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    client.generate("the metrics")
    parrot.await_metric(0, "pressd_requests_running")
    names = {f.name.removeprefix("pressd_") for f in parrot.families() if f.name.startswith("pressd_")}
    assert names == SERIES
    labels = {"model": "parrot", "method": "Generate", "code": "OK", "finish_reason": "eos"}
    eventually(lambda: parrot.metric("pressd_requests_total", **labels) >= 1, "the call is counted")
    assert parrot.metric("pressd_model_weights_bytes", device="cpu", format="dense") == 3 << 20
    assert parrot.metric("pressd_kv_cache_blocks", state="free", dtype="float32") == 4096
    assert parrot.metric("pressd_build_info") == 1


def test_start_line_says_what_is_served(parrot: Any) -> None:
    assert parrot.stdout() == ("weights 3.0 MiB (dense 8.0), KV 4.0 MiB = 65536 tokens, cpu, linear dense: echo x2\n")


def test_start_line_says_what_steps_need_where_they_have_memory_of_their_own() -> None:
    info = EngineInfo(
        architecture="LlamaForCausalLM",
        artifact_id="sha256:0",
        device="cuda:0",
        dtype="bfloat16",
        kv_dtype="bfloat16",
        vocab_size=256,
        max_context=128,
        max_batch=4,
        eos_token_ids=(),
        weights_bytes=3 << 20,
        dense_bytes=8 << 20,
        kv_bytes=4 << 20,
        kv_blocks=16,
        kv_tokens=256,
        block_size=16,
        kernels=(),
        unfused_groups=0,
        load_seconds={},
        activations_bytes=5 << 20,
        graphs_bytes=1 << 19,
    )
    assert "KV 4.0 MiB = 256 tokens, steps 5.0 MiB, graphs 0.5 MiB, cuda:0" in start_line(info)


@pytest.mark.parametrize(
    ("scheme", "methods"),
    [
        ("w4a8g32", [("QUANTIZATION", "rtn", 4, 32, 8)]),
        ("bf16", [("QUANTIZATION", "rtn", 16, None, 16)]),
        ("lowrank8:bf16", [("LOW_RANK", "svd", 8.0)]),
        (
            "sparse24:w4a16+residual3",
            [
                ("SPARSITY_2_OF_4", "magnitude", 0.5),
                ("QUANTIZATION", "rtn", 4, None, 16),
                ("LOW_RANK", "residual", 3.0),
            ],
        ),
    ],
)
def test_a_scheme_is_told_in_the_steps_it_is_made_of(scheme: str, methods: list[tuple[Any, ...]]) -> None:
    told = []
    for method in compression_methods(parse_scheme(scheme), "rtn"):
        kind = model_pb2.CompressionKind.Name(method.kind).removeprefix("COMPRESSION_KIND_")
        if kind == "QUANTIZATION":
            group_size = method.group_size if method.HasField("group_size") else None
            told.append((kind, method.name, method.bits, group_size, method.activation_bits))
        else:
            told.append((kind, method.name, method.sparsity if kind.startswith("SPARSITY") else method.mean_rank))
    assert told == methods
