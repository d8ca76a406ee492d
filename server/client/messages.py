"""Requests from keyword arguments, the same for both clients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from pressd.v1 import chat_pb2, generate_pb2, sampling_pb2, tokens_pb2

DEFAULT_TARGET = "127.0.0.1:50051"


class GenerateOptions(TypedDict, total=False):
    """What can be asked of a completion; what is left out takes the model's default."""

    model: str
    request_id: str
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    text: bool
    token_ids: bool


Prompt = str | Sequence[int | Mapping[str, str]]

_SAMPLING = ("temperature", "top_p", "seed")
_STOPPING = ("max_new_tokens", "stop", "stop_token_ids", "ignore_eos")
_OUTPUT = ("text", "token_ids")


def generate_request(prompt: Prompt, options: GenerateOptions) -> generate_pb2.GenerateRequest:
    """Return a GenerateRequest; the prompt is text, token ids, or messages with `role` and `content`."""
    given: dict[str, Any] = dict(options)
    request = generate_pb2.GenerateRequest(
        sampling=sampling_pb2.SamplingParams(**_part(given, _SAMPLING)),
        stopping=sampling_pb2.StoppingParams(**_part(given, _STOPPING)),
        output=generate_pb2.OutputOptions(**_part(given, _OUTPUT)),
        **_part(given, ("model", "request_id")),
    )
    if given:
        raise TypeError(f"{', '.join(given)} cannot be asked of a completion; known: {', '.join(_known())}")
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat(prompt))
    else:
        request.token_ids.CopyFrom(tokens_pb2.TokenIds(ids=cast(Sequence[int], prompt)))
    return request


def chat(messages: Iterable[Any]) -> chat_pb2.ChatInput:
    """Return a ChatInput of messages with `role` and `content`."""
    return chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(**message) for message in messages])


def tokenize_request(
    text: str | Sequence[Mapping[str, str]], add_special_tokens: bool | None
) -> tokens_pb2.TokenizeRequest:
    """Return a TokenizeRequest for text or for messages."""
    request = tokens_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
    if isinstance(text, str):
        request.text = text
    else:
        request.chat.CopyFrom(chat(text))
    return request


def _part(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}


def _known() -> tuple[str, ...]:
    return ("model", "request_id", *_SAMPLING, *_STOPPING, *_OUTPUT)
