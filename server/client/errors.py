"""Failed calls as one exception."""

from collections.abc import Iterable
from typing import Any, cast

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

_DETAILS = "grpc-status-details-bin"


class CallError(Exception):
    """A call that ended with another status than OK.

    `code` is the status; `reason` one of pressd.v1.ErrorReason without its prefix, or empty; `fields` the paths of the
    fields at fault with what is wrong; `retry_after` the seconds after which to try again, None if that is no use;
    `request_id` what the server's log calls the request, or empty.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.reason = ""
        self.request_id = ""
        self.fields: dict[str, str] = {}
        self.retry_after: float | None = None
        trailers = cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ())
        for key, value in trailers:
            if key == _DETAILS:
                self._read(Status.FromString(value))
        super().__init__(f"{self.code.name}: {self.message}")

    def _read(self, status: Status) -> None:
        info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
        for part in status.details:
            if part.Unpack(info):
                self.reason, self.request_id = info.reason, info.metadata.get("request_id", "")
            elif part.Unpack(bad):
                self.fields |= {violation.field: violation.description for violation in bad.field_violations}
            elif part.Unpack(retry):
                self.retry_after = retry.retry_delay.ToNanoseconds() / 1e9
