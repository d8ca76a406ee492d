"""What the door and the engine's process say to each other: one message per step each way, as msgpack."""

from typing import TypeAlias

import msgspec

from pressd.runtime.report import EngineInfo, StepResult
from pressd.runtime.request import Request


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """To the engine: what to begin, what to stop, and whether to forget cached prefixes."""

    adds: tuple[Request, ...] = ()
    aborts: tuple["Abort", ...] = ()
    flush: bool = False


class Abort(msgspec.Struct, frozen=True, array_like=True):
    """One sequence of a request to stop, or with None all of them."""

    request_id: str
    index: int | None


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A request which the engine did not take, and the field at fault."""

    request_id: str
    field: str
    message: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """From the engine, first: it takes requests."""

    info: EngineInfo


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """From the engine: what one step did. `flushed` answers each flush: blocks that held only
    cached prefixes."""

    step: StepResult
    rejections: tuple[Rejection, ...] = ()
    flushed: tuple[int, ...] = ()


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """From the engine, last: why it ends."""

    message: str


Report: TypeAlias = Ready | Stepped | Failed

encode = msgspec.msgpack.Encoder().encode
decode_commands = msgspec.msgpack.Decoder(Commands).decode
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
decode_report = _reports.decode
