"""What is asked, and when: requests drawn from a seed, alike for everything that they are sent to. No torch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """A whole number, or one drawn evenly between two."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `128` or `32-256`; raises ValueError."""
        least, _, most = text.partition("-")
        numbers = [least, most or least]
        if not all(number.isascii() and number.isdigit() for number in numbers) or not 1 <= int(least) <= int(
            numbers[1]
        ):
            raise ValueError(f"{text!r} is not a number of at least 1 such as 128, nor two such as 32-256")
        return cls(*map(int, numbers))

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: a prompt, and how many tokens the answer must have."""

    prompt_token_ids: tuple[int, ...]
    output_tokens: int


def make_requests(count: int, *, prompt: Span, output: Span, vocab_size: int, seed: str) -> list[Asked]:
    """Return requests whose tokens are random, so that no prompt is the beginning of another."""
    rng = random.Random(seed)
    return [
        Asked(
            prompt_token_ids=tuple(rng.randrange(vocab_size) for _ in range(prompt.draw(rng))),
            output_tokens=output.draw(rng),
        )
        for _ in range(count)
    ]


class Pace(Protocol):
    """When requests begin. Times are seconds since the load began."""

    def due(self, number: int, num_live: int, now: float) -> float | None:
        """Return since when request `number` should be on its way, None while it should not."""
        ...

    def wait(self, number: int, now: float) -> float:
        """Return the seconds until request `number` may be due without any other ending; it is not due now."""
        ...


@dataclass(frozen=True, slots=True)
class Clients:
    """A closed loop: so many clients, each of which asks again when it has its answer."""

    count: int

    def due(self, number: int, num_live: int, now: float) -> float | None:
        return now if num_live < self.count else None

    def wait(self, number: int, now: float) -> float:
        return float("inf")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An open loop: requests come at these times, ascending, however long the answers to others take.

    A request that could not be sent in time counts from when it should have been.
    """

    times: Sequence[float]

    @classmethod
    def poisson(cls, rate: float, count: int, seed: str) -> "Arrivals":
        """Draw arrivals that know nothing of each other, `rate` a second in the mean."""
        rng = random.Random(seed)
        times, now = [], 0.0
        for _ in range(count):
            now += rng.expovariate(rate)
            times.append(now)
        return cls(times)

    def due(self, number: int, num_live: int, now: float) -> float | None:
        return self.times[number] if self.times[number] <= now else None

    def wait(self, number: int, now: float) -> float:
        return self.times[number] - now
