"""A sequence on its way: the tokens it has, how far they are computed, the blocks it holds. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from pressd.runtime.blocks import Content
from pressd.runtime.request import Request


class TokenMatcher(Protocol):
    """What holds a sequence to its constraint; see runtime/constraints."""

    @property
    def is_complete(self) -> bool: ...

    def accept(self, token_id: int) -> None: ...


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence in one KV group: block i holds tokens [i * block_size, (i + 1) * block_size).

    Blocks that fell behind a sliding window are given back; their entries stay, meaningless, and `num_dropped` counts
    them. `num_written` entries are known to the runner. `first_block`, if all that are kept lie in one contiguous run,
    is the block that entry 0 has or would have (it may be negative).
    """

    blocks: list[int] = field(default_factory=list)
    num_dropped: int = 0
    num_written: int = 0
    first_block: int | None = None

    @property
    def kept(self) -> list[int]:
        return self.blocks[self.num_dropped :]

    def append(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if len(self.blocks) == self.num_dropped:
                self.first_block = block - len(self.blocks)
            elif self.first_block is not None and block != self.first_block + len(self.blocks):
                self.first_block = None
            self.blocks.append(block)

    def drop(self, count: int) -> list[int]:
        """Give up the first kept blocks until `count` are dropped in all; return them."""
        dropped = self.blocks[self.num_dropped : count]
        self.num_dropped = max(count, self.num_dropped)
        if dropped and self.first_block is None and self.kept:
            first = self.kept[0]
            if self.kept == list(range(first, first + len(self.kept))):
                self.first_block = first - self.num_dropped
        return dropped

    def move(self, blocks: list[int]) -> list[int]:
        """Replace what is kept by a contiguous run; return what it was."""
        before = self.kept
        assert len(blocks) == len(before)
        self.blocks[self.num_dropped :] = blocks
        self.first_block = blocks[0] - self.num_dropped
        self.num_written = 0
        return before


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One of a request's sequences.

    `token_ids` (prompt plus output) are known here; `num_tokens` counts also those drawn by a step whose result has not
    come back. `num_computed_tokens` have keys and values once the steps in flight are over, `num_settled_tokens` have
    them now. `stop_ids` end the sequence, `max_length` bounds it. `order` decides who goes first; times are monotonic
    seconds. `epoch` counts preemptions: what a step in flight wrote for an earlier one is nobody's.
    """

    request: Request
    index: int = 0
    max_length: int
    order: tuple[int, float, int]
    stop_ids: frozenset[int] = frozenset()
    token_ids: list[int]
    num_tokens: int
    num_computed_tokens: int = 0
    num_settled_tokens: int = 0
    tables: list[BlockTable] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    root: bytes = b""
    row: int | None = None
    owner: int = 0
    epoch: int = 0
    last_step: int = -1
    is_preempted: bool = False
    leader: "Sequence | None" = None
    matcher: TokenMatcher | None = None
    num_cached_tokens: int = 0
    num_published_blocks: int = 0
    num_reported_prompt_tokens: int = 0
    was_scheduled: bool = False
    is_over: bool = False
    scheduled_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute; the whole rule of scheduling is to bring this to zero. The last possible one never is."""
        return min(self.num_tokens, self.max_length - 1) - self.num_computed_tokens

    @property
    def waits_for_result(self) -> bool:
        """True while the next draw depends on the text, and a step that extends the text is in flight."""
        return self.matcher is not None and len(self.token_ids) < self.num_tokens

    @property
    def may_skip_prompt(self) -> bool:
        """Whether a cached prefix may be used: not while the prompt's own log-probabilities are wanted."""
        if self.request.bypass_prefix_cache:
            return False
        return not self.reports_prompt or self.num_reported_prompt_tokens >= self.num_prompt_tokens

    @property
    def reports_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted of this sequence; the first reports for all."""
        return self.request.sampling.prompt_logprobs and self.index == 0
