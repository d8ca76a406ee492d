"""Memory for weights: private, in huge pages where the system gives them, and no other than torch's where small."""

import sys
from pathlib import Path

import pytest
import torch

from pressd.runtime.kernels.host_memory import HUGE_PAGE, huge_empty, keep_freed_memory

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> set[str]:
    """What the kernel says of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 5), (0, 7), (1 << 20, 3), (2, 1 << 21, 3)], ids=str)
def test_it_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = huge_empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(3)
    assert bool((tensor == 3).all())
    assert tensor.data_ptr() % 64 == 0
    if tensor.nbytes >= HUGE_PAGE:
        assert tensor.data_ptr() % HUGE_PAGE == 0


@pytest.mark.skipif(not PAGES.is_file() or not sys.platform.startswith("linux"), reason="no huge pages on this system")
def test_large_memory_is_private_and_asks_for_huge_pages() -> None:
    """Shared memory, as Python maps it unless told otherwise, gets none on most systems."""
    tensor = huge_empty((4 * HUGE_PAGE,), torch.uint8)
    flags = flags_of(tensor.data_ptr())
    assert "hg" in flags
    assert "sh" not in flags


def test_memory_outlives_what_made_it() -> None:
    part = huge_empty((HUGE_PAGE, 2), torch.uint8).fill_(7)[-1]
    others = [huge_empty((HUGE_PAGE, 2), torch.uint8).fill_(1) for _ in range(3)]
    assert part.tolist() == [7, 7]
    assert len(others) == 3


def test_keeping_what_is_freed_can_be_said_twice() -> None:
    keep_freed_memory()
    keep_freed_memory()
