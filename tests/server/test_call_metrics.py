"""Every kind of call and every way it can end, against the status that gRPC's own client saw."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.wrappers_pb2 import StringValue

from pressd.server import metrics as m
from pressd.server.call_metrics import METHODS, CallMetrics, methods_of

PATIENCE = 60.0
# Name, client streams, server streams, what go-grpc-prometheus calls it, messages that are received and sent.
KINDS = {
    "One": (False, False, "unary", 1, 1),
    "Out": (False, True, "server_stream", 1, 2),
    "In": (True, False, "client_stream", 3, 1),
    "Both": (True, True, "bidi_stream", 3, 2),
}
# Go's google.golang.org/grpc/codes/code_string.go.
GO = {
    "OK": "OK",
    "CANCELLED": "Canceled",
    "UNKNOWN": "Unknown",
    "INVALID_ARGUMENT": "InvalidArgument",
    "DEADLINE_EXCEEDED": "DeadlineExceeded",
    "NOT_FOUND": "NotFound",
    "ALREADY_EXISTS": "AlreadyExists",
    "PERMISSION_DENIED": "PermissionDenied",
    "RESOURCE_EXHAUSTED": "ResourceExhausted",
    "FAILED_PRECONDITION": "FailedPrecondition",
    "ABORTED": "Aborted",
    "OUT_OF_RANGE": "OutOfRange",
    "UNIMPLEMENTED": "Unimplemented",
    "INTERNAL": "Internal",
    "UNAVAILABLE": "Unavailable",
    "DATA_LOSS": "DataLoss",
    "UNAUTHENTICATED": "Unauthenticated",
}

End = Callable[[Any], Awaitable[None]]
Counts = dict[tuple[str, ...], float]


def service() -> dict[str, tuple[str, str, str]]:
    """The methods of a proto file with a service of all four kinds."""
    file = descriptor_pb2.FileDescriptorProto(name="every.proto", package="test", syntax="proto3")
    file.message_type.add(name="Text")
    every = file.service.add(name="Every")
    for name, (client_streams, server_streams, *_) in KINDS.items():
        every.method.add(
            name=name,
            input_type=".test.Text",
            output_type=".test.Text",
            client_streaming=client_streams,
            server_streaming=server_streams,
        )
    pool = DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]  # not in the stubs
    return methods_of(pool.FindFileByName("every.proto"))


class Server:
    """A server of the four kinds. Each takes all its client says, answers, and then ends as `end` does."""

    def __init__(self, end: End, *, writes: bool) -> None:
        self.metrics = m.Metrics("m")
        self.target = ""
        self._end = end
        self._writes = writes

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        server = grpc.aio.server(interceptors=[CallMetrics(self.metrics, service())])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Every", {name: self._handler(name) for name in KINDS}),)
        )
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)

    def counts(self, series: m.Series) -> Counts:
        """What is not zero of a series; a histogram's number of observations."""
        suffix = "_count" if series.kind == "histogram" else "_total"
        return {
            tuple(sample.labels[label] for label in series.labels): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name == f"{series.name}{suffix}" and sample.value
        }

    def _handler(self, name: str) -> Any:
        client_streams, server_streams, *_ = KINDS[name]

        async def take(request: Any, context: Any) -> None:
            if client_streams and self._writes:
                while await context.read() is not grpc.aio.EOF:
                    pass
            elif client_streams:
                async for _ in request:
                    pass

        async def answer(request: Any, context: Any) -> StringValue:
            await take(request, context)
            await self._end(context)
            return StringValue(value="a")

        async def write(request: Any, context: Any) -> None:
            await take(request, context)
            for text in "ab":
                await context.write(StringValue(value=text))
            await self._end(context)

        async def generate(request: Any, context: Any) -> AsyncIterator[StringValue]:
            await take(request, context)
            for text in "ab":
                yield StringValue(value=text)
            await self._end(context)

        behaviour: Any = answer if not server_streams else write if self._writes else generate
        kind = f"{'stream' if client_streams else 'unary'}_{'stream' if server_streams else 'unary'}"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(behaviour, StringValue.FromString, StringValue.SerializeToString)


async def call(channel: Any, name: str, timeout: float = PATIENCE) -> Any:
    """Begin a call of a kind with all that its client says."""
    client_streams, server_streams, *_ = KINDS[name]
    kind = f"{'stream' if client_streams else 'unary'}_{'stream' if server_streams else 'unary'}"
    multi = getattr(channel, kind)(f"/test.Every/{name}", StringValue.SerializeToString, StringValue.FromString)

    async def requests() -> AsyncIterator[StringValue]:
        for text in "123":
            yield StringValue(value=text)

    return multi(requests() if client_streams else StringValue(value="1"), timeout=timeout)


