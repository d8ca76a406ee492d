"""How a server starts, loses its engine, and ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pressd.client import CallError
from pressd.server import app
from pressd.server.settings import Settings
from pressd.v1 import control_pb2, generate_pb2, model_pb2

pytestmark = pytest.mark.system

Serve = Callable[..., Any]
Refused = Callable[..., CallError]
Eventually = Callable[[Callable[[], bool], str], None]
IDS = {"text": False, "token_ids": True}
READY = "pressd.v1.Inference"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE = 60


def begin(events: Generator[Any]) -> Generator[Any]:
    """Read the Accepted of a stream: from here on the server owes an answer."""
    assert next(events).HasField("accepted")
    return events


@pytest.fixture
def watch() -> Iterator[Callable[..., Iterator[int]]]:
    """Watches a server's health; gives each status as it changes."""
    channels = []

    def start(server: Any, service: str = READY) -> Iterator[int]:
        channels.append(grpc.insecure_channel(server.target))
        stub = health_pb2_grpc.HealthStub(channels[-1])
        answers = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE)
        return (answer.status for answer in answers)

    yield start
    for channel in channels:
        channel.close()


def test_port_is_bound_before_the_model_is_ready(
    serve: Serve, echo: Path, refused: Refused, watch: Callable[..., Iterator[int]]
) -> None:
    (echo / "hold").touch()
    server = serve(echo)
    statuses = watch(server)
    assert next(statuses) == NOT_SERVING
    with server.client() as client:
        assert client.is_serving("")
        assert client.server_info().state == control_pb2.SERVER_STATE_STARTING
        assert client.model().state == model_pb2.MODEL_STATE_LOADING
        error = refused(lambda: client.generate([5], **IDS), "UNAVAILABLE", "STARTING")
        assert error.retry_after
        (echo / "hold").unlink()
        assert next(statuses) == SERVING
        assert client.generate([5], **IDS).completions[0].tokens[0].id == 5


def test_engine_that_dies_fails_its_requests_and_comes_back(
    serve: Serve, echo: Path, refused: Refused, watch: Callable[..., Iterator[int]]
) -> None:
    server = serve(echo).await_ready()
    statuses, alive = watch(server), watch(server, "")
    assert (next(statuses), next(alive)) == (SERVING, SERVING)
    server.allow_steps(1)
    with server.client() as client:
        streams = [begin(client.stream([5, 6], **IDS)), begin(client.stream([7, 8], **IDS))]
        server.await_metric(2, "pressd_requests_running")
        (echo / "hold").touch()
        os.kill(server.engine_pid(), signal.SIGKILL)
        for stream in streams:
            error = refused(lambda stream=stream: list(stream), "UNAVAILABLE", "ENGINE_DOWN")
            assert "SIGKILL" not in error.message, "the cause is the operator's to know"
            assert error.retry_after
        assert next(statuses) == NOT_SERVING
        assert client.server_info().state == control_pb2.SERVER_STATE_ENGINE_DOWN
        refused(lambda: client.generate([5], **IDS), "UNAVAILABLE", "ENGINE_DOWN")
        assert not any(family.name == "pressd_requests_running" for family in server.families())
        server.allow_all_steps()
        (echo / "hold").unlink()
        assert next(statuses) == SERVING
        assert [token.id for token in client.generate([5, 6], **IDS).completions[0].tokens] == [5, 6]
        assert client.server_info().engine_restarts == 1
        assert client.is_serving("")
    server.await_metric(1, "pressd_engine_restarts_total")
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")
    assert server.stop() == 0


def test_defect_in_a_step_is_told_and_survived(serve: Serve, echo: Path, refused: Refused) -> None:
    server = serve(echo).await_ready()
    with server.client() as client:
        (echo / "poisoned").touch()
        error = refused(lambda: client.generate([5], **IDS), "UNAVAILABLE", "ENGINE_DOWN")
        assert "poisoned" not in error.message
        assert "RuntimeError: the step is poisoned" in server.await_event("engine is down")["cause"]
        (echo / "poisoned").unlink()
        server.await_metric(1, "pressd_engine_restarts_total")
        server.await_ready()
        assert client.generate([5], **IDS).completions[0].tokens[0].id == 5
    assert "scripted_engine.py" in server.log_text()  # the trace


def test_engine_that_cannot_be_restarted_makes_the_process_unsound(
    serve: Serve, echo: Path, watch: Callable[..., Iterator[int]]
) -> None:
    server = serve(echo).await_ready()
    alive = watch(server, "")
    assert next(alive) == SERVING
    (echo / "broken").write_text("the disk is gone")
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert next(alive) == NOT_SERVING  # after five starts that failed
    downs = [line for line in server.log_lines() if line["event"] == "engine is down"]
    assert len(downs) >= 6
    assert downs[1]["cause"] == "the disk is gone"
    waits = [line["restart_in_s"] for line in downs]
    assert waits == sorted(waits)
    (echo / "broken").unlink()
    server.await_ready()
    assert next(alive) == SERVING


def test_engine_ends_with_its_server_however_that_ends(serve: Serve, echo: Path, eventually: Eventually) -> None:
    server = serve(echo).await_ready()
    engine = psutil.Process(server.engine_pid())
    server.process.kill()
    eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine has ended")


