"""Sends a load of requests and notes when each token came. No torch, no protocol."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pressd.server.bench.workload import Asked, Pace

# A poll that waits for an answer returns at least this often, so that progress is told.
TICK = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What came for one request at a time of the target's clock; `error` ends it as well."""

    number: int
    at: float
    num_tokens: int = 0
    is_last: bool = False
    error: str | None = None


class Target(Protocol):
    """Something that takes requests and yields tokens with times; used by one thread."""

    def send(self, number: int, asked: Asked) -> None:
        """Begin a request; what is wrong with it comes as news."""
        ...

    def poll(self, seconds: float) -> Sequence[News]:
        """Wait for news, at most so long; return what has come, which may be nothing."""
        ...

    def facts(self) -> dict[str, float]:
        """Return what only the target knows about the time since this was last called."""
        ...


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request: when it should have been sent, when tokens came and how many, when it ended. Seconds."""

    intended: float
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    ended: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load. `seconds` go from its beginning to the last news; `is_whole` is False if it was interrupted."""

    samples: tuple[Sample, ...]
    seconds: float
    is_whole: bool
    facts: dict[str, float]


def drive(
    target: Target,
    requests: Sequence[Asked],
    pace: Pace,
    *,
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[[Sequence[Sample], int], None] = lambda samples, count: None,
) -> Run:
    """Send all requests at their pace and wait until the last has ended, or for KeyboardInterrupt.

    `clock` is the target's. `tell` is called with the samples so far and the number of requests, after each poll.
    """
    target.facts()
    began = last = clock()
    samples: list[Sample] = []
    num_live = 0
    is_whole = False
    try:
        while len(samples) < len(requests) or num_live:
            wait = TICK
            while len(samples) < len(requests):
                now = clock() - began
                intended = pace.due(len(samples), num_live, now)
                if intended is None:
                    wait = min(TICK, pace.wait(len(samples), now))
                    break
                samples.append(Sample(intended=intended))
                num_live += 1
                target.send(len(samples) - 1, requests[len(samples) - 1])
            for news in target.poll(wait):
                num_live -= _note(samples[news.number], news, began)
                last = news.at
            tell(samples, len(requests))
        is_whole = True
    except KeyboardInterrupt:
        last = clock()
    return Run(samples=tuple(samples), seconds=last - began, is_whole=is_whole, facts=target.facts())


def _note(sample: Sample, news: News, began: float) -> bool:
    """Write news down; return whether the request is over."""
    at = news.at - began
    if news.num_tokens:
        sample.times.append(at)
        sample.num_tokens += news.num_tokens
    if not news.is_last and news.error is None:
        return False
    sample.ended, sample.error = at, news.error
    return True
