"""Nothing is silently ignored: every field of a request that is set must be one that this build honours."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pressd.server.errors import unsupported

# Paths of leaf fields, by method. A field that is added to the promise is refused until it is listed here.
HONOURED: dict[str, frozenset[str]] = {
    "Generate": frozenset(
        {
            "request_id",
            "model",
            "prompt",
            "token_ids.ids",
            "chat.messages.role",
            "chat.messages.content",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.seed",
            "stopping.max_new_tokens",
            "stopping.stop",
            "stopping.stop_token_ids",
            "stopping.ignore_eos",
            "output.text",
            "output.token_ids",
        }
    ),
    "Tokenize": frozenset(
        {"model", "text", "chat.messages.role", "chat.messages.content", "add_special_tokens", "offsets"}
    ),
    "Detokenize": frozenset({"model", "ids", "skip_special_tokens"}),
    "Cancel": frozenset({"request_id"}),
    "GetModel": frozenset({"name"}),
    "GetServerInfo": frozenset(),
    "ListModels": frozenset(),
}
HONOURED["GenerateStream"] = HONOURED["Generate"]


def refuse_unsupported(method: str, message: Message) -> None:
    """Raise Refusal (UNIMPLEMENTED) for the first set field of a request which `method` does not honour."""
    honoured = HONOURED.get(method)
    if honoured is None:
        raise unsupported(f"{method} is not in this build")
    for path, written in _leaves(message, "", ""):
        if path not in honoured:
            raise unsupported(f"{written}: this build does not honour this field; leave it unset", written)


def _leaves(message: Message, path: str, written: str) -> Iterator[tuple[str, str]]:
    """Yield each set leaf as (path without indices, path as the client would write it)."""
    for unknown in cast(Iterable[Any], UnknownFieldSet(message)):
        yield f"{path}?", f"{written}{unknown.field_number} of {message.DESCRIPTOR.full_name}"
    for field, value in message.ListFields():
        inner, shown = f"{path}{field.name}", f"{written}{field.name}"
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.type != FieldDescriptor.TYPE_MESSAGE or is_map:
            yield inner, shown
        elif field.is_repeated:
            for index, item in enumerate(value):
                yield from _leaves(item, f"{inner}.", f"{shown}[{index}].")
        else:
            yield from _leaves(value, f"{inner}.", f"{shown}.")
