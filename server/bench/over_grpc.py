"""A server as the target of a load: what its users would see, measured where they are."""

import asyncio
import queue
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from pressd.client import AsyncClient, Tls
from pressd.server.bench.load import News
from pressd.server.bench.workload import Asked

T = TypeVar("T")
# Seconds for questions that need no computing.
QUICK = 10.0
# What gRPC puts before each message: whether it is compressed, and its length.
PREFIX_BYTES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of its model."""

    vocab_size: int
    max_context: int
    weights_bytes: int


class OverGrpc:
    """Streams token ids; a thread of its own reads them and notes when they came, so that nobody waits for a poll.

    Answers are greedy and as long as was asked: EOS ends none. Nothing is tried again: a refusal is an error.
    """

    def __init__(
        self, target: str, *, tls: Tls | bool = False, token: str | None = None, plaintext_token: bool = False
    ):
        """Connect and ask for the model; raises ValueError or CallError."""
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wire_bytes = 0
        # The same prompts, sent by an earlier load, must not be found in the server's prefix cache.
        self._salt = secrets.token_hex(8)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bench-client", daemon=True)
        self._thread.start()

        async def connect() -> AsyncClient:  # where its event loop runs
            return AsyncClient(target, retry=None, tls=tls, token=token, plaintext_token=plaintext_token)

        try:
            self._client = self._do(connect())
            try:
                self.info = self._do(self._ask())
            except BaseException:
                self._do(self._client.close())
                raise
        except BaseException:
            self._end_thread()
            raise

    def send(self, number: int, asked: Asked) -> None:
        self._loop.call_soon_threadsafe(self._begin, number, asked)

    def poll(self, seconds: float) -> Sequence[News]:
        found: list[News] = []
        try:
            found.append(self._news.get(timeout=max(0.0, seconds)))
            while True:
                found.append(self._news.get_nowait())
        except queue.Empty:
            return found

    def facts(self) -> dict[str, float]:
        """Bytes of the messages that came, with gRPC's prefix and without HTTP/2's frames; no seconds of steps."""
        facts = {"wire_bytes": float(self._wire_bytes)}
        self._wire_bytes = 0
        return facts

    def close(self) -> None:
        """Call off what still runs, and disconnect."""
        self._do(self._give_up())
        self._end_thread()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_thread(self) -> None:
        self._do(_end_calls())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()

    async def _ask(self) -> Served:
        model = await self._client.model(timeout=QUICK)
        limits, memory = model.limits, model.memory
        if not model.HasField("limits"):
            raise ValueError(f"model {model.name} is still being loaded; wait until `pressd health` says ready")
        return Served(vocab_size=limits.vocab_size, max_context=limits.max_context, weights_bytes=memory.weights_bytes)

    async def _give_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def _begin(self, number: int, asked: Asked) -> None:
        task = self._loop.create_task(self._follow(number, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, number: int, asked: Asked) -> None:
        """Stream one answer into news; however it fails, it ends with an error."""
        answer = self._client.stream(
            asked.prompt_token_ids,
            temperature=0.0,
            max_new_tokens=asked.output_tokens,
            ignore_eos=True,
            text=False,
            token_ids=True,
            cache_salt=self._salt,
        )
        try:
            async with aclosing(answer):
                async for event in answer:
                    now = time.monotonic()
                    self._wire_bytes += event.ByteSize() + PREFIX_BYTES
                    if event.HasField("delta"):
                        self._news.put(News(number=number, at=now, num_tokens=event.delta.num_tokens))
                    elif event.HasField("finished"):
                        self._news.put(News(number=number, at=now, is_last=True))
                        return
            error = "the stream ended without an end; the server was stopped"
        except Exception as failure:
            error = str(failure) or type(failure).__name__
        self._news.put(News(number=number, at=time.monotonic(), error=error))


async def _end_calls() -> None:
    """Let grpc.aio's own tasks note how their calls ended: a status that came later would find no event loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=QUICK)
