"""The gate of a feed-forward network, plain torch (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

import torch

from pressd.runtime.kernels.activation_codes import quantize_rows_reference
from pressd.runtime.kernels.registry import CodeType, Rows


def silu_mul(gate_up: torch.Tensor, quantize: CodeType | None = None) -> Rows:
    """Return silu(gate) * up [T, F] for the two halves of [T, 2 F], each step rounded to its type.

    With `quantize` it comes as QuantizedRows.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    return product if quantize is None else quantize_rows_reference(product, quantize)
