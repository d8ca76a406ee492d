"""How long a step takes, and so how many tokens it may have. No torch."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

# How fast the factor between measured and real follows what steps take; one step in ten weighs as much as nine before.
FOLLOW = 0.1
FACTOR_BOUNDS = (0.25, 16.0)


class StepBudget(Protocol):
    """How many tokens the next step may compute, when `num_decoding` sequences get one each in any case."""

    def tokens(self, num_decoding: int) -> int: ...

    def observe(self, num_tokens: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The same number of tokens in every step."""

    max_step_tokens: int

    def tokens(self, num_decoding: int) -> int:
        return self.max_step_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        pass


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured seconds of steps of `tokens` tokens, ascending; in between a straight line, beyond the last slope."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.seconds) >= 1
        assert all(a < b for a, b in zip((0, *self.tokens), self.tokens, strict=False))

    def predict(self, num_tokens: int) -> float:
        """Return the seconds that a step of `num_tokens` takes. More tokens never cost less, whatever was measured."""
        tokens, seconds = (0, *self.tokens), (0.0, *_rising(self.seconds))
        place = min(max(bisect_left(tokens, num_tokens), 1), len(tokens) - 1)
        if num_tokens <= tokens[1]:
            return seconds[1]  # the weights are read however few tokens there are
        slope = (seconds[place] - seconds[place - 1]) / (tokens[place] - tokens[place - 1])
        cost = seconds[place - 1] + slope * (num_tokens - tokens[place - 1])
        # Between two measurements rounding must not carry it past the second.
        return min(cost, seconds[place]) if num_tokens <= tokens[place] else cost

    def tokens_within(self, seconds: float, most: int) -> int:
        """Return the most tokens, up to `most`, that a step of `seconds` computes."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.predict(middle) <= seconds else (low, middle - 1)
        return low


class TimeBudget:
    """As many tokens as are computed within `target` seconds while others wait for their next token.

    A step in which nobody decodes keeps nobody waiting and has `max_step_tokens`. Prompts always get `floor` tokens, so
    that they come on however many decode. The table was measured on an idle machine without context; a factor that
    follows what steps really take corrects it.
    """

    def __init__(self, table: CostTable, target: float, *, max_step_tokens: int, floor: int) -> None:
        self.table = table
        self.target = target
        self.factor = 1.0
        self._max_step_tokens = max_step_tokens
        self._floor = floor

    def tokens(self, num_decoding: int) -> int:
        if num_decoding == 0:
            return self._max_step_tokens
        within = self.table.tokens_within(self.target / self.factor, self._max_step_tokens)
        return min(self._max_step_tokens, max(within, num_decoding + self._floor))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` took `seconds`."""
        low, high = FACTOR_BOUNDS
        ratio = seconds / self.table.predict(num_tokens)
        self.factor = min(high, max(low, self.factor * (ratio / self.factor) ** FOLLOW))


def _rising(seconds: tuple[float, ...]) -> list[float]:
    """Raise each value to the largest before it."""
    return [max(seconds[: place + 1]) for place in range(len(seconds))]
