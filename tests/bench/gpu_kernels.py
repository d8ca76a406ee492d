"""How near every kernel of a GPU comes to what the device can do, measured in the same minute: a roofline in a table.

    python tests/bench/gpu_kernels.py [--seconds 90] [--out build/gpu-results] [--only linear attention ...]

Times are of replays of a CUDA graph that launches an operation many times over inputs that together do not fit the
cache; medians. Bytes are those that must be read and written at least; their share is of what a large copy moves.
Every result is compared with the reference in float32 or wider, on some of its rows; the relative error stands beside.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pressd.runtime.kernels.activation_codes import FP8
from pressd.runtime.kernels.attention import reference as attention_reference
from pressd.runtime.kernels.attention import triton as attention
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, QueryRun, page
from pressd.runtime.kernels.catalogue import LINEAR, linear_kernels
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.gate import triton as gate
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.norm import triton as norm
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import CodeType, LinearProblem, Tensors, describe_device
from pressd.runtime.kernels.rotary import triton as rotary
from pressd.runtime.kernels.step import triton as step
from pressd.runtime.kernels.step.buffers import StepBuffers

DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
# More than any cache: as many copies of the inputs are used in turn.
CACHE = 160 << 20
MOST_COPIES = 48
REPLAYS = 7
# [outputs, inputs] of a Llama of 8 billion parameters, fused, and the square that others quote.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 16, 32, 64, 128, 2048)
SCHEMES = {
    "w4a16g128": (packed_int.NAME, 4, 128, 16),
    "w8a16": (int8.NAME, 8, None, 16),
    "w8a8": (int8.NAME, 8, None, 8),
    "fp8": (fp8.NAME, 8, None, 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operation at one size; `share` is of the measured bandwidth, or of the rate of bf16 products."""

    op: str
    size: str
    us: float
    megabytes: float = 0.0
    share: float | None = None
    tflops: float | None = None
    speedup: float | None = None
    error: float | None = None


def timed(works: Sequence[Callable[[], object]]) -> float:
    """Return microseconds of one of `works`, which are launched in turn; each has inputs of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        works[0]()
        works[-1]()
    torch.cuda.synchronize()
    count = max(len(works), 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            works[index % len(works)]()
    times = []
    for _ in range(REPLAYS + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / count)
    return statistics.median(times[2:])


def copies_for(num_bytes: int) -> int:
    return max(2, min(MOST_COPIES, math.ceil(CACHE / max(num_bytes, 1))))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def ceilings() -> dict[str, float]:
    """Measure what the device can do: bytes per second of a copy, and operations per second of products."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    # An operator, not a copy: graphs hand copies to an engine that is slower than the multiprocessors.
    us = timed([functools.partial(torch.neg, source, out=target)])
    found = {"copy_bytes_per_s": 2 * 4 * source.numel() / (us * 1e-6)}
    side = 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    found["bf16_flops"] = 2 * side**3 / (timed([lambda: a @ b]) * 1e-6)
    ints = [torch.randint(-127, 128, (side, side), device=DEVICE, dtype=torch.int8) for _ in range(2)]
    found["int8_ops"] = 2 * side**3 / (timed([lambda: torch._int_mm(ints[0], ints[1].t())]) * 1e-6)
    if torch.cuda.get_device_capability() >= (9, 0):
        floats = [a.to(FP8), b.to(FP8)]
        ones = torch.ones(side, 1, device=DEVICE)
        work = lambda: torch._scaled_mm(  # noqa: E731
            floats[0], floats[1].t(), scale_a=ones, scale_b=ones.t(), out_dtype=DTYPE
        )
        found["fp8_flops"] = 2 * side**3 / (timed([work]) * 1e-6)
    return found


def stored(problem: LinearProblem) -> Tensors:
    """Return random tensors of a stored weight, on the device."""
    shape, inputs = (problem.out_features, problem.in_features), problem.in_features
    groups = 1 if problem.group_size is None else inputs // problem.group_size
    scale = (torch.rand(shape[0], groups, device=DEVICE) + 0.5) * (12 / inputs) ** 0.5 / 2**problem.bits
    if problem.storage == fp8.NAME:
        return fp8.encode(*fp8.quantize(torch.randn(shape, device=DEVICE, dtype=DTYPE) * inputs**-0.5))
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, device=DEVICE, dtype=torch.int8)
    if problem.storage == int8.NAME:
        return int8.encode(codes, scale.to(DTYPE))
    return packed_int.encode(codes, scale.to(DTYPE), problem.bits)


