"""Plan, then execute: streams a checkpoint block by block into an artifact."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pressd.compress.calibration import CalibrationRows, read_calibration
from pressd.compress.companions import copy_companions
from pressd.compress.cost import Clock
from pressd.compress.fingerprint import make_fingerprint
from pressd.compress.journal import BlockLine, Journal, holds_work
from pressd.compress.plan import BlockPlan, Plan, make_plan
from pressd.compress.press_block import Presser, RoundingPresser
from pressd.compress.press_with_text import TextPresser
from pressd.compress.quantization_config import artifact_config
from pressd.compress.recipe import Recipe, read_recipe, recipe_of_scheme
from pressd.compress.record import make_manifest, source_files
from pressd.compress.report import make_report, this_machine, write_report
from pressd.compress.reread import Reread
from pressd.compress.staging import check_target, staged, sweep, unfinished
from pressd.compress.weights_writer import SHARD_BYTES, DamagedError, PlannedTensor, WeightsWriter, tensor_bytes
from pressd.runtime.artifact import manifest as manifests
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.models import decoder_config


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDone:
    """Progress: `block` is the number `done` of `total`; one that `was_done` was there from a run before."""

    block: str
    done: int
    total: int
    seconds: float
    was_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run for `plan` from `source`: what it reads, where it computes, and who is told."""

    source: Checkpoint
    plan: Plan
    rows: CalibrationRows | None
    devices: tuple[torch.device, ...]
    shard_bytes: int
    progress: Callable[[BlockDone], None]
    clock: Clock

    def presser(self) -> Presser:
        """Return what presses the blocks."""
        if self.rows is None:
            return RoundingPresser(self.source, self.plan, self.clock)
        return TextPresser(self.source, self.plan, self.rows, self.devices, self.clock)


def compress(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    devices: Sequence[torch.device | str] = ("cpu",),
    rows: CalibrationRows | None = None,
    progress: Callable[[BlockDone], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    command: str | None = None,
) -> Manifest:
    """Press the checkpoint `source` into the directory `out`, and return its manifest.

    `recipe` is a scheme's name (no passes: rounded to nearest, no text is read), a path to a .toml file, or a recipe
    that has been read. `out` appears complete or not at all. `resume` goes on with a run for `out` that was killed, if
    there is one; the bytes are those of a run that was not. `rows` are used in place of the recipe's calibration text.
    `devices` share the calibration rows. `command` is kept in the report.

    Raises ValueError naming what is wrong, before anything is written if it can be known from headers.
    """
    clock = Clock()
    source, out = Path(source), Path(out)
    recipe = _read(recipe)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the source itself; give another directory")
    check_target(out, overwrite=overwrite)
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe)
    if plan.reads_text and rows is None:
        rows = read_calibration(recipe.calibration, checkpoint, decoder_config(checkpoint).max_context)
    run = Run(
        source=checkpoint,
        plan=plan,
        rows=rows if plan.reads_text else None,
        devices=tuple(map(torch.device, devices)),
        shard_bytes=shard_bytes,
        progress=progress or _silent,
        clock=clock,
    )
    return _run(run, out, overwrite=overwrite, resume=resume, command=command)


def _run(run: Run, out: Path, *, overwrite: bool, resume: bool, command: str | None) -> Manifest:
    source, plan = run.source, run.plan
    files = source_files(source)
    fingerprint = make_fingerprint(files, plan, run.rows, run.devices, run.shard_bytes)
    begun = unfinished(out) if resume else None
    if begun is not None:
        Journal(begun, fingerprint)  # refuses before anything is touched

    def keeps(directory: Path, error: BaseException) -> bool:
        """Rounding alone is done again in no time, and is not worth a directory that somebody has to remove."""
        return isinstance(error, DamagedError) or (
            isinstance(error, KeyboardInterrupt) and run.rows is not None and holds_work(directory)
        )

    with staged(out, overwrite=overwrite, journaled=True, resume=begun, keeps=keeps) as directory:
        ours = directory / manifests.FOLDER
        sweep(ours)
        (ours / "recipe.toml").write_text(plan.recipe.text, encoding="utf-8")
        groups = _write_weights(run, directory, fingerprint)
        config = artifact_config(source.config, plan)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source.path, directory)
        manifest = make_manifest(source, files, plan, groups, directory, run.rows)
        write_report(directory, make_report(manifest, run.clock.cost(), this_machine(manifest), command), manifest)
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


def _write_weights(run: Run, directory: Path, fingerprint: dict[str, object]) -> tuple[PlannedGroup, ...]:
    """Stream every block through its passes into the weight files; a journal line when each is on disk."""
    groups: list[PlannedGroup] = []
    blocks = run.plan.blocks
    with (
        Journal(directory, fingerprint) as journal,
        WeightsWriter(directory, list(planned_tensors(run.plan)), run.shard_bytes) as writer,
    ):
        presser = run.presser()
        is_complete = len(journal.finished) == len(blocks)
        reread = Reread(directory, writer)
        for number, block in enumerate(blocks, start=1):
            line = journal.finished[number - 1] if number <= len(journal.finished) else None
            was_done = line is not None
            with run.clock.block(block.block.name):
                if line is None:
                    line = _press(presser, block, reread)
                    writer.sync()
                    journal.write(line)
                else:
                    assert line.block == block.block.name, f"{line.block} is not what the same plan would have"
                    tensors = {name: writer.take_over(name, sha) for name, sha in line.sha256.items()}
                    if not is_complete:  # somebody comes after it
                        presser.replay(block, tensors)
            groups += line.groups
            seconds = run.clock.seconds(line.block)
            run.progress(
                BlockDone(block=line.block, done=number, total=len(blocks), seconds=seconds, was_done=was_done)
            )
    return tuple(groups)


def _press(presser: Presser, block: BlockPlan, reread: Reread) -> BlockLine:
    """Press a block, write it, and return what the journal says of it."""
    groups: list[PlannedGroup] = []
    digests: dict[str, str] = {}
    for pressed in presser.press(block, groups):
        digests |= {name: hashlib.sha256(tensor_bytes(one)).hexdigest() for name, one in pressed.tensors.items()}
        reread.write(pressed.tensors, pressed=pressed.is_pressed)
    return BlockLine(block=block.block.name, groups=tuple(groups), sha256=digests)


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
        for name in block.kv_scales:
            yield [PlannedTensor(name=name, dtype=plan.dtype, shape=(1,))]
