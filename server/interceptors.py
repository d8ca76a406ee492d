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
from pressd.server.calls import CALL, Call
from pressd.server.errors import Refusal, internal, invalid
from pressd.server.fields import refuse_unsupported
from pressd.server.metrics import Metrics
from pressd.server.translate import request_id_of

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Message, Context], Awaitable[Message | None]]

OURS = "/pressd.v1."
# A deadline begins when the client calls, so its clock runs out first and what we see is a dropped call. Seconds.
CLIENTS_HEADSTART = 0.1

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
        name: str = handler_call_details.method
        if not name.startswith(OURS):
            return self._guarded(name, handler, handler_call_details.invocation_metadata)
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def handle(data: bytes, context: Context) -> Message | None:
            return await self._handle(name, behaviour, handler.request_deserializer, data, context)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(handle, response_serializer=handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(handle, response_serializer=handler.response_serializer)

    def _guarded(self, name: str, handler: Any, metadata: Metadata) -> Any:
        """Return the handler, or one that refuses a caller without a token."""
        try:
            self._access.require(name, metadata)
        except Refusal as error:
            refusal = error

            async def refuse(requests: Any, context: Context) -> None:
                await context.abort(refusal.code, refusal.message, _trailers(refusal, ""))

            return grpc.stream_stream_rpc_method_handler(refuse)  # as all of reflection are
        return handler

    async def _handle(
        self, name: str, behaviour: Behaviour, parse: Callable[[bytes], Message], data: bytes, context: Context
    ) -> Message | None:
        method = name.rpartition("/")[2]
        call = Call(request_id=secrets.token_hex(8), method=method, arrival=time.monotonic())
        CALL.set(call)
        code, reason = grpc.StatusCode.OK, ""
        try:
            try:
                metadata = cast(Metadata, context.invocation_metadata() or ())
                self._access.require(name, metadata)
                request = _parse(parse, data)
                call.request_id = request_id_of(request, metadata)
                refuse_unsupported(method, request)
                return await behaviour(request, context)
            except Refusal:
                raise
            except Exception as error:
                if context.done():  # the client is gone; writing to it fails in a dozen ways
                    raise asyncio.CancelledError from error
                log.exception("a defect", extra={"request_id": call.request_id, "method": method})
                raise internal("INTERNAL", f"a defect of the server; its log has request {call.request_id}") from None
        except Refusal as refusal:
            code, reason = refusal.code, refusal.reason
            await context.abort(code, refusal.message, _trailers(refusal, call.request_id))
        except asyncio.CancelledError:
            code = _code_of_cancel(context)
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


def _code_of_cancel(context: Context) -> grpc.StatusCode:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= CLIENTS_HEADSTART:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
