"""What a scheme's name means.

    [sparse24:|lowrank{r}:] (bf16 | fp16 | fp8 | fp8a16 | w8a8 | w{2..8}a{16|8}[g{32|64|128}] | fp8-block
                            | fp8-static | w8a8-static | w{2..8}a16[g{32|64|128}]-asym) [+residual{r}]

A8 is int8 activations, symmetric, dynamic: per token, and per group where the weight has groups. `-asym` weights have a
zero point beside each scale. `fp8` has weights (with a scale per row) and activations (per token) as e4m3 floats,
`fp8a16` weights alone; `fp8-block` has a scale per 128 x 128 weights, and per token and 128 columns. The activations of
`-static` have one scale per tensor, which calibration finds. `sparse24` keeps two
of every four weights, `lowrank` stores two thin factors in the scheme that follows, `+residual` adds dense factors of
rank r that correct what the rest lost.
"""

import math
import re
from dataclasses import dataclass

import torch

from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed, Sum
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int

CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = {"fp8": 8, "fp8a16": 16, "fp8-block": 8, "fp8-static": 8}  # and the bits of their activations
GROUP_SIZES = (32, 64, 128)
BLOCK_SIZE = 128
_GROUP = f"[g{'|g'.join(map(str, GROUP_SIZES))}]"
_PLAIN = (
    f"bf16, fp16, fp8, fp8a16, w8a8, w{{2..8}}a{{16|8}}{_GROUP}, w{{2..8}}a16{_GROUP}-asym, "
    "fp8-block, fp8-static, w8a8-static"
)
KNOWN = f"{_PLAIN}, sparse24:SCHEME, lowrank{{r}}:SCHEME, SCHEME+residual{{r}}"
_RANK = r"[1-9]\d{0,4}"
_NAME = re.compile(
    rf"(?:(?P<sparse>sparse24):|lowrank(?P<rank>{_RANK}):)?"
    rf"(?P<weights>[a-z0-9]+(?:-[a-z]+)?)(?:\+residual(?P<residual>{_RANK}))?",
    re.ASCII,
)
_INTEGERS = re.compile(r"w([2-8])a(16|8)(?:g([1-9]\d{0,3}))?(-asym|-static)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is to be stored and multiplied, for any shape; ranks None are for what it has not."""

    name: str
    storage: str
    bits: int
    group_size: int | None
    activation_bits: int
    symmetric: bool = True
    block_size: int | None = None
    static_activations: bool = False
    sparse24: bool = False
    rank: int | None = None
    residual_rank: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether one stored weight is all there is: what other tools have words for."""
        return not self.sparse24 and self.rank is None and self.residual_rank is None

    @property
    def is_dense(self) -> bool:
        """Whether the weight is stored as it is, only cast."""
        return self.is_plain and self.storage == dense.NAME

    @property
    def cast(self) -> torch.dtype | None:
        """The precision that dense weights of this scheme are stored in, None if it has none of its own."""
        return next((dtype for word, dtype in CASTS.items() if _words(self.name)["weights"] == word), None)

    def spec(self, shape: tuple[int, int]) -> LinearSpec:
        """Return this scheme for a weight [out, in].

        Raises ValueError if groups do not divide the inputs, or a rank is not below both sides.
        """
        base = self._base(shape)
        if self.residual_rank is None:
            return base
        return Sum(base=base, residual=self._chain(shape, self.residual_rank, "residual", in_groups=False))

    def bits_per_weight(self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> float:
        """Return the stored bits, scales included, over the weights of [out, in]; `dtype` as in a spec's layout."""
        return 8 * self.spec(shape).stored_bytes(dtype) / math.prod(shape)

    def _base(self, shape: tuple[int, int]) -> Packed | Masked | Chain:
        if self.rank is not None:
            return self._chain(shape, self.rank, "lowrank", in_groups=True)
        if not self.sparse24:
            return self._packed(shape)
        out_features, in_features = shape
        if in_features % 4:
            raise ValueError(f"{self.name}: in_features {in_features} is not a multiple of 4")
        return Masked(values=self._packed((out_features, in_features // 2)))

    def _chain(self, shape: tuple[int, int], rank: int, word: str, *, in_groups: bool) -> Chain:
        if rank >= min(shape):
            raise ValueError(f"{self.name}: {word} {rank} is not below both sides of {shape[0]} x {shape[1]}")
        factors = (shape[0], rank), (rank, shape[1])
        a, b = map(self._packed if in_groups else _dense, factors)
        return Chain(a=a, b=b)

    def _packed(self, shape: tuple[int, int]) -> Packed:
        out_features, in_features = shape
        if self.group_size is not None and in_features % self.group_size:
            what = "in_features" if self.is_plain else "stored columns"
            raise ValueError(f"{self.name}: {what} {in_features} is not a multiple of group size {self.group_size}")
        if self.block_size is not None and in_features % self.block_size:
            raise ValueError(
                f"{self.name}: in_features {in_features} is not a multiple of {self.block_size}, the columns of a block"
            )
        return Packed(
            storage=self.storage,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            out_features=out_features,
            in_features=in_features,
            symmetric=self.symmetric,
            block_size=self.block_size,
            static_activations=self.static_activations,
        )


def parse_scheme(text: str) -> Scheme:
    """Return the scheme that `text` names; raises ValueError saying which names are known."""
    words = _words(text)
    weights = words["weights"] or ""
    suffix = weights.partition("-")[2]
    sparse24 = words["sparse"] is not None
    rank, residual_rank = (None if words[name] is None else int(words[name] or 0) for name in ("rank", "residual"))
    integers = _INTEGERS.fullmatch(weights)
    if weights in CASTS:
        if residual_rank is not None and rank is None and not sparse24:
            raise ValueError(f"scheme {text!r}: {weights} loses nothing that a residual could correct; write {weights}")
        storage, bits, group_size, activation_bits = dense.NAME, 16, None, 16
    elif weights in FLOATS:
        storage, bits, group_size, activation_bits = fp8.NAME, 8, None, FLOATS[weights]
    elif integers is not None and (integers[3] is None or int(integers[3]) in GROUP_SIZES):
        bits, activation_bits = int(integers[1]), int(integers[2])
        group_size = None if integers[3] is None else int(integers[3])
        is_int8 = (bits, activation_bits, group_size) == (8, 8, None)
        storage = int8.NAME if is_int8 else packed_int.NAME
    else:
        raise ValueError(f"scheme {text!r} is not known; choose one of {KNOWN}")
    scheme = Scheme(
        name=text,
        storage=storage,
        bits=bits,
        group_size=group_size,
        activation_bits=activation_bits,
        symmetric=suffix != "asym",
        block_size=BLOCK_SIZE if suffix == "block" else None,
        static_activations=suffix == "static",
        sparse24=sparse24,
        rank=rank,
        residual_rank=residual_rank,
    )
    _check(scheme)
    return scheme


def _check(scheme: Scheme) -> None:
    """Refuse words that do not go together."""
    at = f"scheme {scheme.name!r}"
    if scheme.sparse24 and scheme.activation_bits != 16:
        raise ValueError(f"{at}: sparse24 weights meet 16-bit activations only; write a16")
    if scheme.sparse24 and scheme.storage == fp8.NAME:
        raise ValueError(f"{at}: sparse24 keeps dense weights or integers; write w8a16")
    if not scheme.symmetric and scheme.activation_bits != 16:
        raise ValueError(f"{at}: zero points meet 16-bit activations only; write a16, or leave out -asym")
    if scheme.static_activations and scheme.storage not in (int8.NAME, fp8.NAME):
        raise ValueError(f"{at}: activations of one scale meet 8-bit weights of one per row; write w8a8-static")
    if scheme.static_activations and scheme.rank is not None:
        raise ValueError(f"{at}: each factor would need a scale of its own; leave out lowrank or -static")


def _words(text: str) -> dict[str, str | None]:
    match = _NAME.fullmatch(text)
    if match is None:
        raise ValueError(f"scheme {text!r} is not known; choose one of {KNOWN}")
    return match.groupdict()


def _dense(shape: tuple[int, int]) -> Packed:
    return Packed.dense(shape, torch.bfloat16)
