"""What is too large to look at is refused before it is looked at: the event loop has others to serve."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from pressd.client import CallError
from pressd.server import fields, interceptors, prompts, servicer, translate
from pressd.server.access import Access
from pressd.server.asked import MAX_BAD_TEXTS, TextPrompt
from pressd.server.door import Door, Phase
from pressd.server.errors import Refusal
from pressd.server.fields import MAX_FIELDS, MAX_STRUCT, MAX_UNKNOWN, refuse_unsupported
from pressd.server.interceptors import CallInterceptor
from pressd.server.metrics import REQUESTS, Metrics
from pressd.server.prompts import MAX_TEXT, bad_words_of, encode
from pressd.server.servicer import InferenceServicer
from pressd.server.settings import Settings
from pressd.server.text import Text
from pressd.server.translate import MAX_CONSTRAINT, MAX_IDS
from pressd.v1 import chat_pb2, generate_pb2, inference_pb2_grpc, score_pb2

INVALID, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED


def refused(action: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action()
    return caught.value


def chat(**given: Any) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(chat=chat_pb2.ChatInput(**given))


def struct(num_values: int) -> Struct:
    made = Struct()
    made["list"] = [None] * num_values
    return made


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (chat(messages=[{}] * (MAX_FIELDS + 1)), INVALID, "fields"),
        (chat(messages=[{"tool_calls": [{}] * (MAX_FIELDS + 1)}]), INVALID, "fields"),
        (chat(messages=[{"tool_calls": [{}] * 200}] * 200), INVALID, "fields"),
        (generate_pb2.GenerateRequest(stopping={"stop": ["a"] * (MAX_FIELDS + 1)}), INVALID, "fields"),
        (chat(template_arguments=struct(MAX_STRUCT // 4)), INVALID, "JSON"),
        (chat(tools=[{"parameters": struct(MAX_STRUCT // 40)}] * 10), INVALID, "JSON"),  # all of them together
    ],
)
def test_a_message_of_many_parts_is_not_walked_through(
    message: Message, code: grpc.StatusCode, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "_leaves", None)
    refusal = refused(lambda: refuse_unsupported("Generate", message))
    assert (refusal.code, refusal.field) == (code, "message")
    assert words in refusal.message


def test_unknown_fields_are_counted_in_bytes_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = b"\xf8\x07\x01"  # field 127
    few = generate_pb2.GenerateRequest.FromString(unknown)
    assert "127 of pressd.v1.GenerateRequest" in refused(lambda: refuse_unsupported("Generate", few)).message
    hidden = generate_pb2.GenerateRequest.FromString(unknown)
    hidden.prompt = "x" * (1 << 17)
    assert "127 of pressd.v1.GenerateRequest" in refused(lambda: refuse_unsupported("Generate", hidden)).message
    monkeypatch.setattr(fields, "UnknownFieldSet", None)
    many = generate_pb2.GenerateRequest.FromString(unknown * (1 << 16))
    assert MAX_UNKNOWN < 3 << 16
    refusal = refused(lambda: refuse_unsupported("Generate", many))
    assert (refusal.code, refusal.message.split()[1]) == (UNIMPLEMENTED, str(3 << 16))


def test_the_largest_conversation_is_not_too_large() -> None:
    turn = {"role": "assistant", "content": "x" * 100, "tool_calls": [{"name": "f", "id": "1"}]}
    refuse_unsupported("Generate", chat(messages=[turn] * 4096))


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("token_ids.ids", {"token_ids": {"ids": [1] * (MAX_IDS + 1)}}),
        ("sampling.allowed_token_ids", {"sampling": {"allowed_token_ids": range(MAX_IDS + 1)}}),
        ("stopping.stop_token_ids", {"stopping": {"stop_token_ids": [1] * (MAX_IDS + 1)}}),
        ("sampling.bad_words", {"sampling": {"bad_words": ["x"] * (MAX_BAD_TEXTS + 1)}}),
        ("constraint.regex", {"constraint": {"regex": "x" * (4 * MAX_CONSTRAINT)}}),
        ("constraint.choice", {"constraint": {"choice": {"texts": ["xx"] * MAX_CONSTRAINT}}}),
    ],
)
def test_lists_and_constraints_are_bounded(field: str, given: dict[str, Any]) -> None:
    request = generate_pb2.GenerateRequest(**({"prompt": "x"} if "token_ids" not in given else {}), **given)
    refusal = refused(lambda: translate.asked(request, "r"))
    assert (refusal.code, refusal.field) == (INVALID, field)


def test_score_is_bounded_too() -> None:
    request = score_pb2.ScoreRequest(token_ids={"ids": [1] * (MAX_IDS + 1)})
    assert refused(lambda: translate.score_prompt(request)).field == "token_ids.ids"


class Desk:
    """A door whose thread is this one."""

    def __init__(self, text: Text, max_context: int) -> None:
        self._text = text
        self._info: Any = type("Info", (), {"max_context": max_context})

    def require_ready(self) -> tuple[Any, Any]:
        return self._info, None

    def require_text(self, field: str) -> Text:
        return self._text

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        return function()


@pytest.fixture
def text(echo_text: Path) -> Text:
    loaded = Text.load(echo_text)
    assert loaded is not None
    return loaded


def test_a_text_that_need_not_fit_is_bounded(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_TEXT", 1000)

    def tokenise(length: int, max_context: int) -> Any:
        return asyncio.run(encode(Desk(text, max_context), TextPrompt("x" * length, "text"), bounded=False))

    assert len(tokenise(1000, 1).ids) == 1000
    refusal = refused(lambda: tokenise(1001, 1))
    assert (refusal.field, refusal.reason) == ("text", "PROMPT_TOO_LONG")
    assert len(tokenise(1001, 1001).ids) == 1001  # what fits the context is never too long
    assert MAX_TEXT == 1 << 20


def test_each_bad_word_may_be_spelled_in_two_ways(text: Text) -> None:
    desk = Desk(text, 100)
    words = tuple(f"word{number:03d}" for number in range(MAX_BAD_TEXTS))
    assert len(asyncio.run(bad_words_of(desk, words))) == 2 * MAX_BAD_TEXTS
    refusal = refused(lambda: asyncio.run(bad_words_of(desk, ("a", "b", "x" * 33))))
    assert refusal.field == "sampling.bad_words[2]"  # the word, not one of its spellings


async def answer(model: Path, request: generate_pb2.GenerateRequest) -> tuple[Any, Door]:
    """Serve the scripted engine in this process for one call; returns the response or the error."""
    metrics = Metrics("m")
    door = Door(Settings(model=model, served_name="m"), metrics, "scripted_engine:create")
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics, Access())])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(door), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running = asyncio.ensure_future(door.run())
    while door.phase is not Phase.READY:
        await door.changed.wait()
        door.changed.clear()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            return await inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60), door
    except grpc.aio.AioRpcError as error:
        return CallError(error), door
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)


@pytest.mark.system
@pytest.mark.parametrize(
    ("module", "bound", "most", "field"),
    [(servicer, "MAX_WHOLE", 49, "output.top_logprobs"), (interceptors, "MAX_RESPONSE", 100, "message")],
)
def test_an_answer_that_is_too_large_is_refused_with_a_reason(
    echo: Path, monkeypatch: pytest.MonkeyPatch, module: Any, bound: str, most: int, field: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    request = generate_pb2.GenerateRequest(
        token_ids={"ids": [5]}, output={"text": False, "top_logprobs": 4}, stopping={"max_new_tokens": 10}
    )
    request.stopping.ignore_eos = True
    monkeypatch.setattr(module, bound, most)  # the answer has 50 of the one, and hundreds of the other
    error, door = asyncio.run(answer(echo, request))
    assert isinstance(error, CallError)
    assert (error.code, list(error.fields)) == (INVALID, [field])
    assert ("m", "Generate", "INVALID_ARGUMENT", "") in door.metrics._values[REQUESTS].numbers
    monkeypatch.setattr(module, bound, 10 * most)
    response, _ = asyncio.run(answer(echo, request))
    assert len(response.completions[0].tokens) == 10
