"""Token ids to text, token by token: complete code points only, nothing that a stop text could still swallow."""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pressd.runtime.request import TokenLogprobs

# Each malformed part becomes one U+FFFD, as the tokenizers library has it for byte-level vocabularies. For those with
# fallback to bytes it looks at a whole run of bytes at once, which cannot be streamed.
_Decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True)
class Piece:
    """One token, the text it completed (None where text was not asked for), and its log-probability if that was."""

    token_id: int
    text: str | None
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class _Held:
    piece: Piece
    end: int  # characters of all text up to and including this token's
    needs: int  # characters that must be decided before it may go: further than `end` if it begins the next one

    @property
    def begin(self) -> int:
        return self.end - len(self.piece.text or "")


class StopMatcher:
    """Looks for the stop text that is complete first, however the text is cut (Knuth-Morris-Pratt for each stop)."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._states = [0] * len(self._stops)

    @property
    def num_undecided(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop text."""
        return max(self._states, default=0)

    def feed(self, text: str) -> tuple[str, int] | None:
        """Read on; return the stop text that is complete and the number of characters of `text` read for it."""
        for position, character in enumerate(text, 1):
            matched = ""
            for index, (stop, borders) in enumerate(self._stops):
                state = self._states[index]
                while state and stop[state] != character:
                    state = borders[state - 1]
                state += stop[state] == character
                self._states[index] = state
                if state == len(stop):
                    matched = max(matched, stop, key=len)
                    self._states[index] = borders[-1]
            if matched:
                return matched, position
        return None


def _borders(text: str) -> list[int]:
    """Length of the longest proper prefix of each text[: i + 1] that is also its suffix."""
    borders = [0] * len(text)
    for index in range(1, len(text)):
        length = borders[index - 1]
        while length and text[length] != text[index]:
            length = borders[length - 1]
        borders[index] = length + (text[length] == text[index])
    return borders


class Detokenizer:
    """The text of one sequence. `bytes_of_token` gives each token's UTF-8 bytes, which need not be whole code points.

    A token is released once its text is decided; what is released adds up to the text before the first stop text, with
    `include_stop` to the text through it. Constant work per token, amortised; a stop text costs one comparison per
    character.
    """

    def __init__(
        self, bytes_of_token: Mapping[int, bytes], stops: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self._bytes = bytes_of_token
        self._include_stop = include_stop
        self._decoder = _Decoder(errors="replace")
        self._matcher = StopMatcher(stops) if stops else None
        self._held: deque[_Held] = deque()
        self._length = 0
        self._num_open = 0  # tokens at the end with bytes of a code point that is not complete
        self.matched: str | None = None

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None] = ()) -> list[Piece]:
        """Take new tokens, with or without log-probabilities, and return those that are decided now.

        After a match everything is discarded.
        """
        released: list[Piece] = []
        for token_id, logprob in zip(token_ids, logprobs or [None] * len(token_ids), strict=True):
            if self.matched is not None:
                break
            data = self._bytes.get(token_id, b"")
            text = self._decoder.decode(data)
            if text:  # its first character is the one that open tokens began
                for index in range(1, self._num_open + 1):
                    self._held[-index].needs = self._length + 1
            self._held.append(_Held(Piece(token_id, "", logprob), self._length, self._length))
            self._append(text)
            if self.matched is None:
                num_pending = len(self._decoder.getstate()[0])
                self._num_open = 0 if not num_pending else 1 if len(data) >= num_pending else self._num_open + 1
            released += self._release()
        return released

    def finish(self) -> list[Piece]:
        """Return the tokens still held; nothing can complete their text any more."""
        if self.matched is None and self._held:
            self._append(self._decoder.decode(b"", final=True))
        self._num_open = 0
        self._matcher = None
        return self._release()

    def _append(self, text: str) -> None:
        """Add to the text of the last token."""
        if not text:
            return
        last = self._held[-1]
        last.piece.text = (last.piece.text or "") + text
        start, self._length = self._length, self._length + len(text)
        last.end = last.needs = self._length
        if self._matcher is not None and (match := self._matcher.feed(text)):
            self.matched, num_read = match
            self._cut(start + num_read - (0 if self._include_stop else len(self.matched)))

    def _cut(self, end: int) -> None:
        """Drop all text from `end` on, and the tokens that begin there."""
        while self._held and self._held[-1].begin >= end:
            self._held.pop()
        if self._held:
            last = self._held[-1]
            last.piece.text = (last.piece.text or "")[: end - last.begin]
            last.end = last.needs = end
        self._length = end
        self._num_open = 0
        self._matcher = None

    def _release(self) -> list[Piece]:
        holds_back = self._matcher is not None and not self._include_stop
        decided = self._length - (self._matcher.num_undecided if self._matcher and holds_back else 0)
        released = []
        while len(self._held) > self._num_open and self._held[0].needs <= decided:
            released.append(self._held.popleft().piece)
        return released
