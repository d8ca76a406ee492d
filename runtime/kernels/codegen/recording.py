"""Many generated kernels as one call: what a function of fixed tensors runs is noted once and then done again.

Each kernel costs the interpreter some 15 us, which is nothing beside a prompt and a sixth of a step that decodes one
token. A recording enters the threads' pool once and waits between kernels at a barrier. Its temporary tensors share
memory: where one is last read is known, and another begins there.
"""

import bisect
import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from llvmlite import ir
from torch.utils._python_dispatch import TorchDispatchMode

from pressd.runtime.kernels.codegen import pool
from pressd.runtime.kernels.codegen.writer import I32, I64, POINTER, VOID, Function

ALIGNMENT = 64
COMMAND_WORDS = 2  # the kernel's entry, and its arguments
# Of PyTorch's operators, those that make tensors without writing to them.
ALLOCATING = frozenset({"empty", "empty_strided", "empty_like", "new_empty"})


class NotRecordable(Exception):
    """The function ran something that is no generated kernel, which a recording would leave out."""


@dataclass(slots=True)
class Recording:
    """Kernels as they ran, with their argument blocks, and the tensors that were made for them."""

    thread: int
    commands: list[tuple[int, Any]] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)


_active: Recording | None = None
_one_at_a_time = threading.Lock()  # of the threads of a program with several engines


def note(entry: int, block: Any) -> None:
    """Tell the recording of this thread, if there is one, which kernel ran."""
    recording = _active
    if recording is not None and recording.thread == threading.get_ident():
        recording.commands.append((entry, block))


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory, not cleared, for what a kernel writes."""
    tensor = torch.empty(shape, dtype=dtype)
    recording = _active
    if recording is not None and recording.thread == threading.get_ident():
        recording.tensors.append(tensor)
    return tensor


class Replay:
    """A function's kernels: `run` does them again, reading the same inputs, and writes the same `outputs`."""

    def __init__(self, recording: Recording, outputs: list[torch.Tensor], arena: "Arena") -> None:
        self._recording = recording
        self._threads = torch.get_num_threads()
        places = _plan(recording, outputs)
        self._arena = arena
        self._places = places
        self._moved: torch.Tensor | None = None
        self._blocks = [block for _, block in recording.commands]
        self._templates = [list(block) for block in self._blocks]
        self._output_places = [(places.of(tensor.data_ptr()), tensor.shape, tensor.dtype) for tensor in outputs]
        commands = [word for entry, block in recording.commands for word in (entry, ctypes.addressof(block))]
        self._commands = (ctypes.c_int64 * len(commands))(*commands)
        recording.tensors.clear()
        self.num_kernels = len(recording.commands)
        self.outputs: list[torch.Tensor] = []
        arena.reserve(places.size)

    def run(self) -> None:
        memory = self._arena.memory
        if memory is not self._moved:
            self._move(memory)
        _player()(ctypes.addressof(self._commands), self.num_kernels, self._threads)

    def _move(self, memory: torch.Tensor) -> None:
        """Let every kernel read and write its tensors in this memory."""
        base = memory.data_ptr()
        for block, template in zip(self._blocks, self._templates, strict=True):
            for index, value in enumerate(template):
                place = self._places.find(value)
                if place is not None:
                    block[index] = base + place
        self.outputs = [
            memory[place : place + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for place, shape, dtype in self._output_places
        ]
        self._moved = memory


class Arena:
    """Memory that recordings share, of which one is replayed at a time; it grows with the largest."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        if size > self.memory.numel():
            buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
            start = -buffer.data_ptr() % ALIGNMENT
            self.memory = buffer[start : start + size]


def record(body: Callable[[], list[torch.Tensor]], arena: Arena) -> Replay:
    """Run `body` once and return what does it again; raises NotRecordable if anything but kernels computed something.

    What `body` reads must stay where it is, or be changed in place; it returns tensors that kernels wrote.
    """
    global _active
    recording = Recording(thread=threading.get_ident())
    with _one_at_a_time:
        _active = recording
        try:
            with _OnlyKernels():  # type: ignore[no-untyped-call]
                outputs = body()
        finally:
            _active = None
    return Replay(recording, outputs, arena)


class _OnlyKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses PyTorch's operators that compute something."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        if name not in ALLOCATING and (function._schema.is_mutable or not _is_view(result, args[0])):
            raise NotRecordable(f"{function.name()} is no generated kernel")
        return result


def _is_view(result: Any, source: Any) -> bool:
    """Whether an operator's result is its first argument's memory."""
    results = result if isinstance(result, (list, tuple)) else (result,)
    tensors = [item for item in (source, *results) if isinstance(item, torch.Tensor)]
    return len(tensors) == 1 + len(results) and len({t.untyped_storage().data_ptr() for t in tensors}) == 1


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tensors of a recording were, in ascending order, and where each is in an arena of `size` bytes."""

    starts: list[int]
    stops: list[int]
    offsets: list[int]
    size: int

    def find(self, address: int) -> int | None:
        """Return the place of what was at an address; None for what is no tensor of the recording."""
        index = bisect.bisect_right(self.starts, address) - 1
        if index < 0 or address >= self.stops[index]:
            return None
        return self.offsets[index] + address - self.starts[index]

    def of(self, address: int) -> int:
        place = self.find(address)
        assert place is not None, "an output that no kernel wrote"
        return place


def _plan(recording: Recording, outputs: list[torch.Tensor]) -> _Places:
    """Find out when each tensor is in use, and give memory to those that are at the same time."""
    tensors = sorted({t.data_ptr(): t for t in recording.tensors if t.numel()}.values(), key=torch.Tensor.data_ptr)
    starts = [tensor.data_ptr() for tensor in tensors]
    stops = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in tensors]
    places = _Places(starts, stops, list(range(len(tensors))), 0)
    first, last = [len(recording.commands)] * len(tensors), [-1] * len(tensors)
    for number, (_, block) in enumerate(recording.commands):
        for value in block:
            index = bisect.bisect_right(starts, value) - 1
            if index >= 0 and value < stops[index]:
                first[index], last[index] = min(first[index], number), number
    for tensor in outputs:
        index = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        assert places.find(tensor.data_ptr()) is not None, "an output that no kernel wrote"
        last[index] = len(recording.commands)
    offsets, size = _lay_out(first, last, [stop - start for start, stop in zip(starts, stops, strict=True)])
    return _Places(starts, stops, offsets, size)


