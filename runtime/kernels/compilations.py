"""How many Triton kernels were compiled while nobody should have had to wait for one."""

import sys
from typing import Any


class Compilations:
    """Counts what Triton compiles from now on, in this process; what it finds in its cache on disk counts too."""

    def __init__(self) -> None:
        self.count = 0
        # Where Triton was not loaded, no kernel of it runs.
        if "triton" in sys.modules:
            _watch(self)

    def note(self, **_: Any) -> None:
        self.count += 1


def _watch(compilations: Compilations) -> None:
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook

    def hook(**facts: Any) -> None:
        if before is not None:
            before(**facts)
        compilations.note(**facts)

    knobs.runtime.jit_post_compile_hook = hook