def test_sigterm_lets_accepted_requests_finish(
    serve: Serve, echo: Path, refused: Refused, watch: Callable[..., Iterator[int]]
) -> None:
    server = serve(echo, "--max-batch", "2").await_ready()
    statuses = watch(server)
    assert next(statuses) == SERVING
    server.allow_steps(1)
    with server.client() as client:
        streams = [begin(client.stream([5 + n] * 3, **IDS)) for n in range(5)]
        server.process.send_signal(signal.SIGTERM)
        assert next(statuses) == NOT_SERVING
        error = refused(lambda: client.generate([5], **IDS), "UNAVAILABLE", "DRAINING")
        assert error.retry_after
        assert client.is_serving("")
        assert client.model().state == model_pb2.MODEL_STATE_DRAINING
        server.await_metric(1, "pressd_requests_rejected_total", reason="draining")
        server.allow_all_steps()
        with ThreadPoolExecutor(5) as pool:
            answers: list[list[Any]] = list(pool.map(list, streams))
    for n, events in enumerate(answers):
        assert [token.id for event in events for token in event.delta.tokens] == [5 + n] * 3
        assert events[-1].finished.reason == generate_pb2.FINISH_REASON_EOS
    assert server.process.wait(PATIENCE) == 0


def test_sigterm_ends_what_takes_too_long_with_a_status(serve: Serve, echo: Path, refused: Refused) -> None:
    server = serve(echo, "--shutdown-timeout", "0.5").await_ready()
    server.allow_steps(1)
    with server.client() as client:
        streams = [begin(client.stream([5] * 3, **IDS)) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            refused(lambda stream=stream: list(stream), "UNAVAILABLE", "DRAIN_TIMEOUT")
    assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(serve: Serve, echo: Path, second: signal.Signals) -> None:
    server = serve(echo).await_ready()
    server.allow_steps(1)
    with server.client() as client:
        stream = begin(client.stream([5] * 3, **IDS))
        server.process.send_signal(signal.SIGINT)
        server.await_event("draining")
        server.process.send_signal(second)
        with pytest.raises(CallError):
            list(stream)
    assert server.process.wait(PATIENCE) == 128 + second


def test_ctrl_c_reaches_the_group_and_still_drains(serve: Serve, echo: Path) -> None:
    server = serve(echo).await_ready()
    server.allow_steps(1)
    with server.client() as client:
        stream = begin(client.stream([5] * 3, **IDS))
        for process in (server.process.pid, server.engine_pid()):
            os.kill(process, signal.SIGINT)
        server.await_event("draining")
        server.allow_all_steps()
        assert sum(event.delta.num_tokens for event in stream) == 3
    assert server.process.wait(PATIENCE) == 0


def test_signal_while_loading_ends_at_once(serve: Serve, echo: Path) -> None:
    (echo / "hold").touch()
    assert serve(echo).stop() == 0


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `pressd serve` with the scripted engine until it ends by itself."""
    folder = Path(__file__).parent
    command = [sys.executable, str(folder / "scripted_serve.py"), "serve", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_taken_port_is_one_line(echo: Path, flag: str) -> None:
    other = {"--port": "--metrics-port", "--metrics-port": "--port"}[flag]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_serve(str(echo), flag, port, other, "0")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert port in ended.stderr
    assert "in use" in ended.stderr


def test_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    ended = run_serve(str(tmp_path / "absent"), "--port", "0", "--metrics-port", "0")
    assert (ended.returncode, ended.stdout) == (1, "")
    told = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert told == [f"pressd serve: {tmp_path / 'absent'} has no script.json; write one"]


def test_tokenizer_that_cannot_be_loaded_is_one_line(echo: Path) -> None:
    (echo / "tokenizer.json").write_text("{}")
    ended = run_serve(str(echo), "--port", "0", "--metrics-port", "0")
    told = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert (ended.returncode, ended.stdout, len(told)) == (1, "", 1)
    assert told[0].startswith(f"pressd serve: {echo}: its tokenizer cannot be loaded: ")


def test_channel_options_are_real_keys() -> None:
    # gRPC ignores a key that it does not know; those it knows are strings in its library.
    library = Path(cygrpc.__file__).read_bytes()
    for key, _ in app.CHANNEL_OPTIONS:
        assert key.encode() + b"\0" in library, key


def test_wrong_setting_is_wrong_usage(echo: Path) -> None:
    ended = run_serve(str(echo), "--port", "x")
    assert (ended.returncode, ended.stderr) == (
        2,
        "pressd serve: --port is 'x'; give a port from 0 (any free one) to 65535\n",
    )


def test_cause_of_death_is_left_where_kubernetes_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    settings = Settings(model=tmp_path / "absent", served_name="absent", port=0, metrics_port=0)
    note = tmp_path / "termination-log"
    for exists in (False, True):
        if exists:
            note.touch()
        with pytest.raises(app.StartError, match=r"has no script\.json"):
            app.run(settings, print, factory="scripted_engine:create", termination_log=note)
        assert note.exists() == exists
    assert note.read_text() == f"{tmp_path / 'absent'} has no script.json; write one\n"
    with pytest.raises(app.StartError, match=r"has no script\.json"):  # and not what is wrong with the directory
        app.run(settings, print, factory="scripted_engine:create", termination_log=tmp_path)


def test_only_a_taken_port_is_said_to_be_taken() -> None:
    with pytest.raises(app.StartError, match=r"^port 0 on 192\.0\.2\.1: Cannot assign requested address$"):
        app._require_free("192.0.2.1", 0)  # an address that is nobody's
