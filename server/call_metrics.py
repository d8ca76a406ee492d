"""Every call of every service counted, in the words of go-grpc-prometheus."""

import inspect
import time
from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from pressd.server import metrics as m
from pressd.server.calls import code_of_cancel
from pressd.v1 import control_pb2, inference_pb2

Context = grpc.aio.ServicerContext[Any, Any]
Labels = tuple[str, str, str]

# By (the client streams, the server streams): the word for it, and what makes a handler of it.
_TYPES = {
    (False, False): ("unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", grpc.stream_stream_rpc_method_handler),
}


def methods_of(*files: FileDescriptor) -> dict[str, Labels]:
    """Return type, service and method of all methods in proto files, by the paths they are called with."""
    return {
        f"/{service.full_name}/{method.name}": (
            _TYPES[method.client_streaming, method.server_streaming][0],
            service.full_name,
            method.name,
        )
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


METHODS = methods_of(inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)


class CallMetrics(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Counts calls of the methods it knows, whoever answers them; a path it does not know makes no series.

    It must be the first interceptor. Handlers must be asynchronous.
    """

    def __init__(self, metrics: m.Metrics, methods: Mapping[str, Labels] = METHODS) -> None:
        self._metrics = metrics
        self._methods = methods
        for labels in methods.values():
            for series in (m.CALLS_STARTED, m.CALL_MESSAGES_IN, m.CALL_MESSAGES_OUT):
                metrics.add(series, *labels, by=0)
            metrics.add(m.CALLS_HANDLED, *labels, "OK", by=0)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the handler of a method, wrapped."""
        handler = await continuation(handler_call_details)
        labels = self._methods.get(handler_call_details.method)
        if handler is None or labels is None:
            return handler
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        # A call may end between two messages of a generator, which would not notice; a coroutine that writes does.
        respond = _written(behaviour) if inspect.isasyncgenfunction(behaviour) else behaviour

        async def handle(request: Any, context: Context) -> Any:
            counted = _Counted(context, self._metrics, labels)
            with self._handling(labels, context):
                if not handler.request_streaming:
                    self._metrics.add(m.CALL_MESSAGES_IN, *labels)
                    message = await respond(request, counted)
                else:
                    message = await respond(counted.received(request), counted)
                # The one response is sent unless a code was set; those of a stream were counted one by one.
                if not handler.response_streaming and _code_of(context) is grpc.StatusCode.OK:
                    self._metrics.add(m.CALL_MESSAGES_OUT, *labels)
                return message

        _, make_handler = _TYPES[handler.request_streaming, handler.response_streaming]
        return make_handler(handle, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _handling(self, labels: Labels, context: Context) -> Iterator[None]:
        """Count one call, which lasts as long as the block."""
        began = time.monotonic()
        self._metrics.add(m.CALLS_STARTED, *labels)
        code = grpc.StatusCode.UNKNOWN
        try:
            yield
            code = _code_of(context)
        except (CancelledError, grpc.aio.InternalError):  # the latter: a write that found the client gone
            code = code_of_cancel(context)
            raise
        except Exception:
            set_before = _code_of(context)  # by abort, or by a handler that failed after it set one
            code = grpc.StatusCode.UNKNOWN if set_before is grpc.StatusCode.OK else set_before
            raise
        finally:
            self._metrics.add(m.CALLS_HANDLED, *labels, _spelled(code))
            self._metrics.observe(m.CALL_TIME, time.monotonic() - began, *labels)


class _Counted:
    """A call's context that counts the messages which pass."""

    def __init__(self, context: Context, metrics: m.Metrics, labels: Labels) -> None:
        self._context = context
        self._metrics = metrics
        self._labels = labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        message = await self._context.read()
        if message is not grpc.aio.EOF:  # type: ignore[attr-defined]  # not in the stubs
            self._metrics.add(m.CALL_MESSAGES_IN, *self._labels)
        return message

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._metrics.add(m.CALL_MESSAGES_OUT, *self._labels)

    async def received(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Pass requests on."""
        async for request in requests:
            self._metrics.add(m.CALL_MESSAGES_IN, *self._labels)
            yield request


def _written(generator: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[None]]:
    """A handler that writes what a generator yields."""

    async def write(request: Any, context: Any) -> None:
        async with aclosing(generator(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write


def _code_of(context: Context) -> grpc.StatusCode:
    """The status that was set, as a code or as its number; none is OK."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == (code or 0)), grpc.StatusCode.UNKNOWN)


def _spelled(code: grpc.StatusCode) -> str:
    """A code as Go writes it: InvalidArgument."""
    if code is grpc.StatusCode.OK:
        return "OK"
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    return "".join(word.capitalize() for word in code.name.split("_"))
