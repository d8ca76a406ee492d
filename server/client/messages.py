"""Requests from keyword arguments, the same for both clients."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from pressd.client.options import GenerateOptions
from pressd.v1 import chat_pb2, generate_pb2, score_pb2, tokens_pb2

# A turn of a conversation: the fields of pressd.v1.ChatMessage.
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

# Parts of a request whose fields are options by their own names.
_PARTS = ("sampling", "stopping", "output", "constraint", "runtime", "scheduling")


def _places() -> Iterator[tuple[str, str]]:
    """Each option with the part of the request that it is a field of, "" for the request itself."""
    fields = dict.fromkeys(("model", "request_id"), "")
    request = generate_pb2.GenerateRequest()
    fields |= {field.name: part for part in _PARTS for field in getattr(request, part).DESCRIPTOR.fields}
    fields |= {field.name: "chat" for field in chat_pb2.ChatInput.DESCRIPTOR.fields}
    for name in GenerateOptions.__annotations__:
        yield name, fields[name]


_PLACES = dict(_places())
_CONSTRAINTS = tuple(name for name, place in _PLACES.items() if place == "constraint")
_OF_CHAT = tuple(name for name, place in _PLACES.items() if place == "chat")


def generate_request(prompt: Prompt, options: GenerateOptions) -> generate_pb2.GenerateRequest:
    """Return a GenerateRequest; the prompt is text, token ids, or messages with `role`, `content` and more.

    An option of None is left out. Raises TypeError for what is no option and for options that exclude each other, and
    TypeError or ValueError naming one whose value has no place in its field.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in given if name not in _PLACES]
    if unknown:
        raise TypeError(f"{', '.join(unknown)} cannot be asked of a completion; known: {', '.join(_PLACES)}")
    constraints = [name for name in _CONSTRAINTS if name in given]
    if len(constraints) > 1:
        raise TypeError(f"{' and '.join(constraints)} exclude each other; give one")
    request = generate_pb2.GenerateRequest()
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(_chat(prompt))
    else:
        _set(request.token_ids, "ids", prompt)
    if not request.HasField("chat") and (misplaced := [name for name in _OF_CHAT if name in given]):
        raise TypeError(f"{', '.join(misplaced)}: only for a prompt of messages, which a template renders")
    for name, value in given.items():
        place = _PLACES[name]
        _set(getattr(request, place) if place else request, name, value)
    return request


def tokenize_request(
    text: str | Sequence[Message], add_special_tokens: bool | None, model: str
) -> tokens_pb2.TokenizeRequest:
    """Return a TokenizeRequest for text or for messages."""
    request = tokens_pb2.TokenizeRequest(model=model or None, add_special_tokens=add_special_tokens)
    if isinstance(text, str):
        request.text = text
    else:
        request.chat.CopyFrom(_chat(text))
    return request


def score_request(text: str | Sequence[int], top_logprobs: int | None, model: str) -> score_pb2.ScoreRequest:
    """Return a ScoreRequest for text or for token ids."""
    request = score_pb2.ScoreRequest(model=model or None, top_logprobs=top_logprobs)
    if isinstance(text, str):
        request.text = text
    else:
        _set(request.token_ids, "ids", text)
    return request


def _chat(messages: Sequence[Any]) -> chat_pb2.ChatInput:
    chat = chat_pb2.ChatInput()
    for number, message in enumerate(messages):
        try:
            chat.messages.add(**message)
        except (TypeError, ValueError) as error:
            raise type(error)(f"message {number}: {error}") from None
    return chat


def _set(message: Any, name: str, value: Any) -> None:
    """Set a field, naming it where protobuf would not."""
    field = message.DESCRIPTOR.fields_by_name[name]
    try:
        message.MergeFrom(type(message)(**{name: _written(field, value)}))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _written(field: FieldDescriptor, value: Any) -> Any:
    """The value as protobuf takes it."""
    if field.name == "choice":
        return {"texts": _texts(value)}
    if field.name == "json_schema" and not isinstance(value, str):
        return json.dumps(value)
    if field.name == "exactness":
        return f"EXACTNESS_{value}".upper()
    return _texts(value) if field.is_repeated and field.type == FieldDescriptor.TYPE_STRING else value


def _texts(value: Sequence[str]) -> Sequence[str]:
    """Several texts; protobuf would take the letters of a single one."""
    if isinstance(value, str):
        raise TypeError(f"{value!r} is one text; give a list of texts")
    return value
