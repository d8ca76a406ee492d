"""Why a call is refused, and how that travels: a gRPC status with google.rpc details."""

from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from pressd.v1 import errors_pb2

DOMAIN = "pressd"
# Bytes of a message and of a field's path, which may quote what a client sent. Clients take 8 KiB of trailers, and a
# message is in them three times, once with each byte written as three.
MAX_MESSAGE, MAX_FIELD = 1024, 256


@dataclass(slots=True, kw_only=True, eq=False)
class Refusal(Exception):
    """A call ends with this status. `reason` is an ErrorReason of errors.proto without its prefix."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str | None = None
    retry_after: float | None = None

    def __post_init__(self) -> None:
        assert f"ERROR_REASON_{self.reason}" in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name, self.reason
        self.message = _shortened(self.message, MAX_MESSAGE)
        self.field = self.field and _shortened(self.field, MAX_FIELD)

    def __str__(self) -> str:
        return self.message

    def details(self, request_id: str) -> bytes:
        """The serialised google.rpc.Status for `grpc-status-details-bin`."""
        parts = [ErrorInfo(reason=self.reason, domain=DOMAIN, metadata={"request_id": request_id})]
        if self.field is not None:
            parts.append(BadRequest(field_violations=[{"field": self.field, "description": self.message}]))
        if self.retry_after is not None:
            retry = RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after * 1e9))
            parts.append(retry)
        status = Status(code=self.code.value[0], message=self.message)
        for part in parts:
            packed = AnyMessage()
            packed.Pack(part)
            status.details.append(packed)
        serialised: bytes = status.SerializeToString()
        return serialised


def _shortened(text: str, most: int) -> str:
    """Leave out the middle of a text that has more bytes."""
    raw = text.encode()
    if len(raw) <= most:
        return text
    kept = (most - len(" ... ")) // 2
    return f"{raw[:kept].decode(errors='ignore')} ... {raw[-kept:].decode(errors='ignore')}"


def invalid(field: str, problem: str, *, reason: str = "INVALID_FIELD") -> Refusal:
    """A field has a bad value."""
    return Refusal(code=grpc.StatusCode.INVALID_ARGUMENT, reason=reason, message=f"{field}: {problem}", field=field)


def unsupported(message: str, field: str | None = None) -> Refusal:
    """This build cannot do it."""
    return Refusal(code=grpc.StatusCode.UNIMPLEMENTED, reason="UNSUPPORTED", message=message, field=field)


def unavailable(reason: str, message: str, retry_after: float) -> Refusal:
    """Not now."""
    return Refusal(code=grpc.StatusCode.UNAVAILABLE, reason=reason, message=message, retry_after=retry_after)


def exhausted(reason: str, message: str, retry_after: float) -> Refusal:
    """Too much at once."""
    return Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason=reason, message=message, retry_after=retry_after)


def cancelled(message: str) -> Refusal:
    """Somebody called it off, and there is no part of an answer."""
    return Refusal(code=grpc.StatusCode.CANCELLED, reason="CANCELLED", message=message)


def late(reason: str, message: str) -> Refusal:
    """A time that the request itself set has passed."""
    return Refusal(code=grpc.StatusCode.DEADLINE_EXCEEDED, reason=reason, message=message)


def not_found(reason: str, message: str) -> Refusal:
    """There is no such thing."""
    return Refusal(code=grpc.StatusCode.NOT_FOUND, reason=reason, message=message)


def duplicate_id(request_id: str) -> Refusal:
    """A live request has this id."""
    message = f"request_id: {request_id!r} is in use by a live request"
    return Refusal(
        code=grpc.StatusCode.ALREADY_EXISTS, reason="DUPLICATE_REQUEST_ID", message=message, field="request_id"
    )


def exactness(field: str, problem: str) -> Refusal:
    """This build cannot compute as exactly as was asked."""
    return Refusal(
        code=grpc.StatusCode.FAILED_PRECONDITION, reason="EXACTNESS", message=f"{field}: {problem}", field=field
    )


def unauthenticated(message: str) -> Refusal:
    """It is not known who calls. Must not repeat what was given as a token."""
    return Refusal(code=grpc.StatusCode.UNAUTHENTICATED, reason="TOKEN", message=message)


def not_admin(method: str) -> Refusal:
    """It is known who calls, and that is no admin."""
    message = f"{method} needs an admin's token; this one is valid for all else"
    return Refusal(code=grpc.StatusCode.PERMISSION_DENIED, reason="NOT_ADMIN", message=message)


def admin_disabled(method: str) -> Refusal:
    """Nobody can be an admin here."""
    message = (
        f"{method} needs an admin's token and this server has none; give it --token-file with a line `TOKEN admin`"
    )
    return Refusal(code=grpc.StatusCode.FAILED_PRECONDITION, reason="ADMIN_DISABLED", message=message)


def internal(reason: str, message: str) -> Refusal:
    """Our fault."""
    return Refusal(code=grpc.StatusCode.INTERNAL, reason=reason, message=message)
