"""What may be said of a conversation, against JSON and transformers' own description of functions."""

import inspect
import json
import math
from typing import Any

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from pressd.server import chat
from pressd.server.chat import ChatPrompt, Message, Tool, ToolCall, read_chat
from pressd.server.errors import Refusal
from pressd.v1 import chat_pb2

USER = chat_pb2.ChatMessage(role="user", content="hello")


def struct(value: dict[str, Any]) -> struct_pb2.Struct:
    """As every client writes one."""
    made = struct_pb2.Struct()
    made.update(value)
    return made


def refused(said: chat_pb2.ChatInput) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read_chat(said)
    assert raised.value.code.name == "INVALID_ARGUMENT"
    return raised.value


def test_everything_that_is_said_is_read() -> None:
    call = chat_pb2.ChatToolCall(id="c1", name="add", arguments=struct({"a": 1, "b": 2.5}))
    said = chat_pb2.ChatInput(
        messages=[
            chat_pb2.ChatMessage(role="user", content="add", name="Zoë"),
            chat_pb2.ChatMessage(role="assistant", content="", reasoning="sum", tool_calls=[call]),
            chat_pb2.ChatMessage(role="tool", content="3.5", tool_call_id="c1", name="add"),
        ],
        tools=[chat_pb2.ChatTool(name="add", description="Adds.", parameters=struct({"type": "object"}))],
        add_generation_prompt=False,
        template_arguments=struct({"enable_thinking": True, "budget": 7}),
    )
    assert read_chat(said) == ChatPrompt(
        messages=(
            Message(role="user", content="add", name="Zoë"),
            Message(
                role="assistant",
                content="",
                reasoning="sum",
                tool_calls=(ToolCall(id="c1", name="add", arguments={"a": 1, "b": 2.5}),),
            ),
            Message(role="tool", content="3.5", tool_call_id="c1", name="add"),
        ),
        tools=(Tool(name="add", description="Adds.", parameters={"type": "object"}),),
        add_generation_prompt=False,
        template_arguments={"enable_thinking": True, "budget": 7},
    )


def test_what_is_not_said_is_absent() -> None:
    read = read_chat(chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(role="user")]))
    assert read == ChatPrompt(messages=(Message(role="user"),))
    assert read.add_generation_prompt


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (chat_pb2.ChatInput(), "chat.messages"),
        (chat_pb2.ChatInput(messages=[USER] * (chat.MAX_MESSAGES + 1)), "chat.messages"),
        (chat_pb2.ChatInput(messages=[USER, chat_pb2.ChatMessage(content="x")]), "chat.messages[1].role"),
        (chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(role="", content="x")]), "chat.messages[0].role"),
        (chat_pb2.ChatInput(messages=[USER], tools=[chat_pb2.ChatTool()]), "chat.tools[0].name"),
        (
            chat_pb2.ChatInput(messages=[USER], tools=[chat_pb2.ChatTool(name="f")] * (chat.MAX_TOOLS + 1)),
            "chat.tools",
        ),
        (
            chat_pb2.ChatInput(
                messages=[chat_pb2.ChatMessage(role="assistant", tool_calls=[chat_pb2.ChatToolCall(id="1")])]
            ),
            "chat.messages[0].tool_calls[0].name",
        ),
        (
            chat_pb2.ChatInput(
                messages=[chat_pb2.ChatMessage(role="user", tool_calls=[chat_pb2.ChatToolCall(name="f")])]
            ),
            "chat.messages[0].tool_calls",
        ),
        (
            chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(role="system", reasoning="hm")]),
            "chat.messages[0].reasoning",
        ),
        (
            chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(role="assistant", tool_call_id="1")]),
            "chat.messages[0].tool_call_id",
        ),
    ],
)
def test_mistake_is_refused_by_its_path(said: chat_pb2.ChatInput, field: str) -> None:
    assert refused(said).field == field


