"""The engine's own process: one synchronous loop of commands, step, report."""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import msgspec
import zmq

from pressd.runtime.config import EngineConfig
from pressd.runtime.report import EngineInfo, StepResult, StepStats
from pressd.runtime.request import Request
from pressd.server import wire


class EngineLike(Protocol):
    """What this loop asks of pressd.runtime.engine.Engine."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> bool: ...
    def flush_prefix_cache(self) -> int: ...
    def step(self) -> StepResult: ...
    def stats(self) -> StepStats: ...


EngineFactory = Callable[[str, EngineConfig], EngineLike]


def load_engine(path: str, config: EngineConfig) -> EngineLike:
    """Return the real engine; raises ValueError with one line for the user."""
    from pressd.runtime.engine import Engine

    return Engine.from_pretrained(path, config)


def main(arguments: list[str]) -> int:
    """Serve one engine at a zmq endpoint until the parent goes; arguments are endpoint, factory, model, config."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group, but the door decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    endpoint, factory, path, config = arguments
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 5000)  # milliseconds; lets the last report out
        socket.connect(endpoint)
        try:
            engine = _factory(factory)(path, msgspec.json.decode(config, type=EngineConfig))
        except (ValueError, OSError) as error:  # the user's: a bad model or setting, told in one line
            socket.send(wire.encode(wire.Failed(message=str(error))))
            return 1
        try:
            socket.send(wire.encode(wire.Ready(info=engine.info)))
            _run(engine, socket)
        except Exception as error:  # ours: a defect, told in full on stderr
            traceback.print_exc()
            socket.send(wire.encode(wire.Failed(message=f"{type(error).__name__}: {error}")))
    return 1


def _run(engine: EngineLike, socket: "zmq.Socket[bytes]") -> None:
    while True:
        batches = tuple(_receive(socket, wait=not engine.has_work))
        rejections = tuple(_obey(engine, batches))
        flushed = tuple(engine.flush_prefix_cache() for commands in batches if commands.flush)
        step = engine.step() if engine.has_work else StepResult(outputs=(), stats=engine.stats())
        socket.send(wire.encode(wire.Stepped(step=step, rejections=rejections, flushed=flushed)))


def _receive(socket: "zmq.Socket[bytes]", *, wait: bool) -> Iterable[wire.Commands]:
    """Yield all commands that are there; with `wait`, at least one."""
    if wait:
        yield wire.decode_commands(socket.recv())
    while socket.poll(0):
        yield wire.decode_commands(socket.recv())


def _obey(engine: EngineLike, batches: Iterable[wire.Commands]) -> Iterable[wire.Rejection]:
    for commands in batches:
        for request in commands.adds:
            try:
                engine.add(request)
            except ValueError as error:
                field = getattr(error, "field", "request_id")
                yield wire.Rejection(request_id=request.request_id, field=field, message=str(error))
        for abort in commands.aborts:
            engine.abort(abort.request_id, abort.index)


def _factory(name: str) -> EngineFactory:
    module, _, attribute = name.partition(":")
    return cast(EngineFactory, getattr(importlib.import_module(module), attribute))


def _die_with_the_parent() -> None:
    """The parent holds the other end of standard input; it closes when the parent is gone, however it went."""
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
