"""Conversations: what a client may say of one, free of protocol."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from google.protobuf import struct_pb2

from pressd.server.errors import invalid
from pressd.v1 import chat_pb2

MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_DEPTH = 32
# Names that are the template's own or that transformers takes for itself, as it does every special token's
# (`bos_token`); a client's arguments must not stand in for them. Documents have no field and are such arguments.
RESERVED = frozenset(
    [
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "sanitize_control_tokens",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
        "self",
        "additional_special_tokens",
    ]
)
# A message of protobuf keeps no order of keys, but a model has seen schemas in one, and the same request must always be
# the same prompt: keys of JSON schemas as transformers writes them for functions, then all others by the alphabet.
_KEY_ORDER = ("type", "items", "properties", "required", "enum", "nullable", "description")
# Turns that are none of the assistant's in every template we know of; other roles are the template's business.
_OTHERS = frozenset({"system", "developer", "user", "tool"})
_ANSWERED = frozenset({"system", "developer", "user", "assistant"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the assistant asked for."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; None and nothing are what was not given."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask for; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation to render and tokenise."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    field: ClassVar[str] = "chat"


def read_chat(chat: chat_pb2.ChatInput) -> ChatPrompt:
    """Read a ChatInput; raises Refusal with the path of the field at fault."""
    if not chat.messages:
        raise invalid("chat.messages", "it is empty; at least one message is needed")
    if len(chat.messages) > MAX_MESSAGES:
        raise invalid("chat.messages", f"there are {len(chat.messages)}; at most {MAX_MESSAGES} are taken")
    if len(chat.tools) > MAX_TOOLS:
        raise invalid("chat.tools", f"there are {len(chat.tools)}; at most {MAX_TOOLS} are taken")
    arguments = _plain(chat.template_arguments, "chat.template_arguments")
    for name in arguments:
        path = f"chat.template_arguments[{name!r}]"
        if name in RESERVED or name.endswith("_token"):
            raise invalid(path, "the template gets that by itself; leave it out")
        if not name.isidentifier():
            raise invalid(path, "no template can read an argument of that name; leave it out")
    return ChatPrompt(
        messages=tuple(_message(message, f"chat.messages[{index}]") for index, message in enumerate(chat.messages)),
        tools=tuple(_tool(tool, f"chat.tools[{index}]") for index, tool in enumerate(chat.tools)),
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        template_arguments=arguments,
    )


def _message(message: chat_pb2.ChatMessage, path: str) -> Message:
    if not message.role:
        raise invalid(f"{path}.role", "it is required: system, user, assistant or tool")
    if message.role in _OTHERS:
        for name in ("reasoning", "tool_calls"):
            if getattr(message, name):
                raise invalid(f"{path}.{name}", f"it is the assistant's; a turn of role {message.role!r} has none")
    if message.HasField("tool_call_id") and message.role in _ANSWERED:
        raise invalid(f"{path}.tool_call_id", f"it is for a tool's answer; a turn of role {message.role!r} has none")
    return Message(
        role=message.role,
        content=_optional(message, "content"),
        reasoning=_optional(message, "reasoning"),
        tool_calls=tuple(
            _tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ),
        tool_call_id=_optional(message, "tool_call_id"),
        name=_optional(message, "name"),
    )


def _tool_call(call: chat_pb2.ChatToolCall, path: str) -> ToolCall:
    if not call.name:
        raise invalid(f"{path}.name", "it is required: the function's name")
    return ToolCall(name=call.name, arguments=_plain(call.arguments, f"{path}.arguments"), id=_optional(call, "id"))


def _tool(tool: chat_pb2.ChatTool, path: str) -> Tool:
    if not tool.name:
        raise invalid(f"{path}.name", "it is required: the function's name")
    return Tool(
        name=tool.name,
        description=_optional(tool, "description"),
        parameters=_plain(tool.parameters, f"{path}.parameters") if tool.HasField("parameters") else None,
    )


def _optional(message: Any, name: str) -> str | None:
    return getattr(message, name) if message.HasField(name) else None


def _plain(struct: struct_pb2.Struct, path: str, depth: int = 0) -> dict[str, Any]:
    names = sorted(struct.fields, key=_place)
    return {name: _value(struct.fields[name], f"{path}[{name!r}]", depth + 1) for name in names}


def _place(name: str) -> tuple[int, str]:
    return (_KEY_ORDER.index(name) if name in _KEY_ORDER else len(_KEY_ORDER), name)


def _value(value: struct_pb2.Value, path: str, depth: int) -> Any:
    """Return a JSON value; whole numbers as int, since templates print them."""
    if depth > MAX_DEPTH:
        raise invalid(path, f"it is nested more than {MAX_DEPTH} deep")
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise invalid(path, f"{number} is no number in JSON")
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain(value.struct_value, path, depth)
        case "list_value":
            items: Sequence[struct_pb2.Value] = value.list_value.values
            return [_value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(items)]
        case "null_value":
            return None
        case _:
            raise invalid(path, "it has no value; set one, null if nothing else")
