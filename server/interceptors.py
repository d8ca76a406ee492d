"""Around every call: its request id, its errors as statuses with details, its line in the log and the metrics."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from pressd.server import measure
from pressd.server.access import Access, Metadata
from pressd.server.calls import CALL, Call, code_of_cancel
from pressd.server.errors import Refusal, internal, invalid
from pressd.server.fields import refuse_unsupported
from pressd.server.metrics import Metrics
from pressd.server.translate import request_id_of

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[Call], Awaitable[Message | None]]

OURS = "/pressd.v1."

# Bytes of a response. gRPC itself refuses to send what is larger, but tells neither us nor the client why.
MAX_RESPONSE = 64 << 20

log = logging.getLogger("pressd.calls")


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Handles the calls of pressd.v1. Reflection needs what they need to be let in; health is open to all."""

    def __init__(self, metrics: Metrics, access: Access) -> None:
        self._metrics = metrics
        self._access = access

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the handler of a method, wrapped. Messages arrive as bytes, so that a malformed one is a bad field."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        path: str = handler_call_details.method
        method = path.rpartition("/")[2]
        try:
            self._access.require(path, handler_call_details.invocation_metadata or ())
        except Refusal as refusal:
            return self._refusing(method, refusal)
        if not path.startswith(OURS):
            return handler
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def handle(data: bytes, context: Context) -> Message | None:
            async def answer(call: Call) -> Message | None:
                request = _parse(handler.request_deserializer, data)
                call.request_id = request_id_of(request, cast(Metadata, context.invocation_metadata() or ()))
                refuse_unsupported(method, request)
                response: Message | None = await behaviour(request, context)
                if response is not None and response.ByteSize() > MAX_RESPONSE:
                    raise invalid("message", f"its answer has over {MAX_RESPONSE} bytes; ask for less, or for a stream")
                return response

            return await self._handle(method, answer, context)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(handle, response_serializer=handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(handle, response_serializer=handler.response_serializer)

    def _refusing(self, method: str, refusal: Refusal) -> Any:
        """Return a handler that refuses a call before its message is read: a stranger's is not worth any memory."""

        async def refuse(requests: Any, context: Context) -> None:
            async def answer(call: Call) -> None:
                raise refusal

            await self._handle(method, answer, context)

        # Whatever kind the method is of: this one waits for no message.
        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _handle(self, method: str, answer: Answer, context: Context) -> Message | None:
        call = Call(request_id=secrets.token_hex(8), method=method, arrival=time.monotonic())
        CALL.set(call)
        code, reason = grpc.StatusCode.OK, ""
        try:
            try:
                return await answer(call)
            except Refusal:
                raise
            except Exception as error:
                # The client is gone: writing to it fails in a dozen ways, and one of them before the call is done.
                if context.done() or isinstance(error, grpc.aio.InternalError):
                    raise asyncio.CancelledError from error
                log.exception("a defect", extra={"request_id": call.request_id, "method": method})
                raise internal("INTERNAL", f"a defect of the server; its log has request {call.request_id}") from None
        except Refusal as refusal:
            code, reason = refusal.code, refusal.reason
            call.finish_reason = ""  # an end that the client may not have been told
            await context.abort(code, refusal.message, _trailers(refusal, call.request_id))
        except asyncio.CancelledError:
            code = code_of_cancel(context)
            raise
        finally:
            self._record(call, code.name, reason)

    def _record(self, call: Call, code: str, reason: str) -> None:
        seconds = time.monotonic() - call.arrival
        measure.call(self._metrics, call.method, code, reason=reason, finish_reason=call.finish_reason, seconds=seconds)
        log.info(
            "call",
            extra={
                "request_id": call.request_id,
                "method": call.method,
                "code": code,
                "reason": reason or call.finish_reason,
                "seconds": round(seconds, 6),
                "prompt_tokens": call.num_prompt_tokens,
                "tokens": call.num_tokens,
            },
        )


def _parse(parse: Callable[[bytes], Message], data: bytes) -> Message:
    try:
        return parse(data)
    except DecodeError:
        raise invalid("message", "it cannot be read; was it written with another schema?") from None


def _trailers(refusal: Refusal, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    return (("x-request-id", request_id), ("grpc-status-details-bin", refusal.details(request_id)))
