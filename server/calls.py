"""The call that is being handled, for all who have something to say about it in logs and metrics."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

# A deadline begins when the client calls, so its clock runs out first and what we see is a dropped call. Seconds.
CLIENTS_HEADSTART = 0.1


@dataclass(slots=True, kw_only=True)
class Call:
    """One gRPC call; `arrival` is time.monotonic() seconds, what is not known is empty."""

    request_id: str
    method: str
    arrival: float
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0


CALL: ContextVar[Call] = ContextVar("call")


def code_of_cancel(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """Tell a deadline that has passed from a call that was dropped."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= CLIENTS_HEADSTART:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
