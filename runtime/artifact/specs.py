"""How one linear [out, in] is stored: a tree with stored weights at its leaves.

    Packed                     one weight, dense or in integers
    Masked(values)             two of every four columns kept, the rest zero
    Chain(a, b)                W = A B, low rank
    Sum(base, residual)        W = base + residual

A tensor's name is the path to it: `<linear>.residual.a.weight`. Names, types and shapes of everything follow from the
scheme's name and the weight's shape, so that a reader knows them before it opens a file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.mask import format as mask
from pressd.runtime.kernels.packed_int import format as packed_int

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class _Node:
    """What every kind of node can say of itself and of all below it."""

    __slots__ = ()

    def children(self) -> Mapping[str, "LinearSpec"]:
        """Return the parts by the name that their tensors are stored under."""
        return {}

    def own_layout(self, dtype: torch.dtype) -> Layout:
        """Return the tensors of this node alone."""
        return {}

    def layout(self, dtype: torch.dtype) -> Layout:
        """Return type and shape of each stored tensor by suffix; `dtype` is that of dense weights and of scales."""
        layout = self.own_layout(dtype)
        for name, child in self.children().items():
            layout |= {f"{name}.{suffix}": entry for suffix, entry in child.layout(dtype).items()}
        return layout

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of every stored tensor."""
        return sum(math.prod(shape) * kind.itemsize for kind, shape in self.layout(dtype).values())

    def leaves(self) -> Iterator[tuple[str, "Packed"]]:
        """Yield each stored weight with the prefix of its tensors' suffixes (empty, or ending in a dot)."""
        if isinstance(self, Packed):
            yield "", self
        for name, child in self.children().items():
            yield from ((f"{name}.{prefix}", leaf) for prefix, leaf in child.leaves())

    @property
    def is_dense(self) -> bool:
        """Whether this is one weight stored as it is."""
        return isinstance(self, Packed) and self.storage == dense.NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed(_Node):
    """One stored weight; group_size None is one scale per row (or no scale: dense).

    What is not `symmetric` has zero points beside its scales. With a `block_size` there is one scale for each square of
    so many rows and columns, and activations have one for so many columns. With `static_activations` these have one
    that is stored.
    """

    storage: str
    bits: int
    group_size: int | None
    activation_bits: int
    out_features: int
    in_features: int
    symmetric: bool = True
    block_size: int | None = None
    static_activations: bool = False

    @classmethod
    def dense(cls, shape: tuple[int, int], dtype: torch.dtype) -> "Packed":
        """Return the spec of a weight [out, in] stored as it is."""
        return cls(
            storage=dense.NAME,
            bits=8 * dtype.itemsize,
            group_size=None,
            activation_bits=16,
            out_features=shape[0],
            in_features=shape[1],
        )

    def own_layout(self, dtype: torch.dtype) -> Layout:
        sizes = self.out_features, self.in_features, self.bits, self.group_size, dtype
        static = self.static_activations
        match self.storage:
            case packed_int.NAME:
                return packed_int.layout(*sizes, symmetric=self.symmetric)
            case fp8.NAME:
                return fp8.layout(*sizes, block_size=self.block_size, static_activations=static)
            case int8.NAME:
                return int8.layout(*sizes, static_activations=static)
        assert self.storage == dense.NAME
        return dense.layout(*sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked(_Node):
    """Of every four columns of a row, two: `values` [out, in / 2] holds them in order, `mask` a bit per column."""

    values: Packed

    @property
    def out_features(self) -> int:
        return self.values.out_features

    @property
    def in_features(self) -> int:
        return 2 * self.values.in_features

    def children(self) -> "Mapping[str, LinearSpec]":
        return {"values": self.values}

    def own_layout(self, dtype: torch.dtype) -> Layout:
        return mask.layout(self.out_features, self.in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(_Node):
    """A product: `a` [out, rank] times `b` [rank, in]."""

    a: Packed
    b: Packed

    @property
    def out_features(self) -> int:
        return self.a.out_features

    @property
    def in_features(self) -> int:
        return self.b.in_features

    @property
    def rank(self) -> int:
        return self.a.in_features

    def children(self) -> "Mapping[str, LinearSpec]":
        return {"a": self.a, "b": self.b}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(_Node):
    """A base, and a low-rank correction of its error."""

    base: "Packed | Masked | Chain"
    residual: Chain

    @property
    def out_features(self) -> int:
        return self.residual.out_features

    @property
    def in_features(self) -> int:
        return self.residual.in_features

    def children(self) -> "Mapping[str, LinearSpec]":
        return {"base": self.base, "residual": self.residual}


LinearSpec: TypeAlias = Packed | Masked | Chain | Sum


def child_tensors(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the child called `name`, by their suffixes below it."""
    start = f"{name}."
    return {suffix.removeprefix(start): tensor for suffix, tensor in tensors.items() if suffix.startswith(start)}
