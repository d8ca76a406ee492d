"""Nothing is silently ignored: every field of a request that is set must be one that this build honours."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pressd.server.errors import invalid, unsupported

# Looking at each field of a message takes the event loop some microseconds. The largest conversation that is taken, of
# 4096 turns, has fewer; and what must be looked at one by one is counted only where there may be much of it.
MAX_FIELDS = 1 << 15
MAX_UNKNOWN = 1 << 12  # bytes
LARGE = 1 << 16  # bytes
# Bytes of all values of any shape together: the JSON schemas of tools, say.
MAX_STRUCT = 1 << 17
# A value of any shape: one leaf.
_STRUCT = "google.protobuf.Struct"

_CHAT = {
    "chat.messages.role",
    "chat.messages.content",
    "chat.messages.reasoning",
    "chat.messages.tool_calls.id",
    "chat.messages.tool_calls.name",
    "chat.messages.tool_calls.arguments",
    "chat.messages.tool_call_id",
    "chat.messages.name",
    "chat.tools.name",
    "chat.tools.description",
    "chat.tools.parameters",
    "chat.add_generation_prompt",
    "chat.template_arguments",
}
# Paths of leaf fields, by method. A field that is added to the promise is refused until it is listed here.
HONOURED: dict[str, frozenset[str]] = {
    "Generate": frozenset(
        {
            *("request_id", "model", "prompt", "token_ids.ids"),
            *_CHAT,
            "sampling.temperature",
            "sampling.top_p",
            "sampling.top_k",
            "sampling.min_p",
            "sampling.typical_p",
            "sampling.repetition_penalty",
            "sampling.presence_penalty",
            "sampling.frequency_penalty",
            "sampling.seed",
            "sampling.num_sequences",
            "sampling.logit_bias",
            "sampling.allowed_token_ids",
            "sampling.bad_words",
            "stopping.max_new_tokens",
            "stopping.min_new_tokens",
            "stopping.stop",
            "stopping.stop_token_ids",
            "stopping.include_stop",
            "stopping.ignore_eos",
            "output.text",
            "output.token_ids",
            "output.logprobs",
            "output.top_logprobs",
            "output.prompt_logprobs",
            "output.echo_prompt",
            "output.skip_special_tokens",
            "output.stream_min_tokens",
            "output.stream_max_delay_ms",
            "constraint.json_schema",
            "constraint.json_object",
            "constraint.regex",
            "constraint.ebnf",
            "constraint.choice.texts",
            # Of these three only values that ask for what this build does; translate.py refuses the others.
            "runtime.early_exit.mode",
            "runtime.speculation.mode",
            "runtime.exactness",
            "runtime.bypass_prefix_cache",
            "runtime.cache_salt",
            "scheduling.priority",
            "scheduling.queue_timeout_ms",
            "scheduling.time_budget_ms",
            "scheduling.max_prompt_tokens",
        }
    ),
    "Tokenize": frozenset({"model", "text", *_CHAT, "add_special_tokens", "offsets"}),
    "Detokenize": frozenset({"model", "ids", "skip_special_tokens"}),
    "Score": frozenset({"model", "text", "token_ids.ids", "top_logprobs"}),
    "Cancel": frozenset({"request_id"}),
    "GetModel": frozenset({"name"}),
    "GetServerInfo": frozenset(),
    "ListModels": frozenset(),
    "GetLoad": frozenset({"model"}),
    "WatchLoad": frozenset({"model", "interval_ms"}),
    "FlushPrefixCache": frozenset({"model"}),
    "Drain": frozenset({"timeout_seconds"}),
}
HONOURED["GenerateStream"] = HONOURED["Generate"]


def refuse_unsupported(method: str, message: Message) -> None:
    """Raise Refusal (UNIMPLEMENTED) for the first set field of a request which `method` does not honour.

    Also (INVALID_ARGUMENT) for a request that has too many fields to look at each.
    """
    honoured = HONOURED.get(method)
    if honoured is None:
        raise unsupported(f"{method} is not in this build")
    if message.ByteSize() > LARGE:
        _refuse_many(message)
    for path, written in _leaves(message, "", ""):
        if path not in honoured:
            raise unsupported(f"{written}: this build does not honour this field; leave it unset", written)


def _refuse_many(message: Message) -> None:
    """Raise Refusal for a message of too many fields, those unknown to this build counted in bytes."""
    num_fields, stack = 0, [message]
    struct_bytes = 0
    while stack:
        for field, value in stack.pop().ListFields():
            inner = field.message_type
            is_small = inner is None and field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
            num_fields += len(value) if field.is_repeated and not is_small else 1
            if num_fields > MAX_FIELDS:
                raise invalid("message", f"it has more than {MAX_FIELDS} fields; send less at once")
            if inner is not None and inner.full_name == _STRUCT:
                struct_bytes += value.ByteSize()
                if struct_bytes > MAX_STRUCT:
                    raise invalid("message", f"its JSON values have more than {MAX_STRUCT} bytes; send less at once")
            elif inner is not None and not inner.GetOptions().map_entry:
                stack += value if field.is_repeated else [value]
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    num_unknown = message.ByteSize() - known.ByteSize()
    if num_unknown > MAX_UNKNOWN:
        raise unsupported(f"message: {num_unknown} bytes are of fields that this build does not know; leave them unset")


def _leaves(message: Message, path: str, written: str) -> Iterator[tuple[str, str]]:
    """Yield each set leaf as (path without indices, path as the client would write it)."""
    for unknown in cast(Iterable[Any], UnknownFieldSet(message)):
        yield f"{path}?", f"{written}{unknown.field_number} of {message.DESCRIPTOR.full_name}"
    for field, value in message.ListFields():
        inner, shown = f"{path}{field.name}", f"{written}{field.name}"
        inner_type = field.message_type
        is_whole = inner_type is not None and (inner_type.GetOptions().map_entry or inner_type.full_name == _STRUCT)
        if field.type != FieldDescriptor.TYPE_MESSAGE or is_whole:
            yield inner, shown
        elif field.is_repeated:
            for index, item in enumerate(value):
                yield from _leaves(item, f"{inner}.", f"{shown}[{index}].")
        else:
            yield from _leaves(value, f"{inner}.", f"{shown}.")
