"""HTTP/2 by hand (RFC 9113), as little as it takes to call a method and then to do what no gRPC client does."""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_ERROR, CANCEL = 0, 8
# Seconds that a socket may keep us waiting before the test fails.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame; `kind` and `flags` are numbers of RFC 9113."""

    kind: int
    flags: int = 0
    stream: int = 0
    payload: bytes = b""

    def encoded(self) -> bytes:
        return (
            len(self.payload).to_bytes(3, "big")
            + bytes([self.kind, self.flags])
            + self.stream.to_bytes(4, "big")
            + self.payload
        )


def split_frames(buffer: bytearray) -> Iterator[Frame]:
    """Take all complete frames off the front of a buffer."""
    while len(buffer) >= 9 and len(buffer) >= 9 + (length := int.from_bytes(buffer[:3], "big")):
        yield Frame(
            kind=buffer[3],
            flags=buffer[4],
            stream=int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF,
            payload=bytes(buffer[9 : 9 + length]),
        )
        del buffer[: 9 + length]


def header_block(headers: dict[str, str]) -> bytes:
    """Headers of at most 126 bytes each, as HPACK literals that nobody compresses or remembers (RFC 7541, 6.2.2)."""
    block = b""
    for text in (part for header in headers.items() for part in header):
        assert len(text) < 127, text
    for name, value in headers.items():
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


class RawConnection:
    """One TCP connection that speaks HTTP/2 only as far as it is told to."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._buffer = bytearray()
        self._next_stream = 1

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def greet(self) -> Self:
        """Send the preface and empty settings."""
        self.send(PREFACE + Frame(kind=SETTINGS).encoded())
        return self

    def call(self, path: str, message: bytes, *, announced: int | None = None, authority: str = "localhost") -> int:
        """Begin a gRPC call and return its stream; `announced` is the length that the message claims to have."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": authority}
        headers |= {"te": "trailers", "content-type": "application/grpc"}
        length = len(message) if announced is None else announced
        body = b"\0" + struct.pack(">I", length) + message
        is_whole = END_STREAM if length == len(message) else 0
        self.send(
            Frame(kind=HEADERS, flags=END_HEADERS, stream=stream, payload=header_block(headers)).encoded()
            + Frame(kind=DATA, flags=is_whole, stream=stream, payload=body).encoded()
        )
        return stream

    def ping(self, number: int) -> None:
        self.send(Frame(kind=PING, payload=number.to_bytes(8, "big")).encoded())

    def reset_stream(self, stream: int) -> None:
        """Call off one stream."""
        self.send(Frame(kind=RST_STREAM, stream=stream, payload=CANCEL.to_bytes(4, "big")).encoded())

    def frames(self) -> Iterator[Frame]:
        """Give what comes, and acknowledge settings and pings, until the other end closes."""
        while True:
            for frame in split_frames(self._buffer):
                if frame.kind in (SETTINGS, PING) and not frame.flags & ACK:
                    answer = frame.payload if frame.kind == PING else b""
                    self.send(Frame(kind=frame.kind, flags=ACK, payload=answer).encoded())
                yield frame
            try:
                received = self._socket.recv(1 << 16)
            except ConnectionResetError:
                return
            if not received:
                return
            self._buffer += received

    def messages(self, stream: int) -> Iterator[bytes]:
        """Give the gRPC messages of a stream until it or the connection ends."""
        body = bytearray()
        for frame in self.frames():
            if frame.stream == stream and frame.kind == DATA:
                body += frame.payload
                while len(body) >= 5 and len(body) >= 5 + (length := struct.unpack(">I", body[1:5])[0]):
                    yield bytes(body[5 : 5 + length])
                    del body[: 5 + length]
            if frame.stream == stream and (frame.kind == RST_STREAM or frame.flags & END_STREAM):
                return

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def break_off(self) -> None:
        """Close with a reset, as the kernel does for a process that was killed with bytes unread."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
