"""Settings that only a real engine can follow, over gRPC, against transformers' own numbers and against the request."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf import json_format

from pressd.client import CallError
from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc, score_pb2

pytestmark = pytest.mark.system

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
PROMPT = "def read_config(path):\n    with open(path) as file:\n"


@pytest.fixture(scope="module")
def server(server_of: Callable[..., Any]) -> Iterator[Any]:
    yield from server_of(PYLM, "--device", "cpu", "--dtype", "float32", "--kv-memory", "16MiB", scripted=False)


@pytest.fixture
def raw(server: Any) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def asking(**fields: Any) -> generate_pb2.GenerateRequest:
    given = {"prompt": PROMPT, "sampling": {"temperature": 0}, "stopping": {"maxNewTokens": 24}} | fields
    return json_format.ParseDict(given, generate_pb2.GenerateRequest())


@pytest.fixture(scope="module")
def scores() -> list[list[float]]:
    """transformers' log-probabilities [position][id] of what follows each token of PROMPT, in float32."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.float32), AutoTokenizer.from_pretrained(PYLM)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer(PROMPT)["input_ids"]])).logits[0]
    table: list[list[float]] = logits.double().log_softmax(-1).tolist()
    return table


def test_score_is_the_likelihood_that_transformers_computes(raw: Any, scores: list[list[float]]) -> None:
    answer = raw.Score(score_pb2.ScoreRequest(text=PROMPT, top_logprobs=3))
    expected = [row[token_id] for row, token_id in zip(scores, answer.ids[1:], strict=False)]
    # Two float32 programs that sum in different orders: 1e-4 is what logits of size 20 in 6 layers may differ by.
    assert list(answer.logprobs) == pytest.approx(expected, abs=1e-4)
    assert answer.total_logprob == pytest.approx(sum(expected), abs=1e-3)
    for row, tops in zip(scores, answer.top, strict=False):
        assert [top.logprob for top in tops.tokens] == pytest.approx(sorted(row, reverse=True)[:3], abs=1e-4)


def test_log_probabilities_of_prompt_and_answer_are_the_models(raw: Any, scores: list[list[float]]) -> None:
    output = {"promptLogprobs": True, "logprobs": True}
    answer = raw.Generate(asking(output=output, sampling={"temperature": 3.0, "seed": 1, "topK": 50}))
    prompt, (first, *_) = answer.prompt, answer.completions[0].tokens
    expected = [row[token.id] for row, token in zip(scores, prompt[1:], strict=False)]
    assert [token.logprob for token in prompt[1:]] == pytest.approx(expected, abs=1e-4)
    # The raw model's, whatever the temperature; and its place among all tokens.
    assert first.logprob == pytest.approx(scores[-1][first.id], abs=1e-4)
    assert first.rank == 1 + sum(value > scores[-1][first.id] for value in scores[-1])


def test_a_schema_is_followed(raw: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["file", "directory"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    for seed in range(4):
        fields = {"sampling": {"temperature": 1, "seed": seed}, "constraint": {"jsonSchema": json.dumps(schema)}}
        completion = raw.Generate(asking(**fields, stopping={"maxNewTokens": 200})).completions[0]
        assert completion.finished.reason in (
            generate_pb2.FINISH_REASON_EOS,
            generate_pb2.FINISH_REASON_CONSTRAINT_COMPLETE,
        )
        jsonschema.validate(json.loads(completion.text), schema)


def test_other_constraints_are_followed(raw: Any) -> None:
    number = raw.Generate(asking(constraint={"regex": "[0-9]{3}-[a-f]{2}"})).completions[0].text
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", number)
    texts = ["return", "raise"]
    assert raw.Generate(asking(constraint={"choice": {"texts": texts}})).completions[0].text in texts
    grammar = 'start: "if " NAME ":"\nNAME: /[a-z]{1,5}/\n'
    assert re.fullmatch("if [a-z]{1,5}:", raw.Generate(asking(constraint={"ebnf": grammar})).completions[0].text)


def test_a_constraint_that_cannot_be_followed_is_an_invalid_argument(raw: Any) -> None:
    for fields, field, reason in (
        ({"constraint": {"regex": "("}}, "constraint.regex", "INVALID_FIELD"),
        ({"constraint": {"jsonSchema": "{"}}, "constraint.json_schema", "INVALID_FIELD"),
        (
            {"constraint": {"regex": "abc"}, "sampling": {"allowedTokenIds": [5]}},
            "constraint.regex",
            "CONSTRAINT_IMPOSSIBLE",
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            raw.Generate(asking(**fields))
        error = CallError(caught.value)
        assert (error.code.name, error.reason, list(error.fields)) == ("INVALID_ARGUMENT", reason, [field])
    assert raw.Generate(asking()).completions[0].text


def test_bad_words_are_not_said(raw: Any) -> None:
    plain = raw.Generate(asking()).completions[0].text
    words = sorted(set(re.findall(r"[a-z]{3,}", plain)))[:4]
    assert words, plain
    changed = raw.Generate(asking(sampling={"temperature": 0, "badWords": words})).completions[0].text
    assert not set(re.findall(r"[a-z]{3,}", changed)) & set(words)


def test_tokens_can_be_pushed_allowed_and_penalised(raw: Any) -> None:
    first = raw.Generate(asking(output={"tokenIds": True})).completions[0].tokens[0].id
    pushed = raw.Generate(asking(sampling={"temperature": 0, "logitBias": {"77": 100}}, output={"tokenIds": True}))
    assert {token.id for token in pushed.completions[0].tokens} == {77}
    allowed = raw.Generate(asking(sampling={"temperature": 1, "allowedTokenIds": [70, 71]}, output={"tokenIds": True}))
    assert {token.id for token in allowed.completions[0].tokens} <= {70, 71}
    sampling = {"temperature": 0, "presencePenalty": 100}
    varied = raw.Generate(asking(sampling=sampling, output={"tokenIds": True})).completions[0].tokens
    assert varied[0].id == first
    assert len({token.id for token in varied}) == len(varied)


def test_several_sequences_share_a_prompt_and_differ(raw: Any, server: Any) -> None:
    answer = raw.Generate(asking(sampling={"temperature": 1, "numSequences": 4, "seed": 9}))
    texts = [completion.text for completion in answer.completions]
    assert len(set(texts)) == 4
    again = raw.Generate(asking(sampling={"temperature": 1, "numSequences": 4, "seed": 9}))
    assert [completion.text for completion in again.completions] == texts
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")


def test_a_second_request_finds_the_first_ones_prefix_unless_it_may_not(raw: Any, server: Any) -> None:
    prompt = "# a long comment about nothing\n" * 12

    def cached(**runtime: Any) -> int:
        usage = raw.Generate(asking(prompt=prompt, runtime=runtime)).completions[0].finished.usage
        return int(usage.cached_prompt_tokens)

    assert cached(cacheSalt="a") == 0
    assert cached(cacheSalt="a") > 0
    assert cached(cacheSalt="b") == 0
    assert cached(cacheSalt="b", bypassPrefixCache=True) == 0
    assert server.metric("pressd_kv_cache_blocks", state="cached") > 0


def test_flushing_needs_an_admin(server: Any) -> None:
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        control_pb2_grpc.ControlStub(channel).FlushPrefixCache(control_pb2.FlushPrefixCacheRequest())
    assert CallError(caught.value).reason == "ADMIN_DISABLED"
