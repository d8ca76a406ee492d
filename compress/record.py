"""Fills the manifest of a finished artifact: where it came from, what is in it, and how large it is."""

import math
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from pressd.compress.calibration import CalibrationRows
from pressd.compress.plan import Plan
from pressd.compress.quantization_config import readers, requirements
from pressd.runtime.artifact.directory import INDEX
from pressd.runtime.artifact.manifest import (
    SCHEMA,
    Manifest,
    PlannedGroup,
    Source,
    StoredFile,
    Tool,
    Totals,
    artifact_id,
    digest_file,
)
from pressd.runtime.artifact.manifest import Recipe as RecipeRecord
from pressd.runtime.artifact.reader import Checkpoint


def make_manifest(
    source: Checkpoint,
    source_files: Mapping[str, StoredFile],
    plan: Plan,
    groups: tuple[PlannedGroup, ...],
    directory: Path,
    rows: CalibrationRows | None,
) -> Manifest:
    """Return the manifest of everything that is in `directory` now; `groups` say how each was stored."""
    recipe = plan.recipe
    files = {path.name: digest_file(path) for path in sorted(directory.iterdir()) if path.is_file()}
    return Manifest(
        schema_version=SCHEMA,
        id=artifact_id(files),
        tool=Tool(name="pressd", version=version("pressd"), torch=torch.__version__),
        source=Source(path=str(source.path.resolve()), files=dict(source_files)),
        recipe=RecipeRecord(text=recipe.text, sha256=sha256(recipe.text.encode()).hexdigest()),
        calibration={} if rows is None else rows.describe(),
        plan=groups,
        files=files,
        totals=totals(source, plan, sum(file.bytes for name, file in files.items() if name.endswith(".safetensors"))),
        quality={},
        gates=recipe.gates,
        requires=requirements(plan),
        loads_in=readers(plan),
    )


def source_files(source: Checkpoint) -> dict[str, StoredFile]:
    """Return size and digest of every file of the source that its weights are read from, and of config.json."""
    names = ["config.json", *source.weight_files]
    if len(source.weight_files) > 1:
        names.append(INDEX)
    return {name: digest_file(source.path / name) for name in sorted(names)}


def totals(source: Checkpoint, plan: Plan, written: int) -> Totals:
    """Return the sizes of an artifact whose weight files take `written` bytes."""
    pressed = [group for group in plan.groups() if group.is_pressed]
    bits = sum(8 * group.stored_bytes(plan.dtype) for group in pressed)
    weights = sum(math.prod(group.group.shape) for group in pressed)
    dense = source.model.num_params * source.torch_dtype.itemsize
    return Totals(
        params=source.model.num_params,
        dense_bytes=dense,
        bytes=written,
        ratio=dense / written,
        bpw=bits / weights if weights else None,
    )
