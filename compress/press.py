"""Plan, then execute: streams a checkpoint tensor by tensor into an artifact."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pressd.compress.companions import copy_companions
from pressd.compress.cost import Clock
from pressd.compress.plan import BlockPlan, GroupPlan, Plan, make_plan
from pressd.compress.press_linear import press_linear
from pressd.compress.quantization_config import artifact_config
from pressd.compress.recipe import Recipe, read_recipe, recipe_of_scheme
from pressd.compress.record import make_manifest
from pressd.compress.report import make_report, this_machine, write_report
from pressd.compress.reread import Reread
from pressd.compress.staging import check_target, staged
from pressd.compress.weights_writer import SHARD_BYTES, PlannedTensor, WeightsWriter
from pressd.runtime.artifact import manifest as manifests
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import parse_scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDone:
    """Progress: `block` is the number `done` of `total`."""

    block: str
    done: int
    total: int
    seconds: float


def compress(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[BlockDone], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Press the checkpoint `source` into the directory `out`, and return its manifest.

    `recipe` is a scheme's name, a path to a .toml file, or a recipe that has been read. `out` appears complete or not
    at all. Raises ValueError naming what is wrong, before anything is written if it can be known from headers.
    """
    clock = Clock()
    source, out = Path(source), Path(out)
    recipe = _read(recipe)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the source itself; give another directory")
    check_target(out, overwrite=overwrite)
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe)
    with staged(out, overwrite=overwrite) as directory:
        ours = directory / manifests.FOLDER
        ours.mkdir()
        (ours / "recipe.toml").write_text(recipe.text, encoding="utf-8")
        groups = _write_weights(checkpoint, plan, directory, progress or _silent, shard_bytes, clock)
        config = artifact_config(checkpoint.config, plan)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source, directory)
        manifest = make_manifest(checkpoint, recipe, plan, groups, directory)
        write_report(directory, make_report(manifest, clock.cost(), this_machine(manifest)))
        manifests.write_manifest(directory, manifest)
        # Proves that what was written is what a reader accepts; small artifacts are hashed once more on the way.
        Checkpoint.open(directory)
    return manifest


def _silent(_: BlockDone) -> None:
    pass


def _read(recipe: str | Path | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or recipe.endswith(".toml"):
        return read_recipe(Path(recipe))
    return recipe_of_scheme(parse_scheme(recipe).name)


def _write_weights(
    source: Checkpoint,
    plan: Plan,
    directory: Path,
    progress: Callable[[BlockDone], None],
    shard_bytes: int,
    clock: Clock,
) -> tuple[PlannedGroup, ...]:
    """Stream every tensor through its pass into the weight files; a journal line per block."""
    done: list[PlannedGroup] = []
    with (
        WeightsWriter(directory, list(planned_tensors(plan)), shard_bytes) as writer,
        (directory / manifests.FOLDER / "journal.jsonl").open("w", encoding="utf-8") as journal,
    ):
        reread = Reread(directory, writer)
        for number, block in enumerate(plan.blocks, start=1):
            name = block.block.name
            with clock.block(name):
                groups = _press_block(source, plan, block, reread, clock)
            # How long it took is in the report: the journal of every run is the same.
            entries = [_journal_entry(group) for group in groups]
            journal.write(json.dumps({"block": name, "groups": entries}) + "\n")
            journal.flush()
            done += groups
            progress(BlockDone(block=name, done=number, total=len(plan.blocks), seconds=clock.seconds(name)))
    return tuple(done)


def _journal_entry(group: PlannedGroup) -> dict[str, object]:
    return {"name": group.name, "scheme": group.scheme, "error": group.error, "bytes": group.bytes}


def planned_tensors(plan: Plan) -> Iterator[list[PlannedTensor]]:
    """Every tensor that will be written, in order; those of one linear stay together."""
    for block in plan.blocks:
        for group in block.groups:
            for prefix, spec in group.specs.items():
                yield [
                    PlannedTensor(name=f"{prefix}.{suffix}", dtype=dtype, shape=shape)
                    for suffix, (dtype, shape) in spec.layout(plan.dtype).items()
                ]
        for name, shape in block.block.others.items():
            yield [PlannedTensor(name=name, dtype=plan.dtype, shape=shape)]


def _press_block(source: Checkpoint, plan: Plan, block: BlockPlan, reread: Reread, clock: Clock) -> list[PlannedGroup]:
    groups = []
    for group in block.groups:
        with clock.scheme(group.scheme):
            groups.append(_press_group(source, plan, group, reread))
    for name in block.block.others:
        reread.write({name: _dense(source, name, plan.dtype)})
    return groups


def _press_group(source: Checkpoint, plan: Plan, group: GroupPlan, reread: Reread) -> PlannedGroup:
    lost = total = 0.0
    for prefix, spec in group.specs.items():
        name = f"{prefix}.weight"
        tensors, norms = press_linear(source.tensor(name), _dense(source, name, plan.dtype), spec)
        lost, total = lost + norms[0], total + norms[1]
        named = {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
        reread.write(named, pressed=not spec.is_dense)
    stored = group.stored_bytes(plan.dtype)
    return PlannedGroup(
        name=group.group.name,
        members=tuple(group.specs),
        scheme=group.scheme,
        shape=group.group.shape,
        bits=8 * stored / math.prod(group.group.shape),
        # Six digits: the last ones depend on how many threads summed up.
        error=float(f"{math.sqrt(lost / total):.6g}") if total else 0.0,
        fallback=None,
        bytes=stored,
    )


def _dense(source: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """Return a source tensor in `dtype`; raises ValueError if it is not finite there."""
    stored = source.tensor(name)
    tensor = stored.to(dtype)
    if not _is_finite(tensor):
        if _is_finite(stored):
            raise ValueError(
                f"{source.path}: {name} has values that do not fit {dtype}; keep its precision or use bf16"
            )
        raise ValueError(f"{source.path}: {name} holds NaN or infinity; repair the checkpoint")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())  # both are NaN if anything is
