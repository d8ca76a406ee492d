"""Measure how large pieces of products should be on this GPU, and write down what was fastest.

    python -m pressd.runtime.kernels.tune [--seconds 120] [--shapes 6144x4096 ...] [--out FILE]

Nothing of this happens while serving: kernels read the table that it writes (runtime/kernels/tuned.json), whose rows
say on which device and when they were measured. Shapes are [outputs]x[inputs] of a model's fused linears.
"""

# mypy: disable-error-code="no-untyped-call"

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pressd.runtime.kernels import tiles as table
from pressd.runtime.kernels.activation_codes import FP8, quantize_rows_reference
from pressd.runtime.kernels.code_products import product_of_few
from pressd.runtime.kernels.integer_codes import dequantize
from pressd.runtime.kernels.packed_int import triton as packed_int
from pressd.runtime.kernels.registry import CodeType, LinearProblem
from pressd.runtime.kernels.tiles import Tiles

# Of a Llama of 8 billion parameters.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
KERNELS = ("w4", "w8", "w8a8", "fp8")
TOKENS = (16, 32, 64, 128)
DTYPE = torch.bfloat16
# As many copies of a weight as do not fit a cache are multiplied with in turn, so often.
CACHE = 128 << 20
MOST_COPIES = 24
LAUNCHES, REPLAYS = 20, 5
COMPILERS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size."""

    kernel: str
    shape: tuple[int, int]
    tokens: int

    def candidates(self) -> Iterator[Tiles]:
        """Yield what is tried; few, as every one is compiled."""
        for rows, num_warps in ((64, 4), (128, 4), (128, 8)):
            if self.tokens >= 64 and (rows, num_warps) == (128, 4):
                continue  # too many registers
            for num_stages in (3, 5):
                for split in (1, 2, 4, 8):
                    programs = -(-self.shape[0] // rows) * split
                    if programs <= 1200 and (programs >= 96 or split == 8):
                        yield Tiles(rows=rows, num_warps=num_warps, num_stages=num_stages, split=split)


def products(case: Case, copies: int) -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
    """Return launches over as many weights, and what the first of them should give."""
    generator = torch.Generator("cuda").manual_seed(0)
    out_features, in_features = case.shape
    x = torch.randn(case.tokens, in_features, device="cuda", dtype=DTYPE, generator=generator)
    works: list[Callable[[], torch.Tensor]] = []
    expected = torch.empty(0)
    for index in range(copies):
        if case.kernel in ("w4", "w8"):
            bits, group = (4, 128) if case.kernel == "w4" else (8, None)
            half, groups = 1 << (bits - 1), in_features // group if group else 1
            codes = torch.randint(-half, half, case.shape, device="cuda", dtype=torch.int8, generator=generator)
            scale = (torch.rand(out_features, groups, device="cuda", generator=generator) + 0.5).to(DTYPE)
            problem = LinearProblem(
                storage="packed_int",
                bits=bits,
                group_size=group,
                activation_bits=16,
                out_features=out_features,
                in_features=in_features,
                dtype=DTYPE,
            )
            packed = packed_int.pack_codes(codes, scale, problem)
            works.append(functools.partial(packed_int.run, x, packed, problem))
            weight = dequantize(codes, scale, torch.float32)
            inputs = x.float()
        else:
            kind = torch.int8 if case.kernel == "w8a8" else FP8
            wide = torch.randn(case.shape, device="cuda", generator=generator)
            own, rows = (quantize_rows_reference(values, CodeType(dtype=kind)) for values in (wide, x))
            works.append(functools.partial(product_of_few, rows, own.codes, own.scale, DTYPE))
            weight, inputs = own.codes.float() * own.scale, rows.codes.float() * rows.scale
        if index == 0:
            expected = inputs @ weight.T
    return works, expected


def microseconds(works: Sequence[Callable[[], object]]) -> float:
    """Return the median time of one launch, of graphs of many."""
    works[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            works[index % len(works)]()
    times = []
    for _ in range(REPLAYS + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * float(began.elapsed_time(ended)) / LAUNCHES)
    return statistics.median(times[1:])


def measure(case: Case, deadline: float) -> tuple[Tiles, float] | None:
    """Return the fastest right tiles and their microseconds, of those that there was time for."""
    device = torch.cuda.get_device_name()
    num_bytes = math.prod(case.shape) * (0.5 if case.kernel == "w4" else 1)
    works, expected = products(case, max(2, min(MOST_COPIES, math.ceil(CACHE / num_bytes))))
    found: list[tuple[float, Tiles]] = []
    for tiles in case.candidates():
        if time.monotonic() > deadline:
            break
        table.use(case.kernel, device, case.shape, case.tokens, tiles)
        try:
            error = float((works[0]().float() - expected).norm() / expected.norm())
            if not error < 1e-2:
                _say(f"{case} {tiles}: wrong, relative error {error:.1e}")
                continue
            found.append((microseconds(works), tiles))
        except Exception as failure:  # too much shared memory, say: not a candidate here
            _say(f"{case} {tiles}: {type(failure).__name__}")
    table.use(case.kernel, device, case.shape, case.tokens, None)
    if not found:
        return None
    best, tiles = min(found, key=lambda item: item[0])
    return tiles, best


def compile_part(part: Sequence[tuple[Case, Tiles]]) -> None:
    """Run each once, so that it is in Triton's cache on disk; in a process of its own."""
    device = torch.cuda.get_device_name()
    for case, tiles in part:
        table.use(case.kernel, device, case.shape, case.tokens, tiles)
        try:
            products(case, 1)[0][0]()
        except Exception as failure:
            _say(f"{case} {tiles}: {type(failure).__name__}")


def compile_all(cases: Sequence[Case]) -> None:
    """Compile every candidate, several at a time; shapes of one kernel mostly share theirs."""
    distinct = {(case.kernel, case.tokens, tiles): (case, tiles) for case in cases for tiles in case.candidates()}
    work = list(distinct.values())
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        pool.map(compile_part, [work[first::COMPILERS] for first in range(COMPILERS)], chunksize=1)


def _say(text: object) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="start nothing after so long")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--shapes", nargs="+", help="OUTPUTSxINPUTS, as in 6144x4096")
    parser.add_argument("--out", type=Path, default=table.TABLE)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tune: PyTorch sees no CUDA device\n")
    deadline = time.monotonic() + arguments.seconds
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.shapes or ()] or SHAPES
    cases = [
        Case(kernel, (shape[0], shape[1]), tokens)
        for kernel in arguments.kernels
        for tokens in arguments.tokens
        for shape in shapes
        if not (kernel in ("w4", "w8") and tokens > packed_int.TOKENS[-1])
    ]
    compile_all(cases)
    device, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.is_file() else []
    for case in cases:
        best = measure(case, deadline)
        if best is None:
            _say(f"{case}: no time left")
            continue
        tiles, us = best
        row = {"kernel": case.kernel, "device": device, "date": today, "out_features": case.shape[0]}
        row |= {"in_features": case.shape[1], "tokens": case.tokens, "us": round(us, 2)} | asdict(tiles)
        same = ("kernel", "device", "out_features", "in_features", "tokens")
        rows = [other for other in rows if any(other[key] != row[key] for key in same)] + [row]
        _say(row)
        arguments.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
