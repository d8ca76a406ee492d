"""How one implementation per layer is chosen: once, at load, by asking each candidate why it would not do."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem

Tensors = dict[str, torch.Tensor]
Preference = Literal["fast", "reference"]
REFERENCE = "reference"
# What a 4-bit code's offset of 8 adds to a sum of products, taken off.
SUM_FACTOR = -8


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """One (possibly fused) linear layer: y[T, out] = x[T, in] @ W[out, in]^T, computed in `dtype`.

    With `activation_bits` 8, x is rounded to 8 bits first, by its own maximum per row and per group of `group_size`
    columns (None: the whole row), or, with `static_activations`, by a scale that is stored. A weight that is not
    `symmetric` has zero points; with a `block_size` it has one scale for each square of so many rows and columns, and
    rows of x one for so many columns.
    """

    storage: str
    bits: int
    group_size: int | None
    activation_bits: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    symmetric: bool = True
    block_size: int | None = None
    static_activations: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeType:
    """What rows of activations are quantised to: int8 or float8_e4m3fn, by the maximum of each `group_size` columns.

    None is one maximum for a row. `has_sums`: the sums of the codes are wanted beside them.
    """

    dtype: torch.dtype
    group_size: int | None = None
    has_sums: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows:
    """Activations that are quantised already: codes [T, in] and scale float32 [T, groups].

    `sums` is None, or int32 [T, groups]: the sums of each group's codes, times `SUM_FACTOR`. Between rows of codes
    there may be room, as there is between those of a slice.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor | None = None


Rows: TypeAlias = torch.Tensor | QuantizedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a layer will run and what that hardware can do, e.g. {"avx2", "vnni", "bf16"}."""

    torch_device: torch.device
    features: frozenset[str]

    @property
    def kind(self) -> str:
        return self.torch_device.type


class Candidate(Protocol):
    """What choosing needs to know of an implementation."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearKernel:
    """An implementation of one storage format.

    `why_not(problem, device)` is None when it can serve the problem. `pack(tensors, problem, device)` lays the stored
    tensors out once; what it returns is all the memory the layer keeps. `run(x, packed, problem)` maps x [T, in],
    contiguous, to [T, out] in the problem's dtype, for any T including zero. `rows(ids, packed, problem)` decodes the
    rows of W at ids int64 [T] to [T, in] in the problem's dtype, for embeddings; None where the packed layout has no
    way to its rows. `run_codes(x, packed, problem)` is `run` for rows that whoever made them has quantised already, to
    what `codes(problem)` says (None: x comes as it is); None where nothing is ever saved by it.
    """

    name: str
    storage: str
    why_not: Callable[[LinearProblem, Device], str | None]
    pack: Callable[[Tensors, LinearProblem, Device], Tensors]
    run: Callable[[torch.Tensor, Tensors, LinearProblem], torch.Tensor]
    rows: Callable[[torch.Tensor, Tensors, LinearProblem], torch.Tensor] | None = None
    codes: Callable[[LinearProblem], CodeType | None] | None = None
    run_codes: Callable[[QuantizedRows, Tensors, LinearProblem], torch.Tensor] | None = None


class Attend(Protocol):
    """Attention of query [T, heads, head_dim] over blocks that hold the new tokens already; returns the query's shape.

    Blocks are [blocks, block_size, kv_heads, head_dim], of the type and with the scales that the problem's `kv` says:
    none, of one element, or float32 [blocks, block_size, kv_heads].
    """

    def __call__(
        self,
        query: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        batch: AttentionBatch,
        problem: AttentionProblem,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """An implementation of attention over paged keys and values.

    One that `reads_tables` looks at `batch.decoding` and `batch.prompts` alone, and never at what is on the host. One
    that `is_generated` runs nothing but kernels that codegen.recording notes, where sequences decode.
    """

    name: str
    why_not: Callable[[AttentionProblem, Device], str | None]
    run: Attend
    reads_tables: bool = False
    is_generated: bool = False


class RotateAndWrite(Protocol):
    """Normalise each head (with a gain), rotate queries and keys, write keys and values to their slots.

    `qkv` is [T, (num_heads + 2 num_kv_heads) * head_dim]; `cos` and `sin` are either those of the rows, [T, 1,
    head_dim / 2], with `positions` None, or tables [P, head_dim / 2] with positions int64 [T]. `keys` and `values` are
    [blocks, block_size, kv_heads, head_dim]; with positions given, a slot (block * block_size + offset, int64 [T])
    below 0 writes nothing. Returns the queries [T, num_heads, head_dim].
    """

    def __call__(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm_gain: torch.Tensor | None,
        epsilon: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PointwiseKernels:
    """What lies between the linears, for one compute type.

    `add_norm(x, delta, gain, epsilon, quantize)` returns x + delta (x where delta is None) and its RMS norm, both
    [T, H]; `silu_mul(gate_up, quantize)` maps [T, 2 F] to silu(first half) * second half, [T, F]. With `quantize`
    the norm and the product come as QuantizedRows. `selects_rotations` tells whether `rotate_and_write`
    wants the cosines and sines of the rows or the whole tables.
    """

    name: str
    why_not: Callable[[torch.dtype, Device], str | None]
    add_norm: Callable[
        [torch.Tensor, torch.Tensor | None, torch.Tensor, float, CodeType | None], tuple[torch.Tensor, Rows]
    ]
    silu_mul: Callable[[torch.Tensor, CodeType | None], Rows]
    rotate_and_write: RotateAndWrite
    selects_rotations: bool
    is_generated: bool = False


def why_not_special(
    problem: LinearProblem, *, zero_points: bool = False, static_activations: bool = False
) -> str | None:
    """Return why a kernel would compute something else than a problem that has more than scales by row or group.

    Every kernel of a compressed storage but its reference asks this, naming what it serves: what a kernel does not look
    at, it would leave out.
    """
    if not problem.symmetric and not zero_points:
        return "serves weights without zero points"
    if problem.block_size is not None:
        return f"serves scales by row or group, not by blocks of {problem.block_size}"
    if problem.static_activations and not static_activations:
        return "rounds activations by their own maximum, not by a stored scale"
    return None


K = TypeVar("K", bound=Candidate)
P = TypeVar("P")


def select(
    candidates: Sequence[K], why_not: Callable[[K], str | None], prefer: Preference
) -> tuple[K, tuple[str, ...]]:
    """Return the first candidate without a refusal, and the refusals ("name: reason") of those before it.

    The reference is registered last and never refuses, so there is always an answer.
    """
    refusals: list[str] = []
    for candidate in candidates:
        if prefer == REFERENCE and candidate.name != REFERENCE:
            continue
        reason = why_not(candidate)
        if reason is None:
            return candidate, tuple(refusals)
        refusals.append(f"{candidate.name}: {reason}")
    raise AssertionError(f"no candidate, not even the reference, took the problem: {refusals}")


@functools.cache
def describe_device(torch_device: torch.device) -> Device:
    """Return the device with the features that kernels ask for."""
    features = set[str]()
    if torch_device.type == "cpu":
        features.add(torch.backends.cpu.get_cpu_capability().lower())
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            features.add("bf16")
        if torch.cpu._is_vnni_supported():
            features.add("vnni")
    elif torch_device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(torch_device)
        features.add(f"sm_{major}{minor}")
    return Device(torch_device=torch_device, features=frozenset(features))
