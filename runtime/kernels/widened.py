"""Matrix products in float32 with weights widened a tile at a time, for CPUs whose narrow products are slow or wrong.

A tile is small enough to be multiplied while it is still in cache, and its buffer is reused, so no float32 copy of a
weight ever exists.
"""

from collections.abc import Callable

import torch

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32


def matmul_rows(
    x: torch.Tensor, out_features: int, widen: Callable[[slice, torch.Tensor], None], row_step: int = 1
) -> torch.Tensor:
    """Return x [T, in] @ W^T in float32 [T, out]; `widen(rows, tile)` fills tile [len(rows), in] with those rows of W.

    Tiles begin at multiples of `row_step`.
    """
    num_tokens, in_features = x.shape
    x = x.to(torch.float32)
    rows_per_tile = max(1, TILE_ELEMENTS // (in_features * row_step)) * row_step
    rows_per_tile = min(rows_per_tile, out_features)
    buffer = torch.empty(rows_per_tile, in_features, dtype=torch.float32)
    output = torch.empty(num_tokens, out_features, dtype=torch.float32)
    for start in range(0, out_features, rows_per_tile):
        rows = slice(start, min(start + rows_per_tile, out_features))
        tile = buffer[: rows.stop - rows.start]
        widen(rows, tile)
        output[:, rows] = x @ tile.T
    return output
