"""What calls were made, what their clients saw of them, and whether that is what was promised."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from pressd.client import CallError
from pressd.v1 import generate_pb2

# Seconds that no call takes unless it is told to.
PATIENCE = 60.0
# Statuses that a client may be told at any time; the queue of these tests is short.
ALWAYS = {("RESOURCE_EXHAUSTED", "QUEUE_FULL")}
# Those it may be told while something is wrong with the server.
ENGINE_DOWN = {("UNAVAILABLE", "ENGINE_DOWN"), ("UNAVAILABLE", "STARTING")}
DRAINING = {("UNAVAILABLE", "DRAINING"), ("UNAVAILABLE", "DRAIN_TIMEOUT")}
# A call that reached no server, or one that stopped before gRPC had handed it over: that gRPC cancels (grpc#41785).
NO_SERVER = {("UNAVAILABLE", ""), ("CANCELLED", "")}
LATE = {("DEADLINE_EXCEEDED", "")}
SLOW = {("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")}
RETRIED = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}


@dataclass
class Attempt:
    """One call as its client saw it. `length` None: the answer is the prompt, else it is said over and over.

    `as_ids`: the prompt is digits, and travels as ids (each the digit plus one) for a model without a tokenizer.
    `may_end` are the statuses beside OK that this client has asked for; `left` says that it did not wait for the end.
    """

    request_id: str
    prompt: str
    length: int | None = None
    as_ids: bool = False
    may_end: set[tuple[str, str]] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    accepted: bool = False
    cancel_called: bool = False
    left: bool = False
    text: str = ""
    num_tokens: int = 0
    finish: str = ""
    status: tuple[str, str] = ("", "")  # code and reason
    retry_after: float | None = None

    def request(self) -> generate_pb2.GenerateRequest:
        request = generate_pb2.GenerateRequest(request_id=self.request_id)
        if self.as_ids:
            request.token_ids.ids.extend(int(digit) + 1 for digit in self.prompt)
            request.output.text, request.output.token_ids = False, True
        else:
            request.prompt = self.prompt
        if self.length is not None:
            request.stopping.ignore_eos, request.stopping.max_new_tokens = True, self.length
        return request

    def saw(self, event: generate_pb2.GenerateEvent) -> None:
        """Note an event; raises AssertionError if it is not what comes next."""
        assert event.request_id == self.request_id
        assert not self.finish, "an event behind Finished"
        assert event.HasField("accepted") != self.accepted, "Accepted is the first event and no other"
        self.accepted = True
        if event.HasField("delta"):
            self.text += "".join(str(token.id - 1) for token in event.delta.tokens) if self.as_ids else event.delta.text
            self.num_tokens += event.delta.num_tokens
        elif event.HasField("finished"):
            self._finished(event.finished)

    def answered(self, response: generate_pb2.GenerateResponse) -> None:
        """Note the answer of Generate."""
        (completion,) = response.completions
        self.text, self.num_tokens = completion.text, completion.finished.usage.completion_tokens
        self._finished(completion.finished)
        self.end("OK")

    def failed(self, error: grpc.RpcError) -> None:
        """Note the status that a call ended with."""
        told = CallError(error)
        self.retry_after = told.retry_after
        self.end(told.code.name, told.reason)

    def end(self, code: str, reason: str = "") -> None:
        assert not self.ended, f"{self} ended a second time"
        self.status, self.ended = (code, reason), time.monotonic()

    def complaints(self, troubles: Iterable["Trouble"]) -> Iterator[str]:
        """All that is wrong with how it ended."""
        expected = self.prompt if self.length is None else self.prompt * (self.length // len(self.prompt) + 1)
        if not self.ended:
            yield "it has no end"
        if not expected.startswith(self.text):
            yield f"its text is {self.text!r}"
        if self.status[0] == "OK":
            yield from self._about_finish(expected)
        elif not self.left:
            yield from self._about_status([trouble for trouble in troubles if trouble.touches(self)])

    def _about_finish(self, expected: str) -> Iterator[str]:
        if self.finish == "EOS":
            right = self.length is None and self.text == self.prompt
        elif self.finish == "MAX_TOKENS":
            right = self.num_tokens == self.length and self.text == expected[: self.length]
        else:
            right = self.finish == "CANCELLED" and self.cancel_called
        if not right:
            yield f"it ended by {self.finish or 'nothing'} after {self.num_tokens} tokens"

    def _about_status(self, troubles: list["Trouble"]) -> Iterator[str]:
        excused = any(self.status in trouble.statuses for trouble in troubles)
        excused |= not self.accepted and self.status in NO_SERVER and any(t.server_goes for t in troubles)
        if not excused and self.status not in ALWAYS | self.may_end:
            yield f"nothing excuses {self.status}"
        if self.status[0] in RETRIED and self.status[1] and self.retry_after is None:
            yield "nobody told when to come back"
        if self.finish:
            yield "it had finished"

    def _finished(self, finished: generate_pb2.Finished) -> None:
        self.finish = generate_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
        assert finished.usage.completion_tokens == self.num_tokens


@dataclass
class Trouble:
    """A time in which calls may fail in certain ways, because of something done to the server."""

    statuses: set[tuple[str, str]]
    server_goes: bool = False
    began: float = field(default_factory=time.monotonic)
    ended: float = float("inf")

    def touches(self, attempt: Attempt) -> bool:
        return self.began <= attempt.ended and attempt.began <= self.ended


class Ledger:
    """Everything that was asked of one server process."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.troubles: list[Trouble] = []

    def open(self, prompt: str, **kept: Any) -> Attempt:
        """Begin a call."""
        self.attempts.append(Attempt(f"request-{len(self.attempts)}", prompt, **kept))
        return self.attempts[-1]

    def begin_trouble(self, statuses: set[tuple[str, str]], *, server_goes: bool = False) -> Trouble:
        """From now on calls may end so."""
        self.troubles.append(Trouble(statuses, server_goes))
        return self.troubles[-1]

    @contextmanager
    def trouble(self, statuses: set[tuple[str, str]]) -> Iterator[None]:
        """A block in which calls may end so."""
        trouble = self.begin_trouble(statuses)
        yield
        trouble.ended = time.monotonic()

    def complaints(self, log: Iterable[dict[str, Any]]) -> list[str]:
        """All that is wrong, by the clients' word and by the server's log, once all calls are over."""
        told: dict[str, list[str]] = {}
        for line in log:
            if line["event"] == "call" and line["method"] in ("Generate", "GenerateStream"):
                told.setdefault(line["request_id"], []).append(line["code"])
        return [
            f"{attempt}: {complaint}"
            for attempt in self.attempts
            for complaint in (
                *attempt.complaints(self.troubles),
                *_about_log(attempt, told.get(attempt.request_id, [])),
            )
        ]

    def ends(self) -> Counter[str]:
        """How many ended in which way."""
        return Counter(attempt.finish or ":".join(filter(None, attempt.status)) for attempt in self.attempts)


def _about_log(attempt: Attempt, codes: list[str]) -> Iterator[str]:
    """The server must have ended what it accepted once, and as the client was told."""
    if attempt.accepted and len(codes) != 1:
        yield f"the server ended it {len(codes)} times: {codes}"
    if len(codes) > 1:
        yield f"the server saw it {len(codes)} times"
    knows_the_end = not attempt.left and attempt.status not in LATE  # of a deadline each side has its own clock
    if codes and knows_the_end and codes[0] != attempt.status[0]:
        yield f"the server says that it ended with {codes[0]}"
