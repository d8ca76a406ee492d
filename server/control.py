"""Control: what the server and its model are, as messages of pressd.v1."""

import importlib.metadata
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import Message

from pressd.runtime.report import EngineInfo
from pressd.server.asked import MAX_STOP_LENGTH, MAX_STOP_TEXTS
from pressd.server.door import Door, Phase
from pressd.server.fields import HONOURED
from pressd.server.model_card import ModelCard
from pressd.v1 import control_pb2, model_pb2, sampling_pb2

if TYPE_CHECKING:
    from pressd.runtime.artifact.schemes import Scheme

SCHEMA_REVISION = 1

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

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.ServerInfo:
        """Describe the server."""
        info = control_pb2.ServerInfo(
            version=importlib.metadata.version("pressd"),
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

    async def _absent(self, request: Message, context: Context) -> None:
        """Never reached: what fields.HONOURED does not list is refused before it gets here."""
        raise AssertionError(request)

    # Promised, but not in this build.
    GetLoad = WatchLoad = LoadModel = UnloadModel = FlushPrefixCache = Drain = _absent


def describe(door: Door) -> model_pb2.Model:
    """Write everything known about the model."""
    model = model_pb2.Model(name=door.settings.served_name, state=_MODEL_STATES[door.phase])
    if door.info is None or door.card is None:
        return model
    info, card = door.info, door.card
    model.version = info.artifact_id
    model.architecture = info.architecture
    model.limits.CopyFrom(_limits(info, card))
    model.capabilities.CopyFrom(
        model_pb2.Capabilities(
            request_fields=sorted(HONOURED["Generate"]),
            text=door.text is not None,
            chat=door.text is not None and door.text.has_chat_template,
        )
    )
    model.default_sampling.CopyFrom(
        sampling_pb2.SamplingParams(temperature=card.sampling.temperature, top_p=card.sampling.top_p)
    )
    model.eos_token_ids.extend(info.eos_token_ids)
    model.compression.CopyFrom(_compression(info, card))
    model.memory.CopyFrom(_memory(info))
    return model


def _limits(info: EngineInfo, card: ModelCard) -> model_pb2.Limits:
    return model_pb2.Limits(
        max_context=info.max_context,
        default_max_new_tokens=card.max_new_tokens,
        vocab_size=info.vocab_size,
        max_batch=info.max_batch,
        max_stop_texts=MAX_STOP_TEXTS,
        max_stop_length=MAX_STOP_LENGTH,
        max_kv_tokens=info.kv_tokens,
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
