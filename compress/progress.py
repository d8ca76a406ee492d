"""How far a verb is, on stderr."""

import sys
import time
from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLine:
    """A line on stderr that rewrites itself on a terminal; elsewhere a new line every few seconds and at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def tell(self, what: str, done: int, total: int) -> None:
        """Say that `done` of `total` are done, the last of them `what`."""
        now = self._clock()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{done}/{total} {what}" + ("\n" if done == total else ""))
        elif done == total or now - self._last >= _SECONDS_BETWEEN_LINES:
            sys.stderr.write(f"{done}/{total} {what}\n")
            self._last = now
        sys.stderr.flush()
