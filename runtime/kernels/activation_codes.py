"""Rows quantised to eight bits by their own maximum: the arithmetic that norms, gates and linears share.

int8: scale max|x| / 127.5, codes round half to even and clamp to -127..127, as integer_codes.quantize_activations.
e4m3: scale max|x| / 448, codes round to nearest.
"""

import torch

from pressd.runtime.kernels.registry import QuantizedRows

FP8 = torch.float8_e4m3fn
# The largest value of a row becomes this, and no code is beyond the second.
HALF_RANGE = {torch.int8: 127.5, FP8: 448.0}
LARGEST = {torch.int8: 127.0, FP8: 448.0}


def quantize_rows_reference(x: torch.Tensor, codes: torch.dtype) -> QuantizedRows:
    """Quantise x [T, K], in float32 or wider inside, plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale = (largest / HALF_RANGE[codes]).clamp_min(torch.finfo(wide.dtype).tiny)
    scaled = wide / scale
    if codes == torch.int8:
        scaled = scaled.round()
    return QuantizedRows(codes=scaled.clamp(-LARGEST[codes], LARGEST[codes]).to(codes), scale=scale)
