"""What is wrong with an answer: by what a call of its method may end with, and by what is known of its request."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from random_requests import METHODS, VOCABULARY, Made

from pressd.v1 import errors_pb2, generate_pb2

ADMIN = {"LoadModel", "UnloadModel", "FlushPrefixCache", "Drain"}
ALWAYS = {"OK", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND"}
QUEUED = {"FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "DEADLINE_EXCEEDED"}
ALLOWED = {
    **dict.fromkeys(METHODS, ALWAYS),
    **dict.fromkeys(("Generate", "GenerateStream"), ALWAYS | QUEUED),
    "Score": ALWAYS | {"RESOURCE_EXHAUSTED"},
    **{name: {"FAILED_PRECONDITION"} for name in ADMIN},  # nobody is an admin here
}
# What is answered where there is nothing to object to.
SOUND = {
    **{name: {"OK"} for name in METHODS},
    **{name: {"OK", "RESOURCE_EXHAUSTED"} for name in ("Generate", "GenerateStream", "Score")},
    **{name: {"FAILED_PRECONDITION"} for name in ADMIN},
    "Cancel": {"OK", "NOT_FOUND"},
}
REASONS = set(errors_pb2.ErrorReason.keys())
# Bounds that the protos state, by the paths of fields that have presence.
BOUNDS: dict[str, Callable[[Any], bool]] = {
    "request_id": lambda value: bool(re.fullmatch(r"[!-~]{1,128}", value)),
    "model": lambda value: value in ("", "parrot", "parrot@echo-1"),
    "sampling.temperature": lambda value: 0 <= value <= 100,
    "sampling.top_p": lambda value: 0 < value <= 1,
    "sampling.top_k": lambda value: value >= 1,
    "sampling.min_p": lambda value: 0 <= value <= 1,
    "sampling.typical_p": lambda value: 0 < value <= 1,
    "sampling.repetition_penalty": lambda value: 0.0099 <= value <= 100,
    "sampling.presence_penalty": lambda value: -100 <= value <= 100,
    "sampling.frequency_penalty": lambda value: -100 <= value <= 100,
    "sampling.num_sequences": lambda value: 1 <= value <= 64,
    "output.top_logprobs": lambda value: value <= 64,
    "scheduling.max_prompt_tokens": lambda value: value >= 1,
    "runtime.cache_salt": lambda value: len(value.encode()) <= 256,
    "constraint.json_object": lambda value: value,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a call ended, and the messages before that. WatchLoad, which does not end, is left after the first."""

    code: str
    message: str = ""
    details: bytes | None = None
    messages: list[Message] = field(default_factory=list)


def complaints(made: Made, answer: Answer) -> Iterator[str]:
    """All that is wrong with an answer."""
    name = made.method
    if answer.code not in ALLOWED[name]:
        yield f"{answer.code} is no answer of {name}"
    if made.is_sound and answer.code not in SOUND[name]:
        yield f"nothing is wrong with it, but {answer.code}: {answer.message[:200]}"
    if answer.code != "OK":
        yield from _about_refusal(answer)
    try:
        request = GetMessageClass(METHODS[name].input_type).FromString(made.data)
    except DecodeError:
        if answer.code not in ("INVALID_ARGUMENT", "FAILED_PRECONDITION" if name in ADMIN else ""):
            yield "these bytes are no message"
        return
    if answer.code == "OK":
        if _has_unknown(request):
            yield "a field of no schema was ignored"
        if isinstance(request, generate_pb2.GenerateRequest):
            yield from (f"{path} is out of bounds" for path in BOUNDS if not _is_within(request, path))
            yield from _about_generation(request, answer.messages)
        if name == "Score":
            (score,) = answer.messages
            if len(score.logprobs) != len(score.ids) - 1 or not math.isclose(sum(score.logprobs), score.total_logprob):
                yield "scores do not add up"
        if name == "Tokenize" and not all(token_id < VOCABULARY for token_id in answer.messages[0].ids):
            yield "an id outside the vocabulary"


def _about_refusal(answer: Answer) -> Iterator[str]:
    if re.search(r"Traceback|\.py\b|site-packages|File \"|\n", answer.message):
        yield f"a message for developers: {answer.message[:200]!r}"
    if answer.details is None:
        yield "no details"
        return
    status = Status.FromString(answer.details)
    if (grpc.StatusCode[answer.code].value[0], answer.message) != (status.code, status.message):
        yield f"details of another status: {status.code}, {status.message[:200]!r}"
    info = ErrorInfo()
    if not any(detail.Unpack(info) for detail in status.details):
        yield "no reason"
    elif info.domain != "pressd" or f"ERROR_REASON_{info.reason}" not in REASONS:
        yield f"an unknown reason: {info.domain} {info.reason}"


def _has_unknown(message: Message) -> bool:
    if len(UnknownFieldSet(message)):
        return True
    for part, value in message.ListFields():
        if part.message_type is None or part.message_type.GetOptions().map_entry:
            continue
        if any(_has_unknown(inner) for inner in (value if part.is_repeated else [value])):
            return True
    return False


def _is_within(request: Message, path: str) -> bool:
    *groups, name = path.split(".")
    for group in groups:
        request = getattr(request, group)
    return not request.HasField(name) or BOUNDS[path](getattr(request, name))


def _about_generation(request: generate_pb2.GenerateRequest, messages: list[Message]) -> Iterator[str]:
    """What the events of a stream, or the one answer, must add up to."""
    num_sequences = request.sampling.num_sequences if request.sampling.HasField("num_sequences") else 1
    if isinstance(messages[0], generate_pb2.GenerateResponse):
        (response,) = messages
        finished = [completion.finished for completion in response.completions]
        tokens = [list(completion.tokens) for completion in response.completions]
        counts = None
    else:
        if messages[0].WhichOneof("event") != "accepted":
            yield "the first event is not Accepted"
        finished = [event.finished for event in messages if event.HasField("finished")]
        deltas = [event.delta for event in messages if event.HasField("delta")]
        tokens = [[token for delta in deltas for token in delta.tokens]]
        counts = sum(delta.num_tokens for delta in deltas)
        ended = set()
        for event in messages:
            index = event.delta.index if event.HasField("delta") else None
            if index in ended:
                yield "a delta behind its sequence's end"
            if event.HasField("finished"):
                ended.add(event.finished.index)
    if sorted(end.index for end in finished) != list(range(num_sequences)):
        yield f"{len(finished)} ends of {num_sequences} sequences"
    usages = [end.usage for end in finished if end.HasField("usage")]
    if len(usages) != 1:
        yield f"{len(usages)} usages"
    elif counts is not None and usages[0].completion_tokens != counts:
        yield f"{counts} tokens came and {usages[0].completion_tokens} are billed"
    if any(end.reason == generate_pb2.FINISH_REASON_UNSPECIFIED for end in finished):
        yield "an end without a reason"
    flat = [token for sequence in tokens for token in sequence]
    if request.output.token_ids and usages and len(flat) != usages[0].completion_tokens:
        yield f"{len(flat)} tokens described of {usages[0].completion_tokens}"
    if any(token.id >= VOCABULARY for token in flat):
        yield "an id outside the vocabulary"
    if any(message.request_id != messages[0].request_id for message in messages):
        yield "two request ids"
    if request.request_id and messages[0].request_id != request.request_id:
        yield "another request id"
