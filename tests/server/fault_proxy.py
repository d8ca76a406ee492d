"""A relay between a client and a server that counts the HTTP/2 frames which pass."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fault_wire import ACK, GOAWAY, PING, PREFACE, Frame, split_frames


@dataclass
class Counted:
    """What passed. `num_connections` is how often a client connected."""

    port: int = 0
    num_connections: int = 0
    pings: Counter[str] = field(default_factory=Counter)  # sent and answered, as the client sees it
    goaways: list[bytes] = field(default_factory=list)  # the server's


@asynccontextmanager
async def counting_proxy(port: int) -> AsyncIterator[Counted]:
    """Relay to a port of this machine for the length of a block."""
    counted = Counted()
    relays: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counted.num_connections += 1
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
        relays.update(
            (
                asyncio.ensure_future(_relay(reader, behind_writer, counted, from_client=True)),
                asyncio.ensure_future(_relay(behind_reader, writer, counted, from_client=False)),
            )
        )

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        counted.port = server.sockets[0].getsockname()[1]
        yield counted
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: Counted, *, from_client: bool
) -> None:
    frames = bytearray()
    preface = len(PREFACE) if from_client else 0
    try:
        while data := await reader.read(1 << 16):
            frames += data[preface:]
            preface = max(0, preface - len(data))
            for frame in split_frames(frames):
                _count(frame, counted, from_client=from_client)
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def _count(frame: Frame, counted: Counted, *, from_client: bool) -> None:
    if frame.kind == PING and from_client and not frame.flags & ACK:
        counted.pings["sent"] += 1
    elif frame.kind == PING and not from_client and frame.flags & ACK:
        counted.pings["answered"] += 1
    elif frame.kind == GOAWAY and not from_client:
        counted.goaways.append(frame.payload)
