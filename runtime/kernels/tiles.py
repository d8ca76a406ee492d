"""How large a piece of a product one program of a GPU makes: measured where a table says so, else by rule.

Nothing here depends on how many rows of x there are beyond the branch they fall into, so neither do the bits of a
result.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

# Kernels that multiply codes by codes: no weight becomes a number in registers.
CODES = ("w8a8", "fp8")
TABLE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """`rows` outputs by all `tokens` of a branch are one program's; `split` None divides the inputs by rule."""

    rows: int
    num_warps: int
    num_stages: int
    split: int | None = None


def tiles_for(kernel: str, device: torch.device | None, out_features: int, in_features: int, tokens: int) -> Tiles:
    """Return the tiles of a kernel for W [out, in] and the branch of up to `tokens` rows; `device` None: by rule."""
    if device is not None and device.type == "cuda":
        measured = _table().get((kernel, torch.cuda.get_device_name(device), out_features, in_features, tokens))
        if measured is not None:
            return measured
    if kernel in CODES:
        return Tiles(rows=64, num_warps=4, num_stages=5)
    if tokens <= 32:
        return Tiles(rows=64, num_warps=4, num_stages=3)
    return Tiles(rows=128, num_warps=8, num_stages=2)


def use(kernel: str, device: str, shape: tuple[int, int], tokens: int, tiles: Tiles | None) -> None:
    """Let a kernel take these tiles in this process, for W of `shape` [out, in]; None: those of the table or rule."""
    key = (kernel, device, *shape, tokens)
    _table().pop(key, None)
    if tiles is not None:
        _table()[key] = tiles


@functools.cache
def _table() -> dict[tuple[str, str, int, int, int], Tiles]:
    """Return the measured tiles by kernel, device, outputs, inputs and tokens."""
    if not TABLE.is_file():
        return {}
    found = {}
    for row in json.loads(TABLE.read_text())["rows"]:
        key = (row["kernel"], row["device"], row["out_features"], row["in_features"], row["tokens"])
        found[key] = Tiles(
            rows=row["rows"], num_warps=row["num_warps"], num_stages=row["num_stages"], split=row["split"]
        )
    return found
