"""What a connection may cost the server before anybody has asked for anything: metadata, and silence."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # not in the stubs

from pressd.server.app import CHANNEL_OPTIONS

PATIENCE = 60.0


@asynccontextmanager
async def bounded(**changes: int) -> AsyncIterator[int]:
    """The port of a server with the options of ours, some of them changed."""
    server = grpc.aio.server(options=tuple((dict(CHANNEL_OPTIONS) | changes).items()))
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def code_with(num_bytes: int, port: int) -> grpc.StatusCode:
    """How a call with so much metadata ends."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), metadata=(("x-much", "x" * num_bytes),), timeout=PATIENCE
        )
        code: grpc.StatusCode = await call.code()
        return code


def test_metadata_are_bounded_and_never_by_chance() -> None:
    async def codes(num_bytes: int) -> set[grpc.StatusCode]:
        async with bounded() as port:
            return {await code_with(num_bytes, port) for _ in range(8)}

    assert asyncio.run(codes(15 << 10)) == {grpc.StatusCode.OK}  # with the call's own under 1 KiB
    assert asyncio.run(codes(17 << 10)) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_whoever_connects_and_says_nothing_is_dropped() -> None:
    """By the option that is set, with less of its time."""

    def listen(port: int) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            while connection.recv(4096):  # the server's greeting
                pass
        return True

    async def main() -> bool:
        assert "grpc.server_handshake_timeout_ms" in dict(CHANNEL_OPTIONS)
        async with bounded(**{"grpc.server_handshake_timeout_ms": 100}) as port:
            return await asyncio.to_thread(listen, port)

    assert asyncio.run(main())
