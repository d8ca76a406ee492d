"""What a client asked for, free of protocol, and what of it the engine is told. Pure functions; errors name fields."""

import secrets
from dataclasses import dataclass
from typing import ClassVar

from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import Request
from pressd.server.errors import Refusal, invalid
from pressd.server.model_card import ModelCard

# Bounds on stop texts: each costs a comparison per character of every answer.
MAX_STOP_TEXTS = 16
MAX_STOP_LENGTH = 256

# Where the engine's names for fields stand in GenerateRequest.
_ENGINE_FIELDS = {
    "max_new_tokens": "stopping.max_new_tokens",
    "stop_token_ids": "stopping.stop_token_ids",
    "request_id": "request_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt to tokenise."""

    text: str
    field: ClassVar[str] = "prompt"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokens already."""

    ids: tuple[int, ...]
    field: ClassVar[str] = "token_ids.ids"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to render and tokenise."""

    messages: tuple[Message, ...]
    field: ClassVar[str] = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for a completion; None takes the model's default."""

    request_id: str
    model: str
    prompt: TextPrompt | TokenPrompt | ChatPrompt
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    want_text: bool = True
    want_ids: bool = False


def engine_request(
    asked: Asked, ids: tuple[int, ...], *, info: EngineInfo, card: ModelCard, engine_id: str, arrival: float
) -> Request:
    """Return what the engine is told; raises Refusal for what could never run on this model."""
    check_ids(asked.prompt.field, ids, info)
    check_ids("stopping.stop_token_ids", asked.stop_token_ids, info)
    if not ids:
        raise invalid(asked.prompt.field, "the prompt has no tokens; at least one is needed")
    if len(ids) >= info.max_context:
        problem = f"the prompt has {len(ids)} tokens and leaves no room in the context of {info.max_context}"
        raise invalid(asked.prompt.field, problem, reason="PROMPT_TOO_LONG")
    return Request(
        request_id=engine_id,
        prompt_token_ids=ids,
        sampling=SamplingParams(
            temperature=card.sampling.temperature if asked.temperature is None else asked.temperature,
            top_p=card.sampling.top_p if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(64) if asked.seed is None else asked.seed,
        ),
        stopping=StoppingParams(
            max_new_tokens=_max_new_tokens(asked, len(ids), info, card),
            stop_token_ids=asked.stop_token_ids,
            ignore_eos=asked.ignore_eos,
        ),
        arrival=arrival,
    )


def engine_refusal(field: str, message: str, prompt_field: str) -> Refusal:
    """What the engine itself did not take, in the words of the protocol."""
    return invalid(_ENGINE_FIELDS.get(field, prompt_field), message)


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


def check_ids(field: str, ids: tuple[int, ...], info: EngineInfo) -> None:
    """Raise Refusal for an id that the model does not have."""
    for index, token_id in enumerate(ids):
        if token_id >= info.vocab_size:
            raise invalid(f"{field}[{index}]", f"{token_id} is outside the vocabulary of {info.vocab_size}")
