"""What a Triton kernel is compiled to: one variant for each set of constants that the serving path may launch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kernel with its constants, as it can be compiled without a GPU.

    `signature` has the type of each argument that is no constant, as Triton writes them ("*bf16", "i32", "fp32").
    A `hot` one runs in every step and must not spill registers. `aligned` are the arguments that are always multiples
    of 16, which allows wide loads; pointers are by allocation. `oldest` is the compute capability that it needs.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    aligned: tuple[str, ...] = ()
    oldest: int = 80