async def finish(call: Any) -> None:
    """Take what a call brings; its status is kept by it."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def ok(context: Any) -> None:
    pass


async def abort(context: Any) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")


async def set_a_code(context: Any) -> None:
    context.set_code(grpc.StatusCode.DATA_LOSS)


async def set_a_number(context: Any) -> None:
    context.set_code(grpc.StatusCode.NOT_FOUND.value[0])


async def fail(context: Any) -> None:
    raise ValueError("a defect")


async def fail_with_a_code(context: Any) -> None:
    context.set_code(grpc.StatusCode.UNIMPLEMENTED)
    raise NotImplementedError


async def hang(context: Any) -> None:
    await asyncio.Event().wait()


ENDS = [ok, abort, set_a_code, set_a_number, fail, fail_with_a_code]


@pytest.mark.parametrize("writes", [True, False], ids=["writer", "generator"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_call_is_counted_once_with_the_code_its_client_got(name: str, end: End, writes: bool) -> None:
    *_, kind, num_in, num_out = KINDS[name]

    async def main() -> None:
        async with Server(end, writes=writes).running() as server, grpc.aio.insecure_channel(server.target) as channel:
            began = await call(channel, name)
            await finish(began)
            code = await began.code()
            labels = (kind, "test.Every", name)
            await until(lambda: bool(server.counts(m.CALLS_HANDLED)))
            assert server.counts(m.CALLS_STARTED) == {labels: 1}
            assert server.counts(m.CALLS_HANDLED) == {(*labels, GO[code.name]): 1}
            assert server.counts(m.CALL_TIME) == {labels: 1}
            assert server.counts(m.CALL_MESSAGES_IN) == {labels: num_in}
            # A lone response is dropped when the call fails; those of a stream have left by then.
            is_sent = KINDS[name][1] or code is grpc.StatusCode.OK
            assert server.counts(m.CALL_MESSAGES_OUT) == ({labels: num_out} if is_sent else {})

    asyncio.run(main())


@pytest.mark.parametrize("writes", [True, False], ids=["writer", "generator"])
@pytest.mark.parametrize("code", ["CANCELLED", "DEADLINE_EXCEEDED"])
def test_calls_that_their_clients_left_are_counted_once(code: str, writes: bool) -> None:
    labels = {name: (kind, "test.Every", name) for name, (*_, kind, _, _) in KINDS.items()}

    async def main() -> None:
        async with Server(hang, writes=writes).running() as server, grpc.aio.insecure_channel(server.target) as channel:
            # Long enough for a busy machine to hear of the calls at all; it is waited for in full.
            timeout = PATIENCE if code == "CANCELLED" else 3.0
            calls = [await call(channel, name, timeout) for name in KINDS]
            reading = [asyncio.ensure_future(finish(began)) for began in calls]
            await until(lambda: server.counts(m.CALLS_STARTED) == {labels[name]: 1 for name in KINDS})
            assert server.counts(m.CALLS_HANDLED) == {}
            if code == "CANCELLED":
                for began in calls:
                    began.cancel()
            await asyncio.gather(*reading)
            assert [(await began.code()).name for began in calls] == [code] * len(KINDS)
            await until(lambda: len(server.counts(m.CALLS_HANDLED)) == len(KINDS))
            assert server.counts(m.CALLS_HANDLED) == {(*labels[name], GO[code]): 1 for name in KINDS}
            assert server.counts(m.CALL_TIME) == {labels[name]: 1 for name in KINDS}

    asyncio.run(main())


def test_path_of_nothing_makes_no_series() -> None:
    async def main() -> None:
        async with Server(ok, writes=True).running() as server, grpc.aio.insecure_channel(server.target) as channel:
            before = list(server.metrics.collect())
            for path in ("/test.Every/None", "/test.Other/One", "/x/y", "/"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(path)(b"", timeout=PATIENCE)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert list(server.metrics.collect()) == before

    asyncio.run(main())


def test_handler_of_a_method_that_is_not_known_makes_no_series() -> None:
    """Whatever stands behind may answer any path, as one that refuses callers would."""

    async def main() -> None:
        metrics = m.Metrics("m")
        interceptor = CallMetrics(metrics, {})
        handler = grpc.unary_unary_rpc_method_handler(ok)
        before = list(metrics.collect())

        class Details:
            method = "/made/up"

        async def found(details: Any) -> Any:
            return handler

        assert await interceptor.intercept_service(found, Details) is handler
        assert list(metrics.collect()) == before

    asyncio.run(main())


@pytest.mark.parametrize("code", grpc.StatusCode, ids=lambda code: code.name)
def test_codes_are_spelled_as_in_go(code: grpc.StatusCode) -> None:
    async def aborts(context: Any) -> None:
        await context.abort(code, "")

    async def main() -> Counts:
        end = ok if code is grpc.StatusCode.OK else aborts
        async with Server(end, writes=True).running() as server, grpc.aio.insecure_channel(server.target) as channel:
            await finish(await call(channel, "One"))
            await until(lambda: bool(server.counts(m.CALLS_HANDLED)))
            return server.counts(m.CALLS_HANDLED)

    assert asyncio.run(main()) == {("unary", "test.Every", "One", GO[code.name]): 1}


def test_all_that_is_served_is_known_and_begins_at_zero() -> None:
    metrics = m.Metrics("m")
    CallMetrics(metrics)
    shown = {
        tuple(sample.labels[label] for label in m.CALLS_STARTED.labels): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == "grpc_server_started_total"
    }
    assert shown == dict.fromkeys(METHODS.values(), 0)
    assert ("server_stream", "pressd.v1.Inference", "GenerateStream") in shown
    assert ("bidi_stream", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo") in shown
