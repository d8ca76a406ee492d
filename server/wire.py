"""What the door and the engine's process say to each other: one message per step each way, as msgpack."""

from typing import TypeAlias

import msgspec

from pressd.runtime.report import EngineInfo, StepResult
from pressd.runtime.request import Request


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """To the engine: what to begin, and what to stop."""

    adds: tuple[Request, ...] = ()
    aborts: tuple[str, ...] = ()


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A request which the engine did not take, and the field at fault."""

    request_id: str
    field: str
    message: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """From the engine, first: it takes requests."""

    info: EngineInfo


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """From the engine: what one step did."""

    step: StepResult
    rejections: tuple[Rejection, ...] = ()


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """From the engine, last: why it ends."""

    message: str


Report: TypeAlias = Ready | Stepped | Failed

encode = msgspec.msgpack.Encoder().encode
decode_commands = msgspec.msgpack.Decoder(Commands).decode
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
decode_report = _reports.decode
