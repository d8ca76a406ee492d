"""Who ends a server, by when, and what of its requests is lost: signals and calls of Drain, in any order."""

import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pressd.client import CallError
from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
TOKEN = "admin-0123456789abcdef"
BEARER = (("authorization", f"Bearer {TOKEN}"),)
PATIENCE = 60
LONG = 86400.0


class Busy:
    """A server with one live request, whose end waits for `finish`, and with a token for whoever has it."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self._channel = grpc.insecure_channel(server.target)
        self.stub = control_pb2_grpc.ControlStub(self._channel)
        server.allow_steps(1)
        self._stream = self._begin()

    def _begin(self) -> Generator[Any]:
        request = generate_pb2.GenerateRequest(
            token_ids={"ids": [5] * 3}, output=generate_pb2.OutputOptions(text=False)
        )
        events = inference_pb2_grpc.InferenceStub(self._channel).GenerateStream(
            request, metadata=BEARER, timeout=PATIENCE
        )
        assert next(events).HasField("accepted")
        return events  # type: ignore[no-any-return]

    def drain(self, timeout: float) -> None:
        request = control_pb2.DrainRequest(timeout_seconds=timeout)
        assert self.stub.Drain(request, metadata=BEARER, timeout=PATIENCE).num_live == 1

    def signal(self, number: signal.Signals, event: str) -> None:
        """Send a signal and wait until it was taken in."""
        self.server.process.send_signal(number)
        self.server.await_event(event)

    def finish(self) -> int:
        """Let the request go on; return how many tokens it brought."""
        self.server.allow_all_steps()
        return sum(event.delta.num_tokens for event in self._stream)

    def is_cut_off_with(self) -> str:
        """Wait until the request is cut off; return the reason, empty if the server took no time to give one."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._stream)
        return CallError(caught.value).reason

    def status(self) -> int:
        self._channel.close()
        status: int = self.server.process.wait(PATIENCE)
        return status


@pytest.fixture
def busy(serve: Serve, echo: Path, tmp_path: Path) -> Callable[..., Busy]:
    def start(*flags: str) -> Busy:
        (tokens := tmp_path / "tokens").write_text(f"{TOKEN} admin\n")
        server = serve(echo, "--token-file", str(tokens), *flags)
        return Busy(server.await_ready())

    return start


def test_signal_after_a_drain_lets_requests_finish_as_if_it_came_alone(busy: Callable[..., Busy]) -> None:
    """Kubernetes: a preStop hook that calls Drain, and SIGTERM as soon as that is over."""
    told = busy()
    told.drain(LONG)
    told.server.await_event("draining")
    told.signal(signal.SIGTERM, "still draining")
    assert told.finish() == 3
    assert told.status() == 0


def test_signal_brings_the_end_of_a_long_drain_nearer(busy: Callable[..., Busy]) -> None:
    told = busy("--shutdown-timeout", "0.2")
    told.drain(LONG)
    told.server.await_event("draining")
    told.server.process.send_signal(signal.SIGTERM)
    assert told.is_cut_off_with() == "DRAIN_TIMEOUT"
    assert told.status() == 0


def test_drain_brings_the_end_nearer_and_never_farther(busy: Callable[..., Busy]) -> None:
    told = busy("--shutdown-timeout", str(LONG))
    told.signal(signal.SIGTERM, "draining")
    told.drain(LONG)
    told.drain(0.0)
    assert told.is_cut_off_with() == "DRAIN_TIMEOUT"
    assert told.status() == 0


def test_second_signal_ends_a_drain_at_once(busy: Callable[..., Busy]) -> None:
    told = busy()
    told.drain(LONG)
    told.server.await_event("draining")
    told.signal(signal.SIGTERM, "still draining")
    told.server.process.send_signal(signal.SIGINT)
    assert told.is_cut_off_with() == ""
    assert told.status() == 128 + signal.SIGINT