def _lay_out(first: list[int], last: list[int], sizes: list[int]) -> tuple[list[int], int]:
    """Return offsets with no overlap of what is in use at the same time: the largest first, each as low as goes."""
    offsets, placed, total = [0] * len(sizes), list[int](), 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        others = [o for o in placed if first[o] <= last[index] and first[index] <= last[o]]
        offset = 0
        for other in sorted(others, key=lambda o: offsets[o]):
            if offset + sizes[index] <= offsets[other]:
                break
            offset = max(offset, -(-(offsets[other] + sizes[other]) // ALIGNMENT) * ALIGNMENT)
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + sizes[index])
    return offsets, total


@functools.cache
def _player() -> Callable[[int, int, int], None]:
    """Return what runs (address of commands, their number, threads)."""
    from pressd.runtime.kernels.codegen.program import Code, compile_text
    from pressd.runtime.kernels.codegen.target import machine_vectors

    vectors = machine_vectors()
    assert vectors is not None
    code = Code(compile_text(str(_write_player()), vectors), vectors)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(code.address("all"))
    _kept.append(code)
    return function


_kept: list[Any] = []  # code that functions point into


def _write_player() -> ir.Module:
    """Threads run this: every command, and between two of them they wait for each other."""
    module = ir.Module(name="replay")
    parallel = ir.Function(module, ir.FunctionType(VOID, [POINTER, POINTER, I32, I32]), pool.PARALLEL)
    barrier = ir.Function(module, ir.FunctionType(VOID, []), pool.BARRIER)
    kernel = ir.FunctionType(VOID, [POINTER, I64])
    body = Function(module, "threads", [POINTER])
    commands = body.pointer(body.load(I64, body.arguments[0], 8))
    count = body.load(I64, body.at(body.arguments[0], 8), 8)
    waits = body.builder.icmp_signed(">", body.load(I64, body.at(body.arguments[0], 16), 8), body.number(1))
    with body.loop(0, count) as index:
        place = body.at(commands, body.mul(index, 8 * COMMAND_WORDS))
        entry, block = (body.load(I64, body.at(place, 8 * i), 8) for i in range(COMMAND_WORDS))
        to_call = body.builder.inttoptr(entry, kernel.as_pointer())
        body.builder.call(to_call, [body.pointer(block), body.number(1)])
        with body.when(waits):
            body.builder.call(barrier, [])
    threads_function = body.finish()
    run = Function(module, "run_all", [I64, I64, I64], is_public=True)
    commands, count, threads = run.arguments
    told = run.allocate(ir.ArrayType(I64, 3))
    for number, value in enumerate((commands, count, threads)):
        run.store(value, run.at(told, 8 * number), 8)
    with run.loop(0, count) as index:
        place = run.at(run.pointer(commands), run.mul(index, 8 * COMMAND_WORDS))
        run.store(run.number(0), run.pointer(run.load(I64, run.at(place, 8), 8)), 8)  # no piece is taken yet
    with run.either(run.less(threads, 2)) as (alone, together):
        with alone:
            run.builder.call(threads_function, [told])
        with together:
            run.builder.call(parallel, [threads_function, told, run.builder.trunc(threads, I32), ir.Constant(I32, 0)])
    run.finish()
    return module
