"""A .safetensors header is hostile until it is checked."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.header import ITEM_BYTES, MAX_HEADER_BYTES, read_header

VALID = save({"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.ones(5, dtype=torch.int8)}, {"format": "pt"})


def framed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_a_file_of_the_library_is_read(write: Callable[[bytes], Path]) -> None:
    path = write(VALID)
    header = read_header(path)
    a, b = header.entries["a"], header.entries["b"]
    assert (a.dtype, a.shape, b.dtype, b.shape) == ("F16", (2, 3), "I8", (5,))
    assert path.read_bytes()[b.start : b.end] == b"\1" * 5
    assert header.entries.keys() == {"a", "b"}


def test_scalars_and_empty_tensors_are_read(write: Callable[[bytes], Path]) -> None:
    header = {"scalar": tensor(shape=(), offsets=(0, 4)), "empty": tensor(shape=(0, 7), offsets=(0, 0))}
    entries = read_header(write(framed(header, bytes(4)))).entries
    assert (entries["scalar"].shape, entries["empty"].shape) == ((), (0, 7))


def test_item_sizes_are_the_library_s() -> None:
    for name, size in {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "F8_E4M3": 1}.items():
        assert ITEM_BYTES[name] == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; a .safetensors file has at least 8"),
        (b"\1\2\3", "3 bytes"),
        (framed({}, length=1 << 62), f"at most {MAX_HEADER_BYTES}"),
        (framed({}, length=MAX_HEADER_BYTES), "truncated"),
        (framed({}, length=3), "truncated"),
        (framed(b"{"), "JSON is not valid"),
        (framed(b"\xff\xfe{}"), "JSON is not valid"),
        (framed(b"[" * 200_000), "nested too deeply"),
        (framed(b'{"a":' * 200_000), "nested too deeply"),
        (framed([]), "JSON is a list"),
        (framed(b'{"a": 1, "a": 2}'), "'a' appears twice"),
        (framed({"a": 7}), "exactly dtype, shape and data_offsets"),
        (framed({"a": tensor() | {"more": 1}}, bytes(8)), "exactly dtype"),
        (framed({"a": tensor(dtype="F31")}, bytes(8)), "dtype 'F31'"),
        (framed({"a": tensor(dtype=["F32"])}, bytes(8)), "not known"),
        (framed({"a": tensor(shape=(-2,))}, bytes(8)), "shape"),
        (framed({"a": tensor(shape=(True, 2))}, bytes(8)), "shape"),
        (framed({"a": tensor(shape=(2.0,))}, bytes(8)), "shape"),
        (framed({"a": tensor(shape=(1,) * 9)}, bytes(8)), "shape"),
        (framed({"a": tensor(shape=2)}, bytes(8)), "shape"),
        (framed({"a": tensor(offsets=(8, 0))}, bytes(8)), "data_offsets"),
        (framed({"a": tensor(offsets=(0, 8, 8))}, bytes(8)), "data_offsets"),
        (framed({"a": tensor(offsets=(0, 1 << 64))}, bytes(8)), "data_offsets"),
        (framed({"a": tensor(shape=(3,))}, bytes(8)), "takes 8 bytes"),
        (framed({"a": tensor(shape=(1 << 62, 1 << 62))}, bytes(8)), "takes 8 bytes"),
        (framed({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "'b' overlaps"),
        (framed({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps"),
        (framed({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "'b' leaves a gap"),
        (framed({"a": tensor(offsets=(4, 12))}, bytes(12)), "leaves a gap"),
        (framed({"a": tensor()}, bytes(7)), "truncated"),
        (framed({"a": tensor()}, bytes(9)), "1 bytes after its last tensor"),
    ],
)
def test_a_lie_is_told_in_one_line(write: Callable[[bytes], Path], content: bytes, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_header(write(content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(VALID) - 12), value=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(write: Callable[[bytes], Path], position: int, value: int) -> None:
    damaged = bytearray(VALID)
    damaged[position] = value
    try:
        header = read_header(write(bytes(damaged)))
    except ArtifactError:
        return
    assert all(8 <= entry.start <= entry.end <= len(VALID) for entry in header.entries.values())
