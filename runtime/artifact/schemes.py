"""What a scheme's name means, and how one linear is stored.

Grammar: `bf16 | fp16 | w8a8 | w{2..8}a16[g32|g64|g128]`. A8 is int8 activations, symmetric, dynamic per token.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

LAYOUTS: dict[str, Callable[[int, int, int, int | None, torch.dtype], Layout]] = {
    module.NAME: module.layout for module in (dense, int8, packed_int)
}
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROUP_SIZES = (32, 64, 128)
KNOWN = f"bf16, fp16, w8a8, w{{2..8}}a16, w{{2..8}}a16g{{{'|'.join(map(str, GROUP_SIZES))}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """How one linear's weight [out, in] is stored; group_size None is one scale per row (or no scale: dense)."""

    storage: str
    bits: int
    group_size: int | None
    activation_bits: int
    out_features: int
    in_features: int

    @classmethod
    def dense(cls, shape: tuple[int, int], dtype: torch.dtype) -> "LinearSpec":
        """Return the spec of a weight [out, in] stored as it is."""
        return cls(
            storage=dense.NAME,
            bits=8 * dtype.itemsize,
            group_size=None,
            activation_bits=16,
            out_features=shape[0],
            in_features=shape[1],
        )

    def layout(self, dtype: torch.dtype) -> Layout:
        """Return type and shape of each stored tensor by suffix; `dtype` is the weight's if dense, else the scale's."""
        return LAYOUTS[self.storage](self.out_features, self.in_features, self.bits, self.group_size, dtype)

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of every stored tensor of this linear."""
        return sum(math.prod(shape) * kind.itemsize for kind, shape in self.layout(dtype).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is to be stored and multiplied, for any shape."""

    name: str
    storage: str
    bits: int
    group_size: int | None
    activation_bits: int
    symmetric: bool = True

    def spec(self, shape: tuple[int, int]) -> LinearSpec:
        """Return this scheme for a weight [out, in].

        Raises ValueError if the groups do not divide in_features.
        """
        out_features, in_features = shape
        if self.group_size is not None and in_features % self.group_size:
            raise ValueError(
                f"{self.name}: in_features {in_features} is not a multiple of group size {self.group_size}"
            )
        return LinearSpec(
            storage=self.storage,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            out_features=out_features,
            in_features=in_features,
        )

    def bits_per_weight(self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> float:
        """Return the stored bits, scales included, over the weights of [out, in]; `dtype` as in LinearSpec.layout."""
        return 8 * self.spec(shape).stored_bytes(dtype) / math.prod(shape)


def parse_scheme(text: str) -> Scheme:
    """Return the scheme that `text` names; raises ValueError saying which names are known."""
    if text in CASTS:
        return Scheme(name=text, storage=dense.NAME, bits=16, group_size=None, activation_bits=16)
    if text == "w8a8":
        return Scheme(name=text, storage=int8.NAME, bits=8, group_size=None, activation_bits=8)
    match = re.fullmatch(r"w([2-8])a16(?:g([1-9]\d{0,3}))?", text, re.ASCII)
    group_size = int(match[2]) if match and match[2] else None
    if match is None or group_size not in (None, *GROUP_SIZES):
        raise ValueError(f"scheme {text!r} is not known; choose one of {KNOWN}")
    return Scheme(name=text, storage=packed_int.NAME, bits=int(match[1]), group_size=group_size, activation_bits=16)
