"""One live request: what the engine has said and the reader has not taken yet."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pressd.runtime.request import FinishReason, RequestOutput, TokenLogprobs
from pressd.server.asked import Asked, end_refusal
from pressd.server.detokenize import Detokenizer, Piece
from pressd.server.errors import Refusal, exhausted
from pressd.server.strand import End, Strand

# Tokens, and alternatives to them, that may wait for a reader: a hundred megabytes at most.
MAX_UNREAD = 1 << 18
# Tokens, and alternatives, of one message: some ten milliseconds' work, and below gRPC's own bound on what a client
# takes, 4 MiB.
MAX_TOLD = 1 << 12
# Tokens that become text at once: as much work.
MAX_READ = 1 << 12


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of the prompt from position `start` on, with their log-probabilities."""

    start: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Said:
    """New tokens of one sequence."""

    index: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Ended:
    """One sequence is over. `is_last`: so is the request."""

    strand: Strand
    is_last: bool


Update = Scored | Said | Ended


class Generation:
    """Tokens wait here as bare ids, however slow the reader: the next read takes all of them at once.

    Times are time.monotonic() seconds, 0.0 for what has not happened. `bytes_of_token` None: ids only. `abort` stops
    one sequence in the engine.
    """

    def __init__(
        self,
        asked: Asked,
        *,
        engine_id: str,
        prompt_token_ids: tuple[int, ...],
        seed: int,
        arrival: float,
        bytes_of_token: Mapping[int, bytes] | None,
        abort: Callable[[int], None],
    ) -> None:
        self.asked = asked
        self.engine_id = engine_id
        self.num_prompt_tokens = len(prompt_token_ids)
        self.seed = seed
        self.arrival = arrival
        self.scheduled_at = 0.0
        self.first_sent_at = 0.0
        self.num_cached_tokens = 0
        self.strands = tuple(Strand(index, _detokenizer(asked, bytes_of_token)) for index in range(asked.num_sequences))
        self._prompt = _PromptScores(prompt_token_ids, Detokenizer(bytes_of_token) if bytes_of_token else None)
        self._abort = abort
        self._told: set[int] = set()  # strands whose end the reader knows
        # What each of its tokens counts as: itself, and the alternatives to it.
        self.weight = 1 + asked.output.top_logprobs
        self._failure: Refusal | None = None
        self._news = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self.asked.request_id

    @property
    def num_computed(self) -> int:
        """Tokens that the engine made."""
        return sum(strand.num_computed for strand in self.strands)

    @property
    def num_sent(self) -> int:
        """Tokens that the reader got."""
        return sum(strand.num_sent for strand in self.strands)

    @property
    def first_token_at(self) -> float:
        return min((s.first_token_at for s in self.strands if s.first_token_at), default=0.0)

    @property
    def last_token_at(self) -> float:
        return max(strand.last_token_at for strand in self.strands)

    @property
    def is_over(self) -> bool:
        """Whether the reader has been told the end of every sequence."""
        return len(self._told) == len(self.strands)

    @property
    def is_open(self) -> bool:
        """Whether it may still bring anything but its end."""
        return self._failure is None and any(strand.is_open for strand in self.strands)

    @property
    def engine_is_done(self) -> bool:
        return all(strand.engine_is_done for strand in self.strands)

    @property
    def was_left(self) -> bool:
        """Whether its client ended it: by Cancel, by dropping the call, or by its deadline."""
        if not self.is_over:
            return self._failure is None
        return any(strand.end and strand.end.reason is FinishReason.CANCELLED for strand in self.strands)

    @property
    def phase(self) -> str:
        """How far it got: queued, prefill or decode."""
        return "decode" if self.num_computed else "prefill" if self.scheduled_at else "queued"

    def push(self, output: RequestOutput, now: float) -> None:
        """Take what one step did for one of its sequences."""
        strand = self.strands[output.index]
        if output.finish_reason is not None:
            strand.engine_is_done = True
        if self._failure is not None or not strand.is_open:
            return
        self.scheduled_at = self.scheduled_at or output.scheduled_at
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.finish_reason is not None:
            refusal = end_refusal(output.finish_reason, output.error, self.asked.constraint)
            if refusal is not None:
                self.fail(refusal)
                return
        if output.prompt_logprobs:
            self._prompt.push(output.prompt_logprobs)
        strand.push(output, now)
        self._news.set()
        num_unread = self._prompt.num_unread + sum(strand.num_unread for strand in self.strands)
        if self.weight * num_unread > MAX_UNREAD:
            self.fail(exhausted("SLOW_CONSUMER", "too many tokens wait to be read; read faster", retry_after=1.0))

    def fail(self, refusal: Refusal) -> None:
        """End it with a status, unless it has ended."""
        if self.is_open:
            self._failure = refusal
            self._stop()
            self._news.set()

    def give_up(self, refusal: Refusal) -> None:
        """End it with a status although all of it may be here: its reader does not take it."""
        self._failure = self._failure or refusal

    def end(self, reason: FinishReason) -> None:
        """End what is open of it with what exists."""
        for strand in self.strands:
            strand.close(End(reason=reason))
        self._stop()
        self._news.set()

    def _stop(self) -> None:
        """Have the engine let go of it now: its reader may be slow to hear that it has ended."""
        for strand in self.strands:
            self._release(strand)

    def _release(self, strand: Strand) -> None:
        if not strand.engine_is_done:
            strand.engine_is_done = True
            self._abort(strand.index)

    async def next(self) -> list[Update]:
        """Wait for tokens whose text is decided, and for ends, and return them; nothing when all has been told.

        Raises Refusal if it failed.
        """
        while True:
            if self._failure is not None and not self.is_over:
                raise replace(self._failure)  # many may share it, and each raise leaves its trace
            updates = self._updates(time.monotonic())
            if updates or self.is_over:
                return updates
            if any(strand.has_unread for strand in self.strands):
                await asyncio.sleep(0)
                continue
            try:
                async with asyncio.timeout(self._patience(time.monotonic())):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    def _updates(self, now: float) -> list[Update]:
        updates: list[Update] = list(self._scored())
        output = self.asked.output
        for strand in self.strands:
            if strand.index in self._told:
                continue
            strand.read(now, max(1, MAX_READ // len(self.strands)))
            if strand.is_due(now, output.min_tokens, output.max_delay) and (pieces := strand.take()):
                self.first_sent_at = self.first_sent_at or now
                updates += [Said(strand.index, part) for part in self._parts(pieces)]
            if strand.end is not None:
                self._told.add(strand.index)
                self._release(strand)
                updates.append(Ended(strand, self.is_over))
        return updates

    def _scored(self) -> Iterator[Scored]:
        start = self._prompt.num_taken
        for part in self._parts(self._prompt.take()):
            yield Scored(start, part)
            start += len(part)

    def _parts(self, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
        """Cut what would make too large a message."""
        size = max(1, MAX_TOLD // self.weight)
        return (pieces[start : start + size] for start in range(0, len(pieces), size))

    def _patience(self, now: float) -> float | None:
        """How long tokens that are ready may wait for more, in seconds."""
        delay = self.asked.output.max_delay
        if delay is None:
            return None
        ready = [strand.ready_since for strand in self.strands if strand.ready_since]
        return max(0.0, min(ready) + delay - now) if ready else None


def _detokenizer(asked: Asked, bytes_of_token: Mapping[int, bytes] | None) -> Detokenizer | None:
    return Detokenizer(bytes_of_token, asked.stop, include_stop=asked.include_stop) if bytes_of_token else None


class _PromptScores:
    """Log-probabilities of the prompt on their way to the reader; its first token has none."""

    def __init__(self, token_ids: tuple[int, ...], detokenizer: Detokenizer | None) -> None:
        self._token_ids = token_ids
        self._detokenizer = detokenizer
        self._scores: list[TokenLogprobs | None] = []
        self._num_read = 0
        self.num_taken = 0

    @property
    def num_unread(self) -> int:
        return len(self._scores)

    def push(self, scores: Sequence[TokenLogprobs]) -> None:
        if not self._num_read and not self._scores:
            self._scores.append(None)
        self._scores += scores

    def take(self) -> list[Piece]:
        """Return the tokens whose text is decided."""
        scores, self._scores = self._scores, []
        if not scores:
            return []
        ids = self._token_ids[self._num_read : self._num_read + len(scores)]
        self._num_read += len(scores)
        if self._detokenizer is None:
            pieces = [Piece(token_id, None, score) for token_id, score in zip(ids, scores, strict=True)]
        else:
            pieces = self._detokenizer.push(ids, scores)
            if self._num_read == len(self._token_ids):
                pieces += self._detokenizer.finish()
        self.num_taken += len(pieces)
        return pieces
