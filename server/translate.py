"""From messages of pressd.v1 to plain data. Raises Refusal with the path of the field at fault."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from pressd.runtime.params import MAX_BIAS, MAX_TOP_LOGPROBS, Constraint, SamplingParams, StoppingParams
from pressd.server.asked import (
    MAX_BAD_TEXTS,
    MAX_SALT,
    MAX_STOP_LENGTH,
    MAX_STOP_TEXTS,
    Asked,
    Output,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from pressd.server.chat import read_chat
from pressd.server.errors import exactness, invalid, unsupported
from pressd.v1 import generate_pb2, sampling_pb2, score_pb2

MAX_REQUEST_ID = 128
# More than any model can make use of; what is longer is not even looked at.
MAX_IDS = 1 << 20
# Bytes; what the engine takes of each kind is at most this, and it says so exactly.
MAX_CONSTRAINT = 1 << 16
# Settings of sampling by the engine's names, and by the protocol's.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "n": "num_sequences",
}


def request_id_of(request: ProtoMessage, metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The id a client gave in the message, else in `x-request-id`, else a new one; raises Refusal for a bad one."""
    given, field = "", "request_id"
    if isinstance(request, generate_pb2.GenerateRequest):
        given = request.request_id
        if not given and request.HasField("request_id"):
            raise invalid(field, "it is empty; leave it unset to have one drawn")
    if not given:
        given, field = next((str(value) for key, value in metadata if key == "x-request-id"), ""), "x-request-id"
    if len(given) > MAX_REQUEST_ID or not all("!" <= character <= "~" for character in given):
        raise invalid(field, f"it must be at most {MAX_REQUEST_ID} visible ASCII characters")
    return given or secrets.token_hex(8)


def asked(request: generate_pb2.GenerateRequest, request_id: str) -> Asked:
    """Read a GenerateRequest."""
    stopping, scheduling, runtime = request.stopping, request.scheduling, request.runtime
    max_new_tokens = _optional(stopping, "max_new_tokens")
    stop_token_ids = ids_of(stopping.stop_token_ids, "stopping.stop_token_ids")
    _check("stopping.max_new_tokens", StoppingParams, max_new_tokens=max_new_tokens)
    _check("stopping.min_new_tokens", StoppingParams, min_new_tokens=stopping.min_new_tokens)
    _check("stopping.stop_token_ids", StoppingParams, stop_token_ids=stop_token_ids)
    if max_new_tokens is not None and stopping.min_new_tokens > max_new_tokens:
        raise invalid("stopping.min_new_tokens", f"it is above max_new_tokens ({max_new_tokens})")
    _check_stops(stopping.stop)
    _check_runtime(runtime)
    return Asked(
        request_id=request_id,
        model=request.model,
        prompt=_prompt(request),
        sampling=_sampling(request.sampling),
        bad_words=_bad_words(request.sampling.bad_words),
        max_new_tokens=max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=stop_token_ids,
        include_stop=stopping.include_stop,
        ignore_eos=stopping.ignore_eos,
        output=_output(request.output),
        constraint=_constraint(request.constraint) if request.HasField("constraint") else None,
        bypass_prefix_cache=runtime.bypass_prefix_cache,
        cache_salt=runtime.cache_salt,
        priority=scheduling.priority,
        queue_timeout=_seconds(scheduling, "queue_timeout_ms"),
        time_budget=_seconds(scheduling, "time_budget_ms"),
        max_prompt_tokens=_at_least_one(scheduling, "max_prompt_tokens", "scheduling"),
    )


def score_prompt(request: score_pb2.ScoreRequest) -> TextPrompt | TokenPrompt:
    """Read what a ScoreRequest is about."""
    if request.top_logprobs > MAX_TOP_LOGPROBS:
        raise invalid("top_logprobs", f"it is {request.top_logprobs}; at most {MAX_TOP_LOGPROBS} are sent")
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text, "text")
        case "token_ids":
            return TokenPrompt(ids_of(request.token_ids.ids, "token_ids.ids"))
        case _:
            raise invalid("text", "there is no input; give one of text and token_ids")


def ids_of(ids: Sequence[int], field: str) -> tuple[int, ...]:
    """Return token ids, unless there are too many to look at."""
    if len(ids) > MAX_IDS:
        raise invalid(field, f"there are {len(ids)}; at most {MAX_IDS} are taken")
    return tuple(ids)


def score_asked(request: score_pb2.ScoreRequest, ids: tuple[int, ...], field: str, request_id: str) -> Asked:
    """Ask for the log-probability of each token but the first: all but the last are a prompt, and only it may follow.

    So a text may fill the whole context, and nothing is computed that is not asked for.
    """
    return Asked(
        request_id=request_id,
        model=request.model,
        prompt=TokenPrompt(ids[:-1], field),
        sampling={"temperature": 0.0, "allowed_token_ids": ids[-1:]},
        max_new_tokens=1,
        ignore_eos=True,
        output=Output(text=False, logprobs=True, top_logprobs=request.top_logprobs, prompt_logprobs=True),
    )


