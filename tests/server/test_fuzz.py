"""Random requests and broken bytes over real gRPC: every one is answered as the promise says, and none leaves a trace.

What is sent follows from a seed (random_requests.py); judge.py says what is wrong with an answer.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.status_pb2 import Status
from judge import Answer, complaints
from random_requests import METHODS, UNKNOWN, Made, Maker

from pressd.client import CallError
from pressd.v1 import generate_pb2

pytestmark = pytest.mark.system

NUM_IN_FLIGHT = 32
# Seconds that no call takes.
PATIENCE = 120.0


async def ask(channel: grpc.aio.Channel, name: str, data: bytes) -> Answer:
    method = METHODS[name]
    path = f"/{method.containing_service.full_name}/{name}"
    read = GetMessageClass(method.output_type).FromString
    messages: list[Message] = []
    try:
        if method.server_streaming:
            call = channel.unary_stream(path, response_deserializer=read)(data, timeout=PATIENCE)
            async for message in call:
                messages.append(message)
                if name == "WatchLoad":
                    call.cancel()
                    break
        else:
            messages.append(await channel.unary_unary(path, response_deserializer=read)(data, timeout=PATIENCE))
    except grpc.aio.AioRpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        return Answer(code=error.code().name, message=error.details() or "", details=details, messages=messages)
    return Answer(code="OK", messages=messages)


async def send(target: str, seed: int, num_requests: int) -> tuple[list[str], Counter[str]]:
    """Send requests, so many at a time; return what is wrong with the answers, and how often each status came."""
    maker = Maker(seed)
    requests = (maker.request() for _ in range(num_requests))
    problems: list[str] = []
    codes: Counter[str] = Counter()

    async def work(channel: grpc.aio.Channel) -> None:
        for made in requests:
            answer = await ask(channel, made.method, made.data)
            codes[answer.code] += 1
            shown = f"{made.method} {made.data.hex()[:300]}"
            problems.extend(f"{problem}: {shown}" for problem in complaints(made, answer))

    async with grpc.aio.insecure_channel(target) as channel:
        await asyncio.gather(*(work(channel) for _ in range(NUM_IN_FLIGHT)))
    return problems, codes


def check(server: Any, seed: int, num_requests: int, *, is_echo: bool = True) -> None:
    problems, codes = asyncio.run(send(server.target, seed, num_requests))
    assert not problems, "\n".join(problems[:20])
    # The requests were such that a good part got through, and each way to refuse was tried.
    assert codes["OK"] > num_requests / 5, codes
    assert codes.keys() >= {"INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "FAILED_PRECONDITION"}, codes
    server.await_metric(0, "pressd_requests_running")
    server.await_metric(0, "pressd_requests_waiting")
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")
    server.await_ready()
    assert [line for line in server.log_lines() if line["level"] in ("error", "critical")] == []
    assert "Traceback" not in server.log_text()
    with server.client() as client:
        for used in ("a", "the", "mine", "parrot"):
            answer = client.generate("still there", max_new_tokens=20, temperature=0, request_id=used).completions[0]
            assert answer.text == "still there" if is_echo else answer.finished.usage.completion_tokens > 0


def test_nothing_sent_to_it_harms_the_server(parrot: Any) -> None:
    check(parrot, seed=0, num_requests=3000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_sent_to_it_for_long_harms_the_server(parrot: Any) -> None:
    for seed in range(1, 11):
        check(parrot, seed, num_requests=10_000)


@pytest.mark.parametrize("character", ["a", "é", "🚀"])
def test_what_a_client_sent_is_quoted_in_part(parrot: Any, character: str) -> None:
    with parrot.client() as client, pytest.raises(CallError) as caught:
        client.generate("the", model=character * 20_000)
    assert (caught.value.code.name, caught.value.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert caught.value.message.endswith("is not served here; 'parrot' is")


@pytest.fixture
def llama(
    tmp_path: Path, tokenizer_of: Callable[[Path], int], server_of: Callable[..., Iterator[Any]]
) -> Iterator[Any]:
    """A server with the real engine and a random Llama, under the scripted one's name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer_of(tmp_path),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    yield from server_of(tmp_path, "--served-name", "parrot", scripted=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_sent_to_it_harms_the_engine(llama: Any) -> None:
    check(llama, seed=0, num_requests=5000, is_echo=False)


FINISHED = generate_pb2.Finished(reason="FINISH_REASON_EOS", usage=generate_pb2.Usage(completion_tokens=1))
STREAM = [
    generate_pb2.GenerateEvent(accepted=generate_pb2.Accepted()),
    generate_pb2.GenerateEvent(delta=generate_pb2.Delta(num_tokens=1)),
    generate_pb2.GenerateEvent(finished=FINISHED),
]
REFUSED = Status(code=3, message="no")


@pytest.mark.parametrize(
    ("data", "answer", "complaint"),
    [
        (b"", {"messages": STREAM}, None),
        (b"", {"code": "INTERNAL"}, "INTERNAL is no answer"),
        (b"", {"code": "NOT_FOUND"}, "no details"),
        (b"", {"code": "NOT_FOUND", "message": "no", "details": REFUSED.SerializeToString()}, "of another status"),
        (b"", {"code": "INVALID_ARGUMENT", "message": "no", "details": REFUSED.SerializeToString()}, "no reason"),
        (b"", {"code": "INVALID_ARGUMENT", "message": 'File "door.py"'}, "for developers"),
        (b"\xff", {"messages": STREAM}, "no message"),
        (UNKNOWN, {"messages": STREAM}, "no schema"),
        (b"\x32\x03" + UNKNOWN, {"messages": STREAM}, "no schema"),  # the same inside field 6, `sampling`
        (b"\x32\x05\x0d\x00\x00\xc0\x7f", {"messages": STREAM}, "sampling.temperature is out of bounds"),  # NaN
        (b"\x32\x02\x50\x02", {"messages": STREAM}, "1 ends of 2"),
        (b"", {"messages": STREAM[1:]}, "not Accepted"),
        (b"", {"messages": STREAM[:2]}, "0 ends of 1"),
        (b"", {"messages": [STREAM[0], STREAM[2]]}, "0 tokens came and 1 are billed"),
        (b"", {"messages": [STREAM[0], STREAM[2], STREAM[1]]}, "behind its sequence's end"),
        (b"\x0a\x01x", {"messages": STREAM}, "another request id"),
        (b"\x42\x02\x10\x01", {"messages": STREAM}, "0 tokens described of 1"),
    ],
)
def test_the_judge_sees_what_is_wrong(data: bytes, answer: dict[str, Any], complaint: str | None) -> None:
    made = Made(method="GenerateStream", data=data, is_sound=False)
    found = list(complaints(made, Answer(**{"code": "OK"} | answer)))
    assert any(complaint in one for one in found) if complaint else not found, found
