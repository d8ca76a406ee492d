"""The client for asyncio."""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pressd.client.errors import CallError
from pressd.client.messages import DEFAULT_TARGET, GenerateOptions, Prompt, generate_request, tokenize_request
from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc, model_pb2, tokens_pb2


class AsyncClient:
    """Talks to one server. Every call may take `timeout` seconds, also while it waits; failures are CallError."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout: float | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._timeout = timeout
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> generate_pb2.GenerateResponse:
        """Return the whole completion as a GenerateResponse."""
        answer: generate_pb2.GenerateResponse = await self._call(
            self._inference.Generate, generate_request(prompt, options)
        )
        return answer

    async def stream(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[generate_pb2.GenerateEvent]:
        """Yield GenerateEvents as they come. Closing the iterator cancels the request."""
        call = self._inference.GenerateStream(generate_request(prompt, options), timeout=self._timeout)
        try:
            with _errors():
                async for event in call:
                    yield event
        finally:
            call.cancel()

    async def cancel(self, request_id: str) -> None:
        """End a live request; its own call returns what exists."""
        await self._call(self._inference.Cancel, generate_pb2.CancelRequest(request_id=request_id))

    async def tokenize(
        self, text: str | Sequence[Mapping[str, str]], *, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Return the ids of a text, or of messages by the model's template."""
        return list((await self._call(self._inference.Tokenize, tokenize_request(text, add_special_tokens))).ids)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        answer = await self._call(self._inference.Detokenize, tokens_pb2.DetokenizeRequest(ids=ids))
        text: str = answer.text
        return text

    async def model(self, name: str = "") -> model_pb2.Model:
        """Return a Model: limits, capabilities, compression, memory."""
        model: model_pb2.Model = await self._call(
            self._control.GetModel, control_pb2.GetModelRequest(name=name or None)
        )
        return model

    async def models(self) -> list[model_pb2.Model]:
        """Return all Models."""
        return list((await self._call(self._control.ListModels, control_pb2.ListModelsRequest())).models)

    async def server_info(self) -> control_pb2.ServerInfo:
        """Return the ServerInfo."""
        info: control_pb2.ServerInfo = await self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())
        return info

    async def is_serving(self, service: str = "pressd.v1.Inference") -> bool:
        """Whether requests are taken; with service "" whether the process is sound."""
        answer = await self._call(self._health.Check, health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Cancel what is running and disconnect."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        with _errors():
            return await method(request, timeout=self._timeout)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise CallError(error) from None
