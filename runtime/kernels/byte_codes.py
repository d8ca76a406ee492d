"""Products with int8 codes [out, in], one to a byte, and their rows: what every storage of 8-bit rows shares."""

import torch

from pressd.runtime.kernels.crossovers import few_rows
from pressd.runtime.kernels.integer_codes import (
    INPUT_SCALE,
    dequantize,
    quantize_activations,
    quantize_activations_by,
)
from pressd.runtime.kernels.registry import Device, LinearProblem, Tensors, describe_device, why_not_special
from pressd.runtime.kernels.widened import matmul_rows, tile_dtype

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PRODUCT_COLUMNS = 16
MAX_INT32_COLUMNS = (2**31 - 1) // (255 * 128)  # unsigned times signed bytes, summed up


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if (reason := why_not_special(problem, static_activations=True)) is not None:
        return reason
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
    """Return [T, out] for `packed` with "codes" int8 [out, in], "scale" [out, 1] and, if static, "input_scale" [1]."""
    codes, x_scale = packed["codes"], None
    if problem.activation_bits == 8:
        x, x_scale = activations(x, packed, problem)
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


def activations(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of x as float [T, in] and their scale [T, 1]."""
    if problem.static_activations:
        return quantize_activations_by(x, packed["input_scale"])
    return quantize_activations(x)


def keep_input_scale(packed: Tensors, tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    """Return `packed` with the scale of the activations if it is stored."""
    if not problem.static_activations:
        return packed
    return packed | {"input_scale": tensors[INPUT_SCALE].to(device.torch_device)}


def _takes_product_of_few(x: torch.Tensor, problem: LinearProblem) -> bool:
    """Whether few rows meet the codes in PyTorch's product, which reads past their end unless 16 divides a row."""
    if problem.dtype != torch.bfloat16 or problem.in_features % PRODUCT_COLUMNS:
        return False
    return x.size(0) <= few_rows(f"int8 codes a{problem.activation_bits}")


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Return the rows of W at ids int64 [T]: [T, in]."""
    return dequantize(packed["codes"][ids], packed["scale"][ids], problem.dtype)
