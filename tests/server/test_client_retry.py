"""When the client asks again, and when never, against a server that refuses as it is told."""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_inference import COARSE, Ask, Code, Fake, Waits, ask_stream, ask_stream_async, every_way, refusal, serving
from hypothesis import given
from hypothesis import strategies as st

from pressd.client import CallError, Retry
from pressd.client.retry import Attempts


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def target(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@every_way
@pytest.mark.parametrize("code", [Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE])
def test_refused_for_now_is_asked_again_when_the_server_says(
    fake: Fake, target: str, ask: Ask, answer: list[str], code: Code
) -> None:
    fake.plan = [refusal(code, retry_after=seconds) for seconds in (0.75, 0.125, 4.0)]
    waits = Waits()
    assert ask(target, retry=waits.policy()) == answer
    # At least our own: 0.5 s, doubled each time.
    assert waits == [0.75, 1.0, 4.0]
    assert len(fake.seen) == 4


@every_way
def test_after_the_last_attempt_the_error_is_the_servers(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    fake.plan = [refusal(Code.RESOURCE_EXHAUSTED, retry_after=0.25, reason=f"R{number}") for number in range(4)]
    waits = Waits()
    (error,) = ask(target, retry=waits.policy(attempts=3))
    assert (error.code, error.reason, error.retry_after) == (Code.RESOURCE_EXHAUSTED, "R2", 0.25)
    assert (waits, len(fake.seen)) == ([0.5, 1.0], 3)


@every_way
@pytest.mark.parametrize(
    "way",
    [
        refusal(Code.RESOURCE_EXHAUSTED),
        refusal(Code.UNAVAILABLE, reason="DRAINING"),
        refusal(Code.INTERNAL, retry_after=0.5),
        refusal(Code.INVALID_ARGUMENT),
        refusal(Code.UNKNOWN, reason=""),
    ],
    ids=["exhausted for good", "unavailable for good", "internal", "invalid", "unknown"],
)
def test_refused_for_good_is_not_asked_again(fake: Fake, target: str, ask: Ask, answer: list[str], way: Any) -> None:
    fake.plan = [way]
    waits = Waits()
    (error,) = ask(target, retry=waits.policy())
    assert error.code is way.code
    assert (waits, len(fake.seen)) == ([], 1)


@every_way
def test_without_a_policy_nothing_is_asked_again(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    fake.plan = [refusal(Code.RESOURCE_EXHAUSTED, retry_after=0.0)]
    (error,) = ask(target, retry=None)
    assert (error.retry_after, len(fake.seen)) == (0.0, 1)


@every_way
def test_unavailable_without_details_is_a_connection_that_failed(
    fake: Fake, target: str, ask: Ask, answer: list[str]
) -> None:
    fake.plan = [refusal(Code.UNAVAILABLE, reason="")]
    waits = Waits()
    assert ask(target, retry=waits.policy()) == answer
    assert waits == [0.5]


@every_way
def test_wait_that_would_pass_the_deadline_is_not_begun(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    """Attempts share one deadline: of 1000 s the second has what a wait of 400 s left, and a third would have none."""
    fake.plan = [refusal(Code.UNAVAILABLE, retry_after=seconds) for seconds in (400.0, 600.0)]
    waits = Waits()
    (error,) = ask(target, retry=waits.policy(longest_wait=5000.0), timeout=1000.0)
    assert (error.code, error.retry_after) == (Code.UNAVAILABLE, 600.0)
    assert waits == [400.0]
    first, second = fake.remaining
    assert second <= 600.0 * COARSE < first <= 1000.0 * COARSE


@every_way
def test_wait_that_is_longer_than_we_would_is_not_begun(fake: Fake, target: str, ask: Ask, answer: list[str]) -> None:
    fake.plan = [refusal(Code.UNAVAILABLE, retry_after=10.5)]
    waits = Waits()
    (error,) = ask(target, retry=waits.policy())
    assert (error.retry_after, waits, len(fake.seen)) == (10.5, [], 1)


@pytest.mark.parametrize("ask", [ask_stream, ask_stream_async])
def test_stream_that_has_begun_is_never_begun_again(fake: Fake, target: str, ask: Ask) -> None:
    fake.plan = [refusal(Code.UNAVAILABLE, retry_after=0.0), [refusal(Code.UNAVAILABLE, retry_after=0.0)]]
    waits = Waits()
    accepted, error = ask(target, retry=waits.policy())
    assert (accepted, error.code) == ("accepted", Code.UNAVAILABLE)
    assert (waits, len(fake.seen)) == ([0.5], 2)


@every_way
def test_server_that_comes_up_later_is_found(fake: Fake, ask: Ask, answer: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with contextlib.ExitStack() as stack:

        def start(seconds: float) -> None:
            if not started:
                started.append(stack.enter_context(serving(fake, address)))
            time.sleep(0.01)  # the channel tries again after 0.1 s, however often it is asked before

        async def start_async(seconds: float) -> None:
            start(seconds)

        started: list[str] = []
        assert ask(address, retry=Retry(attempts=100_000, sleep=start, sleep_async=start_async)) == answer


class FakeRpcError(grpc.RpcError):
    """A status as a client sees it."""

    def __init__(self, status: Any) -> None:
        self.code, self.details = lambda: status.code, lambda: status.details
        self.trailing_metadata = lambda: status.trailing_metadata


@given(
    asked=st.floats(0, 10) | st.none(),
    draws=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    first=st.floats(0, 8),
)
def test_wait_is_the_servers_or_a_share_of_a_doubling_one(
    asked: float | None, draws: list[float], first: float
) -> None:
    error = CallError(FakeRpcError(refusal(Code.UNAVAILABLE, retry_after=asked, reason="" if asked is None else "X")))
    left = iter(draws)
    attempts = Attempts(Retry(attempts=6, first_wait=first, longest_wait=10.0, draw=lambda: next(left)), None)
    for number, draw in enumerate(draws):
        floor = error.retry_after or 0.0
        assert attempts.wait_after(error) == max(floor, draw * min(10.0, first * 2**number))
    with pytest.raises(CallError):
        attempts.wait_after(error)


def test_one_may_ask_for_as_long_as_it_takes() -> None:
    """Doubling ends where it no longer matters: two to the 2,000th is no number of seconds."""
    error = CallError(FakeRpcError(refusal(Code.UNAVAILABLE, reason="")))
    attempts = Attempts(Retry(attempts=2002, draw=lambda: 1.0), None)
    assert {attempts.wait_after(error) for _ in range(2001)} == {0.5, 1.0, 2.0, 4.0, 8.0, 10.0}
