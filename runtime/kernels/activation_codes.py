"""Rows quantised to eight bits by their own maximum: the arithmetic that norms, gates and linears share.

int8: scale max|x| / 127.5, codes round half to even and clamp to -127..127, as integer_codes.quantize_activations.
e4m3: scale max|x| / 448, codes round to nearest.
"""

from collections.abc import Callable

import torch

from pressd.runtime.kernels.registry import SUM_FACTOR, CodeType, LinearProblem, QuantizedRows

FP8 = torch.float8_e4m3fn
# The largest value of a row becomes this, and no code is beyond the second.
HALF_RANGE = {torch.int8: 127.5, FP8: 448.0}
LARGEST = {torch.int8: 127.0, FP8: 448.0}


def by_row(dtype: torch.dtype) -> Callable[[LinearProblem], CodeType | None]:
    """Return `LinearKernel.codes` of kernels that take one scale for each row, as schemes without groups have it."""

    def codes(problem: LinearProblem) -> CodeType | None:
        is_by_row = problem.activation_bits == 8 and problem.group_size is None and not problem.static_activations
        return CodeType(dtype=dtype) if is_by_row else None

    return codes


def quantize_rows_reference(x: torch.Tensor, kind: CodeType) -> QuantizedRows:
    """Quantise x [T, K], in float32 or wider inside, plain torch."""
    codes = kind.dtype
    num_rows, width = x.shape
    group = kind.group_size or width
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(num_rows, width // group, group)
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale = (largest / HALF_RANGE[codes]).clamp_min(torch.finfo(wide.dtype).tiny)
    scaled = wide / scale
    if codes == torch.int8:
        scaled = scaled.round()
    found = scaled.clamp(-LARGEST[codes], LARGEST[codes]).to(codes)
    sums = found.sum(dim=-1, dtype=torch.int32) * SUM_FACTOR if kind.has_sums else None
    return QuantizedRows(codes=found.flatten(1), scale=scale.squeeze(-1), sums=sums)
