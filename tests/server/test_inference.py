"""Inference over real gRPC, with a server whose engine repeats the prompt."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from pressd.client import CallError, Client
from pressd.v1 import generate_pb2, inference_pb2_grpc, tokens_pb2

pytestmark = pytest.mark.system

Refused = Callable[[Callable[[], Any], str, str], CallError]
# Characters of one to four bytes; the tokenizer of these tests spells all but u-umlaut one byte at a time.
TEXT = "the ü of 漢字 and 👩‍🚀 €"


@pytest.fixture
def client(parrot: Any) -> Any:
    with parrot.client() as client:
        yield client


@pytest.fixture
def raw(parrot: Any) -> Any:
    """The generated stub, for what the client does not offer."""
    with grpc.insecure_channel(parrot.target) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def kinds(events: list[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def join(events: list[Any]) -> str:
    return "".join(event.delta.text for event in events if event.HasField("delta"))


def test_stream_is_accepted_deltas_finished(client: Client) -> None:
    events = list(client.stream(TEXT, request_id="mine", temperature=0, token_ids=True))
    assert kinds(events) == ["accepted", *["delta"] * (len(events) - 2), "finished"]
    assert {event.request_id for event in events} == {"mine"}
    accepted, finished = events[0].accepted, events[-1].finished
    ids = client.tokenize(TEXT)
    assert (accepted.model, accepted.model_version) == ("parrot", "echo-1")
    assert accepted.num_prompt_tokens == finished.usage.prompt_tokens == len(ids)
    deltas = [event.delta for event in events[1:-1]]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == "".join(delta.text for delta in deltas) == TEXT
    assert sum(delta.num_tokens for delta in deltas) == finished.usage.completion_tokens == len(ids)
    assert finished.reason == generate_pb2.FINISH_REASON_EOS
    assert finished.eos_token_id == 0
    assert accepted.seed == finished.seed
    timings = finished.timings
    assert 0 <= timings.queue_seconds <= timings.ttft_seconds <= timings.total_seconds
    assert timings.queue_seconds + timings.prefill_seconds + timings.decode_seconds <= timings.total_seconds


def test_every_delta_is_whole_code_points(client: Client) -> None:
    # A message with a broken code point could not be parsed; U+FFFD would be one that was given up too early.
    texts = [event.delta.text for event in client.stream(TEXT) if event.HasField("delta")]
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)


def test_bytes_that_are_no_text_are_shown_as_such(client: Client) -> None:
    ids = client.tokenize("漢")
    assert client.generate(ids[:-1]).completions[0].text == "\ufffd"


def test_whole_answer_is_the_joined_stream(client: Client) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 7, "token_ids": True, "max_new_tokens": 9}
    events = list(client.stream(TEXT, **asked))
    completion = client.generate(TEXT, **asked).completions[0]
    assert completion.text == join(events)
    assert list(completion.tokens) == [token for event in events for token in event.delta.tokens]
    whole, streamed = completion.finished, events[-1].finished
    assert (whole.reason, whole.usage, whole.seed) == (streamed.reason, streamed.usage, streamed.seed)
    assert whole.reason == generate_pb2.FINISH_REASON_MAX_TOKENS
    assert whole.seed == 7


def test_only_what_was_asked_for_is_sent(client: Client) -> None:
    ids = client.generate("the", text=False, token_ids=True).completions[0]
    assert not ids.HasField("text")
    assert [token.id for token in ids.tokens] == client.tokenize("the")
    assert not ids.tokens[0].HasField("text")
    text = client.generate("the").completions[0]
    assert (text.text, list(text.tokens)) == ("the", [])


@pytest.mark.parametrize(("stop", "shown"), [("d sto", "and an"), ("stop", "and and "), ("漢字", "and and stop ")])
def test_stop_text_ends_it_wherever_tokens_end(client: Client, stop: str, shown: str) -> None:
    events = list(client.stream("and and stop 漢字 here", stop=[stop, "never"], token_ids=True))
    finished = events[-1].finished
    assert join(events) == shown
    assert (finished.reason, finished.stop) == (generate_pb2.FINISH_REASON_STOP, stop)
    # What lies behind the stop is not billed: these characters are one token each.
    assert finished.usage.completion_tokens == len(shown)


def test_stop_text_works_without_sending_text(client: Client) -> None:
    completion = client.generate("ab!cd", stop=["!"], text=False, token_ids=True).completions[0]
    assert [token.id for token in completion.tokens] == client.tokenize("ab")


def test_stop_token_is_not_part_of_the_answer(client: Client) -> None:
    ids = client.tokenize("ab!cd")
    completion = client.generate(ids, stop_token_ids=[ids[2]]).completions[0]
    assert (completion.text, completion.finished.stop_token_id) == ("ab", ids[2])
    assert completion.finished.reason == generate_pb2.FINISH_REASON_STOP


def test_end_of_sequence_can_be_ignored(client: Client) -> None:
    completion = client.generate("abc", ignore_eos=True, max_new_tokens=7).completions[0]
    assert completion.text == "abcabca"


def test_length_is_bounded_by_default(client: Client) -> None:
    model = client.model()
    finished = client.generate("the", ignore_eos=True).completions[0].finished
    assert finished.usage.completion_tokens == model.limits.default_max_new_tokens == 1024
    assert finished.reason == generate_pb2.FINISH_REASON_MAX_TOKENS


def test_context_is_the_other_bound(client: Client) -> None:
    limit = client.model().limits.max_context
    finished = client.generate([5] * (limit - 3), ignore_eos=True).completions[0].finished
    assert finished.usage.completion_tokens == 3
    assert finished.reason == generate_pb2.FINISH_REASON_CONTEXT_LIMIT


def test_chat_goes_through_the_models_template(client: Client) -> None:
    messages = [{"role": "system", "content": "be ü"}, {"role": "user", "content": "hello"}]
    rendered = "system: be ü\nuser: hello\nassistant:"
    assert client.generate(messages).completions[0].text == rendered
    assert client.tokenize(messages) == client.tokenize(rendered)


def test_tokens_and_offsets(client: Client, raw: Any) -> None:
    answer = raw.Tokenize(tokens_pb2.TokenizeRequest(text="lo the", offsets=True))
    assert [(span.begin, span.end) for span in answer.offsets] == [(0, 2), (2, 6)]
    assert client.detokenize(answer.ids) == "lo the"
    with_special = tokens_pb2.DetokenizeRequest(ids=[*answer.ids, 0], skip_special_tokens=False)
    assert raw.Detokenize(with_special).text == "lo the</s>"


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "prompt"),
        ([], {}, "token_ids.ids"),
        ([1, 99999], {}, "token_ids.ids[1]"),
        ([5] * 4096, {}, "token_ids.ids"),
        ("x", {"temperature": -0.5}, "sampling.temperature"),
        ("x", {"temperature": float("nan")}, "sampling.temperature"),
        ("x", {"top_p": 0.0}, "sampling.top_p"),
        ("x", {"max_new_tokens": 0}, "stopping.max_new_tokens"),
        ("x", {"stop": [""]}, "stopping.stop[0]"),
        ("x", {"stop": ["x"] * 17}, "stopping.stop"),
        ("x", {"stop_token_ids": [0, 4242]}, "stopping.stop_token_ids[1]"),
        ("x", {"request_id": ""}, "request_id"),
        ("x", {"request_id": "with space"}, "request_id"),
        ("x", {"request_id": "y" * 129}, "request_id"),
        ([{"role": "", "content": "x"}], {}, "chat.messages[0].role"),
        ([{"role": "robot", "content": "x"}], {}, "chat"),
        ([13, 13, 13], {}, "stopping.max_new_tokens"),  # only the engine knows that it will not take these
    ],
)
def test_bad_field_is_named(client: Client, prompt: Any, options: Any, field: str) -> None:
    for ask in (client.generate, lambda *args, **kwargs: list(client.stream(*args, **kwargs))):
        with pytest.raises(CallError) as caught:
            ask(prompt, **options)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
        assert list(caught.value.fields) == [field]
        assert caught.value.retry_after is None


def test_prompt_that_is_too_long_is_told_apart(client: Client, refused: Refused, parrot: Any) -> None:
    before = parrot.metric("pressd_requests_rejected_total", reason="too_long")
    refused(lambda: client.generate([5] * 4096), "INVALID_ARGUMENT", "PROMPT_TOO_LONG")
    parrot.await_metric(before + 1, "pressd_requests_rejected_total", reason="too_long")


def test_request_without_input_is_refused(raw: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw.Generate(generate_pb2.GenerateRequest())
    assert "give one of prompt, token_ids and chat" in str(caught.value.details())


def test_field_that_is_not_honoured_is_refused_over_the_wire(raw: Any) -> None:
    request = generate_pb2.GenerateRequest(prompt="x")
    request.adapter = "mine"
    with pytest.raises(grpc.RpcError) as caught:
        raw.Generate(request)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "adapter" in str(caught.value.details())


def test_garbage_is_a_bad_message(parrot: Any) -> None:
    with grpc.insecure_channel(parrot.target) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/pressd.v1.Inference/Generate", None, None)(b"\xff\xff\xff", timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_model_is_not_found(client: Client, refused: Refused) -> None:
    refused(lambda: client.generate("x", model="other"), "NOT_FOUND", "MODEL_NOT_FOUND")
    for name in ("parrot", "parrot@echo-1"):
        assert client.generate("x", model=name).completions[0].text == "x"


def test_request_id_is_echoed_in_metadata(raw: Any) -> None:
    request = generate_pb2.GenerateRequest(prompt="x")
    response, call = raw.Generate.with_call(request, metadata=(("x-request-id", "from-metadata"),))
    assert response.request_id == "from-metadata"
    assert ("x-request-id", "from-metadata") in call.initial_metadata()
    request.request_id = "from-message"
    response = raw.Generate(request, metadata=(("x-request-id", "from-metadata"),))
    assert response.request_id == "from-message"


def test_error_names_its_request(client: Client) -> None:
    with pytest.raises(CallError) as caught:
        client.generate("", request_id="broken-1")
    assert caught.value.request_id == "broken-1"


def test_generation_defaults_are_the_models(client: Client, parrot: Any) -> None:
    model = client.model()
    assert (model.default_sampling.temperature, model.default_sampling.top_p) == (0.5, 1.0)
    assert model.default_sampling.top_k == 7
    # What generation_config.json asks and this build cannot do is said aloud.
    assert parrot.await_event("generation_config.json asks for what this build does not do")["field"] == "num_beams"


def test_many_at_once_do_not_mix(client: Client) -> None:
    prompts = [f"prompt number {number} ü {'x' * number}" for number in range(48)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda prompt: client.generate(prompt).completions[0].text, prompts))
    assert answers == prompts


def test_asyncio_client(parrot: Any) -> None:
    async def main() -> None:
        async with parrot.async_client() as client:
            events = [event async for event in client.stream(TEXT)]
            assert join(events) == TEXT
            assert (await client.generate(TEXT)).completions[0].text == TEXT
            assert await client.detokenize(await client.tokenize(TEXT)) == TEXT
            assert await client.is_serving()
            assert [model.name for model in await client.models()] == ["parrot"]
            assert (await client.server_info()).version == (await client.server_info()).version
            assert (await client.model()).name == "parrot"
            with pytest.raises(CallError) as caught:
                await client.cancel("nobody")
            assert caught.value.reason == "REQUEST_NOT_FOUND"
            with pytest.raises(CallError):
                await anext(client.stream("x", temperature=-1))

    asyncio.run(main())


def test_log_is_json_lines_without_a_word_of_the_prompt(client: Client, parrot: Any) -> None:
    client.generate("zanzibar", request_id="logged-1")
    client.generate([{"role": "user", "content": "zanzibar"}])
    with pytest.raises(CallError):
        client.generate("zanzibar", temperature=-1)
    lines = [line for line in parrot.log_lines() if line.get("request_id") == "logged-1"]
    assert [(line["method"], line["code"], line["prompt_tokens"]) for line in lines] == [("Generate", "OK", 8)]
    text = parrot.log_text()
    assert "zanzibar" not in text
    for line in text.splitlines():
        assert json.loads(line)["level"] in ("info", "warning")


def test_model_directory_is_untouched(echo_text: Path) -> None:
    assert not (echo_text / "steps").exists()
