"""Connections on which nothing is said for long: pings are answered, and whoever answers none is given up."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fault_proxy import Counted, counting_proxy
from fault_wire import ACK, GOAWAY, PATIENCE, PING, Frame, RawConnection

from pressd.server.app import CHANNEL_OPTIONS
from pressd.v1 import generate_pb2, inference_pb2_grpc, tokens_pb2

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
STREAM = "/pressd.v1.Inference/GenerateStream"
NUM_PINGS = 300
# How many tokens each answer has; all but the first are said after the silence.
ANSWER = [5, 6, 7]


def request() -> generate_pb2.GenerateRequest:
    output = generate_pb2.OutputOptions(text=False, token_ids=True)
    return generate_pb2.GenerateRequest(token_ids=tokens_pb2.TokenIds(ids=ANSWER), output=output)


def begin(connection: RawConnection) -> Iterator[bytes]:
    """Have a stream accepted; give its other messages."""
    messages = connection.messages(connection.call(STREAM, request().SerializeToString()))
    assert generate_pb2.GenerateEvent.FromString(next(messages)).HasField("accepted")
    return messages


def ping_on(connection: RawConnection) -> Frame | None:
    """Ping as fast as answers come; return the GOAWAY that ended it."""
    frames = connection.frames()
    for number in range(NUM_PINGS):
        connection.ping(number)
        for frame in frames:
            if frame.kind == GOAWAY:
                return frame
            if frame.kind == PING and frame.flags & ACK and int.from_bytes(frame.payload, "big") == number:
                break
        else:
            raise AssertionError(f"the connection ended at ping {number}")
    return None


@pytest.fixture
def gated(serve: Serve, echo: Path) -> Any:
    """A server that makes no step before it is allowed to."""
    (echo / "steps").write_text("0")
    return serve(echo).await_ready()


def test_silent_call_survives_as_many_pings_as_a_client_likes(gated: Any) -> None:
    with RawConnection(gated.port).greet() as connection:
        messages = begin(connection)
        assert ping_on(connection) is None
        gated.allow_all_steps()
        events = [generate_pb2.GenerateEvent.FromString(message) for message in messages]
    assert [token.id for event in events for token in event.delta.tokens] == ANSWER
    assert events[-1].finished.reason == generate_pb2.FINISH_REASON_EOS


def test_idle_connection_survives_pings_too(gated: Any) -> None:
    with RawConnection(gated.port).greet() as connection:
        assert ping_on(connection) is None


def test_server_without_our_options_would_hang_up() -> None:
    """The two tests above can fail: gRPC's default is to end the connection of whoever pings so often."""

    async def main() -> Frame | None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with RawConnection(port).greet() as connection:
            goaway = await asyncio.to_thread(ping_on, connection)
        await server.stop(None)
        return goaway

    goaway = asyncio.run(main())
    assert goaway is not None
    assert b"too_many_pings" in goaway.payload


async def silent_calls(gated: Any, interval_ms: int, is_over: Callable[[Counted], Awaitable[object]]) -> Counted:
    """A stream and a unary call of a client that pings, both silent until it is over; then both must finish."""
    options = (
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with (
        counting_proxy(gated.port) as counted,
        grpc.aio.insecure_channel(f"127.0.0.1:{counted.port}", options=options) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream, whole = stub.GenerateStream(request()), stub.Generate(request())
        assert (await stream.read()).HasField("accepted")
        await is_over(counted)
        gated.allow_all_steps()
        tokens = []
        while (event := await stream.read()) is not grpc.aio.EOF:
            tokens += [token.id for token in event.delta.tokens]
        assert tokens == [token.id for token in (await whole).completions[0].tokens] == ANSWER
    assert (counted.num_connections, counted.goaways) == (1, [])
    return counted


def test_client_that_pings_without_pause_finishes_its_calls(gated: Any) -> None:
    async def pinged(counted: Counted) -> None:
        async with asyncio.timeout(PATIENCE):
            while counted.pings["answered"] < 5:
                await asyncio.sleep(0.01)

    asyncio.run(silent_calls(gated, 50, pinged))


@pytest.mark.slow
def test_ping_every_ten_seconds_through_a_call_of_two_minutes(gated: Any) -> None:
    seconds, interval = 130, 10
    counted = asyncio.run(silent_calls(gated, 1000 * interval, lambda _: asyncio.sleep(seconds)))
    assert counted.pings["answered"] >= seconds // interval - 1  # the last may be on its way


@pytest.mark.slow
def test_client_that_answers_no_ping_is_given_up(gated: Any) -> None:
    # A frozen client, or one whose network is gone: its connection stands, and nothing comes from it. The server pings
    # after keepalive_time; how long it then waits is ping_timeout, since gRPC (1.85) never arms a keepalive_timeout
    # that is shorter.
    options = {"grpc.http2.ping_timeout_ms": 60_000} | dict(CHANNEL_OPTIONS)
    seconds = (options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"]) / 1000
    with RawConnection(gated.port).greet() as connection:
        begin(connection)
        assert ping_on(connection) is None  # up to here it answered the server's own, which measure the bandwidth
        gated.await_metric(1, "pressd_requests_running")
        deadline = time.monotonic() + seconds + PATIENCE
        while gated.metric("pressd_requests_running"):
            assert time.monotonic() < deadline, f"still there after {seconds} s"
            time.sleep(1.0)
    gated.await_metric(0, "pressd_kv_cache_blocks", state="used")
    gated.await_metric(1, "pressd_requests_total", code="CANCELLED")
