"""Who may call: tokens in a file, and what needs one that is an admin's."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pressd.client import CallError
from pressd.server.access import ADMIN, Access, read_tokens
from pressd.server.errors import Refusal
from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc

USER, ADMIN_TOKEN, LATER = "user-0123456789abcdef", "admin-0123456789abcdef", "later-0123456789abcdef"
GENERATE = "/pressd.v1.Inference/Generate"
FLUSH = "/pressd.v1.Control/FlushPrefixCache"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"# who may call\n{USER}\n\n{ADMIN_TOKEN} admin # it is ours\n")
    return file


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.mark.parametrize(
    ("metadata", "method", "reason"),
    [
        ((), GENERATE, "TOKEN"),
        (bearer(LATER), GENERATE, "TOKEN"),
        (bearer(USER[:-1]), GENERATE, "TOKEN"),
        (bearer(""), GENERATE, "TOKEN"),
        (bearer(USER) * 2, GENERATE, "TOKEN"),
        ((("authorization", f"Basic {USER}"),), GENERATE, "TOKEN"),
        ((("authorization", USER),), GENERATE, "TOKEN"),
        (bearer(USER), GENERATE, None),
        ((("authorization", f"bearer  {USER} "),), GENERATE, None),
        (bearer(ADMIN_TOKEN), GENERATE, None),
        ((), FLUSH, "TOKEN"),
        (bearer(USER), FLUSH, "NOT_ADMIN"),
        (bearer(ADMIN_TOKEN), FLUSH, None),
        ((), "/grpc.health.v1.Health/Check", None),
        ((), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "TOKEN"),
    ],
)
def test_a_call_needs_a_token_and_some_an_admins(
    tokens: Path, metadata: tuple[tuple[str, str], ...], method: str, reason: str | None
) -> None:
    access = Access(tokens)
    if reason is None:
        access.require(method, metadata)
        return
    with pytest.raises(Refusal) as caught:
        access.require(method, metadata)
    assert caught.value.reason == reason
    assert not any(token[:8] in caught.value.message for token in (USER, ADMIN_TOKEN, LATER))


@pytest.mark.parametrize("method", sorted(ADMIN))
def test_without_an_admin_there_is_nothing_for_one_to_do(tmp_path: Path, method: str) -> None:
    (file := tmp_path / "tokens").write_text(USER)
    for access, metadata in ((Access(), ()), (Access(file), bearer(USER))):
        with pytest.raises(Refusal) as caught:
            access.require(method, metadata)
        assert caught.value.reason == "ADMIN_DISABLED"
    Access().require(GENERATE, ())


def test_what_needs_an_admin_is_what_the_promise_says() -> None:
    promise = (Path(__file__).parent.parent.parent / "protos/pressd/v1/control.proto").read_text()
    told = re.findall(r"Needs the admin token\.\n\s*rpc (\w+)", promise)
    assert sorted(ADMIN) == sorted(f"/pressd.v1.Control/{name}" for name in told)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has 0 tokens"),
        (b"# nobody\n", "has 0 tokens"),
        (b"short\n", "line 1: a token must have 16 to 4096 visible"),
        (f"{USER}\n{LATER} admni\n".encode(), "line 2: after a token there may be `admin`"),
        (f"{USER}\n{USER} admin\n".encode(), "line 2: this token was there before"),
        ("ü".encode() * 16, "line 1: a token must have"),
        (b"\xff" * 16, "is not text"),
        (b"\n".join(b"%016d" % number for number in range(1001)), "has 1001 tokens"),
    ],
)
def test_a_bad_file_is_refused_without_a_token_in_the_message(tmp_path: Path, content: bytes, complaint: str) -> None:
    (file := tmp_path / "tokens").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_tokens(file)
    assert str(file) in str(caught.value)
    assert USER not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        read_tokens(tmp_path / "absent")


@pytest.fixture
def guarded(serve: Callable[..., Any], echo: Path, tokens: Path) -> Any:
    server = serve(echo, "--token-file", str(tokens))
    health = health_pb2.HealthCheckRequest(service="pressd.v1.Inference")
    with grpc.insecure_channel(server.target) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health, timeout=60)  # which needs no token
        while next(watching).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        watching.cancel()
    return server


def call(server: Any, token: str | None) -> CallError | None:
    """Ask for a completion; return how it failed."""
    request = generate_pb2.GenerateRequest(token_ids={"ids": [5]}, output={"text": False})
    with grpc.insecure_channel(server.target) as channel:
        try:
            metadata = bearer(token) if token else ()
            inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return CallError(error)
    return None


@pytest.mark.system
def test_the_server_keeps_strangers_out(guarded: Any) -> None:
    assert call(guarded, USER) is None
    for token in (None, LATER):
        error = call(guarded, token)
        assert error is not None
        assert (error.code.name, error.reason) == ("UNAUTHENTICATED", "TOKEN")
        assert error.request_id
    guarded.await_metric(2, "pressd_requests_rejected_total", reason="auth")
    guarded.await_metric(2, "pressd_requests_total", code="UNAUTHENTICATED")
    with grpc.insecure_channel(guarded.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([ask]), timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert len(list(stub.ServerReflectionInfo(iter([ask]), metadata=bearer(USER), timeout=60))) == 1
    text = guarded.log_text()
    assert not any(token in text for token in (USER, ADMIN_TOKEN, LATER))


@pytest.mark.system
def test_a_stranger_is_refused_before_his_message_is_read(guarded: Any) -> None:
    answered = threading.Event()

    def nothing() -> Iterator[bytes]:
        answered.wait()
        yield from ()

    with grpc.insecure_channel(guarded.target) as channel:
        for method in (GENERATE, FLUSH):
            try:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.stream_unary(method)(nothing(), timeout=60)
            finally:
                answered.set()
            assert CallError(caught.value).reason == "TOKEN"
            answered.clear()


@pytest.mark.system
def test_an_admin_may_flush_and_drain(guarded: Any) -> None:
    with grpc.insecure_channel(guarded.target) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        for token, code in ((USER, "PERMISSION_DENIED"), (LATER, "UNAUTHENTICATED")):
            for method in (stub.FlushPrefixCache, stub.Drain):
                request = control_pb2.DrainRequest() if method is stub.Drain else control_pb2.FlushPrefixCacheRequest()
                with pytest.raises(grpc.RpcError) as caught:
                    method(request, metadata=bearer(token), timeout=60)
                assert caught.value.code().name == code
        for absent, asked in (
            ("LoadModel", control_pb2.LoadModelRequest()),
            ("UnloadModel", control_pb2.UnloadModelRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(getattr(stub, absent)(asked, metadata=bearer(ADMIN_TOKEN), timeout=60))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert f"{absent} is not in this build" in str(caught.value.details())
        assert call(guarded, USER) is None
        flushed = stub.FlushPrefixCache(control_pb2.FlushPrefixCacheRequest(), metadata=bearer(ADMIN_TOKEN), timeout=60)
        assert flushed.num_blocks == 1  # the scripted engine's count of requests
        drain = control_pb2.DrainRequest(timeout_seconds=-1)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Drain(drain, metadata=bearer(ADMIN_TOKEN), timeout=60)
        assert list(CallError(caught.value).fields) == ["timeout_seconds"]
        guarded.allow_steps(2)  # one is made; the next request cannot end
        inference = inference_pb2_grpc.InferenceStub(channel)
        request = generate_pb2.GenerateRequest(token_ids={"ids": [5, 6, 7]}, output={"text": False})
        stream = inference.GenerateStream(request, metadata=bearer(USER), timeout=60)
        assert next(stream).HasField("accepted")
        answer = stub.Drain(control_pb2.DrainRequest(timeout_seconds=60), metadata=bearer(ADMIN_TOKEN), timeout=60)
        assert answer.num_live == 1
        error = call(guarded, USER)
        assert error is not None
        assert error.reason == "DRAINING"
        guarded.allow_all_steps()
        assert list(stream)[-1].finished.reason == generate_pb2.FINISH_REASON_EOS
    assert guarded.process.wait(60) == 0


@pytest.mark.system
def test_a_drain_that_may_not_wait_ends_at_once(guarded: Any) -> None:
    guarded.allow_steps(0)
    with grpc.insecure_channel(guarded.target) as channel:
        request = generate_pb2.GenerateRequest(token_ids={"ids": [5]}, output={"text": False})
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request, metadata=bearer(USER), timeout=60)
        assert next(stream).HasField("accepted")
        drain = control_pb2.DrainRequest(timeout_seconds=0)
        control_pb2_grpc.ControlStub(channel).Drain(drain, metadata=bearer(ADMIN_TOKEN), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert CallError(caught.value).reason == "DRAIN_TIMEOUT"
    assert guarded.process.wait(60) == 0


@pytest.mark.system
def test_the_file_is_followed(guarded: Any, tokens: Path, eventually: Callable[..., None]) -> None:
    assert call(guarded, LATER) is not None
    draft = tokens.with_name("draft")
    draft.write_text(f"{LATER}\n")
    draft.replace(tokens)
    eventually(lambda: call(guarded, LATER) is None, "the new token is taken")
    assert call(guarded, USER) is not None
    # A file that became unusable is not used, which is said once.
    tokens.write_text("oops\n")
    guarded.await_event("changed files are not used")
    tokens.unlink()

    def complaints() -> int:
        return sum(line["event"] == "changed files are not used" for line in guarded.log_lines())

    eventually(lambda: complaints() == 2, "the file that is gone was missed")
    assert call(guarded, LATER) is None
    draft.write_text(f"{USER}\n")
    draft.replace(tokens)
    eventually(lambda: call(guarded, USER) is None, "the next good file is taken")
    assert call(guarded, LATER) is not None
    assert complaints() == 2
