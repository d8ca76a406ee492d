"""How serving ends: who may end it, by when, and what becomes of live requests."""

import asyncio
import logging
import math
import signal

from pressd.server.door import Door
from pressd.server.errors import unavailable

# Seconds for aborted requests to send their status.
ABORT_GRACE = 2.0

log = logging.getLogger("pressd.app")


class Ending:
    """Hears SIGTERM, SIGINT and calls of Drain; each can only bring the end nearer, and the second signal is the end.

    A Drain is no signal: Kubernetes sends its SIGTERM when a preStop hook that called Drain is over, and what Drain
    waits for must not be cut off by that.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._num_signals = 0
        self._deadline = math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signals.put_nowait, int(number))

    @property
    def remaining(self) -> float:
        """Seconds that live requests may still take."""
        return max(0.0, self._deadline - self._loop.time())

    async def told(self) -> int | None:
        """Wait for the next word; return the number of a signal that means at once, else None."""
        number = asyncio.ensure_future(self._signals.get())
        drain = asyncio.ensure_future(self._door.drain_requested.wait())
        try:
            await asyncio.wait({number, drain}, return_when=asyncio.FIRST_COMPLETED)
            timeout: float | None = None
            if number.done():
                self._num_signals += 1
                if self._num_signals > 1:
                    return number.result()
            else:
                self._door.drain_requested.clear()
                timeout = self._door.drain_timeout
            if timeout is None:
                timeout = self._door.settings.shutdown_timeout
            self._deadline = min(self._deadline, self._loop.time() + timeout)
            return None
        finally:
            number.cancel()
            drain.cancel()


async def drain(door: Door, ending: Ending) -> int:
    """Let live requests finish, end the rest with a status, and return the exit status of the process."""
    log.info("draining", extra={"live": len(door.live), "timeout_s": round(ending.remaining, 3)})
    door.drain()
    idle, again = asyncio.ensure_future(door.live.idle.wait()), asyncio.ensure_future(ending.told())
    try:
        while True:
            await asyncio.wait({idle, again}, timeout=ending.remaining, return_when=asyncio.FIRST_COMPLETED)
            if idle.done() or not again.done():
                break
            number = again.result()
            if number is not None:
                log.warning("told twice; ending at once", extra={"live": len(door.live)})
                return 128 + number
            log.info("still draining", extra={"live": len(door.live), "timeout_s": round(ending.remaining, 3)})
            again = asyncio.ensure_future(ending.told())
        if not idle.done():
            log.warning("ending live requests", extra={"live": len(door.live)})
            message = "the server shut down before the request was done; ask another one"
            door.live.fail_all(unavailable("DRAIN_TIMEOUT", message, retry_after=0.0))
            await asyncio.wait({idle}, timeout=ABORT_GRACE)
        return 0
    finally:
        idle.cancel()
        again.cancel()
