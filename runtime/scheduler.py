"""Who computes how many tokens in the next step. No torch.

One rule, no prefill or decode phase: every sequence has tokens that are known and tokens that are computed, and a step
hands out its budget so that the second catch up with the first. Chunked prefill and continuous batching follow from it.
"""

from collections import deque
from dataclasses import dataclass

from pressd.runtime.blocks import BlockPool
from pressd.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """`num_tokens` of a sequence's pending tokens, to be computed in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_first(self) -> bool:
        """True in the step that takes the sequence out of the queue."""
        return self.sequence.num_computed_tokens == 0

    @property
    def reaches_end(self) -> bool:
        """True when every known token will be computed, so that the next one can be sampled."""
        return self.num_tokens == self.sequence.num_pending_tokens


class Scheduler:
    """Admits sequences in order of arrival and divides each step's token budget.

    A sequence is admitted when the pool can hold it up to its `max_length`, so a running sequence never runs out of
    blocks.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, max_step_tokens: int) -> None:
        assert max_step_tokens >= max_batch
        self._pool = pool
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def blocks_needed(self, sequence: Sequence) -> int:
        """Return the blocks that a sequence holds while it runs; the last token it may reach is never computed."""
        return self._pool.blocks_for(max(sequence.num_prompt_tokens, sequence.max_length - 1))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that the pool can hold when it is empty."""
        assert self.blocks_needed(sequence) <= self._pool.num_blocks
        self._waiting.append(sequence)

    def schedule(self, now: float) -> list[Scheduled]:
        """Return this step's work: one pending token of the running first, then longer runs, then newcomers."""
        self._admit(now)
        budget = self._max_step_tokens
        step: list[Scheduled] = []
        # A sequence that decodes has one pending token; serving those first keeps a long prompt from stalling them.
        for sequence in sorted(self._running, key=lambda sequence: sequence.num_pending_tokens > 1):
            num_tokens = min(sequence.num_pending_tokens, budget)
            if num_tokens == 0:
                break
            step.append(Scheduled(sequence=sequence, num_tokens=num_tokens))
            budget -= num_tokens
        return step

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and free its blocks at once."""
        if sequence.block_table:
            self._running.remove(sequence)
            self._pool.free(sequence.block_table)
            sequence.give_blocks(())
        else:
            self._waiting.remove(sequence)

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._max_batch:
            blocks = self._pool.allocate(self.blocks_needed(self._waiting[0]))
            if blocks is None:
                return
            sequence = self._waiting.popleft()
            sequence.give_blocks(blocks)
            sequence.scheduled_at = now
            self._running.append(sequence)
