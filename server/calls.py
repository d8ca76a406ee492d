"""The call that is being handled, for all who have something to say about it in logs and metrics."""

from contextvars import ContextVar
from dataclasses import dataclass


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
