"""Control: what the server and its model are, as messages of pressd.v1."""

import asyncio
import importlib.metadata
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import Message

from pressd.runtime.params import MAX_BIAS, MAX_SEQUENCES, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS
from pressd.runtime.report import EngineInfo
from pressd.server.asked import MAX_BAD_TEXTS, MAX_STOP_LENGTH, MAX_STOP_TEXTS
from pressd.server.door import Door, Phase
from pressd.server.errors import invalid
from pressd.server.fields import HONOURED
from pressd.server.model_card import ModelCard
from pressd.v1 import control_pb2, load_pb2, model_pb2, sampling_pb2

if TYPE_CHECKING:
    from pressd.runtime.artifact.schemes import Scheme

SCHEMA_REVISION = 2
# Bounds on WatchLoad's interval in milliseconds, and on how long a drain may wait in seconds.
MIN_INTERVAL, MAX_INTERVAL, DEFAULT_INTERVAL = 100, 3_600_000, 1000
MAX_DRAIN = 86400.0

Context = grpc.aio.ServicerContext[Any, Any]

_MODEL_STATES = {
    Phase.STARTING: model_pb2.MODEL_STATE_LOADING,
    Phase.READY: model_pb2.MODEL_STATE_READY,
    Phase.ENGINE_DOWN: model_pb2.MODEL_STATE_LOADING,
    Phase.DRAINING: model_pb2.MODEL_STATE_DRAINING,
}


