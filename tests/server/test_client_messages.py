"""What the client writes for what it is asked, compared with messages written by hand and with the promise itself."""

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pressd.client import AsyncClient, Client, GenerateOptions, Retry, Tls
from pressd.client.connection import Connection, check_target, is_local
from pressd.client.messages import generate_request, score_request, tokenize_request
from pressd.server.fields import HONOURED
from pressd.v1 import generate_pb2, score_pb2, tokens_pb2

# What a request may hold that is no option of a completion: its input, and modes that ask for nothing in this build.
NO_OPTIONS = {"prompt", "token_ids.ids", "runtime.early_exit.mode", "runtime.speculation.mode"}
VALUES: dict[Any, Any] = {str: "x", int: 3, float: 0.5, bool: False, Sequence[str]: ["x"], Sequence[int]: [3]}
SPECIAL: dict[str, Any] = {"logit_bias": {3: 0.5}, "json_schema": {"a": 1}, "exactness": "lossless"}
OF_CHAT = {"tools": [{"name": "x"}], "add_generation_prompt": False, "template_arguments": {"x": 1}}
HINTS = typing.get_type_hints(GenerateOptions)
CHAT = [{"role": "user", "content": "hi"}]


def leaves(message: Any, path: str = "") -> set[str]:
    """Paths of what is set; a map or a Struct is one."""
    found: set[str] = set()
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name == "google.protobuf.Struct":
            found.add(name)
            continue
        for part in value if field.is_repeated else [value]:
            found |= leaves(part, f"{name}.")
    return found


def value_for(name: str) -> Any:
    return (SPECIAL | OF_CHAT)[name] if name in SPECIAL | OF_CHAT else VALUES[HINTS[name]]


def written_by(name: str) -> set[str]:
    """The fields that one option sets."""
    is_of_chat = name in OF_CHAT
    request = generate_request(CHAT if is_of_chat else "hi", {name: value_for(name)})  # type: ignore[misc]
    return leaves(request) - leaves(generate_request(CHAT if is_of_chat else "hi", {}))


@pytest.mark.parametrize("name", HINTS)
def test_option_sets_the_field_of_its_name(name: str) -> None:
    """A value that is false is one too: it differs from a field that is unset."""
    (path,) = written_by(name)
    assert name in path.split(".")


def test_every_field_that_the_server_honours_is_an_option() -> None:
    written = set().union(*map(written_by, HINTS))
    turns = {path for path in HONOURED["Generate"] if path.startswith("chat.messages.")}
    tools = {path for path in HONOURED["Generate"] if path.startswith("chat.tools.")}
    assert written - tools == HONOURED["Generate"] - turns - tools - NO_OPTIONS
    everything = {"role": "x", "content": "x", "reasoning": "x", "tool_call_id": "x", "name": "x"}
    calls = [{"id": "x", "name": "x", "arguments": {"a": 1}}]
    tool = {"name": "x", "description": "x", "parameters": {"type": "object"}}
    request = generate_request([everything | {"tool_calls": calls}], {"tools": [tool]})
    assert leaves(request) == turns | tools


def test_request_is_what_one_would_write_by_hand() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, None]}}}
    call = {"id": "1", "name": "f", "arguments": {"x": [1, {"y": None}]}}
    messages: list[Mapping[str, Any]] = [*CHAT, {"role": "assistant", "reasoning": "hm", "tool_calls": [call]}]
    request = generate_request(
        messages,
        {
            "model": "m",
            "temperature": 0.0,
            "logit_bias": {3: 1.5},
            "num_sequences": 2,
            "stop": ["a", "b"],
            "json_schema": schema,
            "exactness": "batch_invariant",
            "priority": -1,
            "top_logprobs": 4,
            "template_arguments": {"thinking": True},
        },
    )
    expected = generate_pb2.GenerateRequest(model="m")
    expected.chat.messages.add(role="user", content="hi")
    answer = expected.chat.messages.add(role="assistant", reasoning="hm").tool_calls.add(id="1", name="f")
    answer.arguments.update({"x": [1, {"y": None}]})
    expected.chat.template_arguments.update({"thinking": True})
    expected.sampling.temperature, expected.sampling.logit_bias[3], expected.sampling.num_sequences = 0.0, 1.5, 2
    expected.stopping.stop.extend(["a", "b"])
    expected.constraint.json_schema = json.dumps(schema)
    expected.runtime.exactness = generate_pb2.EXACTNESS_BATCH_INVARIANT
    expected.scheduling.priority = -1
    expected.output.top_logprobs = 4
    assert request == expected


