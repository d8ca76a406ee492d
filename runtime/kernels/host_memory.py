"""Memory of the computer that serves: in huge pages, and kept once it is there."""

import contextlib
import ctypes
import math
import mmap
import sys

import torch

HUGE_PAGE = 2 << 20
# glibc's names for its settings, and the most it takes for the first of them.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST_KEPT, _MOST_KEPT = 32 << 20, 1 << 30


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate a tensor, not cleared; a large one asks for huge pages and gets what there is.

    A weight that is streamed crosses a page of 4 KiB every 64 lines, and waits each time for an address.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    # Huge pages lie where addresses are multiples of their size; what lies before and behind is never touched.
    # Private: what is shared, which is Python's default, gets them by a setting of its own, mostly never.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    start = -buffer.data_ptr() % HUGE_PAGE
    return buffer[start : start + num_bytes].view(dtype).view(shape)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, up to 1 GiB, for whoever asks next; without glibc nothing happens.

    A step allocates what the step before has freed. Given back to the system in between, it would come anew, a page at
    a time and each cleared: a twentieth of the time of a prompt.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
