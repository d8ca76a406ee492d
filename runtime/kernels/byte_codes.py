"""Products with int8 codes [out, in], one to a byte, and their rows: what every storage of 8-bit rows shares."""

import torch

from pressd.runtime.kernels.crossovers import few_rows
from pressd.runtime.kernels.integer_codes import dequantize, quantize_activations
from pressd.runtime.kernels.registry import Device, LinearProblem, Tensors, describe_device
from pressd.runtime.kernels.widened import matmul_rows, tile_dtype

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PRODUCT_COLUMNS = 16
MAX_INT32_COLUMNS = (2**31 - 1) // (255 * 128)  # unsigned times signed bytes, summed up


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.bits != 8 or problem.group_size is not None:
        return "serves 8 bits and one scale per output row"
    if problem.dtype not in DTYPES:
        return f"computes in float32 at most, not in {problem.dtype}"
    return None


def integers_are_exact(problem: LinearProblem, device: Device) -> bool:
    """Whether int8 activations can meet int8 weights in the CPU's integers, without saturation or overflow."""
    whole_rows = problem.activation_bits == 8 and problem.group_size is None
    return whole_rows and "vnni" in device.features and problem.in_features <= MAX_INT32_COLUMNS


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Return [T, out] for `packed` with "codes" int8 [out, in] and "scale" [out, 1]."""
    codes, x_scale = packed["codes"], None
    if problem.activation_bits == 8:
        x, x_scale = quantize_activations(x)
    if x.size(0) == 0:
        products = torch.empty(0, problem.out_features)
    elif _takes_product_of_few(x, problem):
        # Scales multiply the sums afterwards: codes, of weights and activations, are exact in every type.
        ones = torch.ones(problem.out_features, dtype=torch.bfloat16)
        products = torch._weight_int8pack_mm(x.to(torch.bfloat16), codes, ones).float()
    elif integers_are_exact(problem, describe_device(x.device)):
        products = torch._int_mm(x.to(torch.int8), codes.T).float()
    else:

        def widen(rows: slice, tile: torch.Tensor) -> None:
            tile.copy_(codes[rows])

        products = matmul_rows(x, problem.out_features, tile_dtype(problem.dtype), widen)
    products.mul_(packed["scale"].T)
    return (products if x_scale is None else products.mul_(x_scale)).to(problem.dtype)


def _takes_product_of_few(x: torch.Tensor, problem: LinearProblem) -> bool:
    """Whether few rows meet the codes in PyTorch's product, which reads past their end unless 16 divides a row."""
    if problem.dtype != torch.bfloat16 or problem.in_features % PRODUCT_COLUMNS:
        return False
    return x.size(0) <= few_rows(f"int8 codes a{problem.activation_bits}")


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Return the rows of W at ids int64 [T]: [T, in]."""
    return dequantize(packed["codes"][ids], packed["scale"][ids], problem.dtype)
