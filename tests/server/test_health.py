"""grpc.health.v1 over real gRPC, with watchers that do not read."""

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pressd.server.health import HealthServicer

NAME = "a.Service"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# The least window a stream can have: an answer of seven bytes does not go through until it is read.
TINY_WINDOW = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
REQUEST = health_pb2.HealthCheckRequest(service=NAME)


def test_a_watcher_that_does_not_read_keeps_nothing_from_the_others() -> None:
    async def watch() -> list[int]:
        server, health = grpc.aio.server(), HealthServicer()
        health.set(NAME, NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with (
                grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=TINY_WINDOW) as idle,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                stuck = [health_pb2_grpc.HealthStub(idle).Watch(REQUEST) for _ in range(3)]
                await asyncio.gather(*(call.initial_metadata() for call in stuck))  # each handler has begun to write
                watcher = health_pb2_grpc.HealthStub(channel).Watch(REQUEST, timeout=60)
                seen = [(await watcher.read()).status]
                for status in (SERVING, NOT_SERVING):
                    health.set(NAME, status)
                    seen.append((await watcher.read()).status)
                    answer = await health_pb2_grpc.HealthStub(channel).Check(REQUEST, timeout=60)
                    assert answer.status == status
                return seen
        finally:
            await server.stop(0)

    assert asyncio.run(watch()) == [NOT_SERVING, SERVING, NOT_SERVING]


def test_an_unknown_name_is_told_apart_and_may_become_known() -> None:
    async def ask() -> tuple[grpc.StatusCode, list[int]]:
        server, health = grpc.aio.server(), HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                code: grpc.StatusCode = await stub.Check(REQUEST, timeout=60).code()
                watcher = stub.Watch(REQUEST, timeout=60)
                seen = [(await watcher.read()).status]
                health.set(NAME, SERVING)
                return code, [*seen, (await watcher.read()).status]
        finally:
            await server.stop(0)

    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert asyncio.run(ask()) == (grpc.StatusCode.NOT_FOUND, [unknown, SERVING])
