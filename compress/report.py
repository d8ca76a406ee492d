"""`pressd/report.json`: everything measured about an artifact that its deterministic manifest must not hold. No torch.

Two runs of one recipe write the same bytes but for this file: it says how long they took, and where. Beside it lies
`report.html`, the same and the manifest as a page.
"""

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pressd.compress.cost import Cost, cpu_name, num_cores
from pressd.compress.report_html import report_page
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import FOLDER, Manifest, PlannedGroup, Totals

NAME, PAGE = "report.json", "report.html"
# Milliseconds: what is below them differs from run to run.
_DIGITS = 3


# Finite, and less than thirty years: what claims more was not written here.
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


class BlockCost(_Part):
    """Wall seconds of one block."""

    name: str
    seconds: Seconds


class CostReport(_Part):
    """Wall seconds until all files but the manifest were there; `peak_rss_bytes` is of the process since it started.

    Seconds of blocks hold those of schemes, and those of the tensors that no scheme is about; seconds of schemes hold
    those of passes. `joules` is None where nothing measures them.
    """

    wall_seconds: Seconds
    peak_rss_bytes: Annotated[int, Field(ge=0)]
    blocks: tuple[BlockCost, ...]
    schemes: dict[str, Seconds]
    passes: dict[str, Seconds] = {}
    joules: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)] | None = None


class Machine(_Part):
    """Where the artifact was pressed."""

    cpu: str
    cores: int
    torch: str
    python: str


class Size(_Part):
    """The manifest's totals, and the bytes of each file."""

    totals: Totals
    files: dict[str, int]


class GroupError(_Part):
    """One fused group's ||W - W'|| / ||W||."""

    name: str
    scheme: str
    error: float


class Report(_Part):
    """What was measured. `groups` are in file order, `worst` names those that lost something, worst first.

    `command` is the line that was typed, None where a program called.
    """

    schema_version: Annotated[Literal[1], Field(validation_alias="schema", serialization_alias="schema")]
    id: str
    cost: CostReport
    machine: Machine
    size: Size
    groups: tuple[PlannedGroup, ...]
    worst: tuple[GroupError, ...]
    quality: dict[str, object]
    command: str | None = None

    def to_json(self) -> str:
        """The text of report.json, keys in alphabetical order."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, sort_keys=True) + "\n"


def this_machine(manifest: Manifest) -> Machine:
    """Return the machine that runs now."""
    return Machine(cpu=cpu_name(), cores=num_cores(), torch=manifest.tool.torch, python=platform.python_version())


def make_report(manifest: Manifest, cost: Cost, machine: Machine, command: str | None = None) -> Report:
    """Return the report of an artifact that has just been pressed."""
    worst = sorted((group for group in manifest.plan if group.error), key=lambda group: (-group.error, group.name))
    return Report(
        schema_version=1,
        id=manifest.id,
        cost=CostReport(
            wall_seconds=round(cost.wall_seconds, _DIGITS),
            peak_rss_bytes=cost.peak_rss_bytes,
            blocks=tuple(BlockCost(name=name, seconds=round(value, _DIGITS)) for name, value in cost.blocks.items()),
            schemes={name: round(value, _DIGITS) for name, value in cost.schemes.items()},
            passes={name: round(value, _DIGITS) for name, value in cost.passes.items()},
            joules=None if cost.joules is None else round(cost.joules, _DIGITS),
        ),
        machine=machine,
        size=Size(totals=manifest.totals, files={name: file.bytes for name, file in manifest.files.items()}),
        groups=manifest.plan,
        worst=tuple(GroupError(name=group.name, scheme=group.scheme, error=group.error) for group in worst),
        quality=manifest.quality,
        command=command,
    )


def read_report(artifact: Path) -> Report | None:
    """Return the report of an artifact, None if it has none; raises ArtifactError if it cannot be read."""
    path = artifact / FOLDER / NAME
    if not path.is_file():
        return None
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise ArtifactError(f"{path}: {where}: {first['msg']}; remove it, nothing depends on it") from None


def write_report(artifact: Path, report: Report, manifest: Manifest) -> None:
    """Write or replace the report of an artifact and its page, each all or nothing."""
    _replace(artifact / FOLDER / NAME, report.to_json())
    _replace(artifact / FOLDER / PAGE, report_page(manifest, report))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refresh_quality(artifact: Path, manifest: Manifest) -> None:
    """Take the manifest's measurement into the report, if there is one of this artifact."""
    report = read_report(artifact)
    if report is not None and report.id == manifest.id:
        write_report(artifact, report.model_copy(update={"quality": manifest.quality}), manifest)
