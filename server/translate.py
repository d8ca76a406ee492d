"""Between messages of pressd.v1 and plain data. Raises Refusal with the path of the field at fault."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason
from pressd.server.asked import (
    MAX_STOP_LENGTH,
    MAX_STOP_TEXTS,
    Asked,
    ChatPrompt,
    Message,
    TextPrompt,
    TokenPrompt,
)
from pressd.server.detokenize import Piece
from pressd.server.errors import invalid
from pressd.server.generation import Generation
from pressd.v1 import chat_pb2, generate_pb2

MAX_REQUEST_ID = 128


def request_id_of(request: ProtoMessage, metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The id a client gave in the message, else in `x-request-id`, else a new one; raises Refusal for a bad one."""
    given, field = "", "request_id"
    if isinstance(request, generate_pb2.GenerateRequest):
        given = request.request_id
        if not given and request.HasField("request_id"):
            raise invalid(field, "it is empty; leave it unset to have one drawn")
    if not given:
        given, field = next((str(value) for key, value in metadata if key == "x-request-id"), ""), "x-request-id"
    if len(given) > MAX_REQUEST_ID or not all("!" <= character <= "~" for character in given):
        raise invalid(field, f"it must be at most {MAX_REQUEST_ID} visible ASCII characters")
    return given or secrets.token_hex(8)


def asked(request: generate_pb2.GenerateRequest, request_id: str) -> Asked:
    """Read a GenerateRequest."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    temperature, top_p = _optional(sampling, "temperature"), _optional(sampling, "top_p")
    max_new_tokens = _optional(stopping, "max_new_tokens")
    _check("sampling.temperature", SamplingParams, temperature=temperature)
    _check("sampling.top_p", SamplingParams, top_p=top_p)
    _check("stopping.max_new_tokens", StoppingParams, max_new_tokens=max_new_tokens)
    _check("stopping.stop_token_ids", StoppingParams, stop_token_ids=tuple(stopping.stop_token_ids))
    _check_stops(stopping.stop)
    return Asked(
        request_id=request_id,
        model=request.model,
        prompt=_prompt(request),
        temperature=temperature,
        top_p=top_p,
        seed=_optional(sampling, "seed"),
        max_new_tokens=max_new_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        want_text=output.text if output.HasField("text") else True,
        want_ids=output.token_ids,
    )


def conversation(chat: chat_pb2.ChatInput) -> ChatPrompt:
    """Read a ChatInput."""
    if not chat.messages:
        raise invalid("chat.messages", "it is empty; at least one message is needed")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise invalid(f"chat.messages[{index}].role", "it is required: system, user, assistant or tool")
    return ChatPrompt(tuple(Message(role=message.role, content=message.content) for message in chat.messages))


def delta(pieces: list[Piece], wanted: Asked) -> generate_pb2.Delta:
    """Write new tokens."""
    message = generate_pb2.Delta(num_tokens=len(pieces))
    if wanted.want_text:
        message.text = text_of(pieces)
    if wanted.want_ids:
        message.tokens.extend(token(piece, wanted) for piece in pieces)
    return message


def token(piece: Piece, wanted: Asked) -> generate_pb2.Token:
    """Write one token."""
    return generate_pb2.Token(id=piece.token_id, text=piece.text if wanted.want_text else None)


def text_of(pieces: list[Piece]) -> str:
    """The text that tokens completed."""
    return "".join(piece.text or "" for piece in pieces)


def finished(generation: Generation, now: float, model_version: str) -> generate_pb2.Finished:
    """Write the end of a generation that has ended; `now` is in time.monotonic() seconds."""
    end = generation.end
    assert end is not None
    message = generate_pb2.Finished(
        index=0,
        reason=f"FINISH_REASON_{end.reason.name}",
        usage=generate_pb2.Usage(prompt_tokens=generation.num_prompt_tokens, completion_tokens=generation.num_sent),
        timings=generate_pb2.Timings(total_seconds=now - generation.arrival),
        seed=generation.seed,
        model_version=model_version,
    )
    if end.stop is not None:
        message.stop = end.stop
    elif end.token_id is not None and end.reason is FinishReason.EOS:
        message.eos_token_id = end.token_id
    elif end.token_id is not None:
        message.stop_token_id = end.token_id
    if generation.scheduled_at:
        message.timings.queue_seconds = generation.scheduled_at - generation.arrival
    if generation.first_token_at:
        message.timings.prefill_seconds = generation.first_token_at - generation.scheduled_at
        message.timings.decode_seconds = generation.last_token_at - generation.first_token_at
    if generation.first_sent_at:
        message.timings.ttft_seconds = generation.first_sent_at - generation.arrival
    return message


def _prompt(request: generate_pb2.GenerateRequest) -> TextPrompt | TokenPrompt | ChatPrompt:
    match request.WhichOneof("input"):
        case "prompt":
            return TextPrompt(request.prompt)
        case "token_ids":
            return TokenPrompt(tuple(request.token_ids.ids))
        case "chat":
            return conversation(request.chat)
        case _:
            raise invalid("prompt", "there is no input; give one of prompt, token_ids and chat")


def _optional(message: ProtoMessage, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _check(path: str, params: type[SamplingParams | StoppingParams], **value: Any) -> None:
    """Let the engine's own bounds speak for one field."""
    if None in value.values():
        return
    try:
        params(**value)
    except ValueError as error:
        raise invalid(path, str(error)) from None


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOP_TEXTS:
        raise invalid("stopping.stop", f"there are {len(stops)} stop texts; at most {MAX_STOP_TEXTS} are taken")
    for index, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise invalid(f"stopping.stop[{index}]", f"it must have 1 to {MAX_STOP_LENGTH} characters")