def test_as_much_as_is_allowed_is_read() -> None:
    tools = [chat_pb2.ChatTool(name="f")] * chat.MAX_TOOLS
    read = read_chat(chat_pb2.ChatInput(messages=[USER] * chat.MAX_MESSAGES, tools=tools))
    assert (len(read.messages), len(read.tools)) == (chat.MAX_MESSAGES, chat.MAX_TOOLS)


def test_role_that_only_the_template_knows_is_its_business() -> None:
    said = chat_pb2.ChatMessage(role="model", reasoning="hm", tool_call_id="1")
    assert read_chat(chat_pb2.ChatInput(messages=[said])).messages == (
        Message(role="model", reasoning="hm", tool_call_id="1"),
    )


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "chat_template", "no name", ""]
)
def test_arguments_do_not_stand_in_for_the_templates_own(name: str) -> None:
    said = chat_pb2.ChatInput(messages=[USER], template_arguments=struct({name: "x"}))
    assert refused(said).field == f"chat.template_arguments[{name!r}]"


def test_no_argument_of_transformers_can_be_set() -> None:
    ours = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
    assert ours <= chat.RESERVED


# As numbers of JSON are read: doubles, and those without a fraction whole.
SCALARS = st.none() | st.booleans() | st.text() | st.integers(-(2**53) + 1, 2**53 - 1)
SCALARS |= st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_values_are_those_of_json(value: dict[str, Any]) -> None:
    call = chat_pb2.ChatToolCall(name="f", arguments=struct(value))
    (message,) = read_chat(
        chat_pb2.ChatInput(messages=[chat_pb2.ChatMessage(role="assistant", tool_calls=[call])])
    ).messages
    read = message.tool_calls[0].arguments
    # As text, so that 1, 1.0 and True differ; and neither order nor letters are what protobuf made of them.
    assert json.dumps(read, sort_keys=True) == json.dumps(value, sort_keys=True)


def test_numbers_are_as_templates_should_print_them() -> None:
    said = chat_pb2.ChatInput(messages=[USER], template_arguments=struct({"whole": 3.0, "half": 0.5, "huge": 1e300}))
    assert json.dumps(read_chat(said).template_arguments) == '{"half": 0.5, "huge": 1e+300, "whole": 3}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(number: float) -> None:
    said = chat_pb2.ChatInput(messages=[USER], template_arguments=struct({"a": {"b": [0, number]}}))
    assert refused(said).field == "chat.template_arguments['a']['b'][1]"


def test_value_without_a_kind_is_refused() -> None:
    said = chat_pb2.ChatInput(messages=[USER])
    said.template_arguments.fields["a"].SetInParent()
    assert refused(said).field == "chat.template_arguments['a']"


@pytest.mark.parametrize("make", [lambda inner: {"x": inner}, lambda inner: [inner]])
def test_depth_is_bounded(make: Any) -> None:
    value: Any = 1
    for _ in range(chat.MAX_DEPTH - 1):
        value = make(value)
    assert read_chat(chat_pb2.ChatInput(messages=[USER], template_arguments=struct({"a": value})))
    said = chat_pb2.ChatInput(messages=[USER], template_arguments=struct({"a": make(value)}))
    assert "nested more than" in refused(said).message


def find_flight(origin: str, stops: list[int], price: float | None = None, *, direct: bool) -> str:
    """Find a flight.

    Args:
        origin: Where from
        stops: Where between (choices: [1, 2])
        price: At most
        direct: Without a stop
    """
    return f"{origin}{stops}{price}{direct}"


def test_schema_has_the_order_that_models_have_seen() -> None:
    """A Struct keeps no order; transformers' own for a function comes back, but for the parameters' names."""
    theirs = get_json_schema(find_flight)["function"]["parameters"]
    theirs["properties"] = dict(sorted(theirs["properties"].items()))
    said = chat_pb2.ChatInput(messages=[USER], tools=[chat_pb2.ChatTool(name="f", parameters=struct(theirs))])
    assert json.dumps(read_chat(said).tools[0].parameters) == json.dumps(theirs)
