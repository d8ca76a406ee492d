"""From functions over numbered pieces of work to something that Python calls.

A program has one `work(arguments, piece)` or several, run one after the other, each in parallel: threads take the
next piece until none is left. Arguments are 64-bit integers in one block of memory; addresses are among them.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen import object_cache, pool, recording
from pressd.runtime.kernels.codegen.target import Vectors, machine_vectors, target_machine
from pressd.runtime.kernels.codegen.writer import I32, I64, POINTER, VOID, Function, Value

ENTRY = "run"


class Arguments:
    """The block that a piece of work reads, by the names that it was declared with."""

    def __init__(self, function: Function, block: Value, names: tuple[str, ...]) -> None:
        self._function, self._block, self._names = function, block, names

    def number(self, name: str) -> Value:
        place = self._function.at(self._block, 8 * self._names.index(name))
        return self._function.load(I64, place, align=8)

    def pointer(self, name: str) -> Value:
        return self._function.pointer(self.number(name))

    def float(self, name: str) -> Value:
        """Return what the caller gave as the bits of a float32."""
        bits = self._function.builder.trunc(self.number(name), I32)
        return self._function.builder.bitcast(bits, ir.FloatType())


@dataclass(frozen=True, slots=True)
class Region:
    """One parallel region: `write(function, arguments, piece)` writes what a piece does."""

    name: str
    arguments: tuple[str, ...]
    write: Callable[[Function, Arguments, Value], None]


class Program:
    """A compiled region: `run(pieces, *arguments)` does so many pieces on PyTorch's threads.

    Arguments are in the order of the region's. While it runs, the interpreter is free for others.
    """

    def __init__(self, code: "Code", region: Region) -> None:
        self._block = ctypes.c_int64 * (2 + len(region.arguments))
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code.address(region.name))
        self._address = code.address(region.name)
        self._code = code  # the machine code lives as long as this

    def run(self, pieces: int, *arguments: int) -> None:
        block = self._block(0, pieces, *arguments)
        self._entry(ctypes.addressof(block), min(pieces, torch.get_num_threads()))
        recording.note(self._address, block)


class Code:
    """Machine code, which lives as long as this."""

    def __init__(self, image: bytes, vectors: Vectors) -> None:
        pool.publish()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(vectors))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(image))
        self._engine.finalize_object()

    def address(self, region: str) -> int:
        address = self._engine.get_function_address(_entry_name(region))
        assert address, f"{region} is missing"
        return int(address)


def compile_region(make: Callable[[Vectors], Region]) -> Program:
    """Return a program for the region that `make` writes for this machine's vectors, compiled now or earlier."""
    vectors = machine_vectors()
    assert vectors is not None, "whoever asks has made sure that code can be generated here"
    region = make(vectors)
    text = write_region(region)
    image = object_cache.look_up(text, vectors)
    if image is None:
        image = compile_text(text, vectors)
        object_cache.keep(text, vectors, image)
    return Program(Code(image, vectors), region)


def write_region(region: Region) -> str:
    """Return the IR of a region."""
    module = ir.Module(name="pressd")
    module.triple = llvm.get_process_triple()
    _write_entry(module, region, _write_body(module, region))
    return str(module)


def float_bits(value: float) -> int:
    """Return a number as `Arguments.float` reads it."""
    return int.from_bytes(struct.pack("<f", value), "little")


def compile_text(text: str, vectors: Vectors) -> bytes:
    """Return the object file of some IR."""
    return target_machine(vectors).emit_object(optimise(text, vectors))  # type: ignore[no-any-return]


def optimise(text: str, vectors: Vectors) -> llvm.ModuleRef:
    """Return the IR as LLVM's optimiser leaves it."""
    machine = target_machine(vectors)
    module = llvm.parse_assembly(text)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return module


def _write_body(module: ir.Module, region: Region) -> ir.Function:
    """Threads run this: take a piece, do it, until there are no more."""
    work = Function(module, f"{region.name}_work", [POINTER, I64])
    names = ("next", "pieces", *region.arguments)
    region.write(work, Arguments(work, work.arguments[0], names), work.arguments[1])
    work_function = work.finish()
    body = Function(module, f"{region.name}_threads", [POINTER])
    builder, block = body.builder, body.arguments[0]
    pieces = Arguments(body, block, names).number("pieces")
    take, do, over = (builder.append_basic_block(name) for name in ("take", "do", "over"))
    builder.branch(take)
    builder.position_at_end(take)
    piece = builder.atomic_rmw("add", block, ir.Constant(I64, 1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", piece, pieces), do, over)
    builder.position_at_end(do)
    builder.call(work_function, [block, piece])
    builder.branch(take)
    builder.position_at_end(over)
    return body.finish()


def _write_entry(module: ir.Module, region: Region, body: ir.Function) -> None:
    entry = Function(module, _entry_name(region.name), [POINTER, I64], is_public=True)
    block, threads = entry.arguments
    parallel = module.globals.get(pool.PARALLEL)
    if parallel is None:
        parallel = ir.Function(module, ir.FunctionType(VOID, [POINTER, POINTER, I32, I32]), pool.PARALLEL)
    with entry.either(entry.less(threads, 2)) as (alone, together):
        with alone:
            entry.builder.call(body, [block])
        with together:
            count = entry.builder.trunc(threads, I32)
            entry.builder.call(parallel, [body, block, count, ir.Constant(I32, 0)])
    entry.finish()


def _entry_name(region: str) -> str:
    return f"{ENTRY}_{region}"
