"""Everything else that can be asked of a completion, over real gRPC, with a server whose engine repeats the prompt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from scripted_engine import logprobs_of

from pressd.client import CallError
from pressd.v1 import control_pb2_grpc, generate_pb2, inference_pb2_grpc, load_pb2, score_pb2, tokens_pb2

pytestmark = pytest.mark.system

# Characters of one to four bytes; the tokenizer of these tests spells all but u-umlaut one byte at a time.
TEXT = "the ü of 漢字 and 👩‍🚀 €"
VOCAB = 262


@pytest.fixture
def raw(parrot: Any) -> Iterator[Any]:
    with grpc.insecure_channel(parrot.target) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def client(parrot: Any) -> Iterator[Any]:
    with parrot.client() as client:
        yield client


def asking(**fields: Any) -> generate_pb2.GenerateRequest:
    """A request, written as JSON writes it."""
    return json_format.ParseDict(fields, generate_pb2.GenerateRequest())


def refusal(call: Any) -> CallError:
    with pytest.raises(grpc.RpcError) as caught:
        list(answer) if not hasattr(answer := call(), "ListFields") else None
    return CallError(caught.value)


def both(raw: Any, **fields: Any) -> tuple[generate_pb2.GenerateResponse, list[generate_pb2.GenerateEvent]]:
    """The whole answer and the stream of one request, which must say the same."""
    whole, events = raw.Generate(asking(**fields)), list(raw.GenerateStream(asking(**fields)))
    for index, completion in enumerate(whole.completions):
        deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
        assert completion.text == "".join(delta.text for delta in deltas)
        assert list(completion.tokens) == [token for delta in deltas for token in delta.tokens]
        (end,) = [e.finished for e in events if e.HasField("finished") and e.finished.index == index]
        assert (end.reason, end.usage) == (completion.finished.reason, completion.finished.usage)
    assert list(whole.prompt) == [token for event in events for token in event.prompt.tokens]
    return whole, events


def test_several_sequences_each_have_an_end_and_the_last_the_counts(raw: Any) -> None:
    whole, events = both(raw, prompt=TEXT, sampling={"numSequences": 3, "seed": 4}, output={"tokenIds": True})
    assert [completion.text for completion in whole.completions] == 3 * [TEXT]
    ends = [event.finished for event in events if event.HasField("finished")]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert [end.HasField("usage") for end in ends] == [False, False, True]
    assert events[-1].finished == ends[-1]
    length = events[0].accepted.num_prompt_tokens
    assert (ends[-1].usage.prompt_tokens, ends[-1].usage.completion_tokens) == (length, 3 * length)
    assert ends[-1].timings.total_seconds >= ends[-1].timings.decode_seconds > 0
    assert {end.seed for end in ends} == {4}


def test_a_stop_text_ends_each_sequence_in_the_engine_too(raw: Any, parrot: Any) -> None:
    before = parrot.metric("pressd_generated_tokens_total")
    whole, _ = both(raw, prompt="ab!cd", sampling={"numSequences": 2}, stopping={"stop": ["!"], "ignoreEos": True})
    assert [completion.text for completion in whole.completions] == ["ab", "ab"]
    parrot.await_metric(0, "pressd_requests_running")
    assert parrot.metric("pressd_generated_tokens_total") - before < 4 * 1024  # not what max_new_tokens allows


def test_log_probabilities_travel_with_their_tokens(raw: Any, client: Any) -> None:
    ids = client.tokenize(TEXT)
    whole, _ = both(raw, prompt=TEXT, output={"topLogprobs": 2})
    tokens = whole.completions[0].tokens
    assert [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == TEXT
    for token in tokens:
        told = logprobs_of(token.id, VOCAB, 2)
        assert (token.logprob, token.rank) == (told.logprob, told.rank)
        assert [(top.id, top.logprob) for top in token.top] == list(told.top)
        # The oracle for a text alone is the tokenizer itself.
        alone = [tokens_pb2.DetokenizeRequest(ids=[top.id], skip_special_tokens=False) for top in token.top]
        assert [top.text for top in token.top] == [raw.Detokenize(request).text for request in alone]
    plain, _ = both(raw, prompt="the", output={"logprobs": True, "text": False})
    assert not plain.completions[0].tokens[0].HasField("text")
    assert plain.completions[0].tokens[0].HasField("logprob")


def test_log_probabilities_of_the_prompt_come_first_and_in_order(raw: Any, client: Any) -> None:
    ids = client.tokenize(TEXT)
    asked = {"promptLogprobs": True, "topLogprobs": 1}
    whole, events = both(raw, prompt=TEXT, sampling={"numSequences": 2}, output=asked)
    assert [token.id for token in whole.prompt] == ids
    assert "".join(token.text for token in whole.prompt) == TEXT
    assert [token.HasField("logprob") for token in whole.prompt] == [False] + [True] * (len(ids) - 1)
    assert [token.logprob for token in whole.prompt][1:] == [logprobs_of(i, VOCAB, 1).logprob for i in ids[1:]]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.index("prompt") < kinds.index("delta")
    position = 0
    for event in events:
        if event.HasField("prompt"):
            assert event.prompt.start == position
            position += len(event.prompt.tokens)


@pytest.mark.parametrize(
    ("prompt", "echo"),
    [
        ({"prompt": TEXT}, TEXT),
        ({"tokenIds": {"ids": [5, 6]}}, None),
        ({"chat": {"messages": [{"role": "user", "content": "hi"}]}}, "user: hi\nassistant:"),
    ],
)
def test_echo_begins_with_what_was_sent_and_is_not_billed(
    raw: Any, client: Any, prompt: dict[str, Any], echo: str | None
) -> None:
    whole, events = both(raw, **prompt, output={"echoPrompt": True, "tokenIds": True})
    completion = whole.completions[0]
    said = "".join(token.text for token in completion.tokens)
    assert completion.text == (client.detokenize([5, 6]) if echo is None else echo) + said
    assert completion.finished.usage.completion_tokens == len(completion.tokens)
    assert (events[1].delta.num_tokens, len(events[1].delta.tokens)) == (0, 0)


def test_a_longer_prompt_can_be_cut_at_its_beginning(raw: Any) -> None:
    whole, events = both(raw, prompt="abcdef", scheduling={"maxPromptTokens": 2}, output={"echoPrompt": True})
    assert whole.completions[0].text == "ef" + "ef"
    assert events[0].accepted.num_prompt_tokens == 2
    whole, _ = both(raw, prompt="x" * 5000 + "yz", scheduling={"maxPromptTokens": 2})
    assert whole.completions[0].text == "yz"


def test_the_stop_can_be_kept(raw: Any, client: Any) -> None:
    kept, _ = both(raw, prompt="ab!!cd", stopping={"stop": ["!!"], "includeStop": True}, output={"tokenIds": True})
    assert (kept.completions[0].text, kept.completions[0].finished.stop) == ("ab!!", "!!")
    assert len(kept.completions[0].tokens) == kept.completions[0].finished.usage.completion_tokens == 4
    (mark,) = client.tokenize("!")
    kept, _ = both(raw, prompt="ab!cd", stopping={"stopTokenIds": [mark], "includeStop": True})
    assert (kept.completions[0].text, kept.completions[0].finished.stop_token_id) == ("ab!", mark)
    ended, _ = both(raw, prompt="ab", stopping={"includeStop": True}, output={"skipSpecialTokens": False})
    assert (ended.completions[0].text, ended.completions[0].finished.eos_token_id) == ("ab", 0)


def test_special_tokens_can_be_shown(raw: Any) -> None:
    for show, text in ((False, "abab"), (True, "ab</s>ab</s>")):
        output = {"skipSpecialTokens": not show, "tokenIds": True}
        whole, _ = both(raw, prompt="ab</s>", stopping={"ignoreEos": True, "maxNewTokens": 6}, output=output)
        assert whole.completions[0].text == text
        assert len(whole.completions[0].tokens) == 6


def test_deltas_can_be_made_larger(raw: Any) -> None:
    asked = asking(prompt="a" * 10, output={"streamMinTokens": 4}, stopping={"maxNewTokens": 10, "ignoreEos": True})
    counts = [event.delta.num_tokens for event in raw.GenerateStream(asked) if event.HasField("delta")]
    assert sum(counts) == 10
    assert min(counts[:-1]) >= 4


def test_ready_tokens_wait_no_longer_than_was_asked(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "held")).joinpath("steps").write_text("2")
    server = serve(model).await_ready()
    output = {"streamMinTokens": 50, "streamMaxDelayMs": 10, "text": False, "tokenIds": True}
    with grpc.insecure_channel(server.target) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(
            asking(tokenIds={"ids": [5, 6, 7]}, output=output)
        )
        assert next(stream).HasField("accepted")
        # The engine makes no third token before it is allowed to: without the delay this would wait for ever.
        assert sum(next(stream).delta.num_tokens for _ in range(1)) in (1, 2)
        server.allow_all_steps()
        assert list(stream)[-1].finished.usage.completion_tokens == 3


def test_a_time_budget_ends_it_with_what_exists(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "slow")).joinpath("steps").write_text("2")
    server = serve(model).await_ready()
    with grpc.insecure_channel(server.target) as channel:
        asked = asking(
            tokenIds={"ids": [5, 6, 7]},
            output={"text": False, "tokenIds": True},
            scheduling={"timeBudgetMs": 1500},
            sampling={"numSequences": 2},
        )
        answer = inference_pb2_grpc.InferenceStub(channel).Generate(asked, timeout=60)
    for completion in answer.completions:
        assert completion.finished.reason == generate_pb2.FINISH_REASON_TIME_LIMIT
        assert [token.id for token in completion.tokens] == [5, 6]
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")


def test_a_queue_timeout_ends_what_has_not_begun(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "slow")).joinpath("steps").write_text("1")
    server = serve(model, "--max-batch", "1").await_ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        fields: dict[str, Any] = {
            "tokenIds": {"ids": [5, 6]},
            "output": {"text": False},
            "scheduling": {"queueTimeoutMs": 200},
        }
        first = stub.GenerateStream(asking(**fields))
        assert next(first).HasField("accepted")
        assert next(first).delta.num_tokens == 1  # begun in time, whatever comes
        error = refusal(lambda: stub.Generate(asking(**fields)))
        assert (error.code.name, error.reason) == ("DEADLINE_EXCEEDED", "QUEUE_TIMEOUT")
        server.allow_all_steps()
        assert list(first)[-1].finished.reason == generate_pb2.FINISH_REASON_EOS
    server.await_metric(0, "pressd_requests_waiting")


def test_priority_goes_before_arrival(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "one")).joinpath("steps").write_text("0")
    server = serve(model, "--max-batch", "1").await_ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        streams = []
        for priority in (0, 0, 3):
            fields = {"tokenIds": {"ids": [5]}, "output": {"text": False}, "scheduling": {"priority": priority}}
            streams.append(stub.GenerateStream(asking(**fields)))
            assert next(streams[-1]).HasField("accepted")
        server.await_metric(2, "pressd_requests_waiting")
        server.allow_all_steps()
        ends = [list(stream)[-1].finished.timings.queue_seconds for stream in streams]
    # Arrivals are in this order as well, and the third waited less than the second.
    assert ends[2] < ends[1]


def test_a_constraint_reaches_the_engine_and_its_failures_the_client(raw: Any) -> None:
    whole, _ = both(raw, prompt="x", constraint={"choice": {"texts": ["!", "?"]}}, output={"tokenIds": True})
    assert whole.completions[0].finished.reason == generate_pb2.FINISH_REASON_CONSTRAINT_COMPLETE
    assert [token.id for token in whole.completions[0].tokens] == [ord("!")]
    for constraint, field, reason in (
        ({"regex": "("}, "constraint.regex", "INVALID_FIELD"),
        ({"jsonObject": True}, "constraint.json_object", "INVALID_FIELD"),
        ({"choice": {"texts": [""]}}, "constraint.choice", "CONSTRAINT_IMPOSSIBLE"),
    ):
        for method in (raw.Generate, raw.GenerateStream):
            error = refusal(lambda method=method, it=constraint: method(asking(prompt="x", constraint=it)))
            assert (error.code.name, error.reason, list(error.fields)) == ("INVALID_ARGUMENT", reason, [field])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": {"topK": 0}}, "sampling.top_k"),
        ({"sampling": {"minP": 2}}, "sampling.min_p"),
        ({"sampling": {"typicalP": 0}}, "sampling.typical_p"),
        ({"sampling": {"repetitionPenalty": 0}}, "sampling.repetition_penalty"),
        ({"sampling": {"presencePenalty": 101}}, "sampling.presence_penalty"),
        ({"sampling": {"frequencyPenalty": "NaN"}}, "sampling.frequency_penalty"),
        ({"sampling": {"numSequences": 0}}, "sampling.num_sequences"),
        ({"sampling": {"numSequences": 65}}, "sampling.num_sequences"),
        ({"sampling": {"logitBias": {"7": 101}}}, "sampling.logit_bias"),
        ({"sampling": {"logitBias": {"4000": 1}}}, "sampling.logit_bias[4000]"),
        ({"sampling": {"logitBias": {str(n): 1 for n in range(1025)}}}, "sampling.logit_bias"),
        ({"sampling": {"allowedTokenIds": [1, 4000]}}, "sampling.allowed_token_ids[1]"),
        ({"sampling": {"allowedTokenIds": [1, 1]}}, "sampling.allowed_token_ids"),
        ({"sampling": {"badWords": [""]}}, "sampling.bad_words[0]"),
        ({"sampling": {"badWords": ["x" * 100]}}, "sampling.bad_words[0]"),
        ({"sampling": {"badWords": ["x"] * 129}}, "sampling.bad_words"),
        ({"stopping": {"minNewTokens": 5, "maxNewTokens": 4}}, "stopping.min_new_tokens"),
        ({"stopping": {"minNewTokens": 5000}}, "stopping.min_new_tokens"),
        ({"output": {"topLogprobs": 65}}, "output.top_logprobs"),
        ({"output": {"echoPrompt": True, "text": False}}, "output.echo_prompt"),
        ({"output": {"streamMinTokens": 0}}, "output.stream_min_tokens"),
        ({"constraint": {}}, "constraint"),
        ({"constraint": {"jsonObject": False}}, "constraint.json_object"),
        ({"constraint": {"choice": {}}}, "constraint.choice.texts"),
        ({"constraint": {"ebnf": ""}}, "constraint.ebnf"),
        ({"runtime": {"cacheSalt": "ü" * 129}}, "runtime.cache_salt"),
        ({"runtime": {"exactness": 77}}, "runtime.exactness"),
        ({"scheduling": {"maxPromptTokens": 0}}, "scheduling.max_prompt_tokens"),
        ({"prompt": "x" * 100_000}, "prompt"),
    ],
)
def test_bad_field_is_named(raw: Any, fields: dict[str, Any], field: str) -> None:
    error = refusal(lambda: raw.Generate(asking(**{"prompt": "x"} | fields)))
    assert (error.code.name, list(error.fields)) == ("INVALID_ARGUMENT", [field])


@pytest.mark.parametrize(
    ("runtime", "code", "reason"),
    [
        ({"exactness": "EXACTNESS_LOSSLESS", "earlyExit": {"mode": "EARLY_EXIT_MODE_OFF"}}, None, ""),
        ({"speculation": {"mode": "SPECULATION_MODE_OFF"}, "bypassPrefixCache": True}, None, ""),
        ({"exactness": "EXACTNESS_BATCH_INVARIANT"}, "FAILED_PRECONDITION", "EXACTNESS"),
        ({"earlyExit": {"mode": "EARLY_EXIT_MODE_CONFIDENCE"}}, "UNIMPLEMENTED", "UNSUPPORTED"),
        ({"speculation": {"mode": "SPECULATION_MODE_NGRAM"}}, "UNIMPLEMENTED", "UNSUPPORTED"),
        ({"earlyExit": {"threshold": 0.5}}, "UNIMPLEMENTED", "UNSUPPORTED"),
    ],
)
def test_only_what_this_build_does_can_be_asked(
    raw: Any, runtime: dict[str, Any], code: str | None, reason: str
) -> None:
    if code is None:
        assert raw.Generate(asking(prompt="x", runtime=runtime)).completions[0].text == "x"
        return
    error = refusal(lambda: raw.Generate(asking(prompt="x", runtime=runtime)))
    assert (error.code.name, error.reason) == (code, reason)


def test_a_prompt_too_long_in_bytes_is_refused_before_it_is_tokenised(raw: Any, client: Any) -> None:
    most = client.model().limits.max_prompt_bytes
    assert most == 4096 * len("</s>")
    error = refusal(lambda: raw.Generate(asking(prompt="x" * (most + 1))))
    assert (error.code.name, error.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")


def test_score_gives_each_token_but_the_first(raw: Any, client: Any) -> None:
    ids = client.tokenize(TEXT)
    answer = raw.Score(score_pb2.ScoreRequest(text=TEXT, top_logprobs=2))
    told = [logprobs_of(token_id, VOCAB, 2) for token_id in ids[1:]]
    assert list(answer.ids) == ids
    assert list(answer.logprobs) == [one.logprob for one in told]
    assert answer.total_logprob == sum(one.logprob for one in told)
    assert [[(top.id, top.logprob) for top in tops.tokens] for tops in answer.top] == [list(one.top) for one in told]
    assert answer.model_version == "echo-1"
    by_ids = raw.Score(score_pb2.ScoreRequest(token_ids={"ids": ids}))
    assert (by_ids.logprobs, list(by_ids.top)) == (answer.logprobs, [])


def test_score_takes_a_whole_context_and_a_single_token(raw: Any, client: Any) -> None:
    limit = client.model().limits.max_context
    assert len(raw.Score(score_pb2.ScoreRequest(token_ids={"ids": [5] * limit})).logprobs) == limit - 1
    one = raw.Score(score_pb2.ScoreRequest(token_ids={"ids": [5]}))
    assert (list(one.logprobs), one.total_logprob) == ([], 0.0)
    for fields, field in (
        ({"token_ids": {"ids": [5] * (limit + 1)}}, "token_ids.ids"),
        ({"token_ids": {"ids": []}}, "token_ids.ids"),
        ({"text": ""}, "text"),
        ({}, "text"),
        ({"text": "x", "top_logprobs": 65}, "top_logprobs"),
    ):
        error = refusal(lambda it=fields: raw.Score(score_pb2.ScoreRequest(**it)))
        assert (error.code.name, list(error.fields)) == ("INVALID_ARGUMENT", [field])


def test_a_score_that_is_called_off_has_no_answer(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "slow")).joinpath("steps").write_text("0")
    server = serve(model).await_ready()
    with grpc.insecure_channel(server.target) as channel, server.client() as client:
        stub = inference_pb2_grpc.InferenceStub(channel)
        metadata = (("x-request-id", "scored"),)
        scoring = stub.Score.future(score_pb2.ScoreRequest(token_ids={"ids": [5, 6]}), metadata=metadata)
        server.await_metric(1, "pressd_requests_running")
        client.cancel("scored")
        assert scoring.exception().code() == grpc.StatusCode.CANCELLED
        server.await_metric(0, "pressd_requests_running")


def test_cached_tokens_are_told(raw: Any) -> None:
    # The scripted engine finds as many tokens in its cache as the salt says.
    answer = raw.Generate(asking(prompt="abcdef", runtime={"cacheSalt": "3"}))
    assert answer.completions[0].finished.usage.cached_prompt_tokens == 3


def test_load_can_be_asked_and_watched(parrot: Any) -> None:
    with grpc.insecure_channel(parrot.target) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        parrot.await_metric(0, "pressd_requests_running")
        load = stub.GetLoad(load_pb2.GetLoadRequest())
        assert load == load_pb2.LoadInfo()
        watching = stub.WatchLoad(load_pb2.WatchLoadRequest(interval_ms=100))
        assert [next(watching) for _ in range(3)] == 3 * [load]
        watching.cancel()
        for interval in (99, 3_600_001, 0):
            error = refusal(lambda ms=interval: stub.WatchLoad(load_pb2.WatchLoadRequest(interval_ms=ms)))
            assert list(error.fields) == ["interval_ms"]


def test_load_tells_who_runs_and_who_waits(serve: Any, scripted: Any, tmp_path: Path) -> None:
    (model := scripted(tmp_path / "slow")).joinpath("steps").write_text("0")
    server = serve(model, "--max-batch", "2").await_ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        streams = []
        for _ in range(5):
            fields = {"tokenIds": {"ids": [5] * 10}, "output": {"text": False}}
            streams.append(stub.GenerateStream(asking(**fields)))
            assert next(streams[-1]).HasField("accepted")
        server.await_metric(3, "pressd_requests_waiting")
        load = control_pb2_grpc.ControlStub(channel).GetLoad(load_pb2.GetLoadRequest())
        assert (load.num_running, load.num_waiting, load.draining) == (2, 3, False)
        assert load.num_waiting_tokens == 50  # the engine has computed nothing for any
        assert load.kv_usage_ratio == server.metric("pressd_kv_cache_usage_ratio") > 0
