"""What GPTQ costs on a GPU for a model of 8 billion parameters, without the forward passes that make its inputs.

    python tests/bench/gpu_gptq.py [--tokens 262144] [--out build/gpu-results]

For the fused linears of one block: the Hessian of so many tokens (bf16 inputs, products added up in float32), its
inverse's Cholesky factor, and the sweep over all columns with the kernel. One block is measured, 32 are told. The codes
are compared with the plain sweep's on some rows, and with rounding to nearest by the error of outputs.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pressd.runtime.kernels.gptq import reference
from pressd.runtime.kernels.gptq import triton as kernels

# Inputs of the fused linears of a block, and their outputs together.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BLOCKS, CHUNK, BITS, GROUP = 32, 8192, 4, 128


def timed(work, *arguments):  # type: ignore[no-untyped-def]
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = work(*arguments)
    torch.cuda.synchronize()
    return result, time.perf_counter() - began


def hessian(width: int, tokens: int) -> torch.Tensor:
    """Add up X^T X of chunks; the same inputs again and again, as only time matters."""
    x = torch.randn(CHUNK, width, device="cuda", dtype=torch.bfloat16)
    total = torch.zeros(width, width, device="cuda")
    for _ in range(tokens // CHUNK):
        total += torch.mm(x.t(), x, out_dtype=torch.float32)
    return total


def factor_of(total: torch.Tensor) -> torch.Tensor:
    total.diagonal().add_(0.01 * total.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(total))
    return torch.linalg.cholesky(inverse, upper=True).contiguous()


def measure(name: str, tokens: int) -> dict[str, object]:
    out_features, width = SHAPES[name]
    torch.cuda.reset_peak_memory_stats()
    total, hessian_s = timed(hessian, width, tokens)
    kept = total.clone()
    factor, factor_s = timed(factor_of, total)
    weight = torch.randn(out_features, width, device="cuda")
    scale = weight.view(out_features, -1, GROUP).abs().amax(-1) / (2 ** (BITS - 1) - 0.5)
    reference.quantize(weight[:64], factor, scale[:64], BITS, GROUP, kernels.sweep)  # compiled here
    codes, sweep_s = timed(reference.quantize, weight, factor, scale, BITS, GROUP, kernels.sweep)
    peak = torch.cuda.max_memory_allocated()
    plain = reference.quantize(weight[:32], factor, scale[:32], BITS, GROUP)
    wide = scale.repeat_interleave(GROUP, 1)[:32]
    nearest = (weight[:32] / wide).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)

    def size(found: torch.Tensor) -> float:
        lost = weight[:32] - found.float() * wide
        return float(((lost @ kept) * lost).sum())

    return {
        "linear": name,
        "hessian_s": hessian_s,
        "factor_s": factor_s,
        "sweep_s": sweep_s,
        "peak_bytes": peak,
        "codes_that_differ": float((codes[:32] != plain).double().mean()),
        "error_over_nearest": size(codes[:32]) / size(nearest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--out", type=Path, help="folder for gptq.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_gptq.py: PyTorch sees no CUDA device\n")
    rows = [measure(name, arguments.tokens) for name in SHAPES]
    seconds = BLOCKS * sum(float(str(row[key])) for row in rows for key in ("hessian_s", "factor_s", "sweep_s"))
    found = {"device": torch.cuda.get_device_name(), "tokens": arguments.tokens, "rows": rows, "all_blocks_s": seconds}
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gptq.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
