"""One sequence of a request on its way from the engine to the reader."""

from dataclasses import dataclass

from pressd.runtime.request import FinishReason, RequestOutput, TokenLogprobs
from pressd.server.detokenize import Detokenizer, Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a sequence ended, and the stop text or token that ended it."""

    reason: FinishReason
    stop: str | None = None
    token_id: int | None = None


class Strand:
    """Times are time.monotonic() seconds, 0.0 for what has not happened. `detokenizer` None: ids only."""

    def __init__(self, index: int, detokenizer: Detokenizer | None) -> None:
        self.index = index
        self.num_computed = 0  # tokens the engine made
        self.num_sent = 0  # tokens the reader got
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.ready_since = 0.0
        self.engine_is_done = False
        self.end: End | None = None  # set when everything before it has been read
        self._detokenizer = detokenizer
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._ready: list[Piece] = []
        self._engine_end: End | None = None

    @property
    def is_open(self) -> bool:
        """Whether the engine may still bring something for it."""
        return self._engine_end is None and self.end is None

    @property
    def has_unread(self) -> bool:
        """Whether reading on would bring something."""
        return self.end is None and bool(self._ids)

    @property
    def num_unread(self) -> int:
        return len(self._ids) + len(self._ready)

    def push(self, output: RequestOutput, now: float) -> None:
        """Take what one step did."""
        if output.token_ids:
            self.first_token_at = self.first_token_at or now
            self.last_token_at = now
            self.num_computed += len(output.token_ids)
            self._ids += output.token_ids
            self._logprobs += output.logprobs
        if output.finish_reason is not None:
            self.close(End(reason=output.finish_reason, token_id=output.matched_token_id))

    def close(self, end: End) -> None:
        """Nothing more will come, for this reason, unless it has ended."""
        if self.is_open:
            self._engine_end = end

    def read(self, now: float, most: int) -> None:
        """Turn what has come into pieces, of at most so many tokens, and find out whether it is over."""
        if self.end is None:
            self._ready += self._decide(most)
            if self._ready and not self.ready_since:
                self.ready_since = now

    def is_due(self, now: float, min_tokens: int, max_delay: float | None) -> bool:
        """Whether the reader should have what is ready."""
        if self.end is not None or len(self._ready) >= min_tokens:
            return True
        return max_delay is not None and self.ready_since > 0 and now - self.ready_since >= max_delay

    def take(self) -> list[Piece]:
        """Return the pieces that are ready."""
        pieces, self._ready = self._ready, []
        self.ready_since = 0.0
        self.num_sent += len(pieces)
        return pieces

    def _decide(self, most: int) -> list[Piece]:
        ids, self._ids = self._ids[:most], self._ids[most:]
        logprobs, self._logprobs = self._logprobs[:most], self._logprobs[most:]
        engine_end = None if self._ids else self._engine_end
        if self._detokenizer is None:
            self.end = engine_end
            if not logprobs:
                return [Piece(token_id, None) for token_id in ids]
            return [Piece(token_id, None, logprob) for token_id, logprob in zip(ids, logprobs, strict=True)]
        pieces = self._detokenizer.push(ids, logprobs)
        if self._detokenizer.matched is not None:
            self._ids, self._logprobs = [], []
            self.end = End(reason=FinishReason.STOP, stop=self._detokenizer.matched)
        elif engine_end is not None:
            pieces += self._detokenizer.finish()
            stop = self._detokenizer.matched
            self.end = engine_end if stop is None else End(reason=FinishReason.STOP, stop=stop)
        return pieces
