"""Parallel regions on the threads that PyTorch uses already.

A second pool would fight PyTorch's for the cores: its threads spin for a while after each of its operators. So
generated code enters the OpenMP runtime that PyTorch loaded, through GOMP_parallel, which its own regions compile to.
"""

import ctypes
import functools
from pathlib import Path

import llvmlite.binding as llvm
import torch

PARALLEL, BARRIER = "GOMP_parallel", "GOMP_barrier"


@functools.cache
def openmp() -> dict[str, int] | None:
    """Return where PyTorch's OpenMP runtime has what generated code calls; None if it has another runtime or none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.is_file() or not torch._C.has_openmp:
        return None
    try:
        loaded = ctypes.CDLL(str(library))
        functions = {name: ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in (PARALLEL, BARRIER)}
    except (OSError, AttributeError):
        return None
    return {name: address for name, address in functions.items() if address is not None}


@functools.cache
def publish() -> None:
    """Let compiled code find it by name."""
    functions = openmp()
    assert functions is not None, f"PyTorch has no {PARALLEL}"
    for name, address in functions.items():
        llvm.add_symbol(name, address)
