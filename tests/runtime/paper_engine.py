"""An engine on paper: the real scheduler and KV cache, and memory that remembers what was written where.

What a model would compute for a token is replaced by the prefix that ends with it. Every step reads back whatever
attention would read, from the blocks that the tables name, and finds the right prefixes there or fails.
"""

from collections import deque
from dataclasses import replace

from pressd.runtime.costs import TokenBudget
from pressd.runtime.kv_cache import KVCache, KVGroup
from pressd.runtime.params import StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.scheduler import Scheduler, StepPlan
from pressd.runtime.sequence import Sequence

POISON = "poison"


def next_token(tokens: tuple[int, ...]) -> int:
    """What the model on paper says after a prefix; few enough values that prefixes meet."""
    return (sum(tokens) * 31 + len(tokens)) % 3


class PaperEngine:
    """Drives the scheduler as the engine does, with `depth` steps launched before a result is read."""

    def __init__(
        self, groups: list[KVGroup], block_size: int, *, max_batch: int, chunk: int, depth: int, contiguous: bool
    ) -> None:
        self.kv = KVCache(groups, block_size, contiguous=contiguous)
        self.scheduler = Scheduler(self.kv, TokenBudget(chunk), max_batch=max_batch, max_step_tokens=chunk)
        self.live: list[Sequence] = []
        self.outputs: dict[str, list[int]] = {}
        self.max_batch, self.chunk, self.depth = max_batch, chunk, depth
        self._in_flight: deque[tuple[StepPlan, dict[int, int]]] = deque()
        self._serial = 0
        self._memory = [[[POISON] * block_size for _ in range(group.num_blocks)] for group in groups]
        self._device: dict[int, list[int]] = {}  # token ids by row

    def sequence(
        self, prompt: tuple[int, ...], output: int, priority: int, salt: str = "", bypass: bool = False
    ) -> Sequence:
        self._serial += 1
        request = Request(
            request_id=str(self._serial),
            prompt_token_ids=prompt,
            priority=priority,
            cache_salt=salt,
            bypass_prefix_cache=bypass,
            stopping=StoppingParams(max_new_tokens=output),
        )
        order = (-priority, 0.0, self._serial)
        return Sequence(
            request=request,
            max_length=len(prompt) + output,
            order=order,
            token_ids=list(prompt),
            num_tokens=len(prompt),
        )

    def add(self, sequence: Sequence) -> None:
        self.live.append(sequence)
        self.outputs[sequence.request.request_id] = []
        self.scheduler.add(sequence)

    def end(self, sequence: Sequence) -> None:
        sequence.is_over = True
        self.live.remove(sequence)
        self.scheduler.remove(sequence)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule(0.0)
        assert plan.num_tokens <= self.chunk
        assert len(plan.rows) <= self.max_batch
        if plan.rows:
            self._in_flight.append((plan, self._run(plan)))
        elif not self._in_flight:
            self.scheduler.complete(plan.number)
        if self._in_flight and (not plan.rows or len(self._in_flight) > self.depth):
            self._digest(*self._in_flight.popleft())
        self.scheduler.check_integrity(self.live)
        return plan

    def drain(self, most: int) -> None:
        for _ in range(most):
            if not (self.live or self._in_flight):
                return
            self.step()
        raise AssertionError(f"{len(self.live)} sequences do not end")

    def _run(self, plan: StepPlan) -> dict[int, int]:
        """Do a step's work in the order of the device; return what was drawn, by place in the plan."""
        for sequence in plan.admitted:
            assert sequence.row is not None
            self._device[sequence.row] = list(sequence.token_ids)
        for copy in plan.copies:
            memory = self._memory[copy.group]
            for source, target in zip(copy.sources, copy.targets, strict=True):
                memory[target] = list(memory[source])
        drawn = {}
        for place, item in enumerate(plan.rows):
            tokens = self._device[item.row]
            assert len(tokens) >= item.stop
            for position in range(item.start, item.stop):
                self._compute(item.sequence, tuple(tokens[: position + 1]))
            if item.draws:
                assert len(tokens) == item.stop
                drawn[place] = next_token(tuple(tokens))
                tokens.append(drawn[place])
        return drawn

    def _compute(self, sequence: Sequence, prefix: tuple[int, ...]) -> None:
        position, size = len(prefix) - 1, self.kv.block_size
        own = (sequence.request.cache_salt, prefix)
        for group, table, memory in zip(self.kv.groups, sequence.tables, self._memory, strict=True):
            memory[table.blocks[position // size]][position % size] = own  # type: ignore[call-overload]
            first = 0 if group.window is None else max(0, position + 1 - group.window)
            for seen in range(first, position + 1):
                block = table.blocks[seen // size]
                assert memory[block][seen % size] == (own[0], prefix[: seen + 1]), f"position {seen} of {prefix}"
                if table.first_block is not None:
                    assert block == table.first_block + seen // size, "a view would read another block"

    def _digest(self, plan: StepPlan, drawn: dict[int, int]) -> None:
        self.scheduler.complete(plan.number)
        for place, item in enumerate(plan.rows):
            sequence = item.sequence
            if sequence.is_over:
                continue
            if item.epoch == sequence.epoch:
                self.kv.settle(sequence, item.stop)
            if place in drawn:
                sequence.token_ids.append(drawn[place])
                self.outputs[sequence.request.request_id].append(drawn[place])
                if len(sequence.token_ids) >= sequence.max_length:
                    self.end(sequence)


def expected(sequence: Sequence) -> list[int]:
    """What a request gets, whoever is served beside it."""
    prompt = sequence.request.prompt_token_ids
    tokens = list(prompt)
    while len(tokens) < sequence.max_length:
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(prompt) :]


def sized(group: KVGroup, num_blocks: int) -> KVGroup:
    return replace(group, num_blocks=num_blocks)
