"""When a call that failed is made again."""

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from pressd.client.errors import CallError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Makes a call again that the server refused for now, or could not be reached for, before anything was answered.

    Tried again are RESOURCE_EXHAUSTED and UNAVAILABLE with the server's RetryInfo, and UNAVAILABLE without any detail,
    which is a connection that could not be made or broke. No retry runs anything twice: what a server refuses it has
    not begun or has ended, a call whose connection breaks it ends as well, and a stream that has yielded an event is
    never begun again. A completion has no effect but its answer, so that one which broke off unseen is only lost work.

    The wait is what the server asks for, at least a random share (full jitter) of `first_wait` seconds, which doubles
    with each attempt up to `longest_wait`. If the server asks for more than `longest_wait`, or the wait would not end
    before the call's deadline, the call fails at once. `clock`, `draw` (0 to 1) and the two sleeps are for tests.
    """

    attempts: int = 4
    first_wait: float = 0.5
    longest_wait: float = 10.0
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    sleep: Callable[[float], None] = time.sleep
    sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; give at least 1, or retry=None for none")
        if not 0 <= self.first_wait <= self.longest_wait:
            raise ValueError(f"first_wait is {self.first_wait}; give 0 to longest_wait ({self.longest_wait})")


DEFAULT_RETRY = Retry()
NO_RETRY = Retry(attempts=1)


@dataclass(slots=True)
class Attempts:
    """One call with all its attempts, which share one deadline; `timeout` in seconds, None for none."""

    retry: Retry
    timeout: float | None
    _made: int = 0
    _deadline: float | None = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = None if self.timeout is None else self.retry.clock() + self.timeout

    @property
    def remaining(self) -> float | None:
        """Seconds that the next attempt has."""
        return None if self._deadline is None else max(0.0, self._deadline - self.retry.clock())

    def wait_after(self, error: CallError) -> float:
        """Return the seconds before the next attempt; raises the error if there should be none."""
        self._made += 1
        if self._made >= self.retry.attempts or not _is_passing(error):
            raise error
        asked = error.retry_after or 0.0
        doublings = min(self._made - 1, sys.float_info.max_exp - 1)
        longest = min(self.retry.longest_wait, self.retry.first_wait * 2.0**doublings)
        wait = max(asked, self.retry.draw() * longest)
        remaining = self.remaining
        if asked > self.retry.longest_wait or (remaining is not None and wait >= remaining):
            raise error
        return wait


def _is_passing(error: CallError) -> bool:
    """Whether the same call may succeed later."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return True
    refused = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return error.code in refused and error.retry_after is not None
