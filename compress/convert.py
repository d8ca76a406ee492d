"""Decodes an artifact, or another compressed checkpoint, into a plain Hugging Face directory that everything loads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pressd.compress.companions import copy_companions
from pressd.compress.encoding import decode
from pressd.compress.quantization_config import with_precision
from pressd.compress.reread import Reread
from pressd.compress.staging import staged
from pressd.compress.weights_writer import SHARD_BYTES, PlannedTensor, WeightsWriter
from pressd.runtime.artifact.families import Block
from pressd.runtime.artifact.reader import Checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What came out: bytes of weights, their precision, and whether rounding of activations was left behind."""

    bytes: int
    dtype: str
    drops_activations: bool


def convert_to_dense(
    artifact: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write the weights that `artifact` stands for to the new directory `out`, which appears complete or not at all.

    `dtype` is the precision of what is written, the artifact's own by default; each weight is rounded to it once, when
    it is decoded. Raises ValueError if `out` is not empty, or a weight does not fit `dtype`.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give an empty or a new directory")
    checkpoint = Checkpoint.open(artifact)
    dtype = dtype or checkpoint.torch_dtype
    with staged(out, overwrite=False) as directory:
        _write_weights(checkpoint, dtype, directory, progress or _silent, shard_bytes)
        config = _dense_config(checkpoint.config, dtype)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(checkpoint.path, directory)
        written = Checkpoint.open(directory).artifact_bytes  # proves that it is what a reader accepts
    specs = [checkpoint.linear(linear.prefix) for linear in checkpoint.model.linears()]
    return Converted(
        bytes=written,
        dtype=str(dtype).removeprefix("torch."),
        drops_activations=any(leaf.activation_bits < 16 for spec in specs for _, leaf in spec.leaves()),
    )


def _silent(block: str, done: int, total: int) -> None:
    pass


def _dense_config(config: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The config of the model that was pressed, in its own names, with the precision that is written."""
    return with_precision({name: value for name, value in config.items() if name != "quantization_config"}, dtype)


def _write_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    directory: Path,
    progress: Callable[[str, int, int], None],
    shard_bytes: int,
) -> None:
    blocks = checkpoint.model.blocks
    units = [[planned] for block in blocks for planned in _planned(block, dtype)]
    with WeightsWriter(directory, units, shard_bytes) as writer:
        reread = Reread(directory, writer)
        for number, block in enumerate(blocks, start=1):
            for group in block.groups:
                for member in group.members:
                    weight = decode(checkpoint.linear_tensors(member.prefix), checkpoint.linear(member.prefix), dtype)
                    reread.write(_finite(checkpoint, f"{member.prefix}.weight", weight))
            for name in block.others:
                reread.write(_finite(checkpoint, name, checkpoint.tensor(name).to(dtype)))
            progress(block.name, number, len(blocks))


def _planned(block: Block, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    for group in block.groups:
        for member in group.members:
            yield PlannedTensor(name=f"{member.prefix}.weight", dtype=dtype, shape=member.shape)
    for name, shape in block.others.items():
        yield PlannedTensor(name=name, dtype=dtype, shape=shape)


def _finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{checkpoint.path}: {name} is not finite in {tensor.dtype}; choose a wider --dtype")
    return {name: tensor}
