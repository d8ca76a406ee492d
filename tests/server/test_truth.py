"""What is counted is what happened: known requests, and every series that must follow from them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pressd.client import CallError
from pressd.server import measure
from pressd.server import metrics as m
from pressd.server.call_metrics import METHODS
from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc, score_pb2, tokens_pb2

Labels = tuple[str, ...]
Counts = dict[Labels, float]

# The model's name is left out of all labels.
MODEL = "counted"
TIMEOUT = 60.0
KV_BLOCKS, BLOCK_SIZE, MAX_CONTEXT = 16, 16, 512
# What a step of the scripted engine says it took, in seconds.
STEP_SECONDS = 0.001
# What the test over the wire does not follow, and why.
ELSEWHERE = {
    m.WATCHDOG: "a time, looked at now and then: test_lifecycle.py",
    m.ENERGY: "the machine has meters or not: test_energy.py",
    m.BUILD: "a version: test_control.py",
    m.CALL_TIME: "how long it takes is nobody's to say; its counts and bounds are checked beside",
}
# Totals of the engine: the scripted one has none, so that they stay at zero here. See the test without a wire.
ENGINES = (*measure.TOTALS.values(), m.NUMERIC_ERRORS, m.SWAPPED)


def counts(samples: Iterable[Any], series: m.Series, suffix: str | None = None) -> Counts:
    """What is not zero of a series: of a histogram the number of observations, or with "_sum" their sum."""
    own = {"counter": "_total", "gauge": "", "histogram": "_count"}[series.kind]
    name = f"{series.prefix}{series.name}{own if suffix is None else suffix}"
    names = [label for label in series.labels if label != "model"]
    return {tuple(s.labels[label] for label in names): s.value for s in samples if s.name == name and s.value}


def samples_of(families: Iterable[Any]) -> list[Any]:
    return [sample for family in families for sample in family.samples]


class Truth:
    """What must be counted, by series, so far; and the sums of histograms that are known."""

    def __init__(self) -> None:
        self.counts = {series: Counter[Labels]() for series in m.SERIES if series not in ELSEWHERE}
        self.sums = {series: Counter[Labels]() for series in m.SERIES if series.kind == "histogram"}

    def add(self, series: m.Series, *labels: str, by: float = 1) -> None:
        self.counts[series][labels] += by  # type: ignore[assignment]  # a Counter of numbers

    def observe(self, series: m.Series, value: float, *labels: str, times: int = 1) -> None:
        self.add(series, *labels, by=times)
        self.sums[series][labels] += value * times  # type: ignore[assignment]

    def call(self, method: str, code: str = "OK", *, received: int = 1, sent: int = 1) -> None:
        """A call of the full name of a method, with the messages that its client sent and got."""
        labels = METHODS[method]
        self.add(m.CALLS_STARTED, *labels)
        self.add(m.CALL_MESSAGES_IN, *labels, by=received)
        self.add(m.CALL_MESSAGES_OUT, *labels, by=sent)
        self.add(m.CALLS_HANDLED, *labels, "".join(word.capitalize() for word in code.split("_")).replace("Ok", "OK"))

    def ours(
        self, method: str, code: str = "OK", reason: str = "", *, sent: int | None = None, received: int = 1
    ) -> None:
        """A call of pressd.v1, by its end."""
        name = method.rpartition("/")[2]
        spelled = code.replace("CANCELLED", "CANCELED")
        self.call(method, spelled, sent=(code == "OK") if sent is None else sent, received=received)
        self.add(m.REQUESTS, name, code, reason)
        if name in ("Generate", "GenerateStream", "Score"):
            self.add(m.REQUEST_DURATION, code)

    def request(
        self,
        num_prompt: int,
        *,
        computed: Iterable[int] = (),
        sent: int | None = None,
        cached: int = 0,
        begun: bool = True,
    ) -> None:
        """A request that reached the engine, with the tokens that its sequences got there."""
        made = list(computed)
        self.observe(m.REQUEST_PROMPT, num_prompt)
        self.observe(m.REQUEST_GENERATED, sum(made) if sent is None else sent)
        self.add(m.GENERATED_TOKENS, by=sum(made))
        if begun:
            self.add(m.QUEUE_TIME)
        if any(made):
            for series in (m.PREFILL_TIME, m.DECODE_TIME, m.FIRST_TOKEN):
                self.add(series)
            self.add(m.PROMPT_TOKENS, by=num_prompt)
            self.add(m.CACHED_TOKENS, "host", by=cached)
        self.add(m.INTER_TOKEN, by=sum(num - 1 for num in made if num))
        self.add(m.PER_TOKEN, by=sum(num > 1 for num in made))

    def sequence(self, num_prompt: int, num_tokens: int, *, eos: bool) -> None:
        """Steps of a sequence that ran alone: one token each, and one more that says it is over."""
        for number in range(num_tokens + eos):
            first, last = not number, eos and number == num_tokens
            self.observe(m.STEP_TIME, STEP_SECONDS, "mixed" if first else "decode")
            self.observe(m.STEP_TOKENS, num_prompt * first + (not last))
            self.observe(m.BATCH_SIZE, 1)
            self.add(m.STEPS, "eager")
            self.add(m.DISPATCHES, "linear", "echo", by=2)

    def stream(self, events: Iterable[Any]) -> None:
        """Messages of a stream of tokens that its client got."""
        num_tokens = [event.delta.num_tokens for event in events]
        self.add(m.MESSAGES, by=len(num_tokens))
        self.add(m.WRITE_STALL, by=len(num_tokens))
        self.add(m.COALESCED, by=sum(num - 1 for num in num_tokens if num > 1))

    @property
    def num_steps(self) -> int:
        return int(self.counts[m.STEPS]["eager",])

    def check(self, samples: list[Any]) -> None:
        """Fail with all series that say something else."""
        found = {series.name: counts(samples, series) for series in self.counts}
        expected = {series.name: {k: n for k, n in known.items() if n} for series, known in self.counts.items()}
        assert found == expected
        for series in (m.REQUEST_PROMPT, m.REQUEST_GENERATED, m.STEP_TIME, m.STEP_TOKENS, m.BATCH_SIZE):
            sums = {labels: pytest.approx(total) for labels, total in self.sums[series].items() if total}
            assert counts(samples, series, "_sum") == sums, series.name
        # Calls of all kinds are as many as their statuses, and took as long as requests say at least.
        assert counts(samples, m.CALL_TIME) == {k: n for k, n in self.counts[m.CALLS_STARTED].items() if n}
        generations = sum(counts(samples, m.REQUEST_DURATION, "_sum").values())
        times = counts(samples, m.CALL_TIME, "_sum")
        assert sum(seconds for (*_, name), seconds in times.items() if name in measure.GENERATING) >= generations

    def check_times(self, samples: list[Any], ends: list[Any]) -> None:
        """Fail unless the sums are those of the last messages of these answers, which are all there were."""
        timings = [end.timings for end in ends]
        gaps = [end.usage.completion_tokens - 1 for end in ends]
        decoding = [timing.decode_seconds for timing in timings]
        sums = {
            m.QUEUE_TIME: sum(timing.queue_seconds for timing in timings),
            m.PREFILL_TIME: sum(timing.prefill_seconds for timing in timings),
            m.DECODE_TIME: sum(decoding),
            m.FIRST_TOKEN: sum(timing.ttft_seconds for timing in timings),
            m.INTER_TOKEN: sum(decoding),
            m.PER_TOKEN: sum(time / num for time, num in zip(decoding, gaps, strict=True) if num),
        }
        assert {series.name: counts(samples, series, "_sum")[()] for series in sums} == {
            series.name: pytest.approx(total, rel=1e-9) for series, total in sums.items()
        }
        total = counts(samples, m.REQUEST_DURATION, "_sum")["OK",]
        assert total >= sum(timing.total_seconds for timing in timings)


INFERENCE, CONTROL = "/pressd.v1.Inference", "/pressd.v1.Control"
HEALTH, REFLECTION = "/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection"


class Caller:
    """Calls a server and keeps account of what it saw."""

    def __init__(self, server: Any, channel: grpc.Channel) -> None:
        self.server = server
        self.truth = Truth()
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.control = control_pb2_grpc.ControlStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        self.reasons: set[str] = set()
        self.num_streamed = 0  # messages of all streams of tokens

    def generate(self, request: generate_pb2.GenerateRequest, reason: str, *, num_tokens: int, eos: bool) -> Any:
        """Have a whole answer, of one sequence that runs alone; return its Finished."""
        (completion,) = self.inference.Generate(request, timeout=TIMEOUT).completions
        self._answered("Generate", request, reason, [num_tokens], eos=eos)
        return completion.finished

    def stream(self, request: generate_pb2.GenerateRequest, reason: str, *, num_tokens: int, eos: bool) -> Any:
        """The same as a stream; of several sequences, that run one after another, each has so many tokens."""
        events = list(self.inference.GenerateStream(request, timeout=TIMEOUT))
        num_sequences = request.sampling.num_sequences or 1
        self.truth.stream(events)
        self.num_streamed += len(events)
        self._answered("GenerateStream", request, reason, [num_tokens] * num_sequences, eos=eos, sent=len(events))
        return events[-1].finished

    def refused(self, method: str, action: Callable[[], Any]) -> CallError:
        """Make a call that ends with a status."""
        with pytest.raises(grpc.RpcError) as caught:
            action()
        error = CallError(caught.value)
        rejection = measure.REJECTIONS.get(error.reason)
        # The message of a caller who may not call is not taken.
        self.truth.ours(method, error.code.name, received=rejection != "auth")
        if rejection is not None:
            self.reasons.add(rejection)
            self.truth.add(m.REJECTED, rejection)
        return error

    def settle(self) -> list[Any]:
        """Wait until the server has nothing to do and has written all of it down; return what it shows."""
        handled = sum(self.truth.counts[m.CALLS_HANDLED].values())
        self.server.await_metric(handled, "grpc_server_handled_total")
        for gauge in ("running", "waiting"):
            self.server.await_metric(self.truth.counts[RUNNING[gauge]][()], f"pressd_requests_{gauge}")
        return samples_of(self.server.families())

    def _answered(
        self, method: str, request: Any, reason: str, num_tokens: list[int], *, eos: bool, sent: int = 1
    ) -> None:
        num_prompt = len(request.token_ids.ids)
        self.truth.ours(f"{INFERENCE}/{method}", "OK", reason, sent=sent)
        self.truth.request(num_prompt, computed=num_tokens, cached=int(request.runtime.cache_salt or 0))
        for number in num_tokens:
            self.truth.sequence(num_prompt, number, eos=eos)


RUNNING = {"running": m.RUNNING, "waiting": m.WAITING}


def ask(ids: Iterable[int], **fields: Any) -> generate_pb2.GenerateRequest:
    """A request in ids; a prompt is answered with itself and the end."""
    return generate_pb2.GenerateRequest(
        token_ids=tokens_pb2.TokenIds(ids=ids), output={"text": False, "token_ids": True}, **fields
    )


@pytest.fixture
def served(serve: Callable[..., Any], scripted: Callable[..., Path], tmp_path: Path) -> Any:
    """A server that computes one sequence at a time and lets two wait."""
    model = scripted(tmp_path / MODEL, kv_blocks=KV_BLOCKS, max_context=MAX_CONTEXT)
    return serve(model, "--max-batch", "1", "--max-queue-requests", "2").await_ready()


@pytest.fixture
def caller(served: Any) -> Iterator[Caller]:
    with grpc.insecure_channel(served.target) as channel:
        caller = Caller(served, channel)
        # It took as many looks as it took to find it ready; from here on all is known.
        looks = counts(samples_of(served.families()), m.CALLS_STARTED)
        assert set(looks) == {METHODS[f"{HEALTH}/Check"]}
        for _ in range(int(sum(looks.values()))):
            caller.truth.call(f"{HEALTH}/Check")
        describe(caller.truth)
        yield caller


def describe(truth: Truth) -> None:
    """What the scripted engine says of itself, and what nobody uses yet."""
    truth.add(m.KV_BLOCKS, "float32", "free", by=KV_BLOCKS)
    truth.add(m.KV_BLOCK_TOKENS, "float32", by=BLOCK_SIZE)
    truth.add(m.KV_CAPACITY, "float32", by=KV_BLOCKS << 10)
    truth.add(m.WEIGHTS, "cpu", "dense", by=3 << 20)
    truth.add(m.DENSE, by=8 << 20)
    truth.add(m.UNFUSED, by=0)
    truth.add(m.MEMORY, "cpu", "weights", by=3 << 20)
    truth.add(m.MEMORY, "cpu", "kv", by=KV_BLOCKS << 10)
    truth.add(m.LOAD_TIME, "read", by=0.5)
    truth.add(m.CACHE_CONFIG, str(BLOCK_SIZE), str(KV_BLOCKS))
    truth.add(m.MODEL, "dense", "", "", "", "", "echo-1", "echo")


@pytest.mark.system
def test_every_series_follows_from_what_was_called(caller: Caller) -> None:
    truth, server = caller.truth, caller.server
    ends = complete_answers(caller)
    samples = caller.settle()
    truth.check(samples)
    truth.check_times(samples, ends)
    other_calls(caller)
    truth.check(caller.settle())
    refusals_and_cancels(caller)
    truth.check(caller.settle())
    assert caller.reasons == {"queue_full", "too_long", "kv_capacity", "queue_timeout", "auth"}
    assert {phase for (phase,) in truth.counts[m.CANCELLED]} == {"queued", "decode"}
    started = counts(samples := samples_of(server.families()), m.CALLS_STARTED)
    handled = counts(samples, m.CALLS_HANDLED)
    assert sum(started.values()) == sum(handled.values())


def complete_answers(caller: Caller) -> list[Any]:
    """Requests of one sequence each, one after another."""
    return [
        caller.generate(ask([5, 6, 7], runtime={"cache_salt": "2"}), "eos", num_tokens=3, eos=True),
        caller.stream(ask([5, 6, 7, 8], stopping={"max_new_tokens": 2}), "max_tokens", num_tokens=2, eos=False),
        caller.stream(ask([9] * 40), "eos", num_tokens=40, eos=True),
        caller.generate(ask([4], stopping={"max_new_tokens": 1}), "max_tokens", num_tokens=1, eos=False),
        caller.stream(ask([1, 2], stopping={"stop_token_ids": [2]}), "stop", num_tokens=1, eos=True),
    ]


def other_calls(caller: Caller) -> None:
    """Several sequences, scores, questions about the server, and a request for which it has no tokenizer."""
    truth = caller.truth
    caller.stream(ask([5, 6], sampling={"num_sequences": 2}), "eos", num_tokens=2, eos=True)
    # All but the last token are the prompt, and the last is what follows it.
    scored = caller.inference.Score(
        score_pb2.ScoreRequest(token_ids=tokens_pb2.TokenIds(ids=[1, 2, 3])), timeout=TIMEOUT
    )
    assert list(scored.ids) == [1, 2, 3]
    truth.ours(f"{INFERENCE}/Score")
    truth.request(2, computed=[1])
    truth.sequence(2, 1, eos=False)
    caller.control.GetModel(control_pb2.GetModelRequest(), timeout=TIMEOUT)
    truth.ours(f"{CONTROL}/GetModel")
    caller.control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
    truth.ours(f"{CONTROL}/GetServerInfo")
    unknown = generate_pb2.CancelRequest(request_id="nobody")
    caller.refused(f"{INFERENCE}/Cancel", lambda: caller.inference.Cancel(unknown, timeout=TIMEOUT))
    text = tokens_pb2.TokenizeRequest(text="x")
    caller.refused(f"{INFERENCE}/Tokenize", lambda: caller.inference.Tokenize(text, timeout=TIMEOUT))
    flush = control_pb2.FlushPrefixCacheRequest()
    caller.refused(f"{CONTROL}/FlushPrefixCache", lambda: caller.control.FlushPrefixCache(flush, timeout=TIMEOUT))
    assert caller.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status
    truth.call(f"{HEALTH}/Check")
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        caller.health.Check(health_pb2.HealthCheckRequest(service="no such"), timeout=TIMEOUT)
    truth.call(f"{HEALTH}/Check", "NOT_FOUND", sent=0)
    watching = caller.health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert next(watching).status
    caller.server.await_metric(1, "grpc_server_msg_sent_total", grpc_method="Watch")  # a message may arrive before
    watching.cancel()
    truth.call(f"{HEALTH}/Watch", "CANCELED")
    questions = [reflection_pb2.ServerReflectionRequest(list_services="") for _ in range(3)]
    answers = list(caller.reflection.ServerReflectionInfo(iter(questions), timeout=TIMEOUT))
    truth.call(f"{REFLECTION}/ServerReflectionInfo", received=3, sent=len(answers))


def refusals_and_cancels(caller: Caller) -> None:
    """While the engine stands still: what waits, what finds no place, what does not wait, and what is left."""
    truth, server = caller.truth, caller.server
    generate, generates = caller.inference.Generate, f"{INFERENCE}/Generate"
    server.allow_steps(truth.num_steps)
    first, second, third = (Begun(caller, number) for number in (1, 2, 3))
    for gauge, number in (("running", 1), ("waiting", 2)):
        server.await_metric(number, f"pressd_requests_{gauge}")
    caller.refused(generates, lambda: generate(ask([8]), timeout=TIMEOUT))  # nobody else may wait
    third.leave()
    truth.request(3, begun=False)
    truth.add(m.CANCELLED, "queued")
    server.await_metric(1, "pressd_requests_waiting")
    impatient = ask([8], scheduling={"queue_timeout_ms": 1})
    assert caller.refused(generates, lambda: generate(impatient, timeout=TIMEOUT)).reason == "QUEUE_TIMEOUT"
    truth.request(1, begun=False)
    # Long enough for a busy machine to hear of the call at all; it is waited for in full.
    assert caller.refused(generates, lambda: generate(ask([8]), timeout=3.0)).code.name == "DEADLINE_EXCEEDED"
    truth.request(1, begun=False)
    truth.add(m.CANCELLED, "queued")
    caller.refused(generates, lambda: generate(ask([1] * MAX_CONTEXT), timeout=TIMEOUT))
    too_much = ask([1] * 200, stopping={"max_new_tokens": 100})
    caller.refused(generates, lambda: generate(too_much, timeout=TIMEOUT))

    truth.sequence(3, 2, eos=False)
    server.allow_steps(truth.num_steps)
    first.read(2)
    first.leave()
    truth.request(3, computed=[2])
    truth.add(m.CANCELLED, "decode")
    truth.sequence(3, 1, eos=False)
    server.await_metric(0, "pressd_requests_waiting")
    server.allow_steps(truth.num_steps)
    second.read(1)
    caller.inference.Cancel(generate_pb2.CancelRequest(request_id="2"), timeout=TIMEOUT)
    truth.ours(f"{INFERENCE}/Cancel")
    second.end("cancelled")
    truth.request(3, computed=[1])
    truth.add(m.CANCELLED, "decode")


class Begun:
    """A stream of which the first message has come."""

    def __init__(self, caller: Caller, number: int) -> None:
        self._caller, self._truth = caller, caller.truth
        self._call = caller.inference.GenerateStream(ask([5, 6, 7], request_id=str(number)), timeout=TIMEOUT)
        self._events: list[Any] = []
        self._take(next(self._call))
        assert self._events[0].HasField("accepted")

    def read(self, num_tokens: int) -> None:
        while sum(event.delta.num_tokens for event in self._events) < num_tokens:
            self._take(next(self._call))

    def leave(self) -> None:
        """Drop the call, of which all that was sent has been read, when the server has written that down."""
        num_read = self._caller.num_streamed
        self._caller.server.await_metric(num_read, "grpc_server_msg_sent_total", grpc_method="GenerateStream")
        self._call.cancel()
        self._account("CANCELLED", "")

    def end(self, reason: str) -> None:
        self._take(*self._call)
        assert self._events[-1].HasField("finished")
        self._account("OK", reason)

    def _take(self, *events: Any) -> None:
        self._events += events
        self._caller.num_streamed += len(events)

    def _account(self, code: str, reason: str) -> None:
        self._truth.stream(self._events)
        self._truth.ours(f"{INFERENCE}/GenerateStream", code, reason, sent=len(self._events))


@pytest.mark.system
def test_gauges_tell_what_is_inside_and_draining_refuses(caller: Caller) -> None:
    truth, server = caller.truth, caller.server
    server.allow_steps(0)
    held = Begun(caller, 1)
    server.await_metric(1, "pressd_requests_running")
    server.process.terminate()
    server.await_event("draining")
    generate = caller.inference.Generate
    assert caller.refused(f"{INFERENCE}/Generate", lambda: generate(ask([8]), timeout=TIMEOUT)).reason == "DRAINING"
    assert caller.reasons == {"draining"}
    # The stream has begun and not ended; its block is taken.
    labels = METHODS[f"{INFERENCE}/GenerateStream"]
    for series, by in ((m.CALLS_STARTED, 1), (m.CALL_MESSAGES_IN, 1), (m.CALL_MESSAGES_OUT, 1), (m.MESSAGES, 1)):
        truth.add(series, *(labels if series is not m.MESSAGES else ()), by=by)
    truth.add(m.WRITE_STALL)
    truth.add(m.RUNNING)
    truth.add(m.KV_USAGE, by=1)
    truth.counts[m.KV_BLOCKS] = Counter({("float32", "used"): KV_BLOCKS})
    truth.add(m.KV_USED, "float32", by=KV_BLOCKS << 10)
    samples = caller.settle()
    found = {series: counts(samples, series) for series in truth.counts}
    assert found == {series: {k: n for k, n in known.items() if n} for series, known in truth.counts.items()}
    server.allow_all_steps()
    held.read(3)


def test_every_series_is_followed_or_excused() -> None:
    truth = Truth()
    assert set(truth.counts) | set(ELSEWHERE) == set(m.SERIES)
    assert not set(truth.counts) & set(ELSEWHERE)
    assert set(ENGINES) < set(truth.counts)