def linears(limits: dict[str, float], shapes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Yield products of each scheme beside cuBLAS in bf16."""
    device = describe_device(DEVICE)
    for out_features, in_features in shapes:
        weights = out_features * in_features
        dense = [
            torch.randn(out_features, in_features, device=DEVICE, dtype=DTYPE) for _ in range(copies_for(2 * weights))
        ]
        inputs = {tokens: torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE) for tokens in TOKENS}
        base = {}
        for tokens, x in inputs.items():
            base[tokens] = us = timed([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
            yield row_of_product("bf16 cuBLAS", out_features, in_features, tokens, us, 2 * weights, limits)
        del dense
        for name, (storage, bits, group, activation_bits) in SCHEMES.items():
            problem = LinearProblem(
                storage=storage,
                bits=bits,
                group_size=group,
                activation_bits=activation_bits,
                out_features=out_features,
                in_features=in_features,
                dtype=DTYPE,
            )
            kernel = next(k for k in linear_kernels(device) if k.storage == storage and k.name == "triton")
            if reason := kernel.why_not(problem, device):
                print(f"{name} {out_features}x{in_features}: {reason}", flush=True)
                continue
            num_bytes = weights * bits // 8 + out_features * 2 * (in_features // group if group else 1)
            tensors = stored(problem)
            packed = kernel.pack(dict(tensors), problem, device)
            many = [{key: t.clone() for key, t in packed.items()} for _ in range(copies_for(num_bytes))]
            reference = next(k for k in LINEAR if k.storage == storage and k.name == "reference")
            exact = replace(problem, dtype=torch.float32)
            sample = {key: t[:512] for key, t in tensors.items() if key != "weight_shape"}
            some = replace(exact, out_features=min(512, out_features))
            truth = reference.pack(sample, some, device)
            for tokens, x in inputs.items():
                us = timed([lambda p=p, x=x: kernel.run(x, p, problem) for p in many])
                error = relative(
                    kernel.run(x[:tokens], packed, problem)[:64, :512], reference.run(x[:64].float(), truth, some)
                )
                row = row_of_product(name, out_features, in_features, tokens, us, num_bytes, limits)
                yield replace(row, speedup=base[tokens] / us, error=error)
            del many, packed, tensors


def row_of_product(
    op: str, out_features: int, in_features: int, tokens: int, us: float, weight_bytes: int, limits: dict[str, float]
) -> Row:
    moved = weight_bytes + 2 * tokens * (out_features + in_features)
    return Row(
        op=op,
        size=f"{out_features}x{in_features} T{tokens}",
        us=us,
        megabytes=moved / 1e6,
        share=moved / (us * 1e-6) / limits["copy_bytes_per_s"],
        tflops=2 * out_features * in_features * tokens / us / 1e6,
    )


def attentions(limits: dict[str, float]) -> Iterator[Row]:
    """Yield decoding and prompts of 32 heads over 8 KV heads of 128 dimensions."""
    problem = AttentionProblem(num_heads=32, num_kv_heads=8, head_dim=128, dtype=DTYPE)
    for sequences, length, new in (
        (1, 1024, 1),
        (32, 1024, 1),
        (32, 1024, 4),
        (8, 4096, 1),
        (128, 1024, 1),
        (1, 32768, 1),
    ):
        us, error = attended(problem, sequences, length, new)
        moved = sequences * length * 2 * 8 * 128 * 2
        share = moved / (us * 1e-6) / limits["copy_bytes_per_s"]
        yield Row(
            op="decode",
            size=f"{sequences} x {length} new {new}",
            us=us,
            megabytes=moved / 1e6,
            share=share,
            error=error,
        )
    for sequences, length in ((1, 2048), (4, 2048), (1, 8192)):
        us, error = attended(problem, sequences, length, length)
        flops = 2 * 2 * sequences * 32 * 128 * length * (length + 1) / 2
        share = flops / (us * 1e-6) / limits["bf16_flops"]
        yield Row(
            op="prefill", size=f"{sequences} x {length}", us=us, tflops=flops / us / 1e6, share=share, error=error
        )
    query, key, value = (torch.randn(1, heads, 8192, 128, device=DEVICE, dtype=DTYPE) for heads in (32, 8, 8))
    us = timed(
        [lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)]
    )
    flops = 2 * 2 * 32 * 128 * 8192 * 8193 / 2
    yield Row(
        op="prefill, PyTorch's SDPA",
        size="1 x 8192",
        us=us,
        tflops=flops / us / 1e6,
        share=flops / us * 1e6 / limits["bf16_flops"],
    )


def attended(problem: AttentionProblem, sequences: int, length: int, new: int) -> tuple[float, float]:
    """Return microseconds and the error of attention of `new` tokens of each sequence, over scattered blocks."""
    blocks = -(-length // 16)
    shape = (sequences * blocks, 16, problem.num_kv_heads, problem.head_dim)
    num_bytes = 4 * math.prod(shape)
    order = torch.randperm(sequences * blocks).tolist()
    runs = tuple(
        QueryRun(
            start=i * new,
            length=new,
            kv_length=length,
            block_table=order[i * blocks : (i + 1) * blocks],
            first_block=None,
        )
        for i in range(sequences)
    )
    query = torch.randn(sequences * new, problem.num_heads, problem.head_dim, device=DEVICE, dtype=problem.dtype)
    pools = [
        tuple(torch.randn(shape, device=DEVICE, dtype=problem.dtype) for _ in range(2))
        for _ in range(copies_for(num_bytes) if new <= 16 else 1)
    ]
    decoding, prompts = page(runs, 16, DEVICE)
    slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    batch = AttentionBatch(runs=(), slot_mapping=slots, decoding=decoding, prompts=prompts)
    us = timed([lambda p=p: attention.run(query, *p, batch, problem) for p in pools])
    found = attention.run(query, *pools[0], batch, problem)
    last = runs[-1]
    few = replace(last, start=0, length=min(new, 16))
    rows = query[last.start + new - few.length : last.start + new].float()
    exact = replace(problem, dtype=torch.float32)
    expected = attention_reference.run(
        rows, *(p.float() for p in pools[0]), AttentionBatch(runs=(few,), slot_mapping=slots), exact
    )
    return us, relative(found[-few.length :], expected)


def pointwise(limits: dict[str, float]) -> Iterator[Row]:
    """Yield what lies between the products."""
    for tokens in (1, 32, 128, 2048):
        x, delta = (torch.randn(tokens, 4096, device=DEVICE, dtype=DTYPE) for _ in range(2))
        gain = torch.rand(4096, device=DEVICE, dtype=DTYPE)
        gate_up = torch.randn(tokens, 28672, device=DEVICE, dtype=DTYPE)
        for codes in (None, CodeType(dtype=torch.int8)):
            to = "" if codes is None else " to int8"
            size = 2 if codes is None else 1
            works = {
                f"add_norm{to}": (lambda c=codes: norm.add_norm(x, delta, gain, 1e-5, c), tokens * 4096 * (6 + size)),
                f"silu_mul{to}": (lambda c=codes: gate.silu_mul(gate_up, c), tokens * 14336 * (4 + size)),
            }
            for name, (work, moved) in works.items():
                us = timed([work])
                share = moved / (us * 1e-6) / limits["copy_bytes_per_s"]
                yield Row(op=name, size=f"T{tokens}", us=us, megabytes=moved / 1e6, share=share)
        qkv = torch.randn(tokens, 6144, device=DEVICE, dtype=DTYPE)
        pools = [torch.empty(256, 16, 8, 128, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        tables = [torch.rand(4096, 64, device=DEVICE) for _ in range(2)]
        positions = torch.arange(tokens, device=DEVICE)
        us = timed([lambda: rotary.rotate_and_write(qkv, positions, *tables, None, 0.0, *pools, positions, 32, 8)])
        moved = tokens * 6144 * 4
        yield Row(op="rotate_and_write", size=f"T{tokens}", us=us, megabytes=moved / 1e6)
    for places in (1, 128):
        columns = torch.stack([torch.arange(places), torch.full((places,), 900), torch.ones(places)]).int().to(DEVICE)
        ids = torch.zeros(places, 2048, dtype=torch.int64, device=DEVICE)
        table = torch.zeros(places, 128, dtype=torch.int32, device=DEVICE)
        out = StepBuffers.new(places, places, 1, DEVICE)
        yield Row(
            op="prepare",
            size=f"{places} places",
            us=timed([lambda: step.prepare(columns, ids, (table,), 16, places, out)]),
        )


def markdown(found: dict[str, object], rows: Sequence[Row]) -> str:
    """Return the table."""
    head = ", ".join(
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )
    lines = [
        head,
        "",
        "| op | size | us | MB | of ceiling | TFLOP/s | over cuBLAS bf16 | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            row.op,
            row.size,
            f"{row.us:,.1f}",
            f"{row.megabytes:,.1f}" if row.megabytes else "",
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.tflops is None else f"{row.tflops:,.0f}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            "" if row.error is None else f"{row.error:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="stop after so long, with what there is")
    parser.add_argument("--only", nargs="+", choices=("linear", "attention", "pointwise"))
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md, written after every row")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_kernels.py: PyTorch sees no CUDA device\n")
    began = time.monotonic()
    torch.manual_seed(0)
    limits = ceilings()
    found: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__} | limits
    print(found, flush=True)
    rows: list[Row] = []
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "attention": lambda: attentions(limits),
        "linear": lambda: linears(limits, SHAPES),
        "pointwise": lambda: pointwise(limits),
    }
    for name, part in parts.items():
        if arguments.only and name not in arguments.only:
            continue
        try:
            for row in part():
                rows.append(row)
                print(f"{time.monotonic() - began:5.1f} s  {row}", file=sys.stderr, flush=True)
                if arguments.out is not None:
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    (arguments.out / "kernels.json").write_text(json.dumps(found | {"rows": [asdict(r) for r in rows]}))
                    (arguments.out / "kernels.md").write_text(markdown(found, rows))
                if time.monotonic() - began > arguments.seconds:
                    print(f"stopped after {arguments.seconds:.0f} s, in {name}", flush=True)
                    break
        except Exception as error:
            print(f"{name} broke off: {type(error).__name__}: {error}", flush=True)
    print(markdown(found, rows))


if __name__ == "__main__":
    main()
