"""Where in the pool a run of blocks goes, so that it is contiguous and can grow. No torch."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Stamps = NDArray[np.int64]


def find_window(available: Mask, promised: Mask, stamps: Stamps, count: int, wish: int) -> int | None:
    """Return the first block of a window of `count` available blocks, or None.

    A window in which `wish` blocks could be had later is preferred, then one that nobody was promised, then any. Among
    those, the one whose cached prefixes were used longest ago (`stamps`: 0 where nothing is cached).
    """
    open_to_all = available & ~promised
    for mask, length in ((open_to_all, max(count, wish)), (open_to_all, count), (available, count)):
        start = _cheapest(mask, stamps, length)
        if start is not None:
            return start
    return None


def find_pieces(available: Mask, promised: Mask, stamps: Stamps, count: int) -> list[int]:
    """Return `count` of the available blocks in as few runs as can be, those last that somebody was promised."""
    blocks: list[int] = []
    for mask in (available & ~promised, available & promised):
        starts, lengths = _runs(mask)
        # The longest run first; equal ones by what they would evict.
        for index in np.lexsort((stamps[starts], -lengths)):
            start, length = int(starts[index]), int(lengths[index])
            blocks += range(start, start + min(length, count - len(blocks)))
            if len(blocks) == count:
                return blocks
    raise AssertionError(f"{count} blocks were asked for and {len(blocks)} are available")


def _cheapest(mask: Mask, stamps: Stamps, length: int) -> int | None:
    """Return the start of the window of `length` set places with the least sum of stamps, the first of equals."""
    if length > mask.size:
        return None
    set_before = np.concatenate(([0], np.cumsum(mask)))
    fits = set_before[length:] - set_before[:-length] == length
    if not fits.any():
        return None
    stamps_before = np.concatenate(([0], np.cumsum(stamps)))
    cost = np.where(fits, stamps_before[length:] - stamps_before[:-length], np.iinfo(np.int64).max)
    return int(cost.argmin())


def _runs(mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return starts and lengths of the runs of set places."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges[::2], edges[1::2] - edges[::2]
