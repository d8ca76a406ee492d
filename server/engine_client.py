"""The door's end of the engine: spawns its process, talks to it, restarts it when it dies."""

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from pressd.runtime.config import EngineConfig
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import Request
from pressd.server import wire

FIRST_BACKOFF = 0.25  # seconds; doubles with every start that fails
LONGEST_BACKOFF = 15.0
# How long the last words of a process that ended by itself may take to arrive, in seconds.
_LAST_WORDS = 1.0

log = logging.getLogger("pressd.engine")


class EngineStartError(Exception):
    """The engine could not be started at all; the message is one line for the user."""


class EngineGone(Exception):
    """The engine died before it answered."""


class EngineEvents(Protocol):
    """Who hears about the engine. Called on the event loop; must not block."""

    def engine_ready(self, info: EngineInfo) -> None: ...
    def engine_stepped(self, report: wire.Stepped) -> None: ...
    def engine_down(self, cause: str, retry_after: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """What the process runs: `factory` is an importable `module:function` of (path, EngineConfig)."""

    model: Path
    config: EngineConfig
    factory: str


class EngineClient:
    """One engine, kept alive. Single-threaded: use it from the event loop that runs it."""

    def __init__(self, command: EngineCommand, events: EngineEvents) -> None:
        self._command = command
        self._events = events
        self._socket: zmq.asyncio.Socket | None = None
        self._adds: list[Request] = []
        self._aborts: list[wire.Abort] = []
        self._flushes: list[asyncio.Future[int]] = []  # to go out with the next message
        self._flushes_sent: deque[list[asyncio.Future[int]]] = deque()
        self._ready = False
        self.num_starts = 0
        self.num_failed_starts = 0  # since the last that did not fail

    def submit(self, request: Request) -> None:
        """Send a request with the next message. The engine must be ready."""
        assert self._ready
        self._schedule_send()
        self._adds.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its sequences; of a dead engine there is nothing to stop."""
        if self._ready:
            self._schedule_send()
            self._aborts.append(wire.Abort(request_id, index))

    async def flush_prefix_cache(self) -> int:
        """Have cached prefixes forgotten; return the number of blocks that held nothing else. Raises EngineGone."""
        if not self._ready:
            raise EngineGone
        self._schedule_send()
        self._flushes.append(asyncio.get_running_loop().create_future())
        return await self._flushes[-1]

    async def run(self) -> None:
        """Keep an engine running until cancelled; raises EngineStartError if the first one does not start."""
        while True:
            starts = self.num_starts
            cause = await self._one_life()
            if self.num_starts == 0:
                raise EngineStartError(cause)
            if self.num_starts == starts:
                self.num_failed_starts += 1
            backoff = min(FIRST_BACKOFF * 2**self.num_failed_starts, LONGEST_BACKOFF)
            log.error("engine is down", extra={"cause": cause, "restart_in_s": backoff})
            self._events.engine_down(cause, backoff)
            await asyncio.sleep(backoff)

    async def _one_life(self) -> str:
        """Start a process, pass on what it reports, and return why it ended."""
        directory = tempfile.TemporaryDirectory(prefix="pressd-")  # mode 0700
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PAIR)
        # No high-water mark: admission bounds what we send, and a step's report must never be dropped.
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        listening = asyncio.ensure_future(self._listen(socket, directory.cleanup))
        try:
            endpoint = f"ipc://{directory.name}/engine"
            socket.bind(endpoint)
            self._socket = socket
            with _spawned(self._command, endpoint) as process:
                async with _end_of(process) as ended:
                    await asyncio.wait({listening, ended}, return_when=asyncio.FIRST_COMPLETED)
                    if (process.poll() or 0) > 0:
                        await asyncio.wait({listening}, timeout=_LAST_WORDS)
            return listening.result() if listening.done() else _describe_exit(process.returncode)
        except (OSError, zmq.ZMQError) as error:
            return f"the engine's process cannot be started: {error}"
        finally:
            self._ready = False
            self._socket = None
            self._adds.clear()
            self._aborts.clear()
            self._refuse_flushes()
            listening.cancel()
            socket.close()
            context.term()
            directory.cleanup()

    async def _listen(self, socket: zmq.asyncio.Socket, when_connected: Callable[[], None]) -> str:
        """Pass on reports until the process says why it ends."""
        while True:
            match wire.decode_report(await socket.recv()):
                case wire.Ready(info=info):
                    when_connected()  # the socket's name has served its purpose; a killed server leaves none behind
                    self._ready = True
                    self.num_starts += 1
                    self.num_failed_starts = 0
                    self._events.engine_ready(info)
                case wire.Stepped() as report:
                    self._events.engine_stepped(report)
                    for num_blocks in report.flushed:
                        for waiter in self._flushes_sent.popleft():
                            if not waiter.done():  # else its caller has left
                                waiter.set_result(num_blocks)
                    await asyncio.sleep(0)  # recv does not let others run while more reports are there
                case wire.Failed(message=message):
                    return message

    def _refuse_flushes(self) -> None:
        for waiter in itertools.chain(self._flushes, *self._flushes_sent):
            if not waiter.done():
                waiter.set_exception(EngineGone())
        self._flushes.clear()
        self._flushes_sent.clear()

    @property
    def _has_commands(self) -> bool:
        return bool(self._adds or self._aborts or self._flushes)

    def _schedule_send(self) -> None:
        """One message for all commands of this turn of the event loop."""
        if not self._has_commands:
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        if self._socket is not None and self._has_commands:
            commands = wire.Commands(adds=tuple(self._adds), aborts=tuple(self._aborts), flush=bool(self._flushes))
            self._adds.clear()
            self._aborts.clear()
            if self._flushes:
                self._flushes_sent.append(self._flushes)
                self._flushes = []
            self._socket.send(wire.encode(commands))


@contextmanager
def _spawned(command: EngineCommand, endpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of a block. Not asyncio's: uvloop forks, which gRPC's threads do not take well."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "pressd.server.engine_process", endpoint, command.factory),
            *(str(command.model), msgspec.json.encode(command.config).decode()),
        ],
        stdin=subprocess.PIPE,  # its end tells the process that we are gone
        stdout=2,  # ours belongs to the user
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@asynccontextmanager
async def _end_of(process: "subprocess.Popen[bytes]") -> AsyncIterator["asyncio.Task[bool]"]:
    """A task that is done when a process has ended."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, event.set)
    ended = loop.create_task(event.wait())
    try:
        yield ended
    finally:
        ended.cancel()
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _describe_exit(status: int) -> str:
    if status < 0:
        hint = "; the kernel does so when memory runs out" if -status == signal.SIGKILL else ""
        return f"the engine's process was killed by {signal.Signals(-status).name}{hint}"
    return f"the engine's process ended with status {status}"
