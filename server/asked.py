"""What a client asked for, free of protocol, and what of it the engine is told. Pure functions; errors name fields."""

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pressd.runtime.params import MAX_BAD_WORDS, Constraint, SamplingParams, StoppingParams
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import FinishReason, Request
from pressd.server.chat import ChatPrompt
from pressd.server.errors import Refusal, internal, invalid
from pressd.server.model_card import ModelCard

# Bounds on stop texts: each costs a comparison per character of every answer.
MAX_STOP_TEXTS = 16
MAX_STOP_LENGTH = 256
MAX_SALT = 256
# Each bad word is two for the engine: inside a text, and at the beginning of a word.
MAX_BAD_TEXTS = MAX_BAD_WORDS // 2

# Where the engine's names for fields stand in GenerateRequest; what is not listed is about the prompt.
_ENGINE_FIELDS = {
    "max_new_tokens": "stopping.max_new_tokens",
    "stop_token_ids": "stopping.stop_token_ids",
    "logit_bias": "sampling.logit_bias",
    "allowed_token_ids": "sampling.allowed_token_ids",
    "bad_words": "sampling.bad_words",
    "cache_salt": "runtime.cache_salt",
    "request_id": "request_id",
}


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt to tokenise; `field` is where it stands in its message."""

    text: str
    field: str = "prompt"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokens already; `field` is where they stand in their message."""

    ids: tuple[int, ...]
    field: str = "token_ids.ids"


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is sent back. A message waits for `min_tokens`, but no longer than `max_delay` seconds."""

    text: bool = True
    ids: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    echo: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 1
    max_delay: float | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs or self.top_logprobs > 0

    @property
    def wants_tokens(self) -> bool:
        """Whether each token is described by itself."""
        return self.ids or self.wants_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for completions.

    `sampling` holds the SamplingParams that were given, by the engine's names; None anywhere takes the model's default.
    Times are seconds from arrival.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    output: Output = Output()
    constraint: Constraint | None = None
    bypass_prefix_cache: bool = False
    cache_salt: str = ""
    priority: int = 0
    queue_timeout: float | None = None
    time_budget: float | None = None
    max_prompt_tokens: int | None = None

    @property
    def num_sequences(self) -> int:
        return int(self.sampling.get("n", 1))


def engine_request(
    asked: Asked,
    ids: tuple[int, ...],
    *,
    bad_words: tuple[tuple[int, ...], ...] = (),
    info: EngineInfo,
    card: ModelCard,
    engine_id: str,
    arrival: float,
) -> Request:
    """Return what the engine is told; raises Refusal for what could never run on this model.

    `ids` are the prompt's, `bad_words` the texts of that name as tokens.
    """
    _check_all_ids(asked, ids, info)
    if not ids:
        raise invalid(asked.prompt.field, "the prompt has no tokens; at least one is needed")
    if len(ids) >= info.max_context:
        problem = f"the prompt has {len(ids)} tokens and leaves no room in the context of {info.max_context}"
        raise invalid(asked.prompt.field, problem, reason="PROMPT_TOO_LONG")
    return Request(
        request_id=engine_id,
        prompt_token_ids=ids,
        sampling=_sampling(asked, bad_words, card),
        stopping=_stopping(asked, len(ids), info, card),
        constraint=asked.constraint,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        bypass_prefix_cache=asked.bypass_prefix_cache,
        arrival=arrival,
    )


def engine_refusal(field: str, message: str, prompt_field: str) -> Refusal:
    """What the engine itself did not take, in the words of the protocol."""
    name, place = re.fullmatch(r"(\w*)(.*)", field, re.DOTALL).groups()  # type: ignore[union-attr]  # matches anything
    return invalid(f"{_ENGINE_FIELDS[name]}{place}" if name in _ENGINE_FIELDS else prompt_field, message)


def end_refusal(reason: FinishReason, error: str | None, constraint: Constraint | None) -> Refusal | None:
    """What a sequence ended by, if that is a failure, in the words of the protocol."""
    field = f"constraint.{constraint.kind}" if constraint is not None else "constraint"
    if reason is FinishReason.CONSTRAINT_INVALID:
        return invalid(field, error or "it cannot be followed")
    if reason is FinishReason.CONSTRAINT_IMPOSSIBLE:
        return invalid(field, error or "no token is left", reason="CONSTRAINT_IMPOSSIBLE")
    if reason is FinishReason.NUMERIC_ERROR:
        return internal("NUMERIC_ERROR", "the model's logits are not finite; another dtype may help")
    return None


def check_ids(field: str, ids: Sequence[int], info: EngineInfo) -> None:
    """Raise Refusal for an id that the model does not have."""
    if max(ids, default=0) >= info.vocab_size:
        index, token_id = next((index, token_id) for index, token_id in enumerate(ids) if token_id >= info.vocab_size)
        raise invalid(f"{field}[{index}]", f"{token_id} is outside the vocabulary of {info.vocab_size}")


def _check_all_ids(asked: Asked, ids: tuple[int, ...], info: EngineInfo) -> None:
    check_ids(asked.prompt.field, ids, info)
    check_ids("stopping.stop_token_ids", asked.stop_token_ids, info)
    check_ids("sampling.allowed_token_ids", asked.sampling.get("allowed_token_ids") or (), info)
    for token_id, _ in asked.sampling.get("logit_bias", ()):
        if token_id >= info.vocab_size:
            problem = f"{token_id} is outside the vocabulary of {info.vocab_size}"
            raise invalid(f"sampling.logit_bias[{token_id}]", problem)


def _sampling(asked: Asked, bad_words: tuple[tuple[int, ...], ...], card: ModelCard) -> SamplingParams:
    given = {"seed": secrets.randbits(64), **asked.sampling}
    try:
        return dataclasses.replace(
            card.sampling,
            **given,
            bad_words=bad_words,
            logprobs=asked.output.wants_logprobs,
            top_logprobs=asked.output.top_logprobs,
            prompt_logprobs=asked.output.prompt_logprobs,
        )
    except ValueError as error:  # each setting by itself is sound: this is about the words as tokens
        raise invalid("sampling.bad_words", str(error)) from None


def _stopping(asked: Asked, num_prompt_tokens: int, info: EngineInfo, card: ModelCard) -> StoppingParams:
    max_new_tokens = _max_new_tokens(asked, num_prompt_tokens, info, card)
    most = info.max_context - num_prompt_tokens if max_new_tokens is None else max_new_tokens
    if asked.min_new_tokens > most:
        raise invalid("stopping.min_new_tokens", f"{asked.min_new_tokens} is more than the {most} there can be")
    return StoppingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=asked.min_new_tokens,
        stop_token_ids=asked.stop_token_ids,
        include_stop=asked.include_stop,
        ignore_eos=asked.ignore_eos,
    )


def _max_new_tokens(asked: Asked, num_prompt_tokens: int, info: EngineInfo, card: ModelCard) -> int | None:
    """Bound a completion; None lets it fill the context. The last token of a sequence needs no place in the pool."""
    pool = info.kv_tokens + 1 - num_prompt_tokens
    context = info.max_context - num_prompt_tokens
    wanted = card.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
    if min(wanted, context) > pool and (asked.max_new_tokens is not None or pool < 1):
        raise invalid(
            "stopping.max_new_tokens",
            f"prompt and completion need {num_prompt_tokens + min(wanted, context)} tokens of KV cache "
            f"and the whole pool holds {info.kv_tokens}",
            reason="KV_CAPACITY",
        )
    wanted = min(wanted, pool)
    return None if wanted >= context else wanted
