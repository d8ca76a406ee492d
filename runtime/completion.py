"""What a caller in the same process gets: whole completions, or the pieces of one as they come. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from pressd.runtime.request import FinishReason, TokenLogprobs

# A text, or the token ids of one.
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One drawn sequence; `index` counts the sequences of its prompt.

    `text` continues the prompt's, special tokens left out, and is None where the model has no tokenizer. `error` says
    why a sequence ended by NUMERIC_ERROR, CONSTRAINT_INVALID or CONSTRAINT_IMPOSSIBLE; what it had until then is here.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step added to a sequence; the pieces of an index, joined, are its Completion.

    `text` holds whole characters: where a token ends inside one, its text comes with a later piece, at worst the last.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
