"""What the engine is asked and what it answers for one request: plain data, no torch, no protocol."""

import enum
from dataclasses import dataclass, field

from pressd.runtime.params import Constraint, SamplingParams, StoppingParams


class FinishReason(enum.Enum):
    """Why a sequence ended. The last three come with `RequestOutput.error`.

    CANCELLED and TIME_LIMIT are for those who read an engine; it never ends a sequence so by itself.
    """

    EOS = "eos"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    CONSTRAINT_COMPLETE = "constraint_complete"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"
    NUMERIC_ERROR = "numeric_error"
    CONSTRAINT_INVALID = "constraint_invalid"
    CONSTRAINT_IMPOSSIBLE = "constraint_impossible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to complete. `arrival` is time.monotonic() seconds (one clock for all processes of a machine).

    Higher `priority` is sooner. Prefixes are shared only among requests of the same `cache_salt`;
    `bypass_prefix_cache` neither reads nor fills the cache.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    constraint: Constraint | None = None
    priority: int = 0
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    arrival: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probability of a token under the raw model, and of the likeliest tokens, likeliest first.

    `rank` is its place among all tokens by probability, from 1; equally likely ones share the best of theirs.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step did for one sequence of a request: new tokens, and the reason if it ended.

    The step that first schedules a sequence reports it, without tokens if the prompt takes more steps. `index`
    counts the sequences of a request. `matched_token_id` is the stop or EOS token that ended it, part of
    `token_ids` only where `StoppingParams.include_stop` keeps a stop token. `logprobs` has an entry for each of
    `token_ids`, `prompt_logprobs` for prompt tokens computed in this step (the prompt's first token has none), both
    only if asked for. Times are monotonic seconds: when its first token was scheduled and when its first token came
    out; 0.0 while that has not happened. `num_cached_tokens` of the prompt were found in the prefix cache.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched_token_id: int | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    num_cached_tokens: int = 0