def test_other_requests() -> None:
    assert score_request([1, 2], 3, "m") == score_pb2.ScoreRequest(
        model="m", top_logprobs=3, token_ids=tokens_pb2.TokenIds(ids=[1, 2])
    )
    assert score_request("x", None, "") == score_pb2.ScoreRequest(text="x")
    asked = tokenize_request(CHAT, False, "")
    assert (asked.add_special_tokens, asked.HasField("model"), asked.chat.messages[0].content) == (False, False, "hi")


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("x", {"temprature": 1.0}, "temprature cannot be asked of a completion; known: model, request_id, "),
        ("x", {"regex": "a", "ebnf": "b"}, "regex and ebnf exclude each other; give one"),
        ("x", {"tools": []}, "tools: only for a prompt of messages"),
        ([1], {"add_generation_prompt": True}, "add_generation_prompt: only for a prompt of messages"),
        ("x", {"stop": "abc"}, "stop: 'abc' is one text; give a list of texts"),
        ("x", {"bad_words": "abc"}, "bad_words: 'abc' is one text; give a list of texts"),
        ("x", {"choice": "abc"}, "choice: 'abc' is one text; give a list of texts"),
        ("x", {"temperature": "hot"}, "temperature: "),
        ("x", {"top_k": -1}, "top_k: Value out of range: -1"),
        ("x", {"exactness": "very"}, 'exactness: unknown enum label "EXACTNESS_VERY"'),
        (["x"], {}, "ids: "),
        ([*CHAT, {"rol": "user"}], {}, 'message 1: Protocol message ChatMessage has no "rol" field'),
    ],
)
def test_what_cannot_be_asked_is_named(prompt: Any, options: Any, complaint: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        generate_request(prompt, options)
    assert str(caught.value).startswith(complaint)


def test_option_of_none_is_left_out() -> None:
    assert generate_request("x", {"temperature": None, "stop": None}) == generate_request("x", {})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("dns:///localhost:50051", True),
        ("dns://8.8.8.8/localhost:1", False),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/pressd.sock", True),
        ("unix:///run/pressd.sock", True),
        ("unix-abstract:pressd", True),
        ("10.0.0.1:50051", False),
        ("[fe80::1]:50051", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("dns:///pressd.models.svc:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("0.0.0.0:1", False),
    ],
)
def test_token_goes_in_plaintext_to_this_machine_only(target: str, here: bool) -> None:
    assert (check_target(target), is_local(target)) == (target, here)
    for tls, plaintext_token in ((False, False), (True, False), (False, True)):
        if here or tls or plaintext_token:
            made = Connection.to(target, tls=tls, token="secret", plaintext_token=plaintext_token)
            assert made.metadata == (("authorization", "Bearer secret"),)
        else:
            with pytest.raises(ValueError, match=r"a token for .* would be readable on its way; use TLS"):
                Connection.to(target, tls=tls, token="secret", plaintext_token=plaintext_token)
    assert dict(Connection.to(target, tls=False, token=None, plaintext_token=False).options).keys() >= {
        "grpc.keepalive_time_ms",
        *(["grpc.service_config"] if target.startswith("dns:") else []),
    }


@pytest.mark.parametrize("target", ["", "localhost", "http://localhost:50051", "a b:1", "::1:50051", "10.0.0.1:port"])
def test_what_is_no_address_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a server; give HOST:PORT, dns:///NAME:PORT or unix:PATH"):
        Client(target)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "schlüssel"])
def test_token_that_no_header_can_hold_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ValueError, match="the token is empty or has other characters") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go together; give key too"):
        Tls(cert="x")
    with pytest.raises(ValueError, match=r"TLS ca .*nowhere: No such file or directory; give a PEM file"):
        Client(tls=Tls(ca=tmp_path / "nowhere"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is no PEM file"):
        Client(tls=Tls(ca=tmp_path / "text"))


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_wait": -1.0}, {"first_wait": 11.0}])
def test_retry_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="; give "):
        Retry(**wrong)


def test_both_clients_offer_the_same() -> None:
    def offers(client: type) -> dict[str, list[inspect.Parameter]]:
        methods = inspect.getmembers(client, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in methods
            if not name.startswith("_") or name == "__init__"
        }

    assert offers(Client) == offers(AsyncClient)
    assert len(offers(Client)) > 15
