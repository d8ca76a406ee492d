"""Generated kernels with other vectors than this machine's widest."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pressd.runtime.kernels import vnni_product, vnni_rows
from pressd.runtime.kernels.attention import cpu_decode, cpu_prompt
from pressd.runtime.kernels.codegen import target
from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.gate import cpu as gate
from pressd.runtime.kernels.norm import cpu as norm
from pressd.runtime.kernels.rotary import cpu as rotary

MODULES = (vnni_product, vnni_rows, cpu_decode, cpu_prompt, gate, norm, rotary)
needs_vnni = pytest.mark.skipif(target.machine_vectors() is None, reason="this CPU has no VNNI to generate code for")


@contextmanager
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vectors]:
    """Generate code of 256 bits in 16 registers, which AVX-512 runs as well."""
    mine = target.machine_vectors()
    assert mine is not None
    vectors = Vectors(width=8, registers=16, cpu=mine.cpu, features=mine.features)
    with monkeypatch.context() as patch:
        patch.setattr(target, "vectors_of", lambda cpu, features: vectors)
        _forget()
        try:
            yield vectors
        finally:
            _forget()
    _forget()


def _forget() -> None:
    target.machine_vectors.cache_clear()
    for module in MODULES:
        module._program.cache_clear()