def _prompt(request: generate_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            return TextPrompt(request.prompt)
        case "token_ids":
            return TokenPrompt(ids_of(request.token_ids.ids, "token_ids.ids"))
        case "chat":
            return read_chat(request.chat)
        case _:
            raise invalid("prompt", "there is no input; give one of prompt, token_ids and chat")


def _sampling(sampling: sampling_pb2.SamplingParams) -> dict[str, Any]:
    """Return the settings that are given, by the engine's names, each of them sound by itself."""
    if len(sampling.logit_bias) > MAX_BIAS:
        raise invalid("sampling.logit_bias", f"it has {len(sampling.logit_bias)} entries; at most {MAX_BIAS} are taken")
    given = {name: getattr(sampling, field) for name, field in _SAMPLING.items() if sampling.HasField(field)}
    if sampling.logit_bias:
        given["logit_bias"] = tuple(sorted(sampling.logit_bias.items()))
    if sampling.allowed_token_ids:
        given["allowed_token_ids"] = ids_of(sampling.allowed_token_ids, "sampling.allowed_token_ids")
    for name, value in given.items():
        _check(f"sampling.{_SAMPLING.get(name, name)}", SamplingParams, **{name: value})
    return given


def _bad_words(words: Sequence[str]) -> tuple[str, ...]:
    if len(words) > MAX_BAD_TEXTS:
        raise invalid("sampling.bad_words", f"there are {len(words)}; at most {MAX_BAD_TEXTS} are taken")
    for index, word in enumerate(words):
        if not 0 < len(word) <= MAX_STOP_LENGTH:
            raise invalid(f"sampling.bad_words[{index}]", f"it must have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(words)


def _output(output: generate_pb2.OutputOptions) -> Output:
    if output.top_logprobs > MAX_TOP_LOGPROBS:
        problem = f"it is {output.top_logprobs}; at most {MAX_TOP_LOGPROBS} are sent"
        raise invalid("output.top_logprobs", problem)
    text = output.text if output.HasField("text") else True
    if output.echo_prompt and not text:
        raise invalid("output.echo_prompt", "no text is sent; leave it unset, or set output.text to true")
    return Output(
        text=text,
        ids=output.token_ids,
        logprobs=output.logprobs,
        top_logprobs=output.top_logprobs,
        prompt_logprobs=output.prompt_logprobs,
        echo=output.echo_prompt,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        min_tokens=_at_least_one(output, "stream_min_tokens", "output") or 1,
        max_delay=_seconds(output, "stream_max_delay_ms"),
    )


def _constraint(constraint: generate_pb2.Constraint) -> Constraint:
    # A message of many short choices has twice the bytes of their texts, at most.
    if constraint.ByteSize() > 4 * MAX_CONSTRAINT:
        problem = f"it has {constraint.ByteSize()} bytes; no constraint may have more than {MAX_CONSTRAINT}"
        raise invalid(f"constraint.{constraint.WhichOneof('kind')}", problem)
    match constraint.WhichOneof("kind"):
        case "json_object":
            if not constraint.json_object:
                raise invalid("constraint.json_object", "it is false; set it to true, or leave the constraint unset")
            return Constraint(kind="json_object")
        case "choice":
            if not constraint.choice.texts:
                raise invalid("constraint.choice.texts", "there is no text to choose from; give at least one")
            return Constraint(kind="choice", choices=tuple(constraint.choice.texts))
        case "json_schema" | "regex" | "ebnf" as kind:
            text: str = getattr(constraint, kind)
            if not text:
                raise invalid(f"constraint.{kind}", "it is empty")
            return Constraint(kind=kind, text=text)
        case _:
            raise invalid("constraint", "it says nothing; set one of its fields, or leave it unset")


def _check_runtime(runtime: generate_pb2.RuntimeOptions) -> None:
    """Refuse to compute otherwise than this build does: every layer of every token, as the artifact has it."""
    for path, value, known, honoured in (
        ("early_exit.mode", runtime.early_exit.mode, generate_pb2.EarlyExitMode, generate_pb2.EARLY_EXIT_MODE_OFF),
        ("speculation.mode", runtime.speculation.mode, generate_pb2.SpeculationMode, generate_pb2.SPECULATION_MODE_OFF),
        ("exactness", runtime.exactness, generate_pb2.Exactness, generate_pb2.EXACTNESS_LOSSLESS),
    ):
        if value not in known.values():
            raise invalid(f"runtime.{path}", f"{value} is not one of {', '.join(known.keys())}")
        if value not in (0, honoured) and path == "exactness":
            problem = f"{known.Name(value)} cannot be met by this build; it computes EXACTNESS_LOSSLESS"
            raise exactness(f"runtime.{path}", problem)
        if value not in (0, honoured):
            problem = f"{known.Name(value)} is not in this build; {known.Name(honoured)} is"
            raise unsupported(f"runtime.{path}: {problem}", f"runtime.{path}")
    if len(runtime.cache_salt.encode()) > MAX_SALT:
        raise invalid("runtime.cache_salt", f"it must have at most {MAX_SALT} bytes")


def _optional(message: ProtoMessage, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _seconds(message: ProtoMessage, field: str) -> float | None:
    milliseconds = _optional(message, field)
    return None if milliseconds is None else milliseconds / 1000


def _at_least_one(message: ProtoMessage, field: str, path: str) -> int | None:
    value: int | None = _optional(message, field)
    if value == 0:
        raise invalid(f"{path}.{field}", "it is 0; it must be at least 1, or left unset")
    return value


def _check(path: str, params: type[SamplingParams | StoppingParams], **value: Any) -> None:
    """Let the engine's own bounds speak for one field."""
    if None in value.values():
        return
    try:
        params(**value)
    except ValueError as error:
        raise invalid(path, str(error)) from None


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOP_TEXTS:
        raise invalid("stopping.stop", f"there are {len(stops)} stop texts; at most {MAX_STOP_TEXTS} are taken")
    for index, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise invalid(f"stopping.stop[{index}]", f"it must have 1 to {MAX_STOP_LENGTH} characters")
