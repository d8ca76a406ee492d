"""One live request: what the engine has said and the reader has not taken yet."""

import asyncio
import time
from dataclasses import dataclass, replace

from pressd.runtime.request import FinishReason, RequestOutput
from pressd.server.detokenize import Detokenizer, Piece
from pressd.server.errors import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a sequence ended, and the stop text or token that ended it."""

    reason: FinishReason
    stop: str | None = None
    token_id: int | None = None


class Generation:
    """Tokens wait here as bare ids, however slow the reader: the next read takes all of them at once.

    Times are time.monotonic() seconds, 0.0 for what has not happened. `detokenizer` None: ids only.
    """

    def __init__(
        self,
        *,
        request_id: str,
        engine_id: str,
        prompt_field: str,
        num_prompt_tokens: int,
        seed: int,
        arrival: float,
        detokenizer: Detokenizer | None,
    ) -> None:
        self.request_id = request_id
        self.engine_id = engine_id
        self.prompt_field = prompt_field
        self.num_prompt_tokens = num_prompt_tokens
        self.seed = seed
        self.arrival = arrival
        self.scheduled_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.first_sent_at = 0.0
        self.num_computed = 0  # tokens the engine made
        self.num_sent = 0  # tokens the reader got
        self.engine_is_done = False
        self.end: End | None = None
        self._detokenizer = detokenizer
        self._pending: list[int] = []
        self._engine_end: End | None = None
        self._failure: Refusal | None = None
        self._news = asyncio.Event()

    @property
    def was_left(self) -> bool:
        """Whether its client ended it: by Cancel, by dropping the call, or by its deadline."""
        if self.end is None:
            return self._failure is None
        return self.end.reason is FinishReason.CANCELLED

    @property
    def is_open(self) -> bool:
        """Whether the engine may still be working on it."""
        return self._engine_end is None and self._failure is None

    @property
    def phase(self) -> str:
        """How far it got: queued, prefill or decode."""
        return "decode" if self.num_computed else "prefill" if self.scheduled_at else "queued"

    def push(self, output: RequestOutput, now: float) -> None:
        """Take what one step did."""
        if not self.is_open:
            return
        self.scheduled_at = self.scheduled_at or output.scheduled_at
        if output.token_ids:
            self.first_token_at = self.first_token_at or now
            self.last_token_at = now
            self.num_computed += len(output.token_ids)
            self._pending += output.token_ids
            self._news.set()
        if output.finish_reason is not None:
            self.engine_is_done = True
            self._engine_end = End(reason=output.finish_reason, token_id=output.matched_token_id)
            self._news.set()

    def fail(self, refusal: Refusal) -> None:
        """End it with a status, unless it has ended."""
        if self.is_open:
            self._failure = refusal
            self._news.set()

    def cancel(self) -> None:
        """End it with what exists, unless it has ended."""
        if self.is_open:
            self._engine_end = End(reason=FinishReason.CANCELLED)
            self._news.set()

    async def next_pieces(self) -> list[Piece]:
        """Wait for tokens whose text is decided and return them; none when it is over, and then `end` says why.

        Raises Refusal if it failed.
        """
        while self.end is None:
            await self._news.wait()
            self._news.clear()
            if self._failure is not None:
                raise replace(self._failure)  # many may share it, and each raise leaves its trace
            pieces = self._take()
            if pieces:
                self.num_sent += len(pieces)
                self.first_sent_at = self.first_sent_at or time.monotonic()
                return pieces
        return []

    def _take(self) -> list[Piece]:
        ids, self._pending = self._pending, []
        if self._detokenizer is None:
            self.end = self._engine_end
            return [Piece(token_id, None) for token_id in ids]
        pieces = self._detokenizer.push(ids)
        if self._detokenizer.matched is not None:
            self.end = End(reason=FinishReason.STOP, stop=self._detokenizer.matched)
        elif self._engine_end is not None:
            pieces += self._detokenizer.finish()
            stop = self._detokenizer.matched
            self.end = self._engine_end if stop is None else End(reason=FinishReason.STOP, stop=stop)
        return pieces
