"""A server that refuses, breaks off and hangs as it is told, made with gRPC alone; and the four ways to ask it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pressd.client import AsyncClient, CallError, Client, Retry
from pressd.v1 import generate_pb2, inference_pb2_grpc

PATIENCE = 60.0
# gRPC sends a timeout in few digits, rounded up.
COARSE = 1.01
ACCEPTED = generate_pb2.GenerateEvent(request_id="1", accepted=generate_pb2.Accepted(model="fake"))
FINISHED = generate_pb2.GenerateEvent(request_id="1", finished=generate_pb2.Finished(index=0))
ANSWER = generate_pb2.GenerateResponse(request_id="1", model="fake")
Code = grpc.StatusCode


def refusal(code: Code, *, retry_after: float | None = None, reason: str = "SOMETHING") -> Any:
    """A status as the errors of the promise say, made by gRPC's own helper; bare without a reason."""
    status = Status(code=code.value[0], message="no")
    details: list[Any] = [ErrorInfo(reason=reason, domain="pressd")] if reason else []
    if retry_after is not None:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * retry_after))
        details.append(retry)
    for detail in details:
        (packed := AnyMessage()).Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


@dataclass
class Fake(inference_pb2_grpc.InferenceServicer):
    """Ends each call in the next way of `plan`, later ones well: by a refusal, or hanging until cancelled."""

    plan: list[Any] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    remaining: list[float] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: Any, context: Any) -> Any:
        self._end(self._note(context), context)
        return ANSWER

    def GenerateStream(self, request: Any, context: Any) -> Any:
        way = self._note(context)
        if isinstance(way, list):  # ends so after its first event
            yield ACCEPTED
            (way,) = way
        self._end(way, context)
        yield ACCEPTED
        yield FINISHED

    def _note(self, context: Any) -> Any:
        self.seen.append(dict(context.invocation_metadata()))
        self.remaining.append(context.time_remaining())
        way = self.plan.pop(0) if self.plan else None
        # Here: of a stream that is over, gRPC does not ask for the event after the first.
        if way in ("hang", ["hang"]) and not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        return way

    def _end(self, way: Any, context: Any) -> None:
        if way == "hang":
            self.arrived.set()
            self.cancelled.wait(PATIENCE)
        elif way is not None:
            context.abort_with_status(way)


@contextlib.contextmanager
def serving(fake: Fake, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    yield address.replace(":0", f":{port}") if address.endswith(":0") else address
    server.stop(None).wait()


# Asks once, in one of four ways; returns what came, CallError included.
Ask = Callable[..., list[Any]]


def ask_whole(target: str, **told: Any) -> list[Any]:
    with Client(target, **told) as client:
        try:
            return [client.generate("x").model]
        except CallError as error:
            return [error]


def ask_stream(target: str, **told: Any) -> list[Any]:
    found: list[Any] = []
    with Client(target, **told) as client:
        try:
            found += (event.WhichOneof("event") for event in client.stream("x"))
        except CallError as error:
            found.append(error)
    return found


def ask_whole_async(target: str, **told: Any) -> list[Any]:
    async def ask() -> list[Any]:
        async with AsyncClient(target, **told) as client:
            try:
                return [(await client.generate("x")).model]
            except CallError as error:
                return [error]

    return asyncio.run(ask())


def ask_stream_async(target: str, **told: Any) -> list[Any]:
    async def ask() -> list[Any]:
        found: list[Any] = []
        async with AsyncClient(target, **told) as client:
            try:
                async for event in client.stream("x"):
                    found.append(event.WhichOneof("event"))
            except CallError as error:
                found.append(error)
        return found

    return asyncio.run(ask())


WHOLE, STREAM = ["fake"], ["accepted", "finished"]
WAYS = [(ask_whole, WHOLE), (ask_stream, STREAM), (ask_whole_async, WHOLE), (ask_stream_async, STREAM)]
every_way = pytest.mark.parametrize(("ask", "answer"), WAYS, ids=lambda way: getattr(way, "__name__", ""))


class Waits(list[float]):
    """The waits of a policy whose clock moves only while it waits, and whose draws are as long as they may be."""

    def policy(self, **told: Any) -> Retry:
        async def sleep_async(seconds: float) -> None:
            self.append(seconds)

        return Retry(clock=lambda: sum(self), draw=lambda: 1.0, sleep=self.append, sleep_async=sleep_async, **told)
