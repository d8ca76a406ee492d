"""The requests whose clients still wait for something, by both of their names."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pressd.runtime.request import FinishReason
from pressd.server.admission import Ticket
from pressd.server.errors import Refusal, duplicate_id, late
from pressd.server.generation import Generation


class Live:
    """`idle` is set while there are none."""

    def __init__(self) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._by_engine_id: dict[str, tuple[Generation, Ticket]] = {}
        self._by_request_id: dict[str, Generation] = {}

    def __len__(self) -> int:
        return len(self._by_engine_id)

    def __iter__(self) -> Iterator[Generation]:
        return (generation for generation, _ in list(self._by_engine_id.values()))

    def require_free(self, request_id: str) -> None:
        """Raise Refusal if a live request has this id."""
        if request_id in self._by_request_id:
            raise duplicate_id(request_id)

    def find(self, request_id: str) -> Generation | None:
        """Return the request of a client's id."""
        return self._by_request_id.get(request_id)

    def of_engine(self, engine_id: str) -> tuple[Generation, Ticket] | None:
        """Return the request of an engine's id, None if it has left."""
        return self._by_engine_id.get(engine_id)

    def fail_all(self, refusal: Refusal) -> None:
        """End all with a status."""
        for generation in self:
            generation.fail(refusal)

    @contextmanager
    def hold(self, generation: Generation, ticket: Ticket) -> Iterator[None]:
        """Keep a request for the length of a block, and end it when its own times are up."""
        loop, asked = asyncio.get_running_loop(), generation.asked
        self._by_engine_id[generation.engine_id] = generation, ticket
        self._by_request_id[generation.request_id] = generation
        self.idle.clear()
        # The loop's clock is time.monotonic(), which arrivals are told in.
        timers: list[asyncio.TimerHandle] = []
        if asked.queue_timeout is not None:
            timers.append(loop.call_at(generation.arrival + asked.queue_timeout, _end_queued, generation))
        if asked.time_budget is not None:
            at = generation.arrival + asked.time_budget
            timers.append(loop.call_at(at, generation.end, FinishReason.TIME_LIMIT))
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            del self._by_engine_id[generation.engine_id]
            del self._by_request_id[generation.request_id]
            if not self._by_engine_id:
                self.idle.set()


def _end_queued(generation: Generation) -> None:
    if not generation.scheduled_at:
        timeout = generation.asked.queue_timeout
        generation.fail(late("QUEUE_TIMEOUT", f"the engine did not begin with it within {timeout:g} s"))
