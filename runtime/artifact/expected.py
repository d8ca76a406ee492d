"""Which tensors a model directory must hold, from config.json alone, and whether its headers agree."""

import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from pressd.runtime.artifact.directory import Shards
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.families import ModelMap
from pressd.runtime.artifact.header import TensorEntry
from pressd.runtime.artifact.quantization import StoredSchemes
from pressd.runtime.artifact.specs import LinearSpec, Packed

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_CODES = {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
_TYPES = FLOATS | _CODES | {"I32": torch.int32, "I64": torch.int64}


def linear_specs(model: ModelMap, stored: StoredSchemes, dtype: torch.dtype) -> dict[str, LinearSpec]:
    """Return how each linear is stored; raises ArtifactError where a scheme does not fit a shape."""
    specs: dict[str, LinearSpec] = {}
    for linear in model.linears():
        scheme = stored.scheme_of(linear.prefix)
        try:
            specs[linear.prefix] = scheme.spec(linear.shape) if scheme else Packed.dense(linear.shape, dtype)
        except ValueError as error:
            raise ArtifactError(f"config.json: {linear.prefix}: {error}") from None
    return specs


def check_tensors(
    path: Path,
    shards: Shards,
    specs: Mapping[str, LinearSpec],
    model: ModelMap,
    kv_scales: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare headers with what config.json announces: nothing missing, nothing more, every type and shape."""
    expected = _expected(model, specs) | {name: (None, shape) for name, shape in kv_scales.items()}
    missing = sorted(expected.keys() - shards.entries.keys())
    if missing:
        raise ArtifactError(f"tensor {missing[0]!r} is missing ({len(missing)} in all); the checkpoint is incomplete")
    extra = sorted(shards.entries.keys() - expected.keys())
    if extra:
        where = f"{shards.file_of[extra[0]]}: tensor {extra[0]!r}"
        raise ArtifactError(f"{where} is not one of this {model.architecture}'s as config.json describes it")
    for name, (dtype, shape) in expected.items():
        entry = shards.entries[name]
        where = f"{shards.file_of[name]}: tensor {name!r}"
        if entry.shape != shape:
            raise ArtifactError(f"{where} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        matches = entry.dtype in FLOATS if dtype is None else _TYPES.get(entry.dtype) == dtype
        if not matches:
            raise ArtifactError(f"{where} is {entry.dtype}, config.json asks for {dtype or 'a floating-point type'}")
    _check_packed_shapes(path, shards, specs)


def _expected(
    model: ModelMap, specs: Mapping[str, LinearSpec]
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Every tensor the model must have with its shape and type; None for any floating-point type."""
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
    expected = {name: (None, shape) for name, shape in model.others().items()}
    for prefix, spec in specs.items():
        # Dense weights and scales may have any floating-point type: asked with float64, the layout shows which they are
        for suffix, (dtype, shape) in spec.layout(torch.float64).items():
            expected[f"{prefix}.{suffix}"] = (None if dtype == torch.float64 else dtype, shape)
    return expected


def _check_packed_shapes(path: Path, shards: Shards, specs: Mapping[str, LinearSpec]) -> None:
    """A packed weight also stores its shape as two numbers: they must say the same as config.json."""
    leaves = ((f"{prefix}.{inner}", leaf) for prefix, spec in specs.items() for inner, leaf in spec.leaves())
    for prefix, leaf in leaves:
        name = f"{prefix}weight_shape"
        if name in shards.entries:
            stored = _int64_pair(path / shards.file_of[name], shards.entries[name])
            if stored != (leaf.out_features, leaf.in_features):
                wanted = [leaf.out_features, leaf.in_features]
                raise ArtifactError(
                    f"{shards.file_of[name]}: {name!r} says {list(stored)}, config.json asks for {wanted}"
                )


def _int64_pair(path: Path, entry: TensorEntry) -> tuple[int, int]:
    with path.open("rb") as file:
        file.seek(entry.start)
        first, second = struct.unpack("<qq", file.read(16))
    return first, second
