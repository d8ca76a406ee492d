"""Matrix products with weights widened a tile at a time, where a CPU's product with the stored type is slow or wrong.

A tile is small enough to be multiplied while it is still in cache, and its buffer is reused: a weight never exists in
the wider type.
"""

from collections.abc import Callable

import torch

from pressd.runtime.kernels.registry import describe_device

# Fastest of 2^18 to 2^24 at 2048 x 2048, 8192 x 2048 and 2048 x 8192 on 2 cores of AMD Zen 4 (32 MiB of L3); what 2 of
# Zen 3 were measured with.
TILE_ELEMENTS = {"avx512": 1 << 22, "avx2": 1 << 18}


def tile_elements() -> int:
    """Return how many weights to widen at a time on this machine."""
    features = describe_device(torch.device("cpu")).features
    return TILE_ELEMENTS["avx512" if "avx512" in features else "avx2"]


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to multiply in for a result in `dtype`: bfloat16 where the CPU has its arithmetic, or float32."""
    native = dtype == torch.bfloat16 and "bf16" in describe_device(torch.device("cpu")).features
    return torch.bfloat16 if native else torch.float32


def matmul_rows(
    x: torch.Tensor, out_features: int, dtype: torch.dtype, widen: Callable[[slice, torch.Tensor], None]
) -> torch.Tensor:
    """Return x [T, in] @ W^T multiplied in `dtype`: float32 [T, out].

    `widen(rows, tile)` fills tile [len(rows), in] with those rows of W.
    """
    num_tokens, in_features = x.shape
    x = x.to(dtype)
    rows_per_tile = min(max(1, tile_elements() // in_features), out_features)
    buffer = torch.empty(rows_per_tile, in_features, dtype=dtype)
    output = torch.empty(num_tokens, out_features, dtype=torch.float32)
    for start in range(0, out_features, rows_per_tile):
        rows = slice(start, min(start + rows_per_tile, out_features))
        tile = buffer[: rows.stop - rows.start]
        widen(rows, tile)
        output[:, rows] = x @ tile.T
    return output
