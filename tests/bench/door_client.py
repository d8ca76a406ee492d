"""Streams for tests/bench/door.py, in a process of its own: told by a JSON argument, answers with JSON on stdout.

Messages are kept as bytes until the measuring is over, so that what is measured is the server's work more than ours.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc.aio
import psutil

from pressd.client.messages import generate_request
from pressd.v1 import generate_pb2

METHOD = "/pressd.v1.Inference/GenerateStream"


class Streams:
    """So many streams at any time, each begun again when it ends; what arrives while `kept` is set is kept."""

    def __init__(self, channel: grpc.aio.Channel, request: bytes) -> None:
        self._open = channel.unary_stream(METHOD)
        self._request = request
        self._num_begun = 0
        self.all_begun = asyncio.Event()
        self.kept: list[bytes] | None = None

    async def follow(self, count: int) -> None:
        """Be one of `count` streams, until cancelled."""
        is_first = True
        while True:
            async for message in self._open(self._request):
                if self.kept is not None:
                    self.kept.append(message)
                if is_first:
                    is_first = False
                    self._num_begun += 1
                    if self._num_begun == count:
                        self.all_begun.set()


def seconds_used(processes: dict[str, int]) -> dict[str, float]:
    """CPU seconds of each process so far, in user and kernel mode."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in processes.items()}
    return {name: time.user + time.system for name, time in times.items()}


async def measure(told: dict[str, Any]) -> dict[str, Any]:
    """Return messages, tokens, seconds and each process's CPU seconds, once all streams have begun and warmed up."""
    request = generate_request(told["prompt"], {"max_new_tokens": told["new_tokens"], "ignore_eos": True})
    processes = told["processes"] | {"client": psutil.Process().pid}
    async with grpc.aio.insecure_channel(told["target"]) as channel:
        streams = Streams(channel, request.SerializeToString())
        tasks = [asyncio.ensure_future(streams.follow(told["streams"])) for _ in range(told["streams"])]
        failed = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
        begun = asyncio.ensure_future(streams.all_begun.wait())
        await asyncio.wait([failed, begun], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([failed], timeout=told["warm_up"])
        used, began, streams.kept = seconds_used(processes), time.perf_counter(), []
        await asyncio.wait([failed], timeout=told["seconds"])
        messages, streams.kept, ended = streams.kept, None, time.perf_counter()
        spent = {name: seconds - used[name] for name, seconds in seconds_used(processes).items()}
        for task in tasks:
            if task.done():
                task.result()  # a stream only ever ends by failing
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    deltas = [event.delta for event in map(generate_pb2.GenerateEvent.FromString, messages) if event.HasField("delta")]
    return {
        "messages": len(messages),
        "tokens": sum(delta.num_tokens for delta in deltas),
        "bytes": sum(map(len, messages)),
        "seconds": ended - began,
        "cpu_seconds": spent,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(json.loads(sys.argv[1])))))
