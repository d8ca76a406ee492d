"""The life of `pressd serve`: bind, load, serve, drain, end."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pressd.runtime.energy import EnergyMeter
from pressd.runtime.report import EngineInfo
from pressd.server import measure
from pressd.server import metrics as m
from pressd.server.access import Access
from pressd.server.call_metrics import CallMetrics
from pressd.server.control import ControlServicer
from pressd.server.credentials import TlsFiles, server_credentials
from pressd.server.door import Door, Phase
from pressd.server.ending import Ending, drain
from pressd.server.engine_client import EngineStartError
from pressd.server.health import HealthServicer
from pressd.server.interceptors import MAX_RESPONSE, CallInterceptor
from pressd.server.servicer import InferenceServicer
from pressd.server.settings import Settings
from pressd.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

log = logging.getLogger("pressd.app")

TERMINATION_LOG = Path("/dev/termination-log")
READY = "pressd.v1.Inference"
# Seconds between two looks at the watchdog, and for the last bytes out.
WATCH_INTERVAL = 5.0
LAST_BYTES_GRACE = 0.5


CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", MAX_RESPONSE),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # gRPC spreads the age by a tenth either way, so that clients do not all come back at once.
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
    ("grpc.max_concurrent_streams", 1024),
    # Metadata are a token and a few names. Between two different limits gRPC refuses at random.
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # Whoever has not said hello by then, in TLS or HTTP/2, is dropped.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
)


class StartError(Exception):
    """The server cannot start, or cannot go on; the message is one line for the user."""


def run(
    settings: Settings,
    announce: Callable[[str], None],
    *,
    factory: str,
    termination_log: Path = TERMINATION_LOG,
) -> int:
    """Serve until a signal; return the exit status. `announce` gets one line when requests are taken.

    Raises what ended it, StartError if that is the user's to mend, after leaving it where Kubernetes looks for the
    cause of death. `factory` makes the engine.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, announce, factory))
    except Exception as error:
        _leave_word(error, termination_log)
        raise


def _leave_word(error: Exception, termination_log: Path) -> None:
    """Write why it ended where Kubernetes looks; what cannot be written there must not hide the reason itself."""
    if termination_log.exists():
        text = str(error) if isinstance(error, StartError) else f"{type(error).__name__}: {error}"
        try:
            termination_log.write_text(f"{text}\n", encoding="utf-8")
        except OSError as trouble:
            log.warning(
                "the cause of death is not written", extra={"file": str(termination_log), "cause": str(trouble)}
            )


async def _serve(settings: Settings, announce: Callable[[str], None], factory: str) -> int:
    metrics = m.Metrics(settings.served_name)
    door = Door(settings, metrics, factory)
    ending = Ending(door)
    with contextlib.ExitStack() as stack:  # the metrics port closes last
        try:
            metrics_port = stack.enter_context(m.exposed(metrics, settings.host, settings.metrics_port))
        except OSError as error:
            raise StartError(f"metrics port {settings.metrics_port} on {settings.host}: {error.strerror}") from None
        access, credentials = _guards(settings)
        async with _listening(door, access, credentials) as (health, port):
            if settings.is_open:
                log.warning("strangers can reach it", extra={"host": settings.host, "there_is_no": settings.lacks})
            log.info("listening", extra={"host": settings.host, "port": port, "metrics_port": metrics_port})
            serving = asyncio.ensure_future(door.run())
            publishing = asyncio.ensure_future(_publish(door, health, announce))
            following = asyncio.ensure_future(access.follow())
            told = asyncio.ensure_future(ending.told())
            tasks = (serving, publishing, following, told)
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    raise _cause(serving, publishing, following)
                return await drain(door, ending)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def _guards(settings: Settings) -> tuple[Access, grpc.ServerCredentials | None]:
    """Read what tells callers and machines apart; raises StartError."""
    try:
        access = Access(settings.token_file)
        if settings.tls_cert is None or settings.tls_key is None:
            return access, None
        files = TlsFiles(cert=settings.tls_cert, key=settings.tls_key, client_ca=settings.tls_client_ca)
        return access, server_credentials(files)
    except ValueError as error:
        raise StartError(str(error)) from None


@contextlib.asynccontextmanager
async def _listening(
    door: Door, access: Access, credentials: grpc.ServerCredentials | None
) -> AsyncIterator[tuple[HealthServicer, int]]:
    """A gRPC server for the length of a block; raises StartError if its port is taken."""
    settings = door.settings
    interceptors = [CallMetrics(door.metrics), CallInterceptor(door.metrics, access)]
    server = grpc.aio.server(interceptors=interceptors, options=CHANNEL_OPTIONS)
    health = HealthServicer()
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(door), server)
    control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(door), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    services = [file.services_by_name for file in (inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)]
    names = [service.full_name for by_name in services for service in by_name.values()]
    reflection.enable_server_reflection(
        [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    for name in _ready_names(settings):
        health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    _require_free(settings.host, settings.port)
    try:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.port}"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(f"port {settings.port} on {settings.host}: {error}") from None
    await server.start()
    try:
        yield health, port
    finally:
        await server.stop(LAST_BYTES_GRACE)


def _require_free(host: str, port: int) -> None:
    """gRPC tells of a taken port in many lines of its own; the kernel says it in one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            pass
    except OSError as error:
        hint = "; is another server running there?" if error.errno == errno.EADDRINUSE else ""
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address behind it
        raise StartError(f"port {port} on {host}: {reason}{hint}") from None


async def _publish(door: Door, health: HealthServicer, announce: Callable[[str], None]) -> None:
    """Keep health and the watchdog's gauge in step with the door, and announce the first readiness."""
    announced = False
    meter = EnergyMeter()
    while True:
        ready = _status(door.phase is Phase.READY)
        for name in _ready_names(door.settings):
            health.set(name, ready)
        health.set("", _status(door.is_alive))
        door.metrics.set(m.WATCHDOG, to=door.step_age())
        measure.energy(door.metrics, meter)
        if door.phase is Phase.READY and not announced and door.info is not None:
            announce(start_line(door.info))
            announced = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_INTERVAL):
                await door.changed.wait()
        door.changed.clear()


def start_line(info: EngineInfo) -> str:
    """What is served, in one line."""
    mib = 1 << 20
    kernels = ", ".join(
        f"{choice.op} {choice.storage}: {choice.implementation} x{choice.layers}" for choice in info.kernels
    )
    steps = ""
    if info.activations_bytes:
        steps = f"steps {info.activations_bytes / mib:.1f} MiB, graphs {info.graphs_bytes / mib:.1f} MiB, "
    return (
        f"weights {info.weights_bytes / mib:.1f} MiB (dense {info.dense_bytes / mib:.1f}), "
        f"KV {info.kv_bytes / mib:.1f} MiB = {info.kv_blocks * info.block_size} tokens, {steps}{info.device}, {kernels}"
    )


def _ready_names(settings: Settings) -> tuple[str, str]:
    return READY, f"{READY}/{settings.served_name}"


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    statuses = health_pb2.HealthCheckResponse
    return statuses.SERVING if serving else statuses.NOT_SERVING


def _cause(*tasks: "asyncio.Future[None]") -> BaseException:
    """Why serving ended by itself."""
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    error = next(error for error in errors if error is not None)
    return StartError(str(error)) if isinstance(error, EngineStartError | ValueError | OSError) else error
