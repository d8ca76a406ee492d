"""Int8 weights on a CPU: W8A8 in int8 dot products where the hardware's are exact, otherwise in floating point.

Without VNNI, x86 multiplies unsigned by signed bytes into saturating 16-bit sums: oneDNN's int8 product was measured to
be off by a fifth of the largest output on full-range operands. There, activation codes (exact in bfloat16 and float32)
meet the int8 weight in floating point.
"""

import torch

from pressd.runtime.kernels import byte_codes
from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors

BLOCK = 64
# Weights from which oneDNN is the faster for 1 to 512 rows, on 2 cores of AMD Zen 4 in November 2026: one row of
# 512 x 256 takes it 73 us and the bytes as they are 38; at 1024 x 1024 both take about the same.
SMALLEST = 1 << 20


def _not_prepacked(problem: LinearProblem, device: Device) -> str | None:
    if (reason := byte_codes.why_not(problem, device)) is not None:
        return reason
    if problem.activation_bits != 8:
        return "serves int8 activations"
    if "vnni" not in device.features:
        return "this CPU has no VNNI: its int8 products saturate at 16 bits"
    if not byte_codes.integers_are_exact(problem, device):
        return f"sums up to {byte_codes.MAX_INT32_COLUMNS} columns in 32 bits, not {problem.in_features}"
    weights = problem.out_features * problem.in_features
    if prepacked_bytes(problem) > 1.1 * weights:
        return f"would keep more than a tenth beyond {problem.out_features} x {problem.in_features}: blocks of {BLOCK}"
    if weights < SMALLEST:
        return f"takes longer to start than {problem.out_features} x {problem.in_features} take to multiply"
    return None


def prepacked_bytes(problem: LinearProblem) -> int:
    """Return what oneDNN makes of a weight (seen in its 3.12): whole blocks, and a sum of 4 bytes for each row."""
    rows, columns = (-(-size // BLOCK) * BLOCK for size in (problem.out_features, problem.in_features))
    return rows * (columns + 4)


def _pack_prepacked(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    packed = {
        "prepacked": torch.ops.onednn.qlinear_prepack(tensors["weight"], None),
        "scale": tensors["weight_scale"].float().flatten(),
        "zero_points": torch.zeros(problem.out_features, dtype=torch.int32),
    }
    return byte_codes.keep_input_scale(packed, tensors, problem, device)


def _run_prepacked(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if x.size(0) == 0:
        return x.new_zeros(0, problem.out_features)
    codes, x_scale = byte_codes.activations(x, packed, problem)
    # Unsigned activations and float32 output: signed ones or bfloat16 output fall to oneDNN's slow reference path.
    unsigned = codes.to(torch.int8).view(torch.uint8).bitwise_xor_(0x80)  # adds 128; from float directly is slow
    products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned,
        1.0,
        128,
        packed["prepacked"],
        packed["scale"],
        packed["zero_points"],
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return products.mul_(x_scale).to(problem.dtype)


def _pack_codes(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    # A copy: what is mapped from a file lies where the file has it, and PyTorch's product wants multiples of 16.
    codes = tensors["weight"].clone(memory_format=torch.contiguous_format)
    packed = {"codes": codes, "scale": tensors["weight_scale"]}
    return byte_codes.keep_input_scale(packed, tensors, problem, device)


PREPACKED = LinearKernel(
    name="cpu-onednn", storage=disk.NAME, why_not=_not_prepacked, pack=_pack_prepacked, run=_run_prepacked
)
BYTES = LinearKernel(
    name="cpu-bytes",
    storage=disk.NAME,
    why_not=byte_codes.why_not,
    pack=_pack_codes,
    run=byte_codes.run,
    rows=byte_codes.rows,
)