class ControlServicer:
    """Service Control, for one model behind a Door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._started_at = time.time()
        self._version = importlib.metadata.version("pressd")  # what is running, whatever is installed since

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.ServerInfo:
        """Describe the server."""
        info = control_pb2.ServerInfo(
            version=self._version,
            schema_revision=SCHEMA_REVISION,
            state=f"SERVER_STATE_{self._door.phase.name}",
            engine_restarts=max(0, self._door.engine.num_starts - 1),
            max_queue_requests=self._door.settings.max_queue_requests,
            max_queue_tokens=self._door.settings.max_queue_tokens,
        )
        info.started_at.FromNanoseconds(round(self._started_at * 1e9))
        return info

    async def ListModels(
        self, request: control_pb2.ListModelsRequest, context: Context
    ) -> control_pb2.ListModelsResponse:
        """List the one model."""
        return control_pb2.ListModelsResponse(models=[describe(self._door)])

    async def GetModel(self, request: control_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        """Describe the one model."""
        self._door.require_model(request.name)
        return describe(self._door)

    async def GetLoad(self, request: load_pb2.GetLoadRequest, context: Context) -> load_pb2.LoadInfo:
        """Tell how busy the one model is."""
        self._door.require_model(request.model)
        return load(self._door)

    async def WatchLoad(self, request: load_pb2.WatchLoadRequest, context: Context) -> None:
        """Keep telling until the client has enough, or the server ends."""
        self._door.require_model(request.model)
        interval = request.interval_ms if request.HasField("interval_ms") else DEFAULT_INTERVAL
        if not MIN_INTERVAL <= interval <= MAX_INTERVAL:
            raise invalid("interval_ms", f"it is {interval}; it must be {MIN_INTERVAL} to {MAX_INTERVAL}")
        while True:
            await context.write(load(self._door))
            await asyncio.sleep(interval / 1000)

    async def FlushPrefixCache(
        self, request: control_pb2.FlushPrefixCacheRequest, context: Context
    ) -> control_pb2.FlushPrefixCacheResponse:
        """Forget all cached prefixes."""
        self._door.require_model(request.model)
        return control_pb2.FlushPrefixCacheResponse(num_blocks=await self._door.flush_prefix_cache())

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        """Begin what SIGTERM begins."""
        timeout = request.timeout_seconds if request.HasField("timeout_seconds") else None
        if timeout is not None and not 0 <= timeout <= MAX_DRAIN:
            raise invalid("timeout_seconds", f"it is {timeout:g}; it must be 0 to {MAX_DRAIN:g}")
        self._door.request_drain(timeout)
        return control_pb2.DrainResponse(num_live=len(self._door.live))

    async def _absent(self, request: Message, context: Context) -> None:
        """Never reached: what fields.HONOURED does not list is refused before it gets here."""
        raise AssertionError(request)

    # Promised, but not in this build.
    LoadModel = UnloadModel = _absent


def describe(door: Door) -> model_pb2.Model:
    """Write everything known about the model."""
    model = model_pb2.Model(name=door.settings.served_name, state=_MODEL_STATES[door.phase])
    if door.info is None or door.card is None:
        return model
    info, card = door.info, door.card
    model.version = info.artifact_id
    model.architecture = info.architecture
    model.limits.CopyFrom(_limits(door, info, card))
    model.capabilities.CopyFrom(
        model_pb2.Capabilities(
            request_fields=sorted(HONOURED["Generate"]),
            text=door.text is not None,
            chat=door.text is not None and door.text.has_chat_template,
        )
    )
    model.default_sampling.CopyFrom(_default_sampling(card))
    model.eos_token_ids.extend(info.eos_token_ids)
    model.compression.CopyFrom(_compression(info, card))
    model.memory.CopyFrom(_memory(info))
    return model


def load(door: Door) -> load_pb2.LoadInfo:
    """Write how busy the model is."""
    stats, info = door.stats, door.info
    num_running = stats.num_running if stats else 0
    return load_pb2.LoadInfo(
        num_running=num_running,
        num_waiting=max(0, door.admission.num_requests - num_running),
        num_waiting_tokens=door.admission.num_waiting_tokens,
        kv_usage_ratio=stats.kv_blocks_used / info.kv_blocks if stats and info else 0.0,
        draining=door.phase is Phase.DRAINING,
    )


def _default_sampling(card: ModelCard) -> sampling_pb2.SamplingParams:
    sampling = card.sampling
    return sampling_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty,
    )


def _limits(door: Door, info: EngineInfo, card: ModelCard) -> model_pb2.Limits:
    return model_pb2.Limits(
        max_context=info.max_context,
        default_max_new_tokens=card.max_new_tokens,
        vocab_size=info.vocab_size,
        max_batch=info.max_batch,
        max_stop_texts=MAX_STOP_TEXTS,
        max_stop_length=MAX_STOP_LENGTH,
        max_kv_tokens=info.kv_tokens,
        max_prompt_bytes=door.text.max_bytes(info.max_context) if door.text else None,
        max_sequences=min(MAX_SEQUENCES, door.admission.max_requests),
        max_top_logprobs=MAX_TOP_LOGPROBS,
        max_logit_bias=MAX_BIAS,
        max_bad_words=MAX_BAD_TEXTS,
        max_stop_token_ids=MAX_STOP_TOKENS,
    )


def _memory(info: EngineInfo) -> model_pb2.MemoryInfo:
    return model_pb2.MemoryInfo(
        device=info.device,
        dtype=info.dtype,
        weights_bytes=info.weights_bytes,
        dense_bytes=info.dense_bytes,
        kv_bytes=info.kv_bytes,
        kv_dtype=info.kv_dtype,
        kv_blocks=info.kv_blocks,
        block_size=info.block_size,
    )


def compression_methods(scheme: "Scheme", passes: str) -> Iterator[model_pb2.CompressionMethod]:
    """Yield what a scheme does to a weight, in that order."""
    method = model_pb2.CompressionMethod
    if scheme.sparse24:
        yield method(kind=model_pb2.COMPRESSION_KIND_SPARSITY_2_OF_4, name="magnitude", sparsity=0.5)
    if scheme.rank is not None:
        yield method(kind=model_pb2.COMPRESSION_KIND_LOW_RANK, name="svd", mean_rank=scheme.rank)
    if scheme.bits < 16 or scheme.is_dense:
        yield method(
            kind=model_pb2.COMPRESSION_KIND_QUANTIZATION,
            name=passes,
            bits=scheme.bits,
            group_size=scheme.group_size,
            activation_bits=scheme.activation_bits,
            symmetric=scheme.symmetric,
        )
    if scheme.residual_rank is not None:
        yield method(kind=model_pb2.COMPRESSION_KIND_LOW_RANK, name="residual", mean_rank=scheme.residual_rank)


def _compression(info: EngineInfo, card: ModelCard) -> model_pb2.CompressionInfo:
    compression = model_pb2.CompressionInfo(
        dense_bytes=info.dense_bytes,
        quality=card.quality,
        kernels=[
            model_pb2.KernelSelection(
                op=choice.op,
                storage=choice.storage,
                implementation=choice.implementation,
                num_layers=choice.layers,
                refusals=choice.refusals,
            )
            for choice in info.kernels
        ],
    )
    for scheme in card.schemes:
        compression.methods.extend(compression_methods(scheme, "+".join(card.passes)))
    if card.manifest is not None:
        manifest = card.manifest
        compression.artifact_bytes = manifest.totals.bytes
        if manifest.totals.bpw is not None:
            compression.bits_per_weight = manifest.totals.bpw
        compression.layers.extend(
            model_pb2.LayerPlan(pattern=group.name, scheme=group.scheme) for group in manifest.plan
        )
        compression.source = manifest.source.path
        compression.toolchain = f"{manifest.tool.name} {manifest.tool.version}, torch {manifest.tool.torch}"
    return compression
